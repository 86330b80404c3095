"""Generated arithmetic: right answers, splits that share no problem."""

import re

import pytest

from research.data.arithmetic import SPLITS, Arithmetic, split_of
from research.data.sources import open_source
from research.errors import UserError


def solve(question: str) -> int:
    """Read as a person would: by the words, not by the program's own numbers."""
    first, second = map(int, re.findall(r"\d+", question))
    if "we take" in question:
        return second - first
    return first - second if re.search("gives away|are lost", question) else first + second


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_in_range(split):
    problems = Arithmetic(split).problems(50)
    assert len(set(problems)) == 50
    for question, answer in problems:
        assert solve(question) == int(answer)
        assert 0 <= int(answer) < 100


def test_splits_share_no_problem():
    def operations(split):
        text = "".join(Arithmetic(split)[i] for i in range(50))
        found = set()
        for line in text.splitlines():
            a, b, c = map(int, re.findall(r"\d+", line))
            if "we take" in line:
                a, b = b, a
            found.add((a, "+" if a + b == c else "-", b))
        return found

    found = {split: operations(split) for split in SPLITS}
    # 0 may be added or taken away: the sentence says which, its numbers do not.
    assert all(split_of(*problem) == split for split in SPLITS for problem in found[split] if problem[2])
    assert not {p for p in found["train"] if p[2]} & {p for p in found["test"] if p[2]}


def test_documents_are_a_function_of_their_number():
    source = open_source("arithmetic", "train")
    assert source[3] == Arithmetic("train")[3] != source[4]
    assert source[3].count("\n") == 16
    with pytest.raises(IndexError):
        source[len(source)]


def test_mistakes_are_told():
    with pytest.raises(UserError, match="not 'tests'; did you mean test"):
        open_source("arithmetic", "tests")
    with pytest.raises(UserError, match="limit 5"):
        Arithmetic("train", limit=5)
    with pytest.raises(UserError, match="fewer than 1000"):
        Arithmetic("test", limit=10).problems(1000)
