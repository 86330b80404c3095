import numpy as np

from research.data.duplicates import near_duplicate_groups, shingles


def words(*names: str) -> str:
    return " ".join(names)


def test_shingles_are_sets_of_runs_of_words():
    a, b, c, d = shingles(["a b c d e f", "a  b\nc d e f\n", "a b c d e f a b c d e f", "x"])
    assert len(a) == 2  # abcde, bcdef
    np.testing.assert_array_equal(a, b)  # white space doesn't count
    assert len(c) == 6  # the six rotations, of which abcde and bcdef occur twice
    assert np.isin(a, c).all()
    assert len(d) == 1


def test_groups_follow_the_jaccard_similarity():
    # 14 words have 10 shingles of 5. A new last word changes 1 of them: 9 common, 11 in all, 0.82 > 0.5.
    # A new middle word (number 7) changes 5 of them: 5 common, 15 in all, 1/3 < 0.5.
    base = [f"w{i}" for i in range(14)]
    near = [*base[:-1], "other"]
    far = [*base[:6], "other", *base[7:]]
    texts = [words(*far), words(*base), words("unrelated"), words(*near)]
    assert near_duplicate_groups(texts).tolist() == [0, 1, 2, 1]
    assert near_duplicate_groups(texts, threshold=1 / 3).tolist() == [0, 0, 2, 0]
    assert near_duplicate_groups(texts, threshold=0.9).tolist() == [0, 1, 2, 3]


def test_groups_are_linked_by_chains():
    # Each text shares 8 of 10 shingles with the next (8/12 > 0.5), the first 4 with the last (4/16 < 0.5).
    stream = [f"w{i}" for i in range(20)]
    texts = [words(*stream[i : i + 14]) for i in (0, 2, 4, 6)]
    assert near_duplicate_groups([texts[0], texts[3]]).tolist() == [0, 1]
    assert near_duplicate_groups(texts).tolist() == [0, 0, 0, 0]


def test_no_texts():
    assert near_duplicate_groups([]).tolist() == []
