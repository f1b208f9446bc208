"""Speculation against plain decoding, against exact laws where it samples, and against numbers worked out by hand."""

import statistics
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import tensor

from engine.cache import ALIGNED
from engine.compile import compile_step
from engine.decode import decode, forward_chunk, prefill
from engine.engine import Engine, chunks
from engine.sampling import Sampling, logits_to_probs
from engine.speculation.drafters import GRADES, DraftModel, PromptLookup, draft_one_token
from engine.speculation.guess_length import LENGTHS, Costs
from engine.speculation.speculative import Speculation, accept, speculate, verify
from model import Transformer
from tests.tiny import CPU, DIFFERING, GREEDY, continuation, pairwise, random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CHEAP = Costs({k: 1 + 0.01 * k for k in (0, *LENGTHS)})  # proposing costs next to nothing
LONG = CHEAP.with_longer(32)


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
    cache = model.new_cache(len(prompts), max(512, max(map(len, prompts)) + count))
    return continuation(model, cache, prompts, count).tolist()


def speculated(engine, prompts, count, speculation=None, start=0, sampling=GREEDY, seeds=None):
    """[B][count] tokens, and of each round how many were proposed and the counts [B] of new tokens.

    engine: or a model, for one that is made for this text alone.
    """
    if speculation is not None:
        engine = Engine(engine, speculation=speculation)
    rows, rounds = [[] for _ in prompts], []
    for tokens, counts in chunks(engine, prompts, count, sampling, start, seeds):
        rounds.append((len(tokens[0]) - 1, counts))
        for row, ids, n in zip(rows, tokens, counts, strict=True):
            row += ids[:n]
    return rows, rounds[1:]  # the first is the prefill's


def engine_of(model, speculation, n_rows, length):
    engine = Engine(model, speculation=speculation)
    engine.reserve(n_rows, length)
    return engine


def assert_all_accepted(rounds, budget):
    """Every row gets all tokens proposed and one more, until its budget cuts; one budget for all rows, or a list."""
    left = budget if isinstance(budget, list) else [budget] * len(rounds[0][1])
    for k, counts in rounds:
        assert counts == [min(k + 1, n) for n in left], rounds
        left = [n - count for n, count in zip(left, counts, strict=True)]
    assert not any(left)


# ---------------------------------------------------------------- greedy: the same tokens


@pytest.mark.parametrize(
    *pairwise(
        k=[1, 2, 4, 7, 16, 32, "auto"],
        source=SOURCES,
        lengths=[(12,), (1, 17, 6)],
        fields=[{}, {"sliding_window": 8}, DIFFERING],
    )
)
def test_greedy_speculation_equals_plain_greedy(k, source, lengths, fields):
    model, prompts = tiny_model(**fields), random_ids(*lengths)
    plain = plainly(model, prompts, 24)
    assert len({tuple(row) for row in plain}) == len(prompts)
    speculation = Speculation(SOURCES[source](model), k, costs={len(prompts): CHEAP})
    rows, rounds = speculated(model, prompts, 24, speculation)
    assert rows == plain
    if source == "itself":  # a model accepts all of its own proposals
        assert {proposed for proposed, _ in rounds} == {8 if k == "auto" else k}
        assert_all_accepted(rounds, 23)


def test_the_better_the_draft_the_fewer_the_rounds():
    model, prompts = tiny_model(), random_ids(12)
    rounds = {
        name: len(speculated(model, prompts, 41, Speculation(source(model), 4))[1]) for name, source in SOURCES.items()
    }
    assert rounds["itself"] == 8 < rounds["good draft"] < 30 < rounds["bad draft"]


@pytest.mark.parametrize("forgetful, k", [(True, 1), (True, 2), (True, 7), (True, "auto"), (False, 4)])
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
        assert {proposed for proposed, _ in rounds[8:-1]} == {8 if k == "auto" else k}


