"""The cost model, with numbers worked out by hand."""

import pytest

from research.decoding.cost import (
    Candidate,
    Costs,
    best_chain,
    best_size,
    break_even,
    chain_tokens,
    choose,
)
from research.errors import UserError

# A call of N nodes takes 2 + (N - 1) / 4 seconds up to 5, and from there as long as drawn: t(9) = 5.
COSTS = Costs("a/model", "0123", "a machine", {1: 2.0, 5: 3.0, 9: 5.0})


def test_tokens_of_a_chain():
    assert chain_tokens(0.5, 3) == 1.875  # 1 + 1/2 + 1/4 + 1/8
    assert chain_tokens(0.0, 3) == 1.0
    assert chain_tokens(1.0, 3) == 4.0
    with pytest.raises(UserError, match="acceptance must be a probability, not 1.5"):
        chain_tokens(1.5, 3)


def test_call_times_between_measured_sizes():
    assert COSTS.call(5) == 3.0
    assert COSTS.call(2) == 2.25
    assert COSTS.call(7) == 4.0
    with pytest.raises(UserError, match=r"no call time for 10 nodes: measured were \[1, 5, 9\]"):
        COSTS.call(10)


def test_speedup():
    # Three tokens in 1 + 3 seconds instead of three times 2.
    assert COSTS.speedup(5, 3.0, draft=1.0) == 1.5
    assert COSTS.speedup(1, 1.0) == 1.0


def test_break_even():
    # One draft of 0.25 s: (0.25 + 2.25) / 2 = 1.25 = 1 + a.
    assert break_even(COSTS, 1, 0.25) == pytest.approx(0.25, abs=1e-12)
    # At that acceptance the chain is as fast as plain decoding.
    acceptance = break_even(COSTS, 4, 0.5)
    assert COSTS.speedup(5, chain_tokens(acceptance, 4), 2.0) == pytest.approx(1.0)
    # (2 + 2.25) / 2 = 2.125 tokens are more than the two that a call can gain.
    assert break_even(COSTS, 1, 2.0) is None


def test_best_chain():
    # a = 1, free drafts: 2 (g + 1) / t(g + 1) is 10 / 3 at g = 4 and 18 / 5 at g = 8, the most.
    assert best_chain(COSTS, 1.0, 0.0) == (8, 3.6)
    assert best_chain(COSTS, 1.0, 0.0, longest=4) == (4, pytest.approx(10 / 3))
    # a = 1/2, free: speedups 1, 3 / 2.25, 3.5 / 2.5 = 1.4, 3.75 / 2.75, ...: two drafts.
    assert best_chain(COSTS, 0.5, 0.0) == (2, pytest.approx(1.4))
    assert best_chain(COSTS, 0.1, 1.0) == (0, 1.0)


def test_best_size():
    # 2 * 1.5 / 2.25 = 1.33, 2 * 2.4 / 3 = 1.6, 2 * 2.9 / 5 = 1.16.
    assert best_size(COSTS, {2: 1.5, 5: 2.4, 9: 2.9}) == (5, pytest.approx(1.6))
    assert best_size(COSTS, {9: 2.4}) == (1, 1.0)


def test_choice_and_its_reasons():
    slow, fast = Candidate("heads", 9, 3.0, 1.0), Candidate("lookup", 5, 2.25, 0.0)
    choice = choose(COSTS, [slow, fast])
    assert (choice.name, choice.speedup) == ("lookup", 1.5)  # 2.25 * 2 / 3
    assert choice.reasons == (
        "lookup: 1.50x plain decoding, 2.25 tokens a call that costs 1.50 plain ones (5 nodes, 0.00 of it drafting)",
        "heads: 1.00x plain decoding, 3.00 tokens a call that costs 3.00 plain ones (9 nodes, 0.50 of it drafting)",
    )
    assert choose(COSTS, [slow]).name is None  # as fast as plain decoding is no reason
    assert choose(COSTS, []) == choose(COSTS)


def test_files(tmp_path):
    costs = Costs("a/model", "0123", "cpu", {1: 0.1, 4: 0.2}, (Candidate("lookup", 4, 1.5, 0.01),))
    costs.save(tmp_path / "new" / "costs.json")
    assert Costs.load(tmp_path / "new" / "costs.json") == costs
    with pytest.raises(UserError, match="no call times at .*experiments.bench costs measures them"):
        Costs.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"calls": {"one": 2}}')
    with pytest.raises(UserError, match="is no table of call times"):
        Costs.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("calls", "message"),
    [({4: 1.0}, "lack that of 1 node"), ({1: 0.0}, "a call of 1 nodes took 0.0 seconds")],
)
def test_tables_that_mean_nothing(calls, message):
    with pytest.raises(UserError, match=message):
        Costs("m", "f", "d", calls)


def test_candidates_that_mean_nothing():
    with pytest.raises(UserError, match="lookup: 5 tokens a call of 4 nodes"):
        Candidate("lookup", 4, 5, 0.0)
