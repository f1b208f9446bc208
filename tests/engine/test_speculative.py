"""Speculation against plain decoding, against exact laws where it samples, and against numbers worked out by hand."""

import statistics
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import tensor

from engine.cache import setup_caches
from engine.compile import compile_step, warm_up
from engine.decode import decode_one_token, forward_chunk, prefill
from engine.guess_length import LENGTHS, AdaptiveLength, Costs, Odds, check_length
from engine.request import chunks
from engine.sampling import Sampling, logits_to_probs
from engine.speculative import DraftModel, PromptLookup, Speculation, accept, draft_one_token, speculate, verify
from model import Transformer
from tests.tiny import CPU, GREEDY, continuation, random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHEAP = Costs({k: 1 + 0.01 * k for k in (0, *LENGTHS)})  # proposing costs next to nothing


def nearly(model, noise=0.01):
    """A draft that often says the same as the model."""
    draft, generator = deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return draft


SOURCES = {
    "lookup": lambda model: PromptLookup(),
    "good draft": lambda model: DraftModel(nearly(model)),
    "bad draft": lambda model: DraftModel(tiny_model(seed=9)),
    "itself": lambda model: DraftModel(deepcopy(model)),
}


def plainly(model, prompts, count):
    """[B][count] tokens without speculation."""
    setup_caches(model, len(prompts), max(map(len, prompts)) + count)
    return continuation(model, prompts, count).tolist()


def speculated(model, prompts, count, speculation, start=0, sampling=GREEDY):
    """[B][count] tokens, and of each round how many were proposed and the counts [B] of new tokens."""
    rows, rounds = [[] for _ in prompts], []
    for tokens, counts in chunks(model, prompts, count, sampling, start=start, speculation=speculation):
        rounds.append((len(tokens[0]) - 1, counts))
        for row, ids, n in zip(rows, tokens, counts, strict=True):
            row += ids[:n]
    return rows, rounds[1:]  # the first is the prefill's


def assert_all_accepted(rounds, budget):
    """Every row gets all tokens proposed and one more, until its budget cuts; one budget for all rows, or a list."""
    left = budget if isinstance(budget, list) else [budget] * len(rounds[0][1])
    for k, counts in rounds:
        assert counts == [min(k + 1, n) for n in left], rounds
        left = [n - count for n, count in zip(left, counts, strict=True)]
    assert not any(left)


# ---------------------------------------------------------------- greedy: the same tokens