def test_guesses_grow_with_the_match_and_rows_that_match_less_stay_exact():
    """One row soon goes in circles, the other later."""
    model, prompts = tiny_model(), [[7, 3] * 4, random_ids(40)[0]]
    for layer in model.layers:  # each token follows from the one before alone
        layer.attention.wo.weight.data.zero_()
    plain, compiled = plainly(model, prompts, 150), set()

    def noting(model, tokens, *others):
        compiled.add(tokens.shape[1] - 2)
        return verify(model, tokens, *others)

    for some in ([0, 1], [1], [0]):
        speculation = Speculation(PromptLookup(), "auto", noting, {len(some): LONG})
        rows, rounds = speculated(model, [prompts[i] for i in some], 150, speculation)
        assert rows == [plain[i] for i in some]
        assert max(proposed for proposed, _ in rounds) == 32
    assert compiled <= {0, *LENGTHS}  # the function that may be compiled sees no other length


def test_lookup_reads_the_text_and_proposes_nothing_until_a_token_comes_again():
    model, (prompt,) = tiny_model(), random_ids(1)
    (plain,) = plainly(model, [prompt], 60)
    again = next(n for n in range(2, 60) if plain[n - 1] in prompt + plain[: n - 1])  # tokens up to the first repeated
    assert again < 40
    source = PromptLookup()
    _, rounds = speculated(model, [prompt], 60, Speculation(source, 3))
    assert source.rows[0].ids == prompt + plain
    assert [proposed for proposed, _ in rounds[:again]] == [0] * (again - 1) + [3]


def second_row_slowly(model, tokens, pos, cache, limit, *others):
    """Verify, but the second row goes on by one token a round."""
    return verify(model, tokens, pos, cache, torch.minimum(limit, pos + tensor([[9], [1]])), *others)


def test_rows_that_have_their_budget_get_none_while_others_go_on():
    model, prompts = tiny_model(), random_ids(6, 11)
    plain = plainly(model, prompts, 13)
    speculation = Speculation(DraftModel(deepcopy(model)), 4, second_row_slowly)
    rows, rounds = speculated(model, prompts, 13, speculation)
    assert rows == plain
    assert rounds == [(4, [5, 1])] * 2 + [(4, [2, 1])] + [(4, [0, 1])] * 9


@pytest.mark.parametrize(*pairwise(source=["lookup", "itself"], budget=[0, 1, 2, 3, 17], k=[3, "auto"]))
def test_the_budget_is_exact(source, budget, k):
    model, prompts = tiny_model(), random_ids(5, 9)
    speculation = Speculation(SOURCES[source](model), k, costs={2: CHEAP})
    rows, rounds = speculated(model, prompts, budget + 1, speculation)
    assert [len(row) for row in rows] == [budget + 1] * 2
    assert all(any(counts) for _, counts in rounds)
    assert (rounds == []) == (budget == 0)


def test_decode_and_speculate_yield_chunks_of_one_type():
    model, prompts = tiny_model(), random_ids(5, 9)
    cache, drafter = model.new_cache(2, 64), PromptLookup()
    token, pos = prefill(model, cache, prompts, GREEDY)
    drafter.begin(model, prompts)
    speculation, before = Speculation(drafter, "auto", costs={2: CHEAP}), [ids[-1] for ids in prompts]
    streams = (
        decode(model, cache, token, pos, 20, GREEDY),
        speculate(model, cache, token, pos, 20, GREEDY, speculation, before),
    )
    for stream in streams:
        tokens, counts = next(stream)
        assert tokens.shape == (2, 1) and counts.tolist() == [1, 1]  # none of these tokens came before
        assert len(list(stream)) >= 19 // 9


# ---------------------------------------------------------------- the caches


