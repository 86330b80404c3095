"""GEAR: the exact properties of its parts on small chunks, and of its cache on a decoder of one layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.gear import Gear, GearRows, compress, parse_cache, power_iteration, with_cache
from research.decoding.generator import Generator
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.attention_kernels import TreeAttention
from research.nn.masks import Window
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import array_bits
from tests.programs import drawn

HEADS, SIZE, DIM = 2, 16, 8
SMALL = Gear(bits=2, group=8, rank=2, outliers=0.1, buffer=SIZE)
SMALL_S = dataclasses.replace(SMALL, outliers=0.2)
PLAIN = dataclasses.replace(SMALL, rank=0, outliers=0.0)


def rows(batch=2, chunks=3):
    """Chunks [B, C, H, n, d] with a loud channel and some entries of 6 deviations."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, chunks, HEADS, SIZE, DIM)).astype(np.float32)
    return np.where(rng.random(x.shape) < 0.02, 6 * x, x) * np.linspace(0.5, 3, DIM, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def both(x, gear, along):
    """What is kept of chunks, D + S, and D + S + L as chunks."""
    kept = compress(x, gear, along)
    low_rank = jnp.einsum("bchnr,bchdr->bchnd", kept.left, kept.right)
    return kept, kept.dense(), kept.dense() + low_rank


read = jax.jit(lambda layer, length: layer.read(length))
dense = jax.jit(lambda kept: kept.dense())
materialize = jax.jit(lambda kept: kept.materialize())


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def off(x, y):
    return float(np.linalg.norm(x - y))


@pytest.mark.parametrize("along", ["channel", "token"])
def test_every_part_brings_it_nearer_and_outliers_are_exact(along):
    x = rows()
    plain = both(x, PLAIN, along)[2]
    kept, sparse, whole = both(x, SMALL, along)
    assert off(x, whole) < off(x, sparse) < off(x, plain)
    # Vectors by hand: channels over tokens, or tokens over the channels of all heads.
    vectors = lambda y: np.moveaxis(np.asarray(y), *((3, 4) if along == "channel" else (3, 2)))  # noqa: E731
    merge = lambda y: y.reshape(2, 3, *((16, 16) if along == "channel" else (16, 16)))  # noqa: E731
    at = np.asarray(kept.place).astype(int)
    exact, found = (np.take_along_axis(merge(vectors(y)), at, axis=-1) for y in (x, sparse))
    np.testing.assert_array_equal(exact, found)
    # round(0.05 * 16) = 1 at either end: the least and the greatest.
    np.testing.assert_array_equal(exact[..., 0], merge(vectors(x)).min(-1))
    np.testing.assert_array_equal(exact[..., 1], merge(vectors(x)).max(-1))
    assert off(whole, sparse) > 0  # L is not zero


def test_a_vector_is_quantized_as_by_hand():
    # A key channel 0, 1, 2, ... 15 in groups of 8: steps of 7 / 3, values 0, 7/3, 14/3, 7, and then 8 higher.
    x = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None], (1, 1, 1, 16, 8))
    found = np.asarray(both(x, dataclasses.replace(PLAIN, group=8), "channel")[1])[0, 0, 0, :, 0]
    steps = np.round(np.arange(8) / (7 / 3)) * 7 / 3
    np.testing.assert_allclose(found, np.concatenate([steps, 8 + steps]), rtol=1e-6)


