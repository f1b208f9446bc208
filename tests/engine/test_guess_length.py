"""How many tokens to propose: laws that hold whatever the text does."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from engine.speculation.drafters import PromptLookup
from engine.speculation.guess_length import LENGTHS, AdaptiveLength, Costs, Odds, check_length
from engine.speculation.speculative import Speculation
from tests.tiny import pairwise

CHEAP = Costs({k: 1 + 0.01 * k for k in (0, *LENGTHS)})  # proposing costs next to nothing


def costs_of(draft_step, behind=0.0):
    """In plain steps: a round with k tokens takes k steps of the draft, and a little for each token verified."""
    return Costs({0: 1.0, **{k: 1 + (0.05 + draft_step) * k for k in LENGTHS}}, behind)


def simulated(costs, accepted, tokens, truth=None):
    """Seconds for so many tokens, and (tokens before, k) of each round; accepted(tokens before) of a long proposal.

    truth(tokens before): what rounds cost by then, if not what was measured before.
    """
    length, seconds, done, behind, rounds = AdaptiveLength(costs), 0.0, 0, 0, []
    while done < tokens:
        k = length.choose([1], behind, tokens - done)
        count = min(1 + min(k, accepted(done)), tokens - done)
        took = (truth(done) if truth else costs).of(k, behind)
        length.learn([1], k, behind, [count], took)
        seconds += took
        rounds.append((done, k))
        done, behind = done + count, 0 if k else behind + 1
    return seconds, rounds


@pytest.mark.parametrize(*pairwise(draft_step=[0.0, 0.1, 0.7, 2.0], behind=[0.0, 0.1, 1.0], tokens=[100, 1000]))
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
    assert {k for done, k in rounds if 50 <= done < 490} == {8}
    assert seconds < 500 * (1 + 8 * (0.05 + draft_step)) / 9 + 5


# rounds of 1 + k * each steps; a match of n brings 1 + p + ... + p^k tokens, p = (n + 1) / (n + 2): of 8, for example,
# 6.1, 8.3 and 9.7 tokens with k = 8, 16 and 32, which are 4.4, 4.6 and 3.7 a step where rounds take 1.4, 1.8 and 2.6
@pytest.mark.parametrize("each, lengths", [(0.05, [4, 8, 8, 16, 16, 32]), (0.1, [4, 4, 8, 8, 16, 16])])
def test_the_length_of_a_guess_by_that_of_the_match(each, lengths):
    length = AdaptiveLength(Costs({k: 1 + each * k for k in (0, *LENGTHS)}).with_longer(32))
    assert length.choose([32], 0, 99) == lengths[-1] / 2  # at first it risks no more than a step and a half
    length.credit = 4
    assert [length.choose([grade], 0, 99) for grade in (1, 2, 3, 8, 16, 32)] == lengths


def test_no_more_is_guessed_than_a_row_may_get():
    """Where all is accepted and 16 are left, 32 bring 16 / 2.6 tokens a step, 16 bring 16 / 1.8, 8 bring 9 / 1.4."""
    length = AdaptiveLength(Costs({k: 1 + 0.05 * k for k in (0, *LENGTHS)}).with_longer(32))
    length.credit = 4
    for _ in range(50):
        length.odds_of(32).learn(32, 32)
    assert [length.choose([32], 0, left) for left in (99, 30, 16, 9, 4, 1)] == [32, 32, 16, 8, 4, 1]


def test_longer_lengths_cost_as_much_more_as_measured_ones():
    costs = Costs({0: 1.0, 1: 1.25, 2: 1.25, 4: 1.5, 8: 2.5})  # from 4 to 8 a quarter of a step a token
    assert costs.with_longer(32).rounds == costs.rounds | {16: 4.5, 32: 8.5}
    assert costs.with_longer(63).rounds == costs.rounds | {16: 4.5, 32: 8.5, 63: 16.25}


@pytest.mark.parametrize("each, settled", [(0.05, 32), (1.0, 8)])
def test_longer_lengths_are_taken_where_rounds_show_that_they_pay(each, settled):
    """Beyond 8 a token costs `each` step, and not the 0.05 that shorter ones do."""
    costs = drifting(costs_of(0.0)).with_longer(32)
    late = Costs(costs.rounds | {k: 1.4 + each * (k - 8) for k in (16, 32)})
    seconds, rounds = simulated(costs, lambda done: 32, 2000, lambda done: late)
    assert {k for done, k in rounds if 200 <= done < 1960} == {0, settled}  # 0: a look at what a plain step costs
    assert seconds < 1.05 * 2000 * late.rounds[settled] / (settled + 1) + 2 * (late.rounds[16] + late.rounds[32])


def test_longer_proposals_that_cost_more_than_they_bring_are_not_made():
    """One of two is always accepted: of lengths 1, 2, 4, 8 in rounds of 1.15, 1.3, 1.6, 2.2 steps, 1 is best."""
    for k in (1, 2):
        _, rounds = simulated(costs_of(0.1), lambda done, k=k: k, 500)
        assert {k for done, k in rounds if 200 <= done < 490} == {k}


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


def test_a_machine_that_is_faster_now_than_when_costs_were_measured():
    """Of guesses that cost a third of a step one in four is right; plain steps take three quarters of what they did."""
    measured, late = costs_of(0.3), Costs({**costs_of(0.3).rounds, 0: 0.75})
    places = range(0, 130, 4)
    seconds, _ = simulated(drifting(measured), lambda done: int(done in places), 128, lambda done: late)
    assert seconds < 128 * 0.75 / 0.95


def test_watching_for_drift_costs_little_where_costs_stay():
    seconds, _ = simulated(drifting(costs_of(0.1)), lambda done: 2, 1000)
    assert seconds < 1.05 * simulated(costs_of(0.1), lambda done: 2, 1000)[0]


@pytest.mark.parametrize("every", [11, 20, 50])
def test_a_hiccup_now_and_then_does_not_change_the_length(every):
    """One round in so many takes nine times its cost, as where another program had the processor."""
    costs, rounds = costs_of(0.1), count()
    slow = Costs({k: 9 * seconds for k, seconds in costs.rounds.items()})
    _, found = simulated(drifting(costs), lambda done: 8, 2000, lambda done: costs if next(rounds) % every else slow)
    assert {k for done, k in found[4:] if done < 1990} == {0, 8} and sum(k == 0 for _, k in found) < len(found) / 10


def test_nothing_is_proposed_where_no_row_has_anything():
    length = AdaptiveLength(CHEAP)
    assert length.choose([0, 0], 0, 99) == 0
    assert length.choose([0, 3], 0, 99) == 8


def test_each_kind_of_proposal_has_its_own_odds():
    length = AdaptiveLength(costs_of(0.0))
    for _ in range(30):
        length.learn([3, 1], 8, 0, [9, 1], 1.0)  # three tokens that match tell much, one tells nothing
    assert length.choose([3, 3], 0, 99) == 8
    assert length.tokens([3], 8) > 8 > 1.3 > length.tokens([1], 8) > length.tokens([0], 8) == 1
    assert length.tokens([3, 0], 8) == (length.tokens([3], 8) + 1) / 2


def test_rows_that_have_ended_or_proposed_nothing_teach_nothing():
    length = AdaptiveLength(CHEAP)
    before = length.tokens([1], 8)
    for _ in range(30):
        length.learn([0, 1], 8, 0, [1, 0], 1.0)
    assert length.tokens([1], 8) == before


def test_a_round_earns_what_the_rows_that_go_on_gain_on_average():
    length = AdaptiveLength(costs_of(0.1))  # a round with 4 takes 1.6 steps
    before = length.credit
    length.learn([1, 1, 1], 4, 0, [3, 1, 0], 1.6)
    assert length.credit - before == pytest.approx(2 * (1 + AdaptiveLength.SHARE) - 1.6)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
def test_odds_settle_on_what_is_accepted(chance):
    generator, odds, found = torch.Generator().manual_seed(0), Odds(1), []
    for _ in range(3000):
        odds.learn(int((torch.rand(8, generator=generator) < chance).long().cumprod(0).sum()), 8)
        expected = [odds.expected(k) for k in LENGTHS]
        assert expected == sorted(expected) and expected[-1] < 8
        found.append(expected)
    truth = [sum(chance**i for i in range(1, k + 1)) for k in LENGTHS]
    assert torch.tensor(found).mean(0).tolist() == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("device, longest", [("cpu", 32), ("cuda", 63)])
def test_lengths_out_of_range_are_refused(device, longest):
    device = torch.device(device)
    for k in (0, -1, longest + 1, "many", 2.5):
        with pytest.raises(
            ValueError, match=f"speculate_k is {k}; on {device} it must be from 1 to {longest}, or auto"
        ):
            check_length(k, device)
        with pytest.raises(ValueError, match=f"speculate_k is {k};"):
            Speculation(PromptLookup(), k, device=device)
    for k, slots in ((1, 2), (longest, longest + 1), ("auto", longest + 1)):
        assert Speculation(PromptLookup(), k, device=device).look_ahead == slots
    for k, slots in ((12, 13), ("auto", 9)):
        assert Speculation(PromptLookup(), k, device=device, has_states=True).look_ahead == slots
