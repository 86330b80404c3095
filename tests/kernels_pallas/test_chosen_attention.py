"""Attention that chooses, and over what was chosen: choices exact, where scores are exact, and the rest against
float64."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import chosen_attention as kernels
from kernels_pallas.chosen_attention import Unsupported
from tests.kernels_pallas.test_tree_attention import CASES, as_arrays, make, tree_attention

# One program a shape instead of one an operation.
select_attention = jax.jit(
    kernels.select_attention, static_argnames=("k", "per", "scale", "softcap", "implementation")
)
listed_attention = jax.jit(kernels.listed_attention, static_argnames=("scale", "softcap", "implementation"))
IMPLEMENTATIONS = ("reference", "cpu")


@pytest.fixture(params=[4, 8, 16])
def lanes(request, monkeypatch):
    """Vectors of every processor: wider ones than this processor's are cut by LLVM."""
    monkeypatch.setattr("kernels_pallas.cpu.lanes", lambda: request.param)


def whole(arguments):
    """The same with small whole numbers, whose products have the same bits in every order, and often are equal."""
    query, cached, fresh, *masks = arguments
    rounded = jax.tree.map(lambda x: np.round(2 * x).astype(np.float32), (query, cached, fresh))
    return *rounded, *masks


def visible(arguments) -> np.ndarray:
    """bool [B, H, N, S + N]."""
    query, cached, _, length, tree, mask = arguments
    batch, heads, count, _ = query.shape
    slots = cached[0].shape[2]
    held = np.arange(slots) < np.asarray(length)[:, None, None, None]
    held = np.broadcast_to(held if mask is None else held & mask, (batch, heads, count, slots))
    return np.concatenate([held, np.broadcast_to(tree, (batch, heads, count, count))], axis=-1)


