"""Near-duplicate texts, found by the exact Jaccard similarity of their word shingles.

A held-out file that has a near copy among the training files measures memory, not modelling, so a split
keeps each group of near-duplicates on one side.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

_WORD = re.compile(r"\w+|[^\w\s]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a power of it loses no bits mod 2**64


def shingles(texts: Sequence[str], width: int = 5) -> list[np.ndarray]:
    """The set of hashed runs of `width` words of each text, as sorted uint64 arrays.

    Words are identifiers, numbers and single punctuation marks; white space doesn't count. A text of fewer
    than `width` words has one shingle (all of it).
    """
    ids: dict[str, int] = {}
    encoded = []
    for text in texts:
        words = [ids.setdefault(word, len(ids)) for word in _WORD.findall(text)]
        encoded.append(np.asarray(words, np.int64))
    digests = [hashlib.blake2b(word.encode(), digest_size=8).digest() for word in ids]
    hashes = np.frombuffer(b"".join(digests), "<u8")
    result = []
    for words in encoded:
        values = hashes[words]
        span = min(width, len(values)) or 1
        rolling = np.zeros(max(len(values) - span + 1, 0), np.uint64)
        for offset in range(span):
            rolling = rolling * _MULTIPLIER + values[offset : offset + len(rolling)]
        result.append(np.unique(rolling))
    return result


def near_duplicate_groups(texts: Sequence[str], threshold: float = 0.5) -> np.ndarray:
    """Groups of near-duplicates: int32[len(texts)], the index of the first text of each one's group.

    Two texts belong together when the Jaccard similarity |A & B| / |A | B| of their shingle sets is at least
    `threshold`, and so do texts linked by a chain of such pairs. Nothing is sampled, so the result depends on
    the texts alone. The cost grows with the number of pairs that share a shingle: meant for thousands of
    texts.
    """
    sets = shingles(texts)
    count = len(sets)
    sizes = np.array([len(s) for s in sets], np.int64)
    _, columns = np.unique(np.concatenate([*sets, np.zeros(0, np.uint64)]), return_inverse=True)
    rows = np.repeat(np.arange(count), sizes)
    incidence = sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), (count, columns.size + 1))
    common = (incidence @ incidence.T).tocoo()
    union = sizes[common.row] + sizes[common.col] - common.data
    keep = common.data >= threshold * union
    links = sparse.coo_matrix((np.ones(keep.sum()), (common.row[keep], common.col[keep])), (count, count))
    _, labels = sparse.csgraph.connected_components(links, directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels].astype(np.int32)