@pytest.mark.parametrize(
    *pairwise(lengths=[(20,), (3, 20)], k=[1, 4, 7, "auto"], source=["lookup", "good draft", "itself"])
)
def test_prompt_and_budget_may_fill_the_cache_exactly(lengths, k, source):
    model, prompts = tiny_model(max_seq_length=48), random_ids(*lengths)
    plain = plainly(model, prompts, 28)
    speculation = Speculation(SOURCES[source](model), k)  # where k is auto, measuring costs takes the most slots
    engine = Engine(model, speculation=speculation)
    assert speculated(engine, prompts, 28)[0] == plain
    assert engine.cache.n_slots == 48 + ALIGNED + speculation.look_ahead


@pytest.mark.parametrize("lengths", [(243,), (3, 244)])
@pytest.mark.parametrize("k", [1, 4, "auto"])
def test_rounds_across_the_end_of_a_prefix_of_the_cache(k, lengths):
    """256 slots are used until a round needs one more, be it for a proposal."""
    used = set()

    def verify_within(model, tokens, pos, cache, *others):
        assert len(cache.slots) >= pos.max() + tokens.shape[1] - 1
        used.add(len(cache.slots))
        return verify(model, tokens, pos, cache, *others)

    def draft_within(model, tokens, pos, cache, *others):
        assert len(cache.slots) > pos.max()
        return draft_one_token(model, tokens, pos, cache, *others)

    model, prompts = tiny_model(), random_ids(*lengths)
    plain = plainly(model, prompts, 20)
    speculation = Speculation(DraftModel(deepcopy(model), draft_within), k, verify_within, {len(prompts): CHEAP})
    rows, rounds = speculated(model, prompts, 20, speculation)
    assert rows == plain
    assert_all_accepted(rounds, 19)
    assert min(used) == 256 < max(used)


@pytest.mark.parametrize(
    "k, source",
    [*zip([1, 4, "auto", "auto"], SOURCES, strict=True), (4, "lookup"), (4, "itself")],
)
def test_a_second_turn_that_starts_from_the_cache_equals_one_from_scratch(k, source):
    model, (prompt, question) = tiny_model(), random_ids(30, 7)
    speculation = Speculation(SOURCES[source](model), k, costs={1: CHEAP})
    engine = engine_of(model, speculation, 1, 128)
    (answer,), _ = speculated(engine, [prompt], 20)
    second, start = prompt + answer + question, len(prompt + answer) - 1  # the last was drawn, not read
    rows, rounds = speculated(engine, [second], 20, start=start)
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
    engine = engine_of(model, speculation, 1, 128)
    (answer,), _ = speculated(engine, [prompt], 20)  # 19 in rounds of 5, 5, 5, 4
    speculated(engine, [prompt + answer + question], 2, start=30 + 19)
    assert read == [30, 57 - (30 + 1 + 15)]  # the last round began after 15: it read up to there, and proposals


def test_a_turn_that_goes_back_to_an_earlier_place_equals_one_from_scratch():
    model, (prompt, other) = tiny_model(), random_ids(30, 12)
    speculation = Speculation(DraftModel(deepcopy(model)), 4)
    engine = engine_of(model, speculation, 1, 128)
    speculated(engine, [prompt], 20)
    second = prompt[:17] + other
    rows, rounds = speculated(engine, [second], 20, start=17)
    assert_all_accepted(rounds, 19)
    assert rows == plainly(model, [second], 20)


def test_a_draft_makes_its_own_caches_where_they_are_missing_or_small():
    model = tiny_model()
    draft = DraftModel(deepcopy(model))
    for lengths in [(5,), (5, 9), (5, 500), (4,)]:
        _, rounds = speculated(model, random_ids(*lengths), 15, Speculation(draft, 4))
        assert_all_accepted(rounds, 14)


def test_a_draft_whose_caches_are_made_anew_reads_all_of_the_text():
    model, prompts = tiny_model(), random_ids(20)
    draft = DraftModel(deepcopy(model))
    speculation = Speculation(draft, 4)
    speculated(model, prompts, 15, speculation)
    engine = engine_of(model, speculation, 1, 1000)
    prefill(model, engine.cache, prompts, GREEDY)  # without the draft
    _, rounds = speculated(engine, [prompts[0] + [5, 6, 7]], 15, start=20)
    assert_all_accepted(rounds, 14)


