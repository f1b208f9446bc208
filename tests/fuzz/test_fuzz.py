"""Damaged and hostile files of every kind: an answer, or one line of words; `scripts/fuzz.py` draws more cases."""

import pytest

from tests.fuzz.forks import Forks
from tests.fuzz.kinds import KINDS, draw
from tests.fuzz.valid import write_valid


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(write_valid(tmp_path_factory.mktemp("valid")), list(KINDS))
    yield forks
    forks.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_or_one_line(kind, forks):
    assert not forks.findings(kind, draw(kind, forks.valid, n_cases=40, seed=0))
