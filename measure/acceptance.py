"""How many guesses of a draft its model accepts, without running the two in turn."""

import torch

from engine.engine import Engine, generate
from engine.sampling import Sampling
from model import Transformer

N_TEXT, N_PROMPT, N_NEW = 16, 64, 64  # texts, and their tokens: given, and written by the model
Text = tuple[list[int], list[int]]  # a prompt, and what the model says to it


def greedy_texts(model: Transformer, ids: list[int], eos_ids: frozenset[int]) -> list[Text]:
    """Beginnings, evenly spread over a text, with what the model goes on with, up to the end of its text."""
    n_prompt = min(N_PROMPT, len(ids), model.args.max_seq_length // 2)
    n_text = max(1, min(N_TEXT, len(ids) // n_prompt))
    starts = [i * (len(ids) - n_prompt) // n_text for i in range(n_text)]
    prompts = [ids[start : start + n_prompt] for start in starts]
    rows = [[] for _ in prompts]
    n_new = min(N_NEW, model.args.max_seq_length - n_prompt)
    for chunk in generate(Engine(model), prompts, n_new, Sampling(temperature=0)):
        rows = [row + new for row, new in zip(rows, chunk, strict=True)]
    ends = [next((i for i, token in enumerate(row) if token in eos_ids), len(row)) for row in rows]
    return [(prompt, row[:end]) for prompt, row, end in zip(prompts, rows, ends, strict=True)]


@torch.no_grad()
def mean_accepted(draft: Transformer, texts: list[Text], k: int) -> float | None:
    """The mean of the guesses accepted in a round of k, greedy; None: no text is long enough for one.

    A guess that is accepted is the model's text, so that one pass of the draft over that text tells what it would guess
    at every place: the rounds are then counted off.
    """
    accepted = []
    for prompt, new in texts:
        tokens = torch.tensor([prompt + new], device=draft.device)
        guesses = draft(tokens, torch.arange(tokens.shape[1], device=draft.device)[None])[0].argmax(-1).tolist()
        right = [guesses[len(prompt) + i - 1] == token for i, token in enumerate(new)]
        at = 1  # the first new token comes with the prompt
        while at + k <= len(new):
            accepted.append(([*right[at : at + k], False]).index(False))
            at += accepted[-1] + 1
    return sum(accepted) / len(accepted) if accepted else None
