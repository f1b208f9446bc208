"""What a teacher writes itself is what it writes alone, and what was written is kept."""

import json
from functools import partial

import pytest

from compress import training_data
from compress.training_data import ANSWERS, Writer, keep_texts
from engine.engine import Engine
from engine.request import Request, Timing
from engine.sampling import Sampling
from serving.scheduler import Scheduler, Task, run_tasks
from tests.tiny import CHATML, make_tiny_checkpoint
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, SEED, NUMBERS = 96, 5, range(3, 27)
PLAIN = "Q: {{ messages[0].content }}{% if add_generation_prompt %} e{% endif %}"  # ends in what the model may write
SPECIAL = "<|im_start|>{{ messages[0].content }}<|endoftext|>"  # in a token that does not end its texts


def alone(model, tokenizer, prompt, n_new, temperature, number):
    """The ids that come after a prompt while nothing else runs."""
    request = Request(prompt, tokenizer, n_new, (), ignore_eos=False)
    task = Task(request, Sampling(temperature=temperature), SEED + number)
    list(run_tasks(Scheduler(Engine(model), 1, LENGTH), [task], Timing()))
    return request.token_ids


def spelled(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


@pytest.mark.parametrize("template", [CHATML, PLAIN, SPECIAL], ids=["chatml", "plain", "special"])
def test_a_teacher_asks_and_answers_as_it_would_alone(tmp_path, template):
    path = make_tiny_checkpoint(tmp_path, context=LENGTH, template=template)
    model, tokenizer = load_model(path), load_tokenizer(path)
    before, after = {
        CHATML: ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        PLAIN: ("Q:", "e"),
        SPECIAL: ("<|im_start|>", "<|endoftext|>"),
    }[template]
    prompt = tokenizer.encode(before)
    room = (LENGTH - len(prompt) - len(tokenizer.encode(after))) // 2
    found = Writer(model, tokenizer, SEED).conversations(NUMBERS)
    ended = 0
    for number, text in zip(NUMBERS, found, strict=True):
        asked = alone(model, tokenizer, prompt, room, 1.0, number)
        text_of = tokenizer.decode if template == PLAIN else partial(spelled, tokenizer)
        question, *rest = text_of(asked).split(after[: after.find(">") + 1] or after)
        ended += bool(rest)
        for special in tokenizer.special_tokens.values():
            question = question.replace(special, "")
        begun = tokenizer.encode_chat([{"role": "user", "content": question.strip()}])[: LENGTH - 1]
        assert text == spelled(
            tokenizer, begun + alone(model, tokenizer, begun, LENGTH - len(begun), ANSWERS[number % 2], number)
        )
    assert ended  # some questions end before their room does


def test_texts_are_kept_part_by_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_data, "PART", 2)
    path, calls = tmp_path / "own.jsonl", []

    def write(numbers):
        calls.append(numbers)
        if numbers.start == 2 and len(calls) == 2:
            raise KeyboardInterrupt
        return [f"text {number}" for number in numbers]

    with pytest.raises(KeyboardInterrupt):
        keep_texts(path, 5, {"seed": "1"}, write)
    keep_texts(path, 5, {"seed": "1"}, write)
    assert calls == [range(0, 2), range(2, 4), range(2, 4), range(4, 5)]
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert lines == ["", *(f"text {number}" for number in range(5))]
    assert f"Texts kept in {path}: 5 of 5" in capsys.readouterr().err
    for n_text, settings in ((5, {"seed": "2"}), (4, {"seed": "1"})):
        with pytest.raises(ValueError, match=f"{path} has texts that were written with other flags; give it as --data"):
            keep_texts(path, n_text, settings, write)


def test_a_context_without_room_for_a_question_is_refused(tmp_path):
    path = make_tiny_checkpoint(tmp_path, context=12)
    writer = Writer(load_model(path), load_tokenizer(path), SEED)
    message = "the chat template writes [0-9]+ tokens around a question, which leave no room for one in 12"
    with pytest.raises(ValueError, match=message):
        writer.conversations(range(2))