@pytest.mark.parametrize("sliding_window", [None, 8])
@pytest.mark.parametrize("lengths", [(12,), (1, 17, 6)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [1, 2, 4, 7, "auto"])
def test_greedy_speculation_equals_plain_greedy(k, source, lengths, sliding_window):
    model, prompts = tiny_model(sliding_window=sliding_window), random_ids(*lengths)
    plain = plainly(model, prompts, 24)
    assert len({tuple(row) for row in plain}) == len(prompts)
    speculation = Speculation(SOURCES[source](model), k, costs={len(prompts): CHEAP})
    assert speculated(model, prompts, 24, speculation)[0] == plain


@pytest.mark.parametrize("lengths", [(12,), (1, 17, 6)])
@pytest.mark.parametrize("k", [1, 2, 4, 7, "auto"])
def test_a_model_accepts_all_of_its_own_proposals(k, lengths):
    model, prompts = tiny_model(), random_ids(*lengths)
    plain = plainly(model, prompts, 41)
    speculation = Speculation(DraftModel(deepcopy(model)), k, costs={len(prompts): CHEAP})
    rows, rounds = speculated(model, prompts, 41, speculation)
    assert rows == plain
    assert {proposed for proposed, _ in rounds} == {8 if k == "auto" else k}
    assert_all_accepted(rounds, 40)


def test_the_better_the_draft_the_fewer_the_rounds():
    model, prompts = tiny_model(), random_ids(12)
    setup_caches(model, 1, 100)
    rounds = {
        name: len(speculated(model, prompts, 41, Speculation(source(model), 4))[1]) for name, source in SOURCES.items()
    }
    assert rounds["itself"] == 8 < rounds["good draft"] < 30 < rounds["bad draft"]


@pytest.mark.parametrize("k", [1, 2, 4, 7, "auto"])
@pytest.mark.parametrize("forgetful", [True, False])
def test_lookup_of_texts_that_repeat_themselves(forgetful, k):
    model, prompts = tiny_model(), [random_ids(5)[0] * 5, [3] * 9]
    if forgetful:  # each token follows from the one before alone, so the text soon goes in circles
        for layer in model.layers:
            layer.attention.wo.weight.data.zero_()
    plain = plainly(model, prompts, 100)
    rows, rounds = speculated(model, prompts, 100, Speculation(PromptLookup(), k, costs={2: CHEAP}))
    assert rows == plain
    if forgetful:
        begun = [sum(counts) for counts in zip(*(counts for _, counts in rounds[:8]), strict=True)]
        assert_all_accepted(rounds[8:], [99 - count for count in begun])
        assert {proposed for proposed, _ in rounds[8:]} == {8 if k == "auto" else k}


def test_lookup_reads_the_text_and_proposes_nothing_until_a_token_comes_again():
    model, (prompt,) = tiny_model(), random_ids(1)
    (plain,) = plainly(model, [prompt], 60)
    again = next(n for n in range(2, 60) if plain[n - 1] in prompt + plain[: n - 1])  # tokens up to the first repeated
    assert again < 40
    source = PromptLookup()
    _, rounds = speculated(model, [prompt], 60, Speculation(source, 3))
    assert source.rows[0].ids == prompt + plain
    assert [proposed for proposed, _ in rounds[:again]] == [0] * (again - 1) + [3]


def second_row_slowly(model, tokens, pos, slots, limit, *others):
    """Verify, but the second row goes on by one token a round."""
    return verify(model, tokens, pos, slots, torch.minimum(limit, pos + tensor([[9], [1]])), *others)


def test_rows_that_have_their_budget_get_none_while_others_go_on():
    model, prompts = tiny_model(), random_ids(6, 11)
    plain = plainly(model, prompts, 13)
    speculation = Speculation(DraftModel(deepcopy(model)), 4, second_row_slowly)
    rows, rounds = speculated(model, prompts, 13, speculation)
    assert rows == plain
    assert rounds == [(4, [5, 1])] * 2 + [(4, [2, 1])] + [(4, [0, 1])] * 9


@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("source", ["lookup", "itself"])
def test_the_budget_is_exact(source, budget, k):
    model, prompts = tiny_model(), random_ids(5, 9)
    setup_caches(model, 2, 64)
    speculation = Speculation(SOURCES[source](model), k, costs={2: CHEAP})
    rows, rounds = speculated(model, prompts, budget + 1, speculation)
    assert [len(row) for row in rows] == [budget + 1] * 2
    assert all(any(counts) for _, counts in rounds)
    assert (rounds == []) == (budget == 0)


def test_tokens_and_counts_are_lists_of_whole_numbers():
    model, prompts = tiny_model(), random_ids(5, 9)
    setup_caches(model, 2, 64)
    token, pos = prefill(model, prompts, GREEDY)
    source = PromptLookup()
    source.begin(model, prompts)
    speculation = Speculation(source, "auto", costs={2: CHEAP})
    tokens, counts = next(speculate(model, prompts, token, pos, 20, GREEDY, speculation))
    assert counts == [1, 1]  # none of these tokens came before
    assert [[type(token) for token in row] for row in tokens] == [[int], [int]]


# ---------------------------------------------------------------- the caches


@pytest.mark.parametrize("source", ["lookup", "good draft", "itself"])
@pytest.mark.parametrize("k", [1, 4, 7, "auto"])
@pytest.mark.parametrize("lengths", [(20,), (3, 20)])
def test_prompt_and_budget_may_fill_the_cache_exactly(lengths, k, source):
    model, prompts = tiny_model(max_seq_length=48), random_ids(*lengths)
    plain = plainly(model, prompts, 28)
    speculation = Speculation(SOURCES[source](model), k)  # where k is auto, measuring costs takes the most slots
    setup_caches(model, len(prompts), 48, speculation)
    assert len(model.slots) == 48 + speculation.look_ahead
    assert speculated(model, prompts, 28, speculation)[0] == plain


@pytest.mark.parametrize("lengths", [(243,), (3, 244)])
@pytest.mark.parametrize("k", [1, 4, "auto"])
def test_rounds_across_the_end_of_a_prefix_of_the_cache(k, lengths):
    """256 slots are used until a round needs one more, be it for a proposal."""
    used = set()

    def verify_within(model, tokens, pos, slots, *others):
        assert len(slots) >= pos.max() + tokens.shape[1] - 1
        used.add(len(slots))
        return verify(model, tokens, pos, slots, *others)

    def draft_within(model, tokens, pos, slots, *others):
        assert len(slots) > pos.max()
        return draft_one_token(model, tokens, pos, slots, *others)

    model, prompts = tiny_model(), random_ids(*lengths)
    plain = plainly(model, prompts, 20)
    speculation = Speculation(DraftModel(deepcopy(model), draft_within), k, verify_within, {len(prompts): CHEAP})
    rows, rounds = speculated(model, prompts, 20, speculation)
    assert rows == plain
    assert_all_accepted(rounds, 19)
    assert min(used) == 256 < max(used)


def test_slots_that_a_round_looks_ahead():
    draft = DraftModel(tiny_model())
    assert [Speculation(PromptLookup(), k).lengths for k in (3, "auto")] == [(0, 3), (0, 1, 2, 4, 8)]
    assert [Speculation(draft, k).lengths for k in (3, "auto")] == [(3,), (0, 1, 2, 4, 8)]
    assert [Speculation(source, k).look_ahead for source in (draft, PromptLookup()) for k in (3, "auto")] == [
        4,
        9,
        4,
        9,
    ]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [1, 4, "auto"])
def test_a_second_turn_that_starts_from_the_cache_equals_one_from_scratch(k, source):
    model, (prompt, question) = tiny_model(), random_ids(30, 7)
    speculation = Speculation(SOURCES[source](model), k, costs={1: CHEAP})
    setup_caches(model, 1, 128, speculation)
    (answer,), _ = speculated(model, [prompt], 20, speculation)
    second, start = prompt + answer + question, len(prompt + answer) - 1  # the last was drawn, not read
    rows, rounds = speculated(model, [second], 20, speculation, start)
    assert rows == plainly(model, [second], 20)
    if source == "itself":
        assert_all_accepted(rounds, 19)


def test_a_draft_reads_only_what_is_new_in_a_second_turn():
    read = []

    def forward(model, tokens, *others):
        read.append(tokens.shape[1])
        return forward_chunk(model, tokens, *others)

    model, (prompt, question) = tiny_model(), random_ids(30, 7)
    speculation = Speculation(DraftModel(deepcopy(model), forward=forward), 4)
    setup_caches(model, 1, 128, speculation)
    (answer,), _ = speculated(model, [prompt], 20, speculation)  # 19 in rounds of 5, 5, 5, 4
    speculated(model, [prompt + answer + question], 2, speculation, 30 + 19)
    assert read == [30, 57 - (30 + 1 + 15)]  # the last round began after 15: it read up to there, and proposals


def test_a_turn_that_goes_back_to_an_earlier_place_equals_one_from_scratch():
    model, (prompt, other) = tiny_model(), random_ids(30, 12)
    speculation = Speculation(DraftModel(deepcopy(model)), 4)
    setup_caches(model, 1, 128, speculation)
    speculated(model, [prompt], 20, speculation)
    second = prompt[:17] + other
    rows, rounds = speculated(model, [second], 20, speculation, 17)
    assert_all_accepted(rounds, 19)
    assert rows == plainly(model, [second], 20)