def tokens(arguments, part: int) -> np.ndarray:
    """float64 keys (0) or values (1) of slots and new tokens for every query head, [B, H, S + N, d]."""
    query, cached, fresh, *_ = arguments
    rows = np.concatenate([cached[part], fresh[part]], axis=2).astype(np.float64)
    return np.repeat(rows, query.shape[1] // rows.shape[1], axis=1)


def scores(arguments, scale: float, softcap: float | None) -> np.ndarray:
    """float64 [B, H, N, S + N], -inf where not seen."""
    raw = np.einsum("bhnd,bhsd->bhns", np.asarray(arguments[0], np.float64), tokens(arguments, 0)) * scale
    if softcap is not None:
        raw = softcap * np.tanh(raw / softcap)
    return np.where(visible(arguments), raw, -np.inf)


def chosen(rank: np.ndarray, k: int) -> np.ndarray:
    """The k greatest of every row [B, s, N, S + N], oneself and of equal ones the lower first, and then ascending."""
    slots = rank.shape[3] - rank.shape[2]
    k = min(k, rank.shape[3])
    choice = np.full((*rank.shape[:3], k), -1, np.int32)
    for b, s, n in np.ndindex(rank.shape[:3]):
        row = rank[b, s, n].copy()
        row[slots + n] = np.inf
        best = sorted(i for i in np.argsort(-row, kind="stable")[:k] if row[i] > -np.inf)
        choice[b, s, n, : len(best)] = best
    return choice


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_greatest_are_chosen_and_the_output_is_that_of_all(name, implementation):
    arguments = whole(make(**CASES[name]))
    batch, heads, count, dim = arguments[0].shape
    found = scores(arguments, 0.5, None)
    by_group = found.reshape(batch, CASES[name]["kv_heads"], -1, *found.shape[2:]).max(2)
    for per, rank in (("head", found), ("group", by_group)):
        for k in (1, 5, 1000):
            options = dict(k=k, per=per, scale=0.5, implementation=implementation)
            out, choice = select_attention(*arguments, **options)
            assert choice.dtype == jnp.int32 and np.array_equal(choice, chosen(rank, k))
            plain = tree_attention(*arguments, scale=0.5, implementation=implementation)
            assert np.array_equal(out, plain) and np.isfinite(out).all()


@pytest.mark.parametrize("per", ["head", "group"])
def test_vectors_of_other_processors(lanes, per):
    for dim in (4, 48):
        case = dict(batch=2, heads=4, kv_heads=2, count=3, slots=70, dim=dim, lengths=[70, 1], mask=(1, 4))
        arguments = whole(make(**case))
        rank = scores(arguments, 0.25, None)
        rank = rank if per == "head" else rank.reshape(2, 2, 2, *rank.shape[2:]).max(2)
        arrays = as_arrays(arguments)
        _, choice = kernels.select_attention(*arrays, k=6, per=per, scale=0.25)
        assert np.array_equal(choice, chosen(rank, 6))
        out = kernels.listed_attention(*arrays[:3], choice, scale=0.25)
        np.testing.assert_allclose(out, over(arguments, choice, 0.25, None), atol=1e-5)


def as_scores(values: np.ndarray) -> tuple:
    """Arguments of one head whose cached scores are these numbers and whose own is the least; d = 4."""
    key = np.zeros((1, 1, len(values), 4), np.float32)
    key[..., 0] = values
    new = np.full((1, 1, 1, 4), -9, np.float32)
    query = np.eye(4, dtype=np.float32)[None, None, :1]
    return query, (key, key), (new, new), np.int32([len(values)]), np.ones((1, 1, 1, 1), bool), None


rng = np.random.default_rng(0)
ROWS = {
    "normal": rng.normal(size=3000),
    "far apart": rng.choice([-1, 1], 3000) * 2.0 ** rng.integers(-100, 6, 3000),
    "three numbers": rng.choice([-1.5, 0.0, 3.0], 3000),
    "all equal": np.full(3000, 0.25),
    "ascending": np.arange(3000) / 64 - 8,
    "descending": 8 - np.arange(3000) / 64,
    "neighbours": np.float32(1) + np.arange(3000)[::-1] % 300 * 2.0**-23,
    "one above": np.where(np.arange(3000) == 2999, 1.0, -1.0),
    "fewer than a vector": np.float32([3, 1, 2]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_kind(name, lanes):
    values = np.float32(ROWS[name])
    arguments = as_arrays(as_scores(values))
    for k in (1, 2, 256, 2999, 3001):
        _, choice = kernels.select_attention(*arguments, k=k, scale=1.0)
        assert np.array_equal(choice, chosen(np.append(values, -9)[None, None, None], k))


def test_ties_take_the_lower_entry_and_nan_is_never_taken():
    # Greatest is 5, then four 2s, of which two have room beside oneself (entry 7).
    arguments = as_scores(np.float32([2, 1, 2, np.nan, 5, 2, 2]))
    choose = lambda k: np.asarray(select_attention(*arguments, k=k, scale=1.0)[1])[0, 0, 0].tolist()  # noqa: E731
    assert choose(4) == [0, 2, 4, 7]
    assert choose(6) == [0, 2, 4, 5, 6, 7]
    assert choose(8) == [0, 1, 2, 4, 5, 6, 7, -1]


def over(arguments, choice, scale: float, softcap: float | None) -> np.ndarray:
    """Attention over the choice and oneself, in float64."""
    query, cached, *_ = arguments
    batch, heads, count, _ = query.shape
    slots = cached[0].shape[2]
    index = np.repeat(np.asarray(choice), heads // choice.shape[1], axis=1)
    kept = (index[..., None] == np.arange(slots + count)).any(-2)
    kept[:, :, np.arange(count), slots + np.arange(count)] = True
    everything = (*arguments[:3], np.full(batch, slots), np.ones((1, 1, count, count), bool), None)
    with np.errstate(invalid="ignore"):
        found = np.where(kept, scores(everything, scale, softcap), -np.inf)
    weights = np.exp(found - found.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    value = np.where(np.isfinite(tokens(arguments, 1)), tokens(arguments, 1), 0)  # slots that hold nothing
    return np.einsum("bhns,bhsd->bhnd", weights, value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", CASES)
def test_attention_over_a_list(name, softcap, implementation):
    arguments = make(**CASES[name])
    seen = visible(arguments)
    draw = np.random.default_rng(1)
    batch, heads, count, everybody = seen.shape
    for sets, k in ((heads, 9), (arguments[1][0].shape[1], 70)):
        # A list of some that its heads see, in any order, with holes, with oneself or without.
        of_set = seen.reshape(batch, sets, -1, count, everybody).all(2)
        choice = np.full((batch, sets, count, k), -1, np.int32)
        for place in np.ndindex(batch, sets, count):
            some = draw.permutation(np.flatnonzero(of_set[place]))[: k - 2]
            choice[place][draw.permutation(k)[: len(some)]] = some
        options = dict(softcap=softcap, implementation=implementation)
        out = listed_attention(*arguments[:3], choice, **options)
        # Sums of 71 terms of order 1, and weights of a hundredth and more.
        np.testing.assert_allclose(
            out, over(arguments, choice, arguments[0].shape[3] ** -0.5, softcap), atol=3e-6
        )


def test_more_heads_and_entries_than_a_block():
    """70 heads of a key head, more than are kept at once, and 200 entries, whose blocks end within the list."""
    arguments = make(1, 70, 1, 2, 300, 8, [300])
    _, choice = select_attention(*arguments, k=200, per="group")
    out = listed_attention(*arguments[:3], choice)
    np.testing.assert_allclose(out, over(arguments, choice, 8**-0.5, None), atol=3e-6)


def test_nobody_is_listed():
    arguments = make(2, 2, 2, 3, 16, 8, [16, 0])
    choice = np.full((2, 2, 3, 4), -1, np.int32)
    choice[..., 1] = 16 + 3  # behind all
    for listed in (choice, choice[..., :0]):
        assert np.array_equal(listed_attention(*arguments[:3], listed), arguments[2][1])  # one's own value


def test_a_list_of_everything_is_attention():
    arguments = make(2, 4, 2, 5, 100, 16, [100, 40])
    out, choice = select_attention(*arguments, k=105)
    np.testing.assert_allclose(listed_attention(*arguments[:3], choice), out, atol=1e-6)


def test_a_row_has_the_same_bits_alone_and_with_any_number_of_threads():
    query, cached, fresh, length, tree, _ = make(3, 4, 2, 3, 900, 32, [900, 0, 500])
    # The number of pieces and with it of threads: all, and one.
    out, choice = select_attention(query, cached, fresh, length, tree, k=64)
    listed = listed_attention(query, cached, fresh, choice)
    for row, head in np.ndindex(3, 2):
        q, t, c = (x[row : row + 1] for x in (query, tree, choice))
        heads, own = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        pairs = tuple(tuple(x[row : row + 1, own] for x in pair) for pair in (cached, fresh))
        alone = select_attention(q[:, heads], *pairs, length[row : row + 1], t, k=64)
        assert np.array_equal(alone[0], out[row : row + 1, heads])
        assert np.array_equal(alone[1], c[:, heads])
        alone = listed_attention(q[:, heads], *pairs, c[:, heads])
        assert np.array_equal(alone, listed[row : row + 1, heads])


def test_many_callers_at_once():
    # Who finds the threads taken computes alone: the bits are the same with helpers and without.
    arguments = as_arrays(make(1, 4, 4, 1, 2000, 32, [1990])[:5])

    @jax.jit
    def both(*arguments):
        out, choice = select_attention(*arguments, k=64)
        return out, choice, listed_attention(*arguments[:3], choice)

    expected = jax.device_get(both(*arguments))
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: jax.device_get(both(*arguments)), range(50))
        assert all(all(map(np.array_equal, found, expected)) for found in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="tpu"), "no implementation 'tpu': there are reference and cpu"),
        (dict(dim=6), "head_dim=6: the cpu kernel takes multiples of 4"),
        (dict(dtype=jnp.bfloat16), "query is bfloat16: the cpu kernel takes float32"),
        (dict(kv_heads=3), "4 query heads are not a multiple of 3 key heads"),
        (dict(tree_heads=2), "tree is bool"),
        (dict(k=0), "k=0, per='head': at least 1"),
        (dict(per="set"), "per='set': .* head or group are expected"),
        (dict(length=np.int32([1, 2])), r"length has shape \(2,\), expected \(1,\)"),
    ],
)
def test_what_cannot_be_chosen_is_refused(change, message):
    shapes = dict(batch=1, heads=4, kv_heads=2, count=2, slots=64, dim=16, lengths=[3])
    options = dict(k=4, per="head", implementation="cpu", length=None)
    for name, value in change.items():
        (shapes if name in shapes or name in ("dtype", "tree_heads") else options)[name] = value
    query, cached, fresh, length, tree, mask = make(**shapes)
    given = options.pop("length")
    length = length if given is None else given
    with pytest.raises(Unsupported, match=message):
        select_attention(query, cached, fresh, length, tree, mask, **options)


@pytest.mark.parametrize(
    "choice", [np.zeros((1, 3, 2, 4), np.int32), np.zeros((1, 4, 2), np.int32), np.zeros((1, 4, 2, 4))]
)
def test_what_is_no_list_is_refused(choice):
    arguments = make(1, 4, 2, 2, 64, 16, [3])
    with pytest.raises(Unsupported, match=r"expected int32 \[1, 4 or 2, 2, K\]"):
        listed_attention(*arguments[:3], choice)
