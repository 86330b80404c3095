"""Recall data: what is asked for can be answered from the context, and nothing else has weight."""

import numpy as np
import pytest

from research.data.recall import Answers, Recall, needle
from research.errors import UserError


def test_every_answer_stands_in_the_context():
    for data, pairs, queries in ((Recall(32), 8, 8), (needle(40, 0.5), 4, 1)):
        batch = data.take(np.arange(5))
        for row in range(5):
            tokens, weights = batch["tokens"][row], batch["weights"][row]
            context = tokens[: data.prompt - 1].tolist()
            keys = [i for i, token in enumerate(context) if token < 64]
            values = {context[i]: context[i + 1] for i in keys}
            assert len(values) == pairs and sum(token >= 128 for token in context) == data.filler
            (asked,) = np.nonzero(weights)
            assert len(asked) == queries
            assert [values[tokens[i]] for i in asked] == batch["targets"][row, asked].tolist()
            assert batch["targets"][row, asked].tolist() == tokens[asked + 1].tolist()


def test_a_needle_lies_at_its_depth():
    for depth, place in ((0.0, 0), (1.0, 40 - 2 - 2)):
        batch = needle(40, depth).take(np.arange(3))
        asked = batch["tokens"][:, -2]
        assert (batch["tokens"][:, place] == asked).all()


def test_records_are_functions_of_their_number_and_split():
    data = Recall(16)
    np.testing.assert_array_equal(data.take(np.array([3]))["tokens"], data.take(np.arange(4))["tokens"][3:])
    held_out = Recall(16, split="test").take(np.arange(4))["tokens"]
    assert (data.take(np.arange(4))["tokens"] != held_out).any(axis=1).all()


def test_answers_are_the_end_of_a_row():
    weights = Answers(Recall(16), 4).take(np.arange(2))["weights"]
    assert weights.tolist() == [[0.0] * 12 + [1.0, 0.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recall(400), "100 pairs of 64 keys"),
        (lambda: Recall(12, pairs=4), "take 16 tokens, length=12"),
        (lambda: Recall(16, depth=0.5), "there are 4 queries"),
        (lambda: Recall(16, split="dev"), "train, validation, test, not 'dev'"),
        (lambda: Answers(Recall(16), 16), "count=16 of rows of 16"),
    ],
)
def test_impossible_data_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
