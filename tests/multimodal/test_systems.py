"""What each system says must hold exactly, on tiny shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.shapes import vocabulary
from research.errors import UserError
from research.multimodal import dragonfly, inf_llava, llava_uhd
from research.multimodal.connectors import pixel_shuffle, pixel_unshuffle
from research.multimodal.dragonfly import Zooms, ZoomSelection
from research.multimodal.ep_alm import EPALM, LateToken, SoftPrompt
from research.multimodal.eve import EVE, AnyAspect, PatchEmbeddingLayer, SequenceProjection, alignment_loss
from research.multimodal.iaa import IAA, InsertedLayers, begin_workflow
from research.multimodal.inf_llava import BlocksAndStrides, DualPerspective, Enhancement
from research.multimodal.llava_uhd import Slices, WindowResampler
from research.multimodal.media import Square
from research.multimodal.model import Pictures
from research.multimodal.mousi import ExpertFusion, Experts, Panel
from research.multimodal.prompts import Prompts, pictures, write
from research.multimodal.tower import Seen
from research.nn.reports import apply_reporting
from tests.multimodal.test_model import PROMPTS, decoded_as_read, louder
from tests.multimodal.toys import WIDTH, decoder, image, media, tower, vlm
from tests.programs import call, drawn

TEXT = vocabulary()
TOKENS = np.zeros((1, 2), np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def added(x, index, value=1.0):
    """A copy with `value` added in one place."""
    x = x.copy()
    x[index] += value
    return x


def asked(planner, text="<image> what", pixels=None):
    """(tokens, Pictures) of one prompt."""
    written = write(text, [image() if pixels is None else pixels], planner, TEXT)
    return np.asarray([written.tokens]), pictures([written], planner, 1, len(written.tokens))


# EVE


EVE_PLANNER = AnyAspect(patch=2, side=8)  # at most 2 x 2 windows


@pytest.fixture(scope="module")
def eve():
    model = vlm(
        EVE,
        EVE_PLANNER,
        tower=PatchEmbeddingLayer(8, num_heads=2),
        connector=SequenceProjection(WIDTH),
        teacher=tower(side=4, flexible=True),
        every=1,
        align_heads=2,
    )
    return model, drawn(model, TOKENS)


def test_eve_spells_rows_with_a_split_behind_each():
    # (width, height) -> windows: the long side has 2, the short one as many as it begins.
    for size, (h, w) in {(9, 9): (2, 2), (20, 9): (1, 2), (9, 20): (2, 1), (1, 5000): (2, 1)}.items():
        read, spelled = EVE_PLANNER.read(image(0, size[1], size[0]))
        assert read.grid.tolist() == [[2 * h, 2 * w], [h, w]] and len(spelled) == 1 + h * (w + 1)


def test_eve_embeds_a_picture_whatever_stands_behind_it(eve):
    model, params = eve
    wide = media(EVE_PLANNER, image(0, 9, 20))  # 1 x 2 windows: <CLS>, two windows, <SPL>
    layer, own = model.tower, params["tower"]
    run = lambda wide: jax.tree.map(np.asarray, call(layer, own, wide))  # noqa: E731
    seen = run(wide)
    assert seen.mask[0, 0, 0].tolist() == [True] * 4 + [False] * 3
    split = np.asarray(own["split_token"])[0]
    np.testing.assert_array_equal(seen.tokens[0, 0, 0, 3], split)
    other = wide.replace(patches=wide.patches + 7.0 * (np.arange(16) >= 8)[:, None])  # 2 x 4 patches are real
    np.testing.assert_array_equal(run(other).tokens[0, 0, 0, :4], seen.tokens[0, 0, 0, :4])
    # Window (0, 1) is of patches 2, 3, 6 and 7.
    third = wide.replace(patches=wide.patches + (np.arange(16) == 6)[:, None])
    changed = np.abs(run(third).tokens - seen.tokens)[0, 0, 0].max(-1) > 0
    assert changed[:4].tolist() == [True, False, True, False]


def test_eve_learns_through_a_frozen_decoder_and_aligns_in_training_alone(eve):
    model, params = eve
    tokens, seen = asked(EVE_PLANNER, pixels=image(0, 9, 20))

    @jax.jit
    def run(params):
        def loss(params):
            logits, losses, _ = apply_reporting(model, {"params": params}, tokens, seen)
            return jnp.sum(jnp.square(logits)) * 1e-3 + losses["alignment"], (logits, losses["alignment"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (logits, alignment)), gradients = jax.tree.map(np.asarray, run(params))
    assert 0.0 <= float(alignment) <= 2.0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients["teacher"]))
    for part in ("tower", "connector", "align"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[part]))
    plain = call(model, {name: params[name] for name in ("decoder", "tower", "connector")}, tokens, seen)
    np.testing.assert_allclose(plain, logits, rtol=1e-5, atol=1e-5)
    # Windows of the picture: <CLS>, 0, 1, <SPL>, then text.
    picture, window = jax.jit(model.windows)(seen)
    picture, window = np.asarray(picture), np.asarray(window)
    assert picture[0].tolist()[:5] == [-1, 0, 0, -1, -1] and window[0].tolist()[1:3] == [0, 1]


def test_the_alignment_is_a_mean_over_windows_then_pictures():
    p = np.asarray([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]]], np.float32)
    z = np.asarray([[[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]]], np.float32)
    # Cosines 1, 0 | -1; the last token is of no picture: the mean of 1 - 1 / 2 and 1 + 1.
    loss = jax.jit(alignment_loss, static_argnums=3)(p, z, np.asarray([[0, 0, 1, -1]]), 3)
    np.testing.assert_allclose(loss, 1.25, rtol=1e-6)


# eP-ALM


@pytest.fixture(scope="module")
def ep_alm():
    hook = LateToken(start=1, stop=3, levels=2, num_layers=3)
    model = vlm(
        EPALM,
        Square(patch=4, side=8, count=2),
        layers=3,
        tower=tower(layers=2, class_token=True, norm_all=True),
        connector=SoftPrompt(2, WIDTH),
        hooks=(hook,),
    )
    return model, louder(drawn(model, TOKENS))


def test_ep_alm_decodes_with_a_row_more_in_the_upper_layers(ep_alm):
    model, params = ep_alm
    decoded_as_read(model, params, new=6)
    keys = lambda: [layer.read(jnp.zeros(1, int))[0] for layer in model.init_cache(1, 16).layers]  # noqa: E731
    assert [key.shape[2] for key in jax.eval_shape(keys)] == [16, 17, 17]


def test_ep_alm_shows_the_image_to_the_upper_layers_alone(ep_alm):
    model, params = ep_alm
    tokens, seen = asked(model.planner, "<image> what digit is")
    other = seen.replace(media=seen.media.replace(patches=-seen.media.patches))

    def run(tokens, seen):
        return jax.tree.map(np.asarray, call(model, params, tokens, seen, method="features"))

    (hidden, fresh), (changed, other_fresh) = run(tokens, seen), run(tokens, other)
    np.testing.assert_array_equal(fresh[0][0], other_fresh[0][0])  # below `start`
    assert [rows[0].shape[2] for rows in fresh] == [5, 6, 6] and hidden.shape[1] == 5
    assert (np.asarray(fresh[1][0])[:, :, 0] != np.asarray(other_fresh[1][0])[:, :, 0]).any()
    assert (hidden != changed).any(axis=-1).all()
    # Causal, and the added row sees no text: a change of the last token changes nothing before it.
    late = run(np.where(np.arange(5) == 4, 9, tokens), seen)[0]
    np.testing.assert_array_equal(late[:, :4], hidden[:, :4])
    # Without the hook it is the decoder with the prompt; trained are the maps and the prompt.
    trained = sum(x.size for part in ("connector", "hooks_0") for x in jax.tree.leaves(params[part]))
    assert trained == 2 * (8 * WIDTH + WIDTH) + 2 * WIDTH
    assert [model.hooks[0].level(place) for place in (1, 2)] == [0, 1]
    assert [LateToken(19, 31, 6, 32).level(place) for place in (19, 20, 21, 30)] == [0, 0, 1, 5]


# LLaVA-UHD


UHD = Slices(patch=14, side=336)


def test_uhd_slices_as_the_paper():
    # (width, height) -> columns, rows, slice (width, height), overview (width, height); by hand from the formulas.
    table = {
        (672, 1088): ((2, 3), (322, 336), (252, 420)),
        (640, 480): ((2, 2), (378, 280), (378, 280)),
        (1000, 300): ((3, 1), (350, 308), (602, 182)),
        (448, 448): ((1, 2), (462, 224), (336, 336)),
        (2000, 2000): ((3, 2), (266, 406), (336, 336)),
    }
    for size, (grid, slice_, overview) in table.items():
        *parts, whole = UHD.plan(*size)
        assert (UHD.slices(*size), whole.size) == (grid, overview)
        boxes = [part.box for part in parts]
        assert {(b[2] - b[0], b[3] - b[1]) for b in boxes} == {slice_}
        assert parts[0].size == (grid[0] * slice_[0], grid[1] * slice_[1])
        assert boxes == sorted(set(boxes), key=lambda b: (b[1], b[0])) and len(boxes) == grid[0] * grid[1]
        said = UHD.spell(UHD.plan(*size))
        assert [said.count(x) for x in (",", "\n")] == [(grid[0] - 1) * grid[1], grid[1]]
        assert len(said) == 144 * (grid[0] * grid[1] + 1) + grid[0] * grid[1]
    assert UHD.slices(336, 336) == (1, 1) and len(UHD.spell(UHD.plan(336, 336))) == 144
    for size in ((1, 5000), (5000, 1), (333, 7), (4000, 3000)):
        assert all(0 < np.prod(UHD.grid(crop)) <= 576 for crop in UHD.plan(*size))


def test_a_query_of_uhd_reads_its_own_cell():
    grid = np.asarray([[4, 4], [2, 6]])[None, None]
    x = normal(1, 1, 2, 16, 6)
    module = WindowResampler(2, 8, 2)
    seen = Seen(x, None, grid, None)
    like = media(Slices(patch=4, side=16, most=2, queries=2), image())
    like = like.replace(grid=grid, patches=like.patches[:, :, :2])
    params = drawn(module, seen, like)
    out = np.asarray(call(module, params, seen, like)).reshape(2, 4, 8)

    def moved(view, patch):
        other = call(module, params, seen.replace(tokens=added(x, (0, 0, view, patch))), like)
        return (np.abs(np.asarray(other).reshape(2, 4, 8) - out).max(-1) > 0)[view].tolist()

    # On 4 x 4 patches a cell is 2 x 2, and points lie at most a sixth of a cell from its border.
    assert moved(0, 0) == [True, False, False, False] and moved(0, 15) == [False, False, False, True]
    # On 2 x 6 a cell is one patch high, and its points lie between the centres of both rows.
    assert moved(1, 0) == [True, False, True, False] and moved(1, 12) == [False] * 4  # 12 patches are there


@pytest.mark.parametrize("grids", [[[4, 4], [2, 6], [1, 1], [0, 0]], [[16, 1], [1, 16], [3, 5], [2, 2]]])
def test_points_of_uhd_are_the_same_multiplied_and_gathered(monkeypatch, grids):
    x, grid = normal(4, 16, 5), np.asarray(grids)
    weight = normal(4, 9, 12, 5, seed=1)

    def sampled(dense):
        monkeypatch.setattr(llava_uhd, "_DENSE", dense)
        total = lambda x: (jnp.sum(weight * (y := llava_uhd.sample_windows(x, grid, 3)[0])), y)  # noqa: E731
        return map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(x))

    (one, points), (other, same) = sampled(16), sampled(0)
    np.testing.assert_allclose(points, same, atol=1e-6)
    np.testing.assert_allclose(one, other, atol=1e-5)
    # On a grid of one patch every point is that patch, and what stands behind it is never read.
    alone = np.flatnonzero(np.asarray(grids).prod(-1) <= 1)
    np.testing.assert_array_equal(points[alone], np.broadcast_to(x[alone, :1, None], points[alone].shape))


# Dragonfly


select = jax.jit(dragonfly.select, static_argnums=3)


def test_dragonfly_keeps_the_high_crops_that_are_like_their_medium_crop():
    planner = Zooms(patch=2, side=4, keep=2)
    assert dragonfly.choose_canvas(900, 600, 4, dragonfly.HIGH) == (6, 4)
    assert dragonfly.region_of((4, 6), (2, 2)) == [0, 0, 1, 1] * 3 + [2, 2, 3, 3] * 3
    for high in dragonfly.HIGH:
        for medium in dragonfly.MEDIUM:
            if high[0] % medium[0] == high[1] % medium[1] == 0:
                assert np.bincount(dragonfly.region_of(high, medium)).tolist() == [6] * 4
    read, said = planner.read(image(0, 30, 40))
    assert read.marks[5:].tolist() == dragonfly.region_of((6, 4), (2, 2))
    assert len(said) == 13 * 6 and said[5::6] == ["\n"] * 13
    with pytest.raises(UserError, match="keep=6, but of a picture of 300x90 a medium crop has 4"):
        Zooms(patch=2, side=100, keep=6).plan(300, 90)

    fine, medium = normal(1, 24, 5, 3), normal(1, 4, 5, 3, seed=1)
    regions = read.marks[None, 5:]
    scores = np.einsum("jd,rd->rj", np.mean(fine[0], 1), np.mean(medium[0], 1))
    wanted = [
        j for r in range(4) for j in sorted(np.flatnonzero(regions[0] == r), key=lambda j: -scores[r, j])[:2]
    ]
    assert select(fine, medium, regions, 2)[0].tolist() == sorted(wanted)
    assert select(fine, medium, regions, 6)[0].tolist() == list(range(24))


def test_dragonfly_does_not_see_what_it_leaves_out():
    planner = Zooms(patch=2, side=4, keep=2)
    model = vlm(
        planner=planner,
        tower=tower(side=2, class_token=True),
        connector=ZoomSelection(WIDTH, 2),
    )
    params = drawn(model, TOKENS)
    tokens, seen = asked(planner, "<image>")

    @jax.jit
    def run(seen):
        own, rows = model.apply({"params": params}, seen.media, method="see")
        return model.apply({"params": params}, tokens, seen), rows, own.taps[-1]

    logits, rows, tap = map(np.asarray, run(seen))
    linear = jax.tree.map(np.asarray, params["connector"]["projection"]["linear_1"])
    projected = tap[0, 0] @ linear["kernel"] + linear["bias"]
    chosen = select(projected[None, 5:], projected[None, 1:5], seen.media.marks[0, :, 5:], 2)[0]
    left_out = next(j for j in range(24) if j not in chosen.tolist())
    faint = np.zeros((29, 1, 1), np.float32)
    faint[5 + left_out] = 1e-4
    other = run(seen.replace(media=seen.media.replace(patches=seen.media.patches + faint)))
    np.testing.assert_array_equal(other[0], logits)
    np.testing.assert_array_equal(other[1], rows)


# INF-LLaVA


def test_inf_llava_puts_both_perspectives_back():
    n, grid = 3, np.arange(2 * 6 * 6, dtype=np.float32).reshape(2, 6, 6, 1)

    @jax.jit
    def run(grid):
        pairs = (
            (inf_llava.cut_blocks, inf_llava.join_blocks),
            (inf_llava.cut_strides, inf_llava.join_strides),
        )
        return [(cut(grid, n), join(cut(grid, n), n), cut(grid, 1)) for cut, join in pairs]

    parts = jax.tree.map(np.asarray, run(grid))
    for _, joined, whole in parts:
        np.testing.assert_array_equal(joined, grid)
        np.testing.assert_array_equal(whole[:, 0], grid)
    np.testing.assert_array_equal(parts[1][0][:, 1], grid[:, ::3, 1::3])
    np.testing.assert_array_equal(parts[0][0][:, 1], grid[:, :2, 2:4])
    planner = BlocksAndStrides(patch=2, side=4, parts=2)
    pixels = image(0, 8, 8)
    parts = planner.read(pixels)[0].patches
    assert parts.shape == (9, 4, 12) and planner.rows == 4
    scaled = lambda x: x.astype(np.float32) / 127.5 - 1.0  # noqa: E731
    np.testing.assert_allclose(parts[2, 0].reshape(2, 2, 3), scaled(pixels[:2, 4:6]), atol=1e-6)  # block 0, 1
    np.testing.assert_allclose(
        parts[6, 0].reshape(2, 2, 3), scaled(pixels[:4:2, 1:5:2]), atol=1e-6
    )  # stride 0, 1


def test_inf_llavas_perspectives_meet_part_by_part():
    module = Enhancement(parts=2, num_heads=2)
    c, s = (normal(1, 4, 4, 16, seed=k) for k in (0, 1))
    params = drawn(module, c, s)
    run = lambda c, s: map(np.asarray, call(module, params, c, s, method="enhanced"))  # noqa: E731
    local, spread = run(c, s)
    other = added(c, (0, 0, 3))  # block 1, and stride class (0, 1)
    local_, spread_ = run(other, s)
    block = np.zeros((4, 4), bool)
    block[:2, 2:] = True
    np.testing.assert_array_equal(np.abs(spread_ - spread)[0].max(-1) > 0, block)
    assert set(map(tuple, np.argwhere(np.abs(local_ - local)[0].max(-1) > 0))) == {
        (0, 3)
    }  # a query of its own
    local_, _ = run(c, added(s, (0, 2, 1)))
    stride = np.zeros((4, 4), bool)
    stride[::2, 1::2] = True
    np.testing.assert_array_equal(np.abs(local_ - local)[0].max(-1) > 0, stride)


# MouSi


def test_mousi_counts_positions_and_shares_its_second_layer():
    planner = Experts(patch=4, side=8, counts=(4, 2))
    text = "what <image> what"
    spent = {
        "none": 6,
        "image": 1,
        "row": 4,
    }  # rows of 2 of the first expert, of 1 (the root of 2) of the second
    for share, count in spent.items():
        own = Experts(patch=4, side=8, counts=(4, 2), share=share)
        assert max(write(text, [image()], own, TEXT).positions) == 1 + count + 1 - 1
    model = vlm(
        planner=planner, tower=Panel((tower(), tower(width=4))), connector=ExpertFusion(WIDTH, (1, 2))
    )
    params = drawn(model, TOKENS)
    shapes = jax.tree.map(jnp.shape, params["connector"])
    assert (
        shapes["first_0"]["kernel"] == (8, 8) and shapes["first_1"]["kernel"] == (8, 8) and "second" in shapes
    )
    # An expert left out of the text is an expert that isn't there.
    alone = vlm(planner=Experts(patch=4, side=8, counts=(4,)), connector=ExpertFusion(WIDTH, (1,)))
    alone = alone.clone(tower=Panel((tower(),)))
    own = params | {
        "tower": {"experts_0": params["tower"]["experts_0"]},
        "connector": {name: params["connector"][name] for name in ("first_0", "second")},
    }
    tokens, seen = asked(planner)
    kept = np.isin(seen.slot[0], (4, 5), invert=True)
    few = Pictures(seen.media, seen.slot[:, kept], np.arange(kept.sum())[None])
    np.testing.assert_allclose(
        call(model, params, tokens[:, kept], few), call(alone, own, tokens[:, kept], few), atol=1e-5
    )


def test_one_expert_of_mousi_is_llava():
    model = vlm(planner=Experts(patch=4, side=8, counts=(4,)), connector=ExpertFusion(WIDTH, (1,)))
    model = model.clone(tower=Panel((tower(),)))
    params = drawn(model, TOKENS)
    llava = params | {
        "tower": params["tower"]["experts_0"],
        "connector": {
            "projection": {
                "linear_1": params["connector"]["first_0"],
                "linear_2": params["connector"]["second"],
            }
        },
    }
    tokens, seen = asked(model.planner)
    np.testing.assert_array_equal(call(model, params, tokens, seen), call(vlm(), llava, tokens, seen))


def test_rows_that_share_a_position_have_no_order():
    # One layer: what an image's rows are does not depend on what stands before them.
    planner = Square(patch=4, side=8, share="image")
    model = vlm(planner=planner, layers=1)
    params = louder(drawn(model, TOKENS))
    for share, same in (("image", True), ("none", False)):
        tokens, seen = asked(Square(patch=4, side=8, share=share), "<image> what digit")
        mixed = seen.replace(slot=np.concatenate([seen.slot[:, [2, 0, 3, 1]], seen.slot[:, 4:]], axis=1))
        one, other = (np.asarray(call(model, params, tokens, x))[:, 4:] for x in (seen, mixed))
        assert np.allclose(one, other, atol=1e-4) == same


# IAA


def test_iaa_begins_as_the_language_model_and_leaves_it_alone():
    block = decoder().blocks[0]
    model = vlm(IAA, hooks=(InsertedLayers(block, (0, 1)),))
    params = drawn(model, TOKENS)
    text = np.asarray([[1, 5, 9, 2]])
    begun = begin_workflow(params)
    np.testing.assert_allclose(
        call(model, begun, text), call(model.decoder, params["decoder"], text), rtol=1e-6, atol=1e-6
    )
    # Its own layers have caches of their own.
    decoded_as_read(model, louder(params), new=6)
    assert len(model.init_cache(1, 16).layers) == 4


def test_pixel_shuffle_is_undone():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    shuffle, unshuffle = (jax.jit(f, static_argnums=1) for f in (pixel_shuffle, pixel_unshuffle))
    shuffled = np.asarray(shuffle(x, 2))
    assert shuffled.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(shuffled[0, 0, 0], x[0, :2, :2].reshape(-1))
    np.testing.assert_array_equal(unshuffle(shuffled, 2), x)


def test_dual_perspective_makes_the_tokens_of_one_view():
    planner = BlocksAndStrides(patch=2, side=4, parts=2)
    model = vlm(planner=planner, tower=tower(width=16), connector=DualPerspective(WIDTH, 2, 2))
    asked_ = Prompts.of(PROMPTS[:1], planner, TEXT)
    (seen,) = asked_.beside(16)
    params = drawn(model, TOKENS)
    _, rows = call(model, params, seen.media, method="see")
    assert rows.shape == (1, 2 * 4, WIDTH)