def test_a_draft_makes_its_own_caches_where_they_are_missing_or_small():
    model = tiny_model()
    draft = DraftModel(deepcopy(model))
    for lengths, slots in [((5,), 40), ((5, 9), 40), ((5, 50), 80), ((4,), 30)]:
        model.setup_caches(len(lengths), slots)
        _, rounds = speculated(model, random_ids(*lengths), 15, Speculation(draft, 4))
        assert_all_accepted(rounds, 14)


def test_a_draft_whose_caches_are_made_anew_reads_all_of_the_text():
    model, prompts = tiny_model(), random_ids(20)
    draft = DraftModel(deepcopy(model))
    model.setup_caches(1, 40)
    speculated(model, prompts, 15, Speculation(draft, 4))
    model.setup_caches(1, 80)
    prefill(model, prompts, GREEDY)  # without the draft
    _, rounds = speculated(model, [prompts[0] + [5, 6, 7]], 15, Speculation(draft, 4), start=20)
    assert_all_accepted(rounds, 14)


# ---------------------------------------------------------------- a draft that lags


class InTurn:
    """Chooses lengths in turn, whatever the costs; notes how far behind the source is."""

    def __init__(self, lengths):
        self.lengths, self.behind = cycle(lengths), []

    def choose(self, kinds, behind):
        self.behind.append(behind)
        return next(self.lengths)

    def learn(self, *seen):
        pass


@pytest.mark.parametrize("lengths", [(12,), (1,), (1, 17, 6)])
@pytest.mark.parametrize("turns", [(4, 0, 0, 0, 2, 0, 8, 1, 0), (0, 0, 0, 0, 4), (0, 1)])
def test_a_draft_that_was_not_asked_for_a_while_catches_up(monkeypatch, turns, lengths):
    model, prompts, chosen = tiny_model(), random_ids(*lengths), InTurn(turns)
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: chosen)
    plain = plainly(model, prompts, 60)
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", costs={len(prompts): CHEAP})
    rows, rounds = speculated(model, prompts, 60, speculation)
    assert rows == plain
    assert_all_accepted(rounds, 59)
    skipped = 0
    for (k, _), behind in zip(rounds, chosen.behind, strict=True):
        assert behind == skipped
        skipped = 0 if k else skipped + 1


def test_a_draft_catches_up_with_rows_that_have_gone_on_unevenly(monkeypatch):
    caps = torch.randint(1, 6, (100, 3, 1), generator=torch.Generator().manual_seed(3))
    each = iter(caps)

    def some(model, tokens, pos, slots, limit, *others):
        return verify(model, tokens, pos, slots, torch.minimum(limit, pos + next(each)), *others)

    model, prompts = tiny_model(), random_ids(1, 17, 6)
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: InTurn([4, 0, 0, 4, 2, 0]))
    plain = plainly(model, prompts, 50)
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", some, {3: CHEAP})
    rows, rounds = speculated(model, prompts, 50, speculation)
    assert rows == plain
    left = [49] * 3
    for (k, counts), cap in zip(rounds, caps.flatten(1).tolist(), strict=False):
        assert counts == [min(k + 1, most, n) for most, n in zip(cap, left, strict=True)]
        left = [n - count for n, count in zip(left, counts, strict=True)]
    assert 0 in rounds[-1][1]


def test_what_one_text_left_unread_is_no_matter_to_the_next(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: InTurn([0, 0, 4]))
    setup_caches(model, 1, 128)
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", costs={1: CHEAP})
    for budget in (2, 7, 9):  # ends behind, after proposing, behind again
        _, rounds = speculated(model, random_ids(9, seed=budget), budget + 1, speculation)
        assert_all_accepted(rounds, budget)


@pytest.mark.parametrize("lengths", [(9,), (3, 10)])
@pytest.mark.parametrize("turns", [(0,), (4, 0, 0, 0, 0, 0), (4,)])
def test_a_second_turn_after_one_that_the_draft_has_read_in_part(monkeypatch, turns, lengths):
    model, prompts = tiny_model(), random_ids(*lengths)
    chosen = iter([InTurn(turns), InTurn([4])])
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: next(chosen))
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", costs={len(prompts): CHEAP})
    setup_caches(model, len(prompts), 64, speculation)
    answers, _ = speculated(model, prompts, 10, speculation)
    second = [prompt + answer + [5, 6, 7] for prompt, answer in zip(prompts, answers, strict=True)]
    rows, rounds = speculated(model, second, 10, speculation, min(lengths) + 9)
    assert_all_accepted(rounds, 9)
    assert rows == plainly(model, second, 10)


def test_a_row_that_ended_early_keeps_its_place_in_the_cache_of_the_draft(monkeypatch):
    model, prompts = tiny_model(), random_ids(6, 11)
    chosen = iter([InTurn([4, 4, 0, 0, 0, 0, 4]), InTurn([4])])
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: next(chosen))
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", second_row_slowly, {2: CHEAP})
    setup_caches(model, 2, 64, speculation)
    answers, rounds = speculated(model, prompts, 10, speculation)
    assert [counts for _, counts in rounds] == [[5, 1], [4, 1]] + [[0, 1]] * 7
    speculation.verify = verify
    second = [prompt + answer + [5, 6, 7] for prompt, answer in zip(prompts, answers, strict=True)]
    _, rounds = speculated(model, second, 10, speculation, 6 + 9)
    assert_all_accepted(rounds, 9)


