"""How many tokens to propose in a round: a fixed number, or the one that pays most.

A round proposes k tokens and verifies them in one pass, which gives 1 to k + 1 new tokens a row; k = 0 is a plain step.
"""

import statistics
from dataclasses import dataclass, replace

import torch

LENGTHS = (1, 2, 4, 8)  # the k that the adaptive length chooses from, beside 0: measured before the first token
LONGER = (16, 32, 63)  # and those that it takes at an estimated cost until rounds tell what they cost


def longest(device: torch.device) -> int:
    """The largest k on a device."""
    return 63 if device.type == "cuda" else 32  # on CUDA attention takes 64 tokens a row


def look_ahead(k: int | str, device: torch.device, has_states: bool) -> int:
    """Cache slots that a round may use beyond the text's last.

    k: "auto" for as many as pay; states, kept for each token of a round, take memory, of which ten are enough.
    """
    if k == "auto":
        k = max(LENGTHS) if has_states else longest(device)
    return k + 1


def check_length(k: int | str, device: torch.device) -> None:
    """Refuse all but a number of tokens to propose and "auto"."""
    if k != "auto" and not (isinstance(k, int) and 1 <= k <= longest(device)):
        raise ValueError(f"speculate_k is {k}; on {device.type} it must be from 1 to {longest(device)}, or auto")


class Odds:
    """How likely the i-th proposed token is accepted if those before it were. Recent rounds count most."""

    DECAY = 0.95

    def __init__(self, grade: int):
        # after `grade` tokens that agreed the next one does too by Laplace's rule of succession
        self.first_guess = (grade + 1) / (grade + 2)
        self.tried, self.taken = [0.0] * max(LONGER), [0.0] * max(LONGER)

    def learn(self, accepted: int, k: int) -> None:
        for i in range(min(accepted + 1, k)):
            self.tried[i] = self.DECAY * self.tried[i] + 1
            self.taken[i] = self.DECAY * self.taken[i] + (i < accepted)

    def expected(self, k: int) -> float:
        """Tokens accepted of k, on average."""
        total, reached, chance = 0.0, 1.0, self.first_guess
        for tried, taken in zip(self.tried[:k], self.taken[:k], strict=True):
            chance = (taken + chance) / (tried + 1)  # with few observations: as likely as the token before
            reached *= chance
            total += reached
        return total


class FixedLength:
    """k in every round in which there is something to propose."""

    def __init__(self, k: int):
        self.k = k

    def at_most(self, k: int) -> "FixedLength":
        return FixedLength(min(self.k, k))

    def choose(self, grades: list[int], behind: int, left: int) -> int:
        return self.k if any(grades) else 0

    def learn(self, grades: list[int], k: int, behind: int, counts: list[int], seconds: float) -> None:
        pass


