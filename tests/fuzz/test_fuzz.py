"""Damaged and hostile files of every kind: an answer, or one line of words; `scripts/fuzz.py` draws more cases."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.forks import ALLOWED, Forks
from tests.fuzz.kinds import KINDS, write_valid

SETTINGS = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return write_valid(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="module")
def forks(valid):
    forks = Forks(valid)
    yield forks
    forks.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_or_one_line(kind, forks, valid):
    @settings(max_examples=40, derandomize=True, phases=[Phase.generate], **SETTINGS)
    @given(KINDS[kind].draw(valid))
    def check(case):
        outcome, text = forks.outcome(kind, case)
        assert outcome in ALLOWED, text

    check()
