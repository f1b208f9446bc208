"""How many tokens to propose."""

import statistics
from dataclasses import dataclass, replace

LENGTHS = (1, 2, 4, 8)  # what k is chosen from where it follows the text


LONGEST = 64  # k at most


def check_length(k: int | str) -> None:
    """Raise ValueError unless k is a number of tokens to propose, or "auto"."""
    if k != "auto" and not (isinstance(k, int) and 1 <= k <= LONGEST):
        raise ValueError(f"speculate_k is {k}; it must be from 1 to {LONGEST}, or auto")


class Odds:
    """How likely each proposed token is accepted, those before it being so. Recent rounds count most."""

    FIRST_GUESS, DECAY = 0.7, 0.95

    def __init__(self):
        self.tried, self.taken = [0.0] * max(LENGTHS), [0.0] * max(LENGTHS)

    def learn(self, accepted: int, k: int) -> None:
        for i in range(min(accepted + 1, k)):
            self.tried[i] = self.DECAY * self.tried[i] + 1
            self.taken[i] = self.DECAY * self.taken[i] + (i < accepted)

    def expected(self, k: int) -> float:
        """Tokens accepted of k, on average."""
        total, reached, chance = 0.0, 1.0, self.FIRST_GUESS
        for tried, taken in zip(self.tried[:k], self.taken[:k], strict=True):
            chance = (taken + chance) / (tried + 1)  # where little was seen, as the token before
            reached *= chance
            total += reached
        return total


class FixedLength:
    """k in every round in which there is something to propose."""

    def __init__(self, k: int):
        self.k = k

    def choose(self, grades: list[int], behind: int) -> int:
        return self.k if any(grades) else 0

    def learn(self, grades: list[int], k: int, behind: int, counts: list[int], seconds: float) -> None:
        pass


class AdaptiveLength:
    """The k that promises most tokens a second, from what was accepted and what rounds cost.

    A budget bounds the loss: what rounds take longer than plain steps would may not exceed what others gained, one and
    a half steps at the start and a hundredth of the time. What is left of it tries speculation again. Costs, where they
    drift, follow what rounds take, and a few plain steps now and then tell what those take by now.
    """

    FREE_STEPS, SHARE, MOST_STEPS = 1.5, 0.01, 4.0
    MARGIN = 1.05  # what it must promise over plain steps: costs are not known better
    HICCUP = 1.5  # what takes longer than so many times its cost, something else held up
    CHECK_EVERY, TIMED = 32, 3  # after so many rounds so many plain ones, to know what they cost by now

    def __init__(self, costs: "Costs"):
        self.costs = replace(costs, rounds=dict(costs.rounds))  # which follow this text only
        self.credit = self.FREE_STEPS * costs.rounds[0]
        self.odds: dict[int, Odds] = {}
        self.timed = {
            k: [seconds] * self.TIMED for k, seconds in costs.rounds.items()
        }  # the last rounds of each length
        self.caught_up = [costs.behind] * self.TIMED
        self.alike, self.last, self.unchecked = 0, None, 0

    def choose(self, grades: list[int], behind: int) -> int:
        plain = self.costs.rounds[0]
        costs = {k: self.costs.of(k, behind) for k in LENGTHS}
        affordable = [k for k in LENGTHS if costs[k] - plain <= self.credit]
        check = self.costs.drift and self.unchecked >= self.CHECK_EVERY
        if not any(grades) or not affordable or check:
            return 0
        best = max(affordable, key=lambda k: self.tokens(grades, k) / costs[k])
        pays = self.tokens(grades, best) / costs[best] > self.MARGIN / plain
        return best if pays else affordable[0]

    def tokens(self, grades: list[int], k: int) -> float:
        """New tokens of a round, on average over the rows."""
        return 1 + sum(self.odds.setdefault(grade, Odds()).expected(k) for grade in grades if grade) / len(grades)

    def learn(self, grades: list[int], k: int, behind: int, counts: list[int], seconds: float) -> None:
        for grade, count in zip(grades, counts, strict=True):
            if grade and count:  # none: the row has ended
                self.odds.setdefault(grade, Odds()).learn(count - 1, k)
        running = [count for count in counts if count]
        worth = sum(running) / max(len(running), 1) * self.costs.rounds[0]
        cost = self.costs.of(k, behind)
        if self.costs.drift and (k or self.last):  # the plain step that follows others is theirs to pay for too
            cost = min(seconds, self.HICCUP * cost)
        self.credit += (1 + self.SHARE) * worth - cost
        self.credit = min(self.credit, self.MOST_STEPS * self.costs.rounds[0])
        if self.costs.drift:
            self.follow(k, behind, seconds)

    def follow(self, k: int, behind: int, seconds: float) -> None:
        """Take the median of what the last rounds took for what one costs."""
        self.alike = self.alike + 1 if k == self.last else 1
        self.last, self.unchecked = k, self.unchecked + 1
        if k and behind:
            self.caught_up = [*self.caught_up[1:], max(0.0, seconds - self.costs.rounds[k]) / Costs.growth(behind)]
            self.costs.behind = statistics.median(self.caught_up)
        elif self.alike > 1:  # a change of k costs a tenth of a step
            self.timed[k] = [*self.timed[k][1:], seconds]
            self.costs.rounds[k] = statistics.median(self.timed[k])
        if k == 0 and self.alike == self.TIMED:
            self.unchecked = 0


@dataclass
class Costs:
    """Seconds of a round with k tokens proposed, and of a pass over a few tokens that the source is behind.

    drift: as those of a machine do that is busy at times, so that they must follow what rounds take.
    """

    rounds: dict[int, float]
    behind: float = 0.0
    drift: bool = False

    def of(self, k: int, behind: int) -> float:
        return self.rounds[k] + (self.behind * self.growth(behind) if k and behind else 0.0)

    @staticmethod
    def growth(behind: int) -> float:
        """How a pass over so many tokens compares with one over a few: so, or it grows slower."""
        return 1 + behind / 32