# ---------------------------------------------------------------- a draft that lags


class InTurn:
    """Chooses lengths in turn, whatever the costs; notes how far behind the source is."""

    def __init__(self, lengths):
        self.lengths, self.behind = cycle(lengths), []

    def choose(self, grades, behind, left):
        self.behind.append(behind)
        return next(self.lengths)

    def learn(self, *seen):
        pass


TURNS = (4, 0, 0, 0, 2, 0, 8, 1, 0)


@pytest.mark.parametrize(
    "turns, lengths",
    [(TURNS, (12,)), (TURNS, (1,)), (TURNS, (1, 17, 6)), ((0, 0, 0, 0, 4), (1, 17, 6)), ((0, 1), (1,))],
)
def test_a_draft_that_was_not_asked_for_a_while_catches_up(monkeypatch, turns, lengths):
    model, prompts, chosen = tiny_model(), random_ids(*lengths), InTurn(turns)
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: chosen)
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

    def some(model, tokens, pos, cache, limit, *others):
        return verify(model, tokens, pos, cache, torch.minimum(limit, pos + next(each)), *others)

    model, prompts = tiny_model(), random_ids(1, 17, 6)
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: InTurn([4, 0, 0, 4, 2, 0]))
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
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: InTurn([0, 0, 4]))
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", costs={1: CHEAP})
    engine = engine_of(model, speculation, 1, 128)
    for budget in (2, 7, 9):  # ends behind, after proposing, behind again
        _, rounds = speculated(engine, random_ids(9, seed=budget), budget + 1)
        assert_all_accepted(rounds, budget)


@pytest.mark.parametrize("lengths", [(9,), (3, 10)])
@pytest.mark.parametrize("turns", [(0,), (4, 0, 0, 0, 0, 0), (4,)])
def test_a_second_turn_after_one_that_the_draft_has_read_in_part(monkeypatch, turns, lengths):
    model, prompts = tiny_model(), random_ids(*lengths)
    chosen = iter([InTurn(turns), InTurn([4])])
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: next(chosen))
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", costs={len(prompts): CHEAP})
    engine = engine_of(model, speculation, len(prompts), 64)
    answers, _ = speculated(engine, prompts, 10)
    second = [prompt + answer + [5, 6, 7] for prompt, answer in zip(prompts, answers, strict=True)]
    rows, rounds = speculated(engine, second, 10, start=min(lengths) + 9)
    assert_all_accepted(rounds, 9)
    assert rows == plainly(model, second, 10)


def test_a_row_that_ended_early_keeps_its_place_in_the_cache_of_the_draft(monkeypatch):
    model, prompts = tiny_model(), random_ids(6, 11)
    chosen = iter([InTurn([4, 4, 0, 0, 0, 0, 4]), InTurn([4])])
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: next(chosen))
    speculation = Speculation(DraftModel(deepcopy(model)), "auto", second_row_slowly, {2: CHEAP})
    engine = engine_of(model, speculation, 2, 64)
    answers, rounds = speculated(engine, prompts, 10)
    assert [counts for _, counts in rounds] == [[5, 1], [4, 1]] + [[0, 1]] * 7
    speculation.verify = verify
    second = [prompt + answer + [5, 6, 7] for prompt, answer in zip(prompts, answers, strict=True)]
    _, rounds = speculated(engine, second, 10, start=6 + 9)
    assert_all_accepted(rounds, 9)