def test_measuring_costs_leaves_the_text_as_it_is():
    model, prompts = tiny_model(), random_ids(1, 17, 6)
    plain = plainly(model, prompts, 30)
    speculation = Speculation(DraftModel(deepcopy(model)), "auto")
    rows, rounds = speculated(model, prompts, 30, speculation)
    assert rows == plain
    assert_all_accepted(rounds, 29)
    costs = speculation.costs[3]
    assert set(costs.rounds) == {0, 1, 2, 4, 8}
    assert 0 < costs.rounds[0] < costs.rounds[2] < costs.rounds[8]
    assert 0 < costs.behind < costs.rounds[8]


# ---------------------------------------------------------------- a draft with another padded vocabulary


def with_vocabulary(model, size):
    """The same model with tokens cut off, or with more tokens, which it would rather say than any other."""
    other = Transformer(replace(model.args, vocab_size=size)).eval()
    state = model.state_dict()
    for name in ("tok_embeddings.weight", "output.weight"):
        loud = torch.randn(max(size - len(state[name]), 0), model.args.dim, generator=torch.Generator().manual_seed(1))
        state[name] = torch.cat((state[name][:size], 9 * loud))
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("size", [100, 127, 129, 160])
@pytest.mark.parametrize("k", [1, 4, "auto"])
def test_a_draft_of_another_vocabulary_size_changes_no_token(k, size):
    model, prompts = tiny_model(), random_ids(40, 7)
    assert max(map(max, prompts)) >= 100
    plain = plainly(model, prompts, 40)
    speculation = Speculation(DraftModel(with_vocabulary(model, size)), k, costs={2: CHEAP})
    rows, rounds = speculated(model, prompts, 40, speculation)
    assert rows == plain
    if size > 128:  # what it would rather say is barred: it accepts its own proposals
        assert_all_accepted(rounds, 39)


def test_a_draft_that_lags_reads_tokens_that_it_lacks(monkeypatch):
    model, prompts = tiny_model(), random_ids(12)
    monkeypatch.setattr("engine.speculative.AdaptiveLength", lambda costs: InTurn([0, 0, 0, 4]))
    (plain,) = plainly(model, prompts, 40)
    assert max(plain) >= 100
    speculation = Speculation(DraftModel(with_vocabulary(model, 20)), "auto", costs={1: CHEAP})
    assert speculated(model, prompts, 40, speculation)[0] == [plain]


@pytest.mark.parametrize("size", [100, 160])
def test_sampled_with_another_vocabulary_size_every_token_is_one_of_the_model(size):
    model, prompts, proposed = tiny_model(), random_ids(8, 5), []

    def noting(model, tokens, *others):
        proposed.extend(tokens.flatten().tolist())
        return verify(model, tokens, *others)

    setup_caches(model, 2, 128)
    torch.manual_seed(0)
    speculation = Speculation(DraftModel(with_vocabulary(model, size)), 4, noting)
    rows, _ = speculated(model, prompts, 60, speculation, sampling=Sampling(2.0, 0))
    assert max(map(max, rows)) < 128
    assert 100 <= max(proposed) < 128


# ---------------------------------------------------------------- sampled: the same law


SAMPLINGS = {
    "temperature": Sampling(0.9, top_k=0),
    "top_k": Sampling(1.0, top_k=3),
    "top_p": Sampling(1.2, top_k=0, top_p=0.8),
    "min_p": Sampling(1.0, top_k=0, min_p=0.3),
}
PROMPT = [1, 2, 3, 1, 2, 3, 1, 2, 3]  # the last is the token after the prompt


def toy_model(seed=0, vocab_size=7):
    """Small enough to count every text of three tokens."""
    sizes = dict(dim=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8, intermediate_size=24, max_seq_length=32)
    return tiny_model(seed, vocab_size=vocab_size, **sizes)


@torch.inference_mode()
def law_of_three(model, sampling):
    """The chance of each text of three tokens after PROMPT, [V ** 3], by one forward of each."""
    texts = torch.cartesian_prod(*[torch.arange(model.args.vocab_size)] * 3)
    tokens = torch.cat((tensor(PROMPT).expand(len(texts), -1), texts[:, :2]), 1)
    model.setup_caches(len(texts), tokens.shape[1])
    logits = model(tokens, torch.arange(tokens.shape[1]).expand(len(texts), -1))[:, -3:]
    return logits_to_probs(logits.double(), sampling).gather(2, texts[..., None]).double().prod(1)[:, 0]


def three_drawn(model, sampling, speculation, rows):
    """How often each text of three tokens came, [V ** 3]."""
    prompts, size = [PROMPT[:-1]] * rows, model.args.vocab_size
    model.setup_caches(rows, len(PROMPT) + 3 + speculation.look_ahead)
    prefill(model, prompts, sampling)
    speculation.source.begin(model, prompts)
    token, pos = torch.full((rows, 1), PROMPT[-1]), torch.full((rows, 1), len(PROMPT) - 1)
    drawn = [[] for _ in prompts]
    torch.manual_seed(0)
    for tokens, counts in speculate(model, prompts, token, pos, 3, sampling, speculation):
        for row, ids, n in zip(drawn, tokens, counts, strict=True):
            row += ids[:n]
    return (tensor(drawn) * tensor([size**2, size, 1])).sum(1).bincount(minlength=size**3)


def chance(counts, law):
    """How likely counts are at least so far from the law: a chi-square test, bins of less than 5 put together."""
    expected, order = (law.double() * counts.sum()).sort(descending=True)
    counts = counts[order]
    if counts[expected == 0].any():
        return 0.0
    many = int((expected >= 5).sum()) - 1  # the last of these takes the rare ones in
    expected, counts = (torch.cat((x[:many], x[many:].sum()[None])) for x in (expected, counts))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(tensor(many / 2, dtype=torch.double), statistic / 2).item()


