"""GlobalCom2: ratios, scores, order and counts by hand, and an encoder's class token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.sparse.crop_reading import read, views
from research.sparse.globalcom2 import (
    GlobalCom2,
    Layout,
    compress,
    crop_ratios,
    encode,
    global_scores,
    holistic_scores,
)
from research.vision.vit import ViT
from tests.programs import drawn

SIDE, DIM = 4, 3
# A wide image in 2 x 2 crops: 8 rows of 8, of which 8 * 10 // 16 = 5 hold image, (8 - 5) // 2 = 1 row of padding above
# and below, so 6 rows of image.
WIDE = Layout((2, 2), SIDE, (16, 10))
SQUARE = Layout((2, 2), SIDE)


def tokens_and_scores(layout: Layout, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    n, m = layout.side**2, layout.crops
    shapes = ((n, DIM), (m, n, DIM), (n,), (m, n), (DIM,))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@functools.partial(jax.jit, static_argnums=(5, 6))
def run(*arguments):
    return compress(*arguments)


def by_hand(thumbnail, crops, s_g, s_l, layout, ratio) -> list[list[int]]:
    """What every crop keeps, as indices in the whole crop: loops and numpy's sort."""
    (gh, gw), side = layout.grid, layout.side
    sums = np.zeros(gh * gw)
    for i in range(side):
        for j in range(side):
            row, column = min(i // (side // gh), gh - 1), min(j // (side // gw), gw - 1)
            sums[row * gw + column] += s_g[i * side + j]
    sigma = np.exp(sums / 10) / np.exp(sums / 10).sum()
    ratios = np.minimum(ratio * (1 + sigma - sigma.mean()), 1)
    overall = np.asarray(global_scores(jnp.asarray(s_g, jnp.float32), layout), np.float64)
    kept = []
    for crop in range(gh * gw):
        places = np.flatnonzero(layout.to_crops(layout.valid)[crop])
        local, whole = s_l[crop][places], overall[crop][places]
        score = local / np.linalg.norm(local) + whole / np.linalg.norm(whole)
        kept.append(sorted(places[np.argsort(-score)[: int(len(places) * ratios[crop])]].tolist()))
    return kept


def test_the_padding_is_found_on_both_sides():
    assert WIDE.valid.any(axis=1).tolist() == [False] + [True] * 6 + [False]
    assert WIDE.counts.tolist() == [12, 12, 12, 12]
    tall = Layout((2, 1), 4, (3, 8))  # 8 rows of 4; 3 * 8 // 8 = 3 columns, (4 - 3) // 2 = 0 of padding
    assert tall.valid.all()
    narrow = Layout((2, 1), 4, (2, 8))  # 2 columns, one of padding on each side
    assert narrow.valid.any(axis=0).tolist() == [False, True, True, False]
    image = np.arange(64).reshape(8, 8)
    np.testing.assert_array_equal(WIDE.to_image(WIDE.to_crops(image)), image)
    assert WIDE.to_crops(image)[1].tolist()[:5] == [4, 5, 6, 7, 12]


def test_ratios():
    """They sum to m R, lie in R [1 - 1/m, 2 - 1/m], and are R where all scores are equal."""
    scores = jnp.arange(25.0)  # 5 x 5 in 2 x 2: regions of 2 x 2, 2 x 3, 3 x 2 and 3 x 3
    ratios = np.asarray(crop_ratios(scores, (2, 2), 0.25, 10.0))
    sums = np.array(
        [0 + 1 + 5 + 6, 2 + 3 + 4 + 7 + 8 + 9, 10 + 11 + 15 + 16 + 20 + 21, 162]
    )  # 162 = 12 + 13 + 14 + 17 + ... + 24
    sigma = np.exp((sums - sums.max()) / 10) / np.exp((sums - sums.max()) / 10).sum()
    np.testing.assert_allclose(ratios, 0.25 * (1 + sigma - 0.25), rtol=1e-6)
    assert ratios.sum() == pytest.approx(1.0, abs=1e-6)
    assert (ratios >= 0.25 * 0.75 - 1e-7).all() and (ratios <= 0.25 * 1.75).all()
    assert (crop_ratios(jnp.ones(16), (2, 2), 0.25, 10.0) == 0.25).all()
    assert crop_ratios(scores, (2, 2), 0.9, 10.0).max() == 1.0  # 0.9 * 1.75 is clipped


def test_global_scores_are_resized_to_the_image():
    """2 -> 4 with half-pixel centres: places -0.25, 0.25, 0.75, 1.25, clipped at the ends."""
    layout = Layout((1, 1), 4, (4, 2))  # rows 1 and 2 of 4 are image
    scores = global_scores(jnp.asarray([0.0, 4.0, 8.0, 12.0]), layout).reshape(4, 4)
    line = np.array([0.0, 1.0, 3.0, 4.0])
    np.testing.assert_allclose(scores, [line * 0, line, line + 8, line * 0], atol=1e-6)
    with pytest.raises(UserError, match=r"scores of shape \(5,\) are not those of a square thumbnail"):
        global_scores(jnp.ones(5), layout)


def test_holistic_scores():
    valid = jnp.asarray([[True, True, False]])
    scores = holistic_scores(jnp.asarray([[3.0, 4.0, 9.0]]), jnp.asarray([[-8.0, 6.0, 9.0]]), valid)
    np.testing.assert_allclose(scores, [[0.6 - 0.8, 0.8 + 0.6, 0.0]], atol=1e-6)


@pytest.mark.parametrize("layout", [SQUARE, WIDE], ids=["square", "padded"])
def test_what_is_kept_and_in_which_order(layout: Layout):
    inputs, rule = tokens_and_scores(layout), GlobalCom2(0.5)
    thumbnail, crops, s_g, s_l, newline = (np.asarray(x) for x in inputs)
    kept = run(*inputs, layout, rule)
    assert kept.tokens.shape == (rule.tokens(layout), DIM)
    chosen = by_hand(*(x.astype(np.float64) for x in (thumbnail, crops, s_g, s_l)), layout, 0.5)
    index = np.asarray(kept.index)[np.asarray(kept.valid)]
    # 8 of the thumbnail's 16; then the grid row by row, each with a newline, rows of padding too.
    assert index[:8].tolist() == sorted(np.argsort(-s_g)[:8].tolist())
    keep = np.zeros((4, 16), bool)
    for crop, places in enumerate(chosen):
        keep[crop, places] = True
    numbers = layout.to_image(16 + np.arange(64).reshape(4, 16))
    image = layout.to_image(keep)
    rows = [[*numbers[i][image[i]].tolist(), 80] for i in range(8)]
    assert index[8:].tolist() == sum(rows, [])
    assert len(index) == 8 + sum(map(len, chosen)) + 8
    table = np.concatenate([thumbnail, crops.reshape(64, DIM), newline[None]])
    np.testing.assert_array_equal(np.asarray(kept.tokens)[np.asarray(kept.valid)], table[index])
    # Scores of a crop times a positive number change nothing.
    scaled = run(*inputs[:3], inputs[3] * jnp.asarray([[2.0], [4.0], [0.5], [8.0]]), newline, layout, rule)
    np.testing.assert_array_equal(scaled.index, kept.index)


# Every quarter of this magic square sums to 34.
EVEN = np.array([16, 3, 2, 13, 5, 10, 11, 8, 9, 6, 7, 12, 4, 15, 14, 1], np.float32)


def test_the_whole_image_is_the_uncompressed_path():
    inputs = tokens_and_scores(WIDE)
    kept = run(*inputs[:2], jnp.asarray(EVEN), *inputs[3:], WIDE, GlobalCom2(1.0))
    assert kept.valid.all()
    image = WIDE.to_image(16 + np.arange(64).reshape(4, 16))
    rows = [[*image[i][WIDE.valid[i]].tolist(), 80] for i in range(8)]
    assert kept.index.tolist() == [*range(16), *sum(rows, [])]
    # The authors' order: a crop's tokens move to its beginning.
    authors = GlobalCom2(1.0, order="authors")
    moved = run(*inputs[:2], jnp.asarray(EVEN), *inputs[3:], WIDE, authors)
    assert moved.index[:16].tolist() == np.argsort(-EVEN).tolist()
    # The upper crops have rows 1, 2 and 3, put into rows 0, 1 and 2; their last row is empty but for the newline.
    first = [16 + 4, 16 + 5, 16 + 6, 16 + 7, 32 + 4, 32 + 5, 32 + 6, 32 + 7, 80]
    assert moved.index[16:25].tolist() == first
    assert moved.index[16 + 27] == 80 and moved.valid.all()
    assert sorted(moved.index.tolist()) == sorted(kept.index.tolist())


def test_permuted_crops_permute_the_output():
    thumbnail, crops, _, s_l, newline = tokens_and_scores(SQUARE)
    swap = np.array([3, 0, 1, 2])

    def of_crops(features, scores):
        kept = run(thumbnail, features, jnp.ones(16), scores, newline, SQUARE, GlobalCom2(0.5))
        assert (kept.ratios == 0.5).all()
        index = np.asarray(kept.index)
        return [set(index[index // 16 == crop + 1] % 16) for crop in range(4)]

    plain, moved = of_crops(crops, s_l), of_crops(crops[swap], s_l[swap])
    assert moved == [plain[crop] for crop in swap] and len(set(map(tuple, plain))) == 4


def test_the_class_token_of_an_encoder():
    """Logits before the softmax, of the last layer, averaged over heads; features are what enters that layer."""
    attention = Attention(num_heads=2, head_dim=4, rule=Full(), use_bias=True)
    block = Block(attention, MLP(16), norm=LayerNorm())
    model = ViT(num_classes=3, width=8, patch=2, pool="class", blocks=(block,), num_layers=2)
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    params = drawn(model, images)
    features, scores, logits = encode(model, params, images)
    np.testing.assert_allclose(logits, model.apply({"params": params}, images), atol=1e-6)
    shallow = model.clone(num_layers=1, final_norm=lambda x: x)
    before = shallow.apply({"params": params}, images, method="features")
    np.testing.assert_allclose(features, before[:, 1:], atol=1e-6)
    last = params["layer_1"]["attention"]
    normed = LayerNorm().apply({"params": params["layer_1"]["attention_norm"]}, before)
    query, key = (
        (normed @ last[name]["kernel"] + last[name]["bias"]).reshape(2, 5, 2, 4) for name in ("query", "key")
    )
    raw = np.einsum("bhd,bthd->bht", query[:, 0], key) / 2  # sqrt(4)
    np.testing.assert_allclose(scores, raw.mean(axis=1)[:, 1:], atol=1e-5)
    shares = encode(model, params, images, softmaxed=True)[1]
    expected = np.exp(raw) / np.exp(raw).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(shares, expected.mean(axis=1)[:, 1:], atol=1e-6)
    with pytest.raises(UserError, match="asks the class token, and this ViT has pool='mean'"):
        encode(model.clone(pool="mean"), params, images)


def test_a_reader_sees_no_padding():
    """Views of a picture by hand; tokens, padding, question: the logits of tokens and question alone."""
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    parts = views(image, 2)[0, ..., 0]
    # Means of 2 x 2 pixels, then the crops row by row.
    assert parts[0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert parts[2].tolist() == [[2, 3], [6, 7]] and parts[3].tolist() == [[8, 9], [12, 13]]
    model = DecoderLM(
        vocab_size=5,
        width=8,
        max_length=8,
        blocks=(Block(Attention(num_heads=2, head_dim=4, rotary=Rotary()), None),),
        num_layers=1,
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    tokens = jax.random.normal(jax.random.key(1), (1, 4, 8))

    @jax.jit
    def answers(tokens, question):
        padded = model.apply(params, tokens, jnp.asarray([[True, True, True, False]]), question, method=read)
        short = model.apply(params, tokens[:, :3], jnp.ones((1, 3), bool), question, method=read)
        return padded, short

    np.testing.assert_allclose(*answers(tokens, jnp.asarray([2])), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout((3, 1), 2), "at least one row and column for each crop"),
        (lambda: Layout((1, 1), 4, (0, 3)), "at least 1 pixel each"),
        (lambda: GlobalCom2(0.0), r"a ratio in \(0, 1\]"),
        (lambda: GlobalCom2(order="score"), "neither 'raster' nor 'authors'"),
        (
            lambda: compress(*tokens_and_scores(SQUARE), Layout((1, 2), SIDE), GlobalCom2()),
            "the layout's are",
        ),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