def test_measuring_costs_leaves_the_text_as_it_is():
    model, prompts = tiny_model(), random_ids(1, 17, 6)
    plain = plainly(model, prompts, 30)
    speculation = Speculation(DraftModel(deepcopy(model)), "auto")
    rows, rounds = speculated(model, prompts, 30, speculation)
    assert rows == plain
    assert_all_accepted(rounds, 29)
    costs = speculation.costs[3]
    assert set(costs.rounds) == {0, 1, 2, 4, 8, 16, 32}
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


@pytest.mark.parametrize("size, k", [(100, 4), (100, "auto"), (127, 1), (129, "auto"), (160, 1), (160, 4)])
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
    monkeypatch.setattr("engine.speculation.speculative.AdaptiveLength", lambda costs: InTurn([0, 0, 0, 4]))
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
    logits = model(tokens, torch.arange(tokens.shape[1]).expand(len(texts), -1))[:, -3:]
    return logits_to_probs(logits.double(), sampling).gather(2, texts[..., None]).double().prod(1)[:, 0]


def three_drawn(model, sampling, speculation, rows):
    """How often each text of three tokens came, [V ** 3]."""
    prompts, size = [PROMPT[:-1]] * rows, model.args.vocab_size
    n_slots = len(PROMPT) + 3 + speculation.look_ahead
    cache = model.new_cache(rows, n_slots)
    cache.uniforms.uniform_(generator=torch.Generator().manual_seed(1))
    speculation.drafter.reserve(rows, n_slots)
    prefill(model, cache, prompts, sampling)
    speculation.drafter.begin(model, prompts)
    token, pos = torch.full((rows, 1), PROMPT[-1]), torch.full((rows, 1), len(PROMPT) - 1)
    drawn = [[] for _ in prompts]
    torch.manual_seed(0)
    for tokens, counts in speculate(model, cache, token, pos, 3, sampling, speculation, [PROMPT[-2]] * rows):
        for row, ids, n in zip(drawn, tokens.tolist(), counts.tolist(), strict=True):
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


@pytest.mark.parametrize(*pairwise(source=["draft", "lookup"], k=[1, 2, 3, "auto"], sampling=SAMPLINGS))
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


