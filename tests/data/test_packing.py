import numpy as np
import pytest

from research.data.packing import (
    Stream,
    mixture_counts,
    mixture_table,
    num_rows,
    pack_rows,
    permutation,
)

# Three documents between <bos> 1 and <eos> 2, in the order B, A, C.
A, B, C = [1, 10, 11, 2], [1, 20, 2], [1, 30, 31, 32, 2]
TOKENS = np.array(A + B + C, np.uint16)
OFFSETS = np.array([0, 4, 7, 12])
STREAM = Stream.of(np.array([4, 3, 5]), np.array([1, 0, 2]))  # 1 20 2 | 1 10 11 2 | 1 30 31 32 2
BYTES = np.where(np.arange(40) >= 10, np.arange(40), 0).astype(np.int32)  # token 20 stands for 20 bytes


def pack(rows, length):
    return pack_rows(np.array(rows), STREAM, TOKENS, OFFSETS, length, 0, BYTES)


def check(packed, **expected):
    assert set(packed) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(packed[name], value, err_msg=name)


def test_table_by_hand():
    assert STREAM.starts.tolist() == [0, 3, 7, 12]
    assert num_rows(12, 5) == 3  # 11 targets in rows of 5: 2 full rows, and 1 target in the third
    check(
        pack([0, 1, 2], 5),
        tokens=[[1, 20, 2, 1, 10], [11, 2, 1, 30, 31], [32, 2, 0, 0, 0]],
        targets=[[20, 2, 1, 10, 11], [2, 1, 30, 31, 32], [2, 0, 0, 0, 0]],
        segments=[[1, 1, 1, 2, 2], [1, 1, 2, 2, 2], [1, 1, 0, 0, 0]],
        positions=[[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 0, 0, 0]],
        # <eos> -> <bos> crosses documents: no target. The last <eos> has nothing after it.
        weights=[[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0]],
        target_bytes=[[20, 0, 0, 10, 11], [0, 0, 30, 31, 32], [0, 0, 0, 0, 0]],
    )


def test_rows_that_end_with_the_stream_have_no_padding():
    assert num_rows(12, 11) == 1
    packed = pack([0], 11)
    np.testing.assert_array_equal(packed["targets"][0], (B + A + C)[1:])
    assert (packed["segments"] > 0).all()


def test_bytes_of_a_target_that_does_not_count_are_not_counted():
    # Without <bos> and <eos> the first word of a document follows another document.
    stream = Stream.of(np.array([2, 2]), np.array([0, 1]))
    packed = pack_rows(np.array([0]), stream, np.array([10, 11, 12, 13]), np.array([0, 2, 4]), 3, 0, BYTES)
    np.testing.assert_array_equal(packed["weights"], [[1, 0, 1]])
    np.testing.assert_array_equal(packed["target_bytes"], [[11, 0, 13]])


def test_types_and_any_order_of_rows():
    packed = pack([2, 0], 5)
    for name, value in packed.items():
        assert value.shape == (2, 5)
        assert value.dtype == (np.float32 if name == "weights" else np.int32)
    both = pack([0, 1, 2], 5)
    for name in packed:
        np.testing.assert_array_equal(packed[name], both[name][[2, 0]])


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_every_token_but_the_first_is_a_target_once(length):
    draw = np.random.RandomState(0)
    lengths = draw.randint(1, 30, size=40)
    tokens = np.arange(3, 3 + lengths.sum())  # each token is its own name
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    document = np.repeat(np.arange(40), lengths)
    order = draw.permutation(40)
    stream = Stream.of(lengths, order)
    rows = np.arange(num_rows(len(tokens), length))
    sizes = np.ones(len(tokens) + 3, np.int32)
    packed = pack_rows(rows, stream, tokens, offsets, length, 0, sizes)
    expected = np.concatenate([tokens[offsets[d] : offsets[d + 1]] for d in order])
    targets = packed["targets"].ravel()
    np.testing.assert_array_equal(targets[targets > 0], expected[1:])
    counted = packed["weights"] == 1
    same = document[packed["tokens"][counted] - 3] == document[packed["targets"][counted] - 3]
    assert same.all()
    assert counted.sum() == len(tokens) - 40  # all but the first of each document
    # Inside a row, equal segments are exactly the tokens of one document, and positions are consecutive.
    for row in range(len(rows)):
        real = packed["segments"][row] > 0
        ids, segments = packed["tokens"][row][real] - 3, packed["segments"][row][real]
        np.testing.assert_array_equal(segments[:, None] == segments, document[ids][:, None] == document[ids])
        for segment in np.unique(segments):
            positions = packed["positions"][row][real][segments == segment]
            np.testing.assert_array_equal(positions, np.arange(len(positions)))


def test_mixture_counts():
    # 10 records, weights 2:1:1 -> 5, 2.5, 2.5: the one left over goes to the first of the equal remainders.
    assert mixture_counts(np.array([2.0, 1.0, 1.0]), 10).tolist() == [5, 3, 2]
    # 7 records, weights 0.5:0.3:0.2 -> 3.5, 2.1, 1.4: floors 3, 2, 1 and one more where 0.5 was lost.
    assert mixture_counts(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    assert mixture_counts(np.array([1.0]), 9).tolist() == [9]


def test_mixture_table_by_hand():
    # Moments (j + 1/2) / count: 1/6, 3/6, 5/6 for the first source, 1/2 for the second; ties in order.
    source, index = mixture_table(np.array([3, 1]))
    assert source.tolist() == [0, 0, 1, 0]
    assert index.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("counts", [[700, 300], [1, 999], [512, 512]])
def test_mixture_is_even_at_every_moment(counts):
    source, index = mixture_table(np.array(counts))
    for i, count in enumerate(counts):
        np.testing.assert_array_equal(index[source == i], np.arange(count))
        so_far = np.cumsum(source == i)
        share = np.arange(1, len(source) + 1) * count / sum(counts)
        assert np.abs(so_far - share).max() <= 1


def test_permutation_depends_on_the_whole_key_and_never_changes():
    order = permutation(6, 0, 1, 2)
    assert sorted(order) == list(range(6))
    assert order.dtype == np.int64
    keys = [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 3)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == 4
    # Recorded: what an old checkpoint resumes with.
    assert order.tolist() == [2, 0, 1, 4, 5, 3]
