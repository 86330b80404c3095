import itertools

import jax
import numpy as np
import pytest

from research.data.pipeline import RecordDataset
from research.errors import UserError


class Numbers(RecordDataset):
    """Record i of the run is (i // 10, i % 10)."""

    def element_spec(self):
        return {"x": jax.ShapeDtypeStruct((2,), np.int32), "weights": jax.ShapeDtypeStruct((), np.float32)}

    def __len__(self):
        return 10

    def take(self, numbers):
        return {
            "x": np.stack(np.divmod(numbers, 10), 1).astype(np.int32),
            "weights": np.ones(len(numbers), "f4"),
        }


def first(iterator, count):
    return [batch["x"] for batch in itertools.islice(iterator, count)]


def test_rows_by_hand():
    a, b = first(Numbers().batches(7, 4), 2)
    assert a.tolist() == [[0, 7], [0, 8], [0, 9], [1, 0]]
    assert b.tolist() == [[1, 1], [1, 2], [1, 3], [1, 4]]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_rows(hosts):
    whole = first(Numbers().batches(3, 8), 6)
    parts = [first(Numbers().batches(3, 8, rows=range(k, 8, hosts)), 6) for k in range(hosts)]
    for step, batch in enumerate(whole):
        for k in range(hosts):
            np.testing.assert_array_equal(parts[k][step], batch[k::hosts])


def test_a_finite_pass_ends_with_zeros():
    batches = list(Numbers().batches(0, 4, epochs=1))
    assert [b["weights"].tolist() for b in batches] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batches[2]["x"].tolist() == [[0, 8], [0, 9], [0, 0], [0, 0]]
    # A host whose rows are all past the end gets zeros, so that every host has as many batches.
    last = list(Numbers().batches(0, 8, rows=(3, 7), epochs=1))[1]
    assert last["x"].tolist() == [[0, 0], [0, 0]] and last["weights"].tolist() == [0, 0]


@pytest.mark.parametrize(("start", "epochs", "expected"), [(13, 2, 7), (20, 2, 0), (25, 2, 0), (0, 2, 20)])
def test_epochs_are_counted_from_record_zero(start, epochs, expected):
    assert sum(b["weights"].sum() for b in Numbers().batches(start, 3, epochs=epochs)) == expected


def test_far_along():
    start = 10**12 + 3
    assert first(Numbers().batches(start, 2), 1)[0].tolist() == [
        [10**11 - 23 * 2**32, 3],
        [10**11 - 23 * 2**32, 4],
    ]


def test_an_error_in_a_thread_reaches_the_caller():
    class Broken(Numbers):
        def take(self, numbers):
            raise UserError("file.jsonl, line 7: not JSON")

    with pytest.raises(UserError, match="line 7"):
        next(Broken().batches(0, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1, "batch_size": 2}, "record -1, batch size 2: at least 0 and 1 are expected"),
        ({"start": 0, "batch_size": 0}, "record 0, batch size 0"),
        ({"start": 0, "batch_size": 4, "rows": (2, 4)}, r"rows \[2, 4\] of a batch of 4: some of 0 to 3"),
        ({"start": 0, "batch_size": 3, "rows": ()}, "of a batch of 3: some of 0 to 2"),
    ],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(UserError, match=message):
        Numbers().batches(**arguments)