class AdaptiveLength:
    """The k that promises most tokens a second, by what was accepted and what rounds cost.

    A credit, in seconds, bounds the loss. Each round pays what it took and earns what its tokens would have taken in
    plain steps. The credit begins at FREE_STEPS plain steps and grows by SHARE of the time; while it lasts, lengths
    that do not pay are tried again, because the text may have changed. On a machine whose speed drifts, the costs are
    the medians of the last rounds, and what a draft misses in the first check of a plain step is added to the credit.
    """

    FREE_STEPS, SHARE, MOST_STEPS = 1.5, 0.01, 4.0
    MARGIN = 1.05  # the least gain over plain steps that is believed: costs are known to about 5 %
    HICCUP = 1.5  # a round pays at most so many times its cost: what takes longer waited for other programs
    CHECK_EVERY, TIMED = 32, 3  # after CHECK_EVERY rounds, TIMED plain steps measure what a plain step costs now
    FIRST_CHECK = 2  # and after the first rounds, because costs were measured at another time
    CHEAP = 1.1  # of a plain step: where a guess costs no more, a check costs more than it saves

    def __init__(self, costs: "Costs"):
        self.costs = replace(costs, rounds=dict(costs.rounds))  # a copy: it follows this text only
        self.lengths = sorted(costs.rounds)[1:]
        self.credit = self.FREE_STEPS * costs.rounds[0]
        self.odds: dict[int, Odds] = {}
        self.timed = {k: [seconds] * self.TIMED for k, seconds in costs.rounds.items()}  # the last rounds of each k
        self.caught_up = [costs.behind] * self.TIMED
        self.alike, self.last, self.unchecked = 0, None, 0  # equal k in a row, the last k, rounds since a check
        self.is_new = True  # before the first check
        if costs.rounds[self.lengths[0]] > self.CHEAP * costs.rounds[0]:
            self.unchecked = self.CHECK_EVERY - self.FIRST_CHECK

    def at_most(self, k: int) -> "AdaptiveLength":
        """The same, without longer ones."""
        rounds = {each: seconds for each, seconds in self.costs.rounds.items() if each <= k}
        return AdaptiveLength(replace(self.costs, rounds=rounds))

    def choose(self, grades: list[int], behind: int, left: int) -> int:
        """The k of the next round.

        grades: of each row's proposal; behind: tokens that the drafter has not read; left: tokens that a row may get.
        """
        plain = self.costs.rounds[0]
        costs = {k: self.costs.of(k, behind) for k in self.lengths}
        affordable = [k for k in self.lengths if costs[k] - plain <= self.credit]
        check = self.costs.drift and self.unchecked >= self.CHECK_EVERY
        if not any(grades) or not affordable or check:
            return 0
        rates = {k: min(self.tokens(grades, k), left) / costs[k] for k in affordable}
        best = max(affordable, key=rates.get)
        pays = rates[best] > self.MARGIN / plain
        return best if pays else affordable[0]

    def tokens(self, grades: list[int], k: int) -> float:
        """New tokens of a round, on average over the rows."""
        return 1 + sum(self.odds_of(grade).expected(k) for grade in grades if grade) / len(grades)

    def odds_of(self, grade: int) -> Odds:
        return self.odds.setdefault(grade, Odds(grade))

    def learn(self, grades: list[int], k: int, behind: int, counts: list[int], seconds: float) -> None:
        """Take in a round: its k, the new tokens of each row, and how long it took."""
        for grade, count in zip(grades, counts, strict=True):
            if grade and count:  # a count of 0: the row has ended
                self.odds_of(grade).learn(count - 1, k)
        running = [count for count in counts if count]
        worth = sum(running) / max(len(running), 1) * self.costs.rounds[0]
        cost = self.costs.of(k, behind)
        if self.costs.drift and (k or self.last):  # a plain step after a round finds a cold cache: the round pays
            cost = min(seconds, self.HICCUP * cost)
        self.credit += (1 + self.SHARE) * worth - cost
        plain, dearest = self.costs.rounds[0], self.costs.rounds[self.lengths[-1]]
        self.credit = min(self.credit, max(self.MOST_STEPS * plain, dearest - plain))
        if self.costs.drift:
            self.follow(k, behind, seconds)

    def follow(self, k: int, behind: int, seconds: float) -> None:
        """Set costs to the medians of the last rounds."""
        self.alike = self.alike + 1 if k == self.last else 1
        self.last, self.unchecked = k, self.unchecked + 1
        if k and behind:
            self.caught_up = [*self.caught_up[1:], max(0.0, seconds - self.costs.rounds[k]) / Costs.growth(behind)]
            self.costs.behind = statistics.median(self.caught_up)
        elif self.alike > 1 or k > max(LENGTHS):  # the first round after a change of k takes a tenth longer
            self.timed[k] = [*self.timed[k][1:], seconds]
            self.costs.rounds[k] = statistics.median(self.timed[k])
        if k == 0 and self.alike == self.TIMED:
            if self.is_new and self.unchecked >= self.CHECK_EVERY:  # the draft is behind by no fault of its own
                self.credit += self.costs.behind * Costs.growth(self.TIMED)
            self.unchecked, self.is_new = 0, False


@dataclass
class Costs:
    """What rounds cost, in seconds.

    rounds: of a round with k proposals. behind: of reading a few tokens that the drafter has not read. drift: whether
    the costs change while a text is made, as on a machine that is busy at times.
    """

    rounds: dict[int, float]
    behind: float = 0.0
    drift: bool = False

    def with_longer(self, longest: int) -> "Costs":
        """The same, with lengths up to the longest, as if each token more cost what it does from 4 to 8."""
        (k, at_k), (last, at_last) = sorted(self.rounds.items())[-2:]
        each = max(0.0, at_last - at_k) / (last - k)
        more = {longer: at_last + (longer - last) * each for longer in LONGER if last < longer <= longest}
        return replace(self, rounds=self.rounds | more)

    def of(self, k: int, behind: int) -> float:
        return self.rounds[k] + (self.behind * self.growth(behind) if k and behind else 0.0)

    @staticmethod
    def growth(behind: int) -> float:
        """How much longer a pass over so many tokens takes than one over a few: at most so."""
        return 1 + behind / 32