def test_constants_full_rank_all_outliers_and_more_bits():
    x = rows()
    constant = np.full_like(x, 1.7)
    np.testing.assert_array_equal(both(constant, SMALL, "token")[1], constant)
    # Rounding of sums of 16 terms of size up to 20.
    np.testing.assert_allclose(both(x, dataclasses.replace(SMALL, rank=DIM), "channel")[2], x, atol=2e-4)
    np.testing.assert_array_equal(both(x, dataclasses.replace(SMALL, outliers=1.0, rank=0), "channel")[2], x)
    errors = [off(x, both(x, dataclasses.replace(PLAIN, bits=bits), "token")[2]) for bits in (2, 4, 8, 16)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[3] == 0


def test_low_rank_is_a_projection_that_grows_with_the_rank():
    residual = rows()[0, 0]
    errors = []
    for rank in (1, 2, 4, DIM):
        factors = jax.jit(power_iteration, static_argnums=(1, 2))(residual, rank, 3, jax.random.key(0))
        left, right = map(np.asarray, factors)
        np.testing.assert_allclose(
            left.mT @ left, np.broadcast_to(np.eye(rank), (HEADS, rank, rank)), atol=1e-5
        )
        projected = left @ right.mT
        np.testing.assert_allclose(left @ (left.mT @ residual), projected, atol=1e-4)
        errors.append(off(residual, projected))
    assert off(residual, 0) > errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-4


def test_factored_attention_is_that_of_the_materialized_rows():
    kept = both(rows(), SMALL, "channel")[0]
    held = GearRows((kept,), normal(2, HEADS, 5, DIM))
    query = normal(2, HEADS, 3, DIM)
    dense, scores, mixed = jax.jit(lambda h, q: (h.materialize(), h.scores(q), h.mix(h.scores(q))))(
        held, query
    )
    assert dense.shape == held.shape == (2, HEADS, 3 * SIZE + 5, DIM)
    # Sums of 8 and 53 products of size up to 400.
    np.testing.assert_allclose(scores, np.einsum("bhmd,bhsd->bhms", query, dense), atol=1e-3)
    np.testing.assert_allclose(mixed, np.einsum("bhms,bhsd->bhmd", scores, dense), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("gear", [SMALL, PLAIN, dataclasses.replace(SMALL, group=None, bits=4, keys="token")])
def test_bits_are_those_of_the_formula(gear):
    cache = jax.eval_shape(lambda: gear.empty(3, 5 * SIZE, HEADS, DIM, 2, jnp.bfloat16))
    assert cache.stored_bits() == 3 * 5 * gear.chunk_bits(HEADS, DIM, 16)
    buffers = sum(array_bits(x) for x in (cache.key_buffer, cache.value_buffer))
    assert buffers == 2 * 3 * HEADS * (SIZE + 1) * DIM * 16


def test_by_hand_what_a_chunk_takes():
    # 256 elements of 2 bits; of keys 16 channels of 2 groups, of values 16 tokens of 2: 64 x 32 bits; 2 factors of
    # (16 + 8) x 2 x 2 heads x 16 bits; 2 x 16 vectors x 2 outliers x (16 + 8) bits.
    assert SMALL.chunk_bits(HEADS, DIM, 16) == 2 * 512 + 64 * 32 + 2 * 1536 + 64 * 24


def decoder(rule=None, cached=None):
    fields = dict(num_heads=4, num_kv_heads=HEADS, head_dim=DIM, rotary=Rotary())
    fields |= {} if rule is None else dict(rule=rule)
    fields |= {} if cached is None else dict(cached_kernel=cached)
    return DecoderLM(
        vocab_size=32,
        width=16,
        max_length=96,
        num_layers=1,
        blocks=(Block(Attention(**fields), GatedMLP(16)),),
    )


@functools.cache
def params():
    made = drawn(decoder(), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda x: jnp.asarray(3.0 * np.asarray(x)) if x.ndim > 1 else x, made)


def tokens_of(rows):
    return np.random.default_rng(3).integers(0, 32, (rows, 80), np.int32)


@functools.cache
def original():
    """Keys and values of a prompt, nothing compressed."""
    run = lambda t: decoder().apply({"params": params()}, t, np.full((3,), 80), method="prefill")[2][0]  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(run)(tokens_of(3)))


@functools.partial(jax.jit, static_argnums=(0, 4))
def fill(model, tokens, first, steps, prefilled):
    """The cache behind a prompt of first[b] <= `prefilled` tokens and steps[b] single ones, and the last logits."""
    variables = {"params": params()}
    _, _, fresh = model.apply(variables, tokens[:, :prefilled], first, method="prefill")
    cache = model.init_cache(len(tokens), 80, margin=4).commit(fresh, None, first)

    def step(i, carry):
        cache, _ = carry
        token = jnp.take_along_axis(tokens, jnp.minimum(cache.length, tokens.shape[1] - 1)[:, None], axis=1)
        logits, _, fresh = model.apply(variables, token, cache, method="extend")
        return cache.commit(fresh, None, (i < steps).astype(jnp.int32)), logits[:, 0]

    return jax.lax.fori_loop(0, jnp.max(steps), step, (cache, jnp.zeros((len(tokens), 32))))


def test_chunks_are_compressed_once_from_the_originals_row_by_row_and_survive_a_roll_back():
    model, _ = with_cache(decoder(), params(), SMALL)
    first, steps = np.array([40, 19, 3]), np.array([30, 30, 2])
    cache, _ = fill(model, tokens_of(3), first, steps, 40)
    layer = cache.layers[0]
    # 70 = 4 chunks + 4 margin + 2; 49 = 2 + 17, one short of a third with its margin; 5: none.
    np.testing.assert_array_equal(layer.held, [64, 32, 0])
    # Offline: the same chunks of the same original rows. A prompt's rows do not depend on compression in one layer.
    chunks = [x[:, :, :64].reshape(3, HEADS, 4, SIZE, DIM).swapaxes(1, 2) for x in original()]
    for kept, rows_, along in zip((layer.key, layer.value), chunks, ("channel", "token"), strict=True):
        expected = np.asarray(both(rows_, SMALL, along)[1])
        found = np.asarray(dense(kept))
        np.testing.assert_allclose(found[0, :4], expected[0], atol=1e-5)
        np.testing.assert_allclose(found[1, :2], expected[1, :2], atol=1e-5)
    # A roll-back by the margin, and other tokens behind it: nothing compressed changes.
    back = cache.rollback(np.asarray(cache.length) - 4)
    fresh = ((np.ones((3, HEADS, 2, DIM), np.float32),) * 2,)
    after = jax.jit(lambda c, f: c.commit(f, None, np.full((3,), 2)))(back, fresh)
    np.testing.assert_array_equal(after.layers[0].held, layer.held)
    keys, _, index, valid = read(after.layers[0], after.length)
    index, valid = np.asarray(index), np.asarray(valid)
    np.testing.assert_array_equal(np.sum(valid, axis=1), [68, 47, 3])
    keys, earlier = (np.asarray(materialize(k)) for k in (keys, read(layer, cache.length)[0]))
    for row, length in enumerate((68, 47, 3)):
        slots = np.flatnonzero(valid[row])
        np.testing.assert_array_equal(index[row, slots], np.arange(length))
        np.testing.assert_array_equal(keys[row, :, slots[-2:]], 1)
        np.testing.assert_array_equal(keys[row, :, slots[:-2]], earlier[row, :, slots[:-2]])
    with pytest.raises(
        UserError, match="a roll-back to 5 tokens reaches into compressed chunks: .* go back 4 tokens"
    ):
        cache.rollback(np.full((3,), 5))
    chosen = jax.jit(lambda cache, rows: cache.select(rows))(after, np.array([2, 0]))
    np.testing.assert_array_equal(chosen.layers[0].held, [0, 64])


def test_a_prompt_has_a_chunk_of_its_own():
    """Of 40 tokens 32 in one chunk of rank 3, of 19 none (with a margin of 4 there is no whole buffer), of 70 the first
    48; row by row what compressing just those tokens gives, and later chunks as ever."""
    kind = dataclasses.replace(SMALL, prompt=48, prompt_rank=3, outliers=0.2)
    model, _ = with_cache(decoder(), params(), kind)
    cache, _ = fill(model, tokens_of(3), np.array([40, 19, 70]), np.array([15, 2, 0]), 70)
    layer = cache.layers[0]
    np.testing.assert_array_equal(layer.begin, [32, 0, 48])
    # 55 = 48 + 4 + 3, 21 = 16 + 4 + 1, 70 = 64 + 4 + 2: each has a later chunk.
    np.testing.assert_array_equal(layer.held, [48, 16, 64])
    for kept, rows_, along in zip(layer.prompt, original(), ("channel", "token"), strict=True):
        whole = np.asarray(materialize(kept))
        for row, count in ((0, 32), (2, 48)):
            alone = both(
                rows_[row, :, :count][None, None], dataclasses.replace(kind.of_prompt, buffer=count), along
            )
            found = whole[row, :, :count]
            np.testing.assert_allclose(found, np.asarray(alone[2])[0, 0], atol=2e-4)
            places = lambda x: np.sort(np.unique(np.asarray(x)))  # noqa: E731
            if along == "channel":  # round(0.1 * 32) = 3 and round(0.1 * 48) = 5 at either end
                found, expected = (np.asarray(k.place) for k in (kept, alone[0]))
                np.testing.assert_array_equal(places(found[row, 0, 0]), places(expected[0, 0, 0]))
    # Behind it chunks of rank 2, from the tokens that follow.
    for kept, rows_, along in zip((layer.key, layer.value), original(), ("channel", "token"), strict=True):
        whole = np.asarray(materialize(kept))
        for row, at in enumerate((32, 0, 48)):
            alone = np.asarray(both(rows_[row, :, at : at + SIZE][None, None], SMALL_S, along)[2])
            np.testing.assert_allclose(whole[row, :, :SIZE], alone[0, 0], atol=2e-4)
    keys, _, index, valid = read(layer, cache.length)
    index, valid = np.asarray(index), np.asarray(valid)
    assert keys.shape == (3, HEADS, 48 + 80 + SIZE + 3, DIM)
    for row, length in enumerate((55, 21, 70)):
        np.testing.assert_array_equal(np.sort(index[row, valid[row]]), np.arange(length))
    # 2 bits a code and so on, by the formula of a chunk of 48 tokens and rank 3.
    cache = jax.eval_shape(lambda: kind.empty(1, 80, HEADS, DIM, 4, jnp.bfloat16))
    of_prompt = dataclasses.replace(kind, prompt=0, buffer=48, rank=3).chunk_bits(HEADS, DIM, 16)
    assert cache.stored_bits() == of_prompt + 5 * kind.chunk_bits(HEADS, DIM, 16)


def test_greedy_output_is_the_uncompressed_where_nothing_is_lost():
    prompts, options = [[5, 9, 2] * 8, [7]], dict(max_new_tokens=40)
    expected = Generator(decoder(), params()).generate(prompts, **options).samples
    for lossless in (
        Gear(16, rank=0, outliers=0.0, buffer=SIZE, group=8, prompt=32, prompt_rank=0),
        dataclasses.replace(SMALL, rank=DIM),
    ):
        model, own = with_cache(decoder(), params(), lossless)
        assert Generator(model, own).generate(prompts, **options).samples == expected


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Gear(bits=3), "bits=3 is not one of 2, 4, 8, 16"),
        (lambda: Gear(prompt=100), "prompt=100 is no multiple of the buffer of 64 tokens"),
        (lambda: Gear(group=48), "group=48 does not divide the buffer of 64 tokens"),
        (
            lambda: with_cache(decoder(), {}, Gear()),
            "group=64 does not divide the 16 channels of all 2 heads",
        ),
        (
            lambda: with_cache(decoder(), {}, Gear(group=8, rank=9)),
            "rank=9 is larger than heads of 8 channels",
        ),
        (
            lambda: with_cache(decoder(Window(4)), {}, SMALL),
            "no layer of this model has a cache that could be",
        ),
        (lambda: parse_cache("gaer:bits=2"), "no cache 'gaer'; did you mean gear"),
        (lambda: parse_cache("kivi:rank=2"), "kivi has no 'rank'"),
        (lambda: parse_cache("gear:bits=two"), "bits=two: a number is expected"),
    ],
)
def test_mistakes_are_told(act, message):
    with pytest.raises(UserError, match=message):
        act()


def test_a_kernel_that_reads_arrays_refuses():
    model, own = with_cache(decoder(cached=TreeAttention()), params(), SMALL)
    with pytest.raises(UserError, match="reads arrays, not GearRows"):
        jax.eval_shape(
            lambda: model.apply(
                {"params": own}, jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 32), method="extend"
            )
        )


def test_names():
    assert parse_cache("gear:bits=4,group=none,outliers=0.05") == Gear(4, None, outliers=0.05)
    assert parse_cache("tokens:bits=8") == Gear(8, keys="token", rank=0, prompt_rank=0, outliers=0.0)
    assert parse_cache("gear:prompt=128,prompt_rank=8") == Gear(prompt=128, prompt_rank=8)