@pytest.mark.parametrize("k", [1, 3, 8, "auto"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_guesses_of_the_text_itself_change_nothing_that_is_drawn(k, sampling):
    model, sampling, prompts = toy_model(), SAMPLINGS[sampling], [PROMPT, [4, 5], [1, 2, 3, 4]]
    engine = Engine(model)
    engine.reserve(3, 32)
    expected, _ = speculated(engine, prompts, 20, sampling=sampling, seeds=[5, 6, 7])
    rows, rounds = speculated(model, prompts, 20, Speculation(PromptLookup(), k), sampling=sampling, seeds=[5, 6, 7])
    assert rows == expected and any(proposed for proposed, _ in rounds)
    alone, _ = speculated(engine, prompts[1:2], 20, sampling=sampling, seeds=[6])
    assert alone == expected[1:2] != speculated(engine, prompts[1:2], 20, sampling=sampling, seeds=[8])[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("wrong", [lambda q: q * 0, lambda q: q.sqrt() / q.sqrt().sum(-1, keepdim=True)])
def test_wrong_rules_are_found_out(wrong, sampling):
    """Always accept; take the draft for more careful than it is."""

    def verify_wrongly(model, tokens, pos, cache, limit, draft_probs, sampling):
        return verify(model, tokens, pos, cache, limit, wrong(draft_probs), sampling)

    model, sampling = toy_model(), SAMPLINGS[sampling]
    law = law_of_three(model, sampling)
    counts = three_drawn(model, sampling, Speculation(DraftModel(toy_model(seed=1)), 2, verify_wrongly), 4000)
    assert chance(counts, law) < 1e-6


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_model_accepts_all_that_it_samples(sampling):
    model, prompts = toy_model(), [[1, 2, 3]] * 200
    speculation = Speculation(DraftModel(deepcopy(model)), 4)
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
    return accept(P.log().expand(rows, -1, -1), draft, q, Sampling(1.0, 0), torch.rand(rows, 3))


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
    _, count = accept(logits, torch.full((1000, 1), 7), None if least else q, Sampling(1.0, 0), torch.zeros(1000, 2))
    assert (count == (1 if least else 2)).all()


def test_greedy_acceptance_by_hand():
    logits = torch.eye(5)[tensor([[4, 2, 1], [4, 2, 1], [4, 2, 1], [4, 2, 1]])]
    draft = tensor([[4, 2], [4, 3], [0, 2], [0, 0]])
    new, count = accept(logits, draft, None, GREEDY, None)
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
        engine = engine_of(model, speculation, n_rows, 700)
        engine.warm_up([[5] * n_rows, [600] * n_rows], 20, GREEDY)
        with nothing_compiles():
            for length in (1, 5, 250, 500, 600):  # 250 and 500 cross a boundary of 256 slots
                prompts = random_ids(*(length, 3)[:n_rows], seed=length)
                plain = plainly(model, prompts, 20)
                assert speculated(engine, prompts, 20)[0] == plain, (k, n_rows, length)


def test_compiled_sampling_rounds_take_the_likeliest_of_one():
    model, prompts, sampling = tiny_model(n_layer=1), random_ids(9), Sampling(1.0, top_k=1)
    plain = plainly(model, prompts, 20)
    torch._dynamo.reset()
    draft = DraftModel(with_vocabulary(model, 140), compile_step(draft_one_token, CPU))
    speculation = Speculation(draft, 1, compile_step(verify, CPU))
    engine = engine_of(model, speculation, 1, 29)
    engine.warm_up([[9]], 20, sampling)
    with nothing_compiles():
        rows, rounds = speculated(engine, prompts, 20, sampling=sampling)
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
    assert source.grades() == [match]
    assert draft.tolist() == [continuation]
    assert probs is None


def looked_up(text, k):
    """By trying every place: how many tokens match, and what follows."""
    for n in range(min(GRADES[-1], len(text) - 1), 0, -1):
        for after in range(len(text) - 1, n - 1, -1):
            if text[after - n : after] == text[-n:]:
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
            found = [(row.matched, ids) for row, ids in zip(source.rows, draft.tolist(), strict=True)]
            assert found == [looked_up(text, 7) for text in texts]
            matches.update(source.grades())
    assert matches == set(GRADES)


@pytest.mark.parametrize(
    "match, grade", [(1, 1), (2, 2), (3, 3), (7, 3), (8, 8), (15, 8), (16, 16), (32, 32), (50, 32)]
)
def test_grades_by_hand(match, grade):
    source = PromptLookup()
    source.begin(None, [[*range(60), 99, *range(60 - match, 60), 98, *range(60 - match, 60)]])
    assert source.grades() == [grade]


def test_the_table_of_a_lookup_is_kept_over_turns(monkeypatch):
    """What it holds for the next turn, or for another one from an earlier place, is what a new one would."""
    kept, prompt = PromptLookup(), random_ids(300)[0] * 2
    kept.begin(None, [prompt])
    kept.extend([prompt[:50] + [5, 6]])
    row, read = kept.rows[0], []
    for turn in (prompt + prompt[:50] + [9] * 40, prompt + [1, 2, 3], prompt[:400], [7, 8, *prompt]):
        monkeypatch.setattr(row, "extend", lambda ids: (read.append(len(ids)), type(row).extend(row, ids)))
        kept.begin(None, [turn])
        new = PromptLookup()
        new.begin(None, [turn])
        assert vars(row) | {"extend": 0} == vars(new.rows[0]) | {"extend": 0}
    assert read == [40, 3, 0, 602]


def test_the_prompts_given_to_a_lookup_stay_as_they_are():
    prompts, source = [[1, 2, 3]], PromptLookup()
    source.begin(None, prompts)
    source.extend([[4]])
    assert prompts == [[1, 2, 3]]