def test_the_chance_of_counts_by_hand():
    # (4^2 + 4^2) / 20 = 1.6 with 1 degree of freedom; (0 + 5^2 + 5^2) / 10 = 5 with 2
    assert chance(tensor([24, 16]), tensor([0.5, 0.5])) == pytest.approx(0.2059, abs=1e-4)
    assert chance(tensor([10, 15, 5]), tensor([1, 1, 1]) / 3) == pytest.approx(0.0821, abs=1e-4)
    assert chance(tensor([24, 12, 3, 1]), tensor([0.5, 0.3, 0.1, 0.1])) == pytest.approx(0.2059, abs=1e-4)
    assert chance(tensor([24, 15, 1]), tensor([0.5, 0.5, 0])) == 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("k", [1, 2, 3, "auto"])
@pytest.mark.parametrize("source", ["draft", "lookup"])
def test_what_speculation_samples_has_the_law_of_the_model(source, k, sampling):
    model, sampling, rows = toy_model(), SAMPLINGS[sampling], 4000
    law = law_of_three(model, sampling)
    source = DraftModel(toy_model(seed=1)) if source == "draft" else PromptLookup()
    counts = three_drawn(model, sampling, Speculation(source, k, costs={rows: CHEAP}), rows)
    assert chance(counts, law) > 1e-4


@pytest.mark.parametrize("vocab_size", [5, 9])
def test_a_draft_of_another_vocabulary_size_leaves_the_law_as_it_is(vocab_size):
    model, sampling = toy_model(), SAMPLINGS["temperature"]
    law = law_of_three(model, sampling)
    speculation = Speculation(DraftModel(toy_model(1, vocab_size)), 2)
    assert chance(three_drawn(model, sampling, speculation, 4000), law) > 1e-4


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("wrong", [lambda q: q * 0, lambda q: q.sqrt() / q.sqrt().sum(-1, keepdim=True)])
def test_wrong_rules_are_found_out(wrong, sampling):
    """Always accept; take the draft for more careful than it is."""

    def verify_wrongly(model, tokens, pos, slots, limit, draft_probs, sampling):
        return verify(model, tokens, pos, slots, limit, wrong(draft_probs), sampling)

    model, sampling = toy_model(), SAMPLINGS[sampling]
    law = law_of_three(model, sampling)
    counts = three_drawn(model, sampling, Speculation(DraftModel(toy_model(seed=1)), 2, verify_wrongly), 4000)
    assert chance(counts, law) < 1e-6


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_model_accepts_all_that_it_samples(sampling):
    model, prompts = toy_model(), [[1, 2, 3]] * 200
    speculation = Speculation(DraftModel(deepcopy(model)), 4)
    model.setup_caches(200, 32)
    torch.manual_seed(0)
    _, rounds = speculated(model, prompts, 21, speculation, sampling=SAMPLINGS[sampling])
    assert statistics.mean(count == 5 for _, counts in rounds[:4] for count in counts) > 0.995


# ---------------------------------------------------------------- acceptance alone

P = tensor([[0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.5, 0]])  # the model after 0, 1 and 2 tokens
Q = tensor([[0.2, 0.2, 0.1, 0.5], [0.7, 0.1, 0.1, 0.1]])  # the draft


def drawn_from(q, rows):
    generator = torch.Generator().manual_seed(2)
    return torch.stack([each.multinomial(rows, True, generator=generator) for each in q], 1)


def accepted_from(q, draft):
    rows = len(draft)
    torch.manual_seed(1)
    q = None if q is None else q.expand(rows, -1, -1)
    return accept(P.log().expand(rows, -1, -1), draft, q, Sampling(1.0, 0))


def laws_of_new(new, count):
    """The chance of the counts of first, second and third tokens, each in the rows that have one."""
    return [chance(new[count[:, 0] > i, i].bincount(minlength=4), P[i]) for i in range(3)]


def test_every_new_token_has_the_law_of_the_model():
    rows = 20_000
    new, count = accepted_from(Q, drawn_from(Q, rows))
    assert new.shape == (rows, 3) and count.shape == (rows, 1)
    assert min(laws_of_new(new, count)) > 1e-4
    # the sums of what p and q share: 0.2 + 0.2 + 0.1 + 0 = 0.5, then 0.1 + 0.1 + 0.1 + 0.1 = 0.4
    assert chance(count[:, 0].bincount(minlength=4)[1:], tensor([0.5, 0.5 * 0.6, 0.5 * 0.4])) > 1e-4


def test_every_new_token_has_the_law_of_the_model_after_certain_proposals():
    rows = 20_000
    new, count = accepted_from(None, tensor([[0, 2]]).expand(rows, -1))
    assert min(laws_of_new(new, count)) > 1e-4
    assert chance(count[:, 0].bincount(minlength=4)[1:], tensor([0.5, 0.5 * 0.7, 0.5 * 0.3])) > 1e-4


def test_a_draft_with_fewer_tokens_never_proposes_the_others():
    q = tensor([[0.6, 0.4], [0.5, 0.5]])
    new, count = accepted_from(q, drawn_from(q, 20_000))
    assert min(laws_of_new(new, count)) > 1e-4
    # shared with p: 0.5 + 0.3 = 0.8, then 0.1 + 0.2 = 0.3
    assert chance(count[:, 0].bincount(minlength=4)[1:], tensor([0.2, 0.8 * 0.7, 0.8 * 0.3])) > 1e-4


def test_a_token_that_the_model_never_says_is_not_accepted():
    new, count = accepted_from(None, tensor([[3, 3]]).expand(1000, -1))
    assert (count == 1).all() and (new[:, 0] < 3).all()


@pytest.mark.parametrize("least, drawn", [(True, 0.0), (False, 1 - 2**-24)])
def test_the_ends_of_what_can_be_drawn(monkeypatch, least, drawn):
    """Even the least number accepts no token of chance 0, even the greatest every one as likely as the draft said."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, drawn))
    p = torch.rand(1000, 1, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    logits = p.log().expand(-1, 2, -1).clone()
    if least:
        logits[:, :, 7] = float("-inf")
    q = logits_to_probs(logits[:, :1], Sampling(1.0, 0))
    _, count = accept(logits, torch.full((1000, 1), 7), None if least else q, Sampling(1.0, 0))
    assert (count == (1 if least else 2)).all()


def test_greedy_acceptance_by_hand():
    logits = torch.eye(5)[tensor([[4, 2, 1], [4, 2, 1], [4, 2, 1], [4, 2, 1]])]
    draft = tensor([[4, 2], [4, 3], [0, 2], [0, 0]])
    new, count = accept(logits, draft, None, GREEDY)
    assert new.tolist() == [[4, 2, 1]] * 4
    assert count.tolist() == [[3], [2], [1], [1]]


# ---------------------------------------------------------------- compiled


@contextmanager
def nothing_compiles():
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert before > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert graphs["unique_graphs"] == before


def test_compiled_rounds_equal_plain_and_nothing_compiles_once_text_flows():
    model = tiny_model(n_layer=1)
    torch._dynamo.reset()
    round, step = compile_step(verify, CPU), compile_step(draft_one_token, CPU)
    draft = DraftModel(nearly(model), step)
    for source, k, n_rows in [(draft, "auto", 1), (draft, 4, 1), (PromptLookup(), 1, 1), (draft, 1, 2)]:
        speculation = Speculation(source, k, round)
        model.setup_caches(n_rows, 700)
        warm_up(model, [[5] * n_rows, [600] * n_rows], 20, GREEDY, decode_one_token, forward_chunk, speculation)
        with nothing_compiles():
            for length in (1, 5, 250, 500, 600):  # 250 and 500 cross a boundary of 256 slots
                prompts = random_ids(*(length, 3)[:n_rows], seed=length)
                plain = continuation(model, prompts, 20).tolist()
                assert speculated(model, prompts, 20, speculation)[0] == plain, (k, n_rows, length)


def test_compiled_sampling_rounds_take_the_likeliest_of_one():
    model, prompts, sampling = tiny_model(n_layer=1), random_ids(9), Sampling(1.0, top_k=1)
    plain = plainly(model, prompts, 20)
    torch._dynamo.reset()
    draft = DraftModel(with_vocabulary(model, 140), compile_step(draft_one_token, CPU))
    speculation = Speculation(draft, 1, compile_step(verify, CPU))
    setup_caches(model, 1, 29, speculation)
    warm_up(model, [[9]], 20, sampling, decode_one_token, forward_chunk, speculation)
    with nothing_compiles():
        rows, rounds = speculated(model, prompts, 20, speculation, sampling=sampling)
    assert rows == plain
    assert_all_accepted(rounds, 19)


# ---------------------------------------------------------------- prompt lookup


@pytest.mark.parametrize(
    "text, match, continuation",
    [
        ([5], 0, [5, 5, 5, 5]),
        ([5, 6, 7], 0, [7, 7, 7, 7]),
        ([5, 6, 7, 8, 9, 5], 1, [6, 7, 8, 9]),
        ([5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5], 1, [6, 7, 8, 9]),  # the later of two 5s
        ([1, 5, 6, 2, 2, 4, 5, 3, 3, 1, 5], 2, [6, 2, 2, 4]),  # 1 5 goes before the later 5
        ([0, 1, 5, 6, 7, 8, 1, 5, 9, 9, 0, 1, 5], 3, [6, 7, 8, 1]),  # 0 1 5 goes before the later 1 5
        ([1, 2, 3, 1, 2], 2, [3, 1, 2, 3]),  # past the end, it goes on with itself
        ([4, 7, 7], 1, [7, 7, 7, 7]),
        ([8, 1, 2, 1, 2, 1], 3, [2, 1, 2, 1]),
    ],
)
def test_lookup_by_hand(text, match, continuation):
    source = PromptLookup()
    source.begin(None, [text])
    draft, probs = source.propose(tensor([[0, 0]]), tensor([[0]]), 0, 4, GREEDY)
    assert source.kinds() == [match]
    assert draft.tolist() == [continuation]
    assert probs is None


def looked_up(text, k):
    """By trying every place: how many tokens match, and what follows."""
    for n in (3, 2, 1):
        for after in range(len(text) - 1, n - 1, -1):
            if len(text) > n and text[after - n : after] == text[-n:]:
                return n, [text[after + i % (len(text) - after)] for i in range(k)]
    return 0, [text[-1]] * k


def test_lookup_equals_trying_every_place_as_the_texts_grow():
    generator = torch.Generator().manual_seed(0)
    matches = set()
    for alphabet in (1, 2, 4, 8, 30):
        lengths = torch.randint(1, 6, (40,), generator=generator).tolist()
        rows = [[torch.randint(alphabet, (n,), generator=generator).tolist() for n in lengths] for _ in range(3)]
        texts, source = [row[0] for row in rows], PromptLookup()
        source.begin(None, texts)
        for new in zip(*(row[1:] for row in rows), strict=True):
            source.extend(new)
            texts = [text + ids for text, ids in zip(texts, new, strict=True)]
            draft, _ = source.propose(torch.zeros(3, 2), torch.zeros(3, 1), 0, 7, GREEDY)
            assert list(zip(source.kinds(), draft.tolist(), strict=True)) == [looked_up(text, 7) for text in texts]
            matches.update(source.kinds())
    assert matches == {0, 1, 2, 3}


def test_the_prompts_given_to_a_lookup_stay_as_they_are():
    prompts, source = [[1, 2, 3]], PromptLookup()
    source.begin(None, prompts)
    source.extend([[4]])
    assert prompts == [[1, 2, 3]]


# ---------------------------------------------------------------- how many to propose


def costs_of(draft_step, behind=0.0):
    """In plain steps: a round with k tokens takes k steps of the draft, and a little for each token verified."""
    return Costs({0: 1.0, **{k: 1 + (0.05 + draft_step) * k for k in LENGTHS}}, behind)


def simulated(costs, accepted, tokens, truth=None):
    """Seconds for so many tokens, and (tokens before, k) of each round; accepted(tokens before) of a long proposal.

    truth(tokens before): what rounds cost by then, if not what was measured before.
    """
    length, seconds, done, behind, rounds = AdaptiveLength(costs), 0.0, 0, 0, []
    while done < tokens:
        k = length.choose([1], behind)
        count = min(1 + min(k, accepted(done)), tokens - done)
        took = (truth(done) if truth else costs).of(k, behind)
        length.learn([1], k, behind, [count], took)
        seconds += took
        rounds.append((done, k))
        done, behind = done + count, 0 if k else behind + 1
    return seconds, rounds


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("behind", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("draft_step", [0.0, 0.1, 0.7, 2.0])
def test_speculation_that_never_succeeds_costs_little(draft_step, behind, tokens):
    seconds, rounds = simulated(costs_of(draft_step, behind), lambda done: 0, tokens)
    assert seconds <= tokens / 0.95
    assert seconds <= AdaptiveLength.FREE_STEPS + (1 + AdaptiveLength.SHARE) * tokens
    assert any(k for _, k in rounds) or draft_step == 2.0  # it tried, where it could


@pytest.mark.parametrize("draft_step", [0.0, 0.1, 0.7, 2.0])
@pytest.mark.parametrize("odds", [0.1, 0.4, 0.6, 0.8, 0.95])
def test_the_loss_is_bounded_whatever_is_accepted(odds, draft_step):
    generator = torch.Generator().manual_seed(0)

    def accepted(done):
        return int((torch.rand(8, generator=generator) < odds).long().cumprod(0).sum())

    seconds, rounds = simulated(costs_of(draft_step, 0.1), accepted, 1000)
    assert seconds <= AdaptiveLength.FREE_STEPS + (1 + AdaptiveLength.SHARE) * 1000
    if odds > 0.9 and draft_step < 0.5:
        assert seconds < 500


@pytest.mark.parametrize("draft_step", [0.0, 0.1, 0.3])
def test_speculation_that_always_succeeds_settles_on_8(draft_step):
    seconds, rounds = simulated(costs_of(draft_step), lambda done: 8, 500)
    assert {k for done, k in rounds if done >= 50} == {8}
    assert seconds < 500 * (1 + 8 * (0.05 + draft_step)) / 9 + 5


def test_longer_proposals_that_cost_more_than_they_bring_are_not_made():
    """One of two is always accepted: of lengths 1, 2, 4, 8 in rounds of 1.15, 1.3, 1.6, 2.2 steps, 1 is best."""
    _, rounds = simulated(costs_of(0.1), lambda done: 1, 500)
    assert {k for done, k in rounds if done >= 200} == {1}
    _, rounds = simulated(costs_of(0.1), lambda done: 2, 500)
    assert {k for done, k in rounds if done >= 200} == {2}


@pytest.mark.parametrize("draft_step, behind", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.3, 0.1)])
def test_the_length_follows_the_text(draft_step, behind):
    _, rounds = simulated(costs_of(draft_step, behind), lambda done: 8 if 300 <= done < 600 else 0, 900)
    assert all(k <= 1 for done, k in rounds if 100 <= done < 300)
    assert min(done for done, k in rounds if done >= 300 and k == 8) < 380
    assert {k for done, k in rounds if 400 <= done < 600} == {8}
    assert all(k <= 1 for done, k in rounds if done >= 650)


def drifting(costs):
    return replace(costs, drift=True)


def test_costs_follow_rounds_that_take_longer_than_was_measured():
    """A draft that was measured on a quiet machine, and from the 200th token on takes two steps for each token."""
    measured, late = costs_of(0.1), costs_of(2.0)

    def truth(done):
        return measured if done < 200 else late

    stale, _ = simulated(measured, lambda done: 2, 1000, truth)
    seconds, rounds = simulated(drifting(measured), lambda done: 2, 1000, truth)
    assert {k for done, k in rounds if 50 <= done < 90} == {2}
    assert stale > 200 / 3 * 1.3 + 800 * 1.5
    assert seconds < 200 / 3 * 1.3 + 800 / 0.95 + 60  # steps until it has seen what each length costs
    assert measured.rounds == costs_of(0.1).rounds  # another text begins with what was measured


def test_costs_follow_plain_steps_that_take_less_than_was_measured():
    measured, late = costs_of(0.3), Costs({**costs_of(0.3).rounds, 0: 0.4})
    stale, _ = simulated(measured, lambda done: 2, 1000, lambda done: late)
    seconds, _ = simulated(drifting(measured), lambda done: 2, 1000, lambda done: late)
    assert stale > 1000 * 0.4 / 0.8
    assert seconds < 1000 * 0.4 / 0.9


def test_plain_steps_are_timed_now_and_then():
    seconds, rounds = simulated(drifting(costs_of(0.1)), lambda done: 2, 1000)
    plain = [i for i, (_, k) in enumerate(rounds) if k == 0]
    assert [b - a for a, b in zip(plain, plain[1:], strict=False)] == [1, 1, AdaptiveLength.CHECK_EVERY + 1] * 9 + [
        1,
        1,
    ]
    assert seconds < 1.05 * simulated(costs_of(0.1), lambda done: 2, 1000)[0]


def test_costs_that_follow_by_hand():
    length = AdaptiveLength(Costs({0: 1.0, **{k: 2.0 for k in LENGTHS}}, behind=0.5, drift=True))
    for k, behind, seconds, cost in [
        (2, 0, 1.0, 2.0),  # the first after another length
        (2, 0, 1.0, 2.0),  # 2 2 1
        (2, 0, 9.0, 2.0),  # 2 1 9: a hiccup
        (2, 0, 1.5, 1.5),  # 1 9 1.5
        (2, 32, 3.5, 1.5),  # of which 2 went into reading what was skipped
        (0, 0, 3.0, 1.0),
        (0, 1, 3.0, 1.0),  # 1 1 3
        (0, 2, 4.0, 3.0),  # 1 3 4
    ]:
        length.learn([1], k, behind, [1], seconds)
        assert length.costs.rounds[k] == cost
    assert length.costs.behind == 0.5  # 0.5 0.5 1
    length.learn([1], 2, 16, [1], 1.5 + 3.0)
    assert length.costs.behind == 1.0  # 0.5 1 2
    length.learn([1], 2, 16, [1], 1.0)  # no less than nothing
    assert length.costs.behind == 1.0
    still = AdaptiveLength(Costs({0: 1.0}))
    for _ in range(5):
        still.learn([1], 0, 0, [1], 2.0)
    assert still.costs.rounds == {0: 1.0}


def test_a_promise_of_less_than_a_twentieth_is_not_believed():
    """At first 1.7 tokens are expected of k = 1, 2.19 of k = 2; where none pays, the cheapest is tried."""
    assert AdaptiveLength(Costs({0: 1.0, 1: 1.68, 2: 2.12, 4: 9.0, 8: 9.0})).choose([1], 0) == 1  # 2.19 / 2.12 = 1.03
    assert AdaptiveLength(Costs({0: 1.0, 1: 1.68, 2: 2.0, 4: 9.0, 8: 9.0})).choose([1], 0) == 2  # 2.19 / 2 = 1.095


def test_nothing_is_proposed_where_no_row_has_anything():
    length = AdaptiveLength(CHEAP)
    assert length.choose([0, 0], 0) == 0
    assert length.choose([0, 3], 0) == 8


def test_each_kind_of_proposal_has_its_own_odds():
    length = AdaptiveLength(costs_of(0.0))
    for _ in range(30):
        length.learn([3, 1], 8, 0, [9, 1], 1.0)  # three tokens that match tell much, one tells nothing
    assert length.choose([3, 3], 0) == 8
    assert length.tokens([3], 8) > 8 > 1.3 > length.tokens([1], 8) > length.tokens([0], 8) == 1
    assert length.tokens([3, 0], 8) == (length.tokens([3], 8) + 1) / 2


def test_rows_that_have_ended_or_proposed_nothing_teach_nothing():
    length = AdaptiveLength(CHEAP)
    length.learn([3, 0, 1], 2, 0, [2, 1, 0], 1.0)
    assert set(length.odds) == {3}


def test_a_round_earns_what_the_rows_that_go_on_gain_on_average():
    length = AdaptiveLength(costs_of(0.1))  # a round with 4 takes 1.6 steps
    before = length.credit
    length.learn([1, 1, 1], 4, 0, [3, 1, 0], 1.6)
    assert length.credit - before == pytest.approx(2 * (1 + AdaptiveLength.SHARE) - 1.6)


def test_where_costs_drift_a_round_pays_for_what_it_took():
    length = AdaptiveLength(drifting(costs_of(0.1)))
    share = 1 + AdaptiveLength.SHARE
    for k, seconds, change in [
        (4, 1.7, 2 * share - 1.7),
        (0, 1.2, 2 * share - 1.2),  # the weights it reads were pushed out of the cache
        (0, 1.2, 2 * share - 1.0),
        (4, 9.0, 2 * share - 1.5 * 1.6),  # a hiccup
    ]:
        before = length.credit = -5.0
        length.learn([1], k, 0, [2], seconds)
        assert length.credit - before == pytest.approx(change)


def test_odds_by_hand():
    odds = Odds()
    assert odds.expected(1) == pytest.approx(0.7)
    assert odds.expected(2) == pytest.approx(0.7 + 0.7**2)
    odds.learn(accepted=1, k=2)  # tried 1 1, taken 1 0
    first = (1 + 0.7) / 2
    assert odds.expected(1) == pytest.approx(first)
    assert odds.expected(2) == pytest.approx(first + first * first / 2)
    assert odds.expected(4) == pytest.approx(first + first * first / 2 * (1 + first / 2 + (first / 2) ** 2))
    odds.learn(accepted=0, k=4)  # tried 1.95 1, taken 0.95 0: the second was never reached
    first = (0.95 + 0.7) / 2.95
    assert odds.expected(1) == pytest.approx(first)
    assert odds.expected(2) == pytest.approx(first + first * first / 2)
    odds.learn(accepted=2, k=2)
    assert odds.tried[:3] == pytest.approx([0.95 * 1.95 + 1, 1.95, 0])
    assert odds.taken[:3] == pytest.approx([0.95 * 0.95 + 1, 1, 0])


def test_odds_of_a_position_beyond_those_counted_are_not_asked():
    odds = Odds()
    odds.learn(accepted=8, k=8)
    assert all(odds.expected(k) < odds.expected(j) for k, j in zip((1, 2, 4), (2, 4, 8), strict=True))
    assert odds.expected(8) < 8


def test_costs_by_hand():
    costs = Costs({0: 1.0, 2: 1.5}, behind=0.25)
    assert [costs.of(0, 16), costs.of(2, 0), costs.of(2, 16)] == [1.0, 1.5, 1.5 + 0.25 * 1.5]


@pytest.mark.parametrize("k", [0, -1, 65, "many", 2.5])
def test_lengths_out_of_range_are_refused(k):
    with pytest.raises(ValueError, match=f"speculate_k is {k}; it must be from 1 to 64, or auto"):
        check_length(k)
    with pytest.raises(ValueError, match=f"speculate_k is {k};"):
        Speculation(PromptLookup(), k)


def test_lengths_in_range_are_taken():
    for k in (1, 64, "auto"):
        check_length(k)
    assert [Speculation(PromptLookup(), k).k for k in (1, 64, "auto")] == [1, 64, "auto"]
