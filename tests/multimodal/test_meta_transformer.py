"""Meta-Transformer: one encoder for all, what every tokenizer promises, and what a frozen encoder keeps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.data.together import SideBySide
from research.errors import UserError
from research.multimodal.heads import ClassHead, ForecastHead, NumberHead, pool_tokens
from research.multimodal.media import Media
from research.multimodal.meta_transformer import Encoder, MetaTransformer, Modality, Transfer, with_blocks
from research.multimodal.tokenize.graphs import GraphTokens
from research.multimodal.tokenize.grids import BandTokens, GridTokens
from research.multimodal.tokenize.points import PointTokens, farthest_points
from research.multimodal.tokenize.series import SeriesTokens, sinusoids
from research.multimodal.tokenize.symbols import TableTokens, TextTokens
from research.nn.accounting import count_parameters
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.pool import largest
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.optimizers import constant, sgd
from research.training.paths import named_leaves
from research.training.stages import Stage
from research.training.workdir import save_model
from tests.multimodal.toys import tower
from tests.programs import call, drawn, drawn_like

D = 8
BATCH = 2
CLASSES = ClassHead(3)
# name -> (tokenizer, tokens by hand)
TOKENIZERS = {
    "image": (GridTokens(D, (4, 4, 3), (2, 2), (2, 2)), 2 * 2),
    "audio": (
        GridTokens(D, (48, 40, 1), (16, 16), (10, 10)),
        4 * 3,
    ),  # (48 - 16) // 10 + 1, (40 - 16) // 10 + 1
    "video": (GridTokens(D, (4, 4, 4, 1), (2, 2, 2), (2, 2, 2)), 2 * 2 * 2),
    "hyperspectral": (BandTokens(D, (3, 3, 7), 3, 2), 3),  # bands 0-2, 2-4, 4-6
    "text": (TextTokens(D, 6, 20, 5), 6),
    "points": (PointTokens(D, 12, 4, 3, 6), 4),
    "series": (SeriesTokens(D, 7, 2, calendar=4), 7),
    "inertial": (SeriesTokens(D, 5, 6), 5),
    "table": (TableTokens(D, 3, (2, 4)), 3 + 2),
    "graph": (GraphTokens(D, 5, 6, 1, 1, 4), 5 + 6),
}


def block(width=D):
    attention = Attention(2, width // 2, rule=Full(), use_bias=True, output_bias=True)
    return Block(attention, MLP(2 * width), LayerNorm())


def meta(names, layers=1, **heads):
    placed = {name: "none" if name == "points" else "learned" for name in names}
    parts = {n: Modality(TOKENIZERS[n][0], heads.get(n, CLASSES), positions=placed[n]) for n in names}
    return MetaTransformer(Encoder(blocks=(block(),), num_layers=layers), parts)


def record(tokenizer, seed=0, batch=BATCH):
    """Random values; of what is counted, 0 and 1."""
    random = np.random.default_rng(seed)

    def draw(spec):
        x = random.standard_normal((batch, *spec.shape))
        return np.asarray(x > 0 if spec.dtype != jnp.float32 else x, spec.dtype)

    return {name: draw(spec) for name, spec in tokenizer.spec.items()}


@functools.cache
def tokenized(name):
    """(record, parameters, Tokens) of a tokenizer."""
    tokenizer = TOKENIZERS[name][0]
    x = record(tokenizer)
    params = drawn(tokenizer, x)
    return x, numbers(params), numbers(call(tokenizer, params, x))


def numbers(tree):
    """As numpy's, whose operations need no program."""
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_gives_its_tokens(name):
    tokenizer, count = TOKENIZERS[name]
    _, _, tokens = tokenized(name)
    assert tokenizer.count == count and tokens.x.shape == (BATCH, count, D)
    assert tokens.mask is None or tokens.mask.shape == (BATCH, count)
    assert (tokens.places is not None) == (name == "points")


def test_a_spectrogram_of_ast():
    # Ten seconds, 128 bins: floor((1024 - 16) / 10) + 1 = 101 by floor((128 - 16) / 10) + 1 = 12.
    tokenizer = GridTokens(768, (1024, 128, 1), (16, 16), (10, 10))
    assert tokenizer.counts == (101, 12) and tokenizer.count == 1212


@pytest.mark.parametrize("name", ["audio", "video"])
def test_windows_are_a_convolution(name):
    tokenizer = TOKENIZERS[name][0]
    x, params, tokens = tokenized(name)
    kernel = params["projection"]["kernel"].reshape(*tokenizer.size, -1, D)
    axes = "THW"[: len(tokenizer.size)]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    there = jax.lax.conv_general_dilated(
        x["images"], kernel, tokenizer.stride, "VALID", dimension_numbers=names, precision="highest"
    )
    # Float32 rounding of sums of up to 256 terms whose variances add up to 1.
    np.testing.assert_allclose(
        tokens.x - params["projection"]["bias"], there.reshape(tokens.x.shape), rtol=1e-4, atol=1e-4
    )


def test_bands_by_hand():
    x, params, tokens = tokenized("hyperspectral")
    # Token 1 has the bands 2, 3 and 4, each of them a window of 3 x 3.
    flat = np.asarray(x["images"])[:, :, :, 2:5].transpose(0, 3, 1, 2).reshape(BATCH, -1)
    expected = flat @ params["projection"]["kernel"] + params["projection"]["bias"]
    np.testing.assert_allclose(tokens.x[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_text_is_filled_with_zeros():
    x, params, tokens = tokenized("text")
    assert np.array_equal(tokens.x[..., :5], params["embedding"]["table"][x["tokens"]])
    assert not tokens.x[..., 5:].any()


def test_columns_by_hand():
    x, params, tokens = tokenized("table")
    expected = x["numbers"][..., None] * params["slopes"] + params["offsets"]
    np.testing.assert_allclose(tokens.x[:, :3], expected, rtol=1e-6, atol=1e-6)
    # The second column of categories begins behind the two values of the first.
    table = params["categories_table"]["table"]
    assert np.array_equal(tokens.x[:, 3], table[x["categories"][:, 0]])
    assert np.array_equal(tokens.x[:, 4], table[2 + x["categories"][:, 1]])
    # A third value of the first column is not the first of the second one's.
    tokenizer, wrong = TOKENIZERS["table"][0], x | {"categories": x["categories"] * 0 + np.int32([2, 0])}
    assert np.isnan(call(tokenizer, params, wrong).x).all(axis=(0, 2)).tolist() == [False] * 3 + [True, False]
    with pytest.raises(UserError, match="TableTokens: category 2 in column 0, which has 0 to 1"):
        tokenizer.apply({"params": params}, wrong)


CHOOSE = jax.jit(farthest_points, static_argnums=1)


def test_farthest_points_by_hand():
    # From 0 the farthest is 10; then 4, 4 away from the nearest of both; then 7, 3 away; then 2.
    line = np.float32([0.0, 2.0, 4.0, 7.0, 10.0])[:, None] * np.float32([1.0, 0.0, 0.0])
    assert CHOOSE(line[None], 5)[0].tolist() == [0, 4, 2, 3, 1]


def test_points_in_any_order_and_anywhere():
    tokenizer = TOKENIZERS["points"][0]
    _, params, _ = tokenized("points")
    # Coordinates and moves in eighths: their differences are exact.
    points = np.random.default_rng(1).integers(-64, 64, (BATCH, 12, 3)).astype("f") / 8
    order = np.concatenate([[0], 1 + np.random.default_rng(2).permutation(11)])
    move = np.float32([4.0, -0.5, 1.25])
    clouds = np.stack([points, points[:, order], points + move]).reshape(-1, 12, 3)
    found = numbers(call(tokenizer, params, {"points": clouds}))
    x, places = (y.reshape(3, BATCH, 4, D) for y in (found.x, found.places))
    assert np.array_equal(x[0], x[1]) and np.array_equal(places[0], places[1])
    assert np.array_equal(x[0], x[2]) and not np.allclose(places[0], places[2])
    # Where a moved patch lies is where its moved centre does.
    first, _, moved = CHOOSE(clouds, 4).reshape(3, BATCH, 4)
    assert np.array_equal(first, moved)
    centres = np.take_along_axis(points, np.asarray(first)[..., None], axis=1) + move
    up, down = params["place_up"], params["place_down"]
    lifted = jax.nn.gelu(centres @ up["kernel"] + up["bias"])
    np.testing.assert_allclose(places[2], lifted @ down["kernel"] + down["bias"], rtol=1e-4, atol=1e-4)


def test_a_rolled_series_rolls_its_values():
    tokenizer = TOKENIZERS["series"][0]
    x, params, tokens = tokenized("series")
    both = np.concatenate([x["values"], np.roll(x["values"], 3, axis=1)])
    values = np.asarray(call(tokenizer, params, both, method="values"))
    assert np.array_equal(np.roll(values[:BATCH], 3, axis=1), values[BATCH:])
    # Step 0 by hand, its neighbours being the last step and step 1.
    near = np.concatenate([x["values"][:, i] for i in (-1, 0, 1)], axis=-1)
    expected = near @ params["convolution"]["kernel"] + np.array([0.0, 1.0] * (D // 2))
    expected += x["calendar"][:, 0] @ params["dates"]["kernel"]
    np.testing.assert_allclose(tokens.x[:, 0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        sinusoids(2, 4)[1], [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("channels", "trained"), [(7, 19_200), (8, 21_504), (21, 51_456), (862, 1_989_120)], ids=str
)
def test_the_papers_counts_of_forecasting(channels, trained):
    # ETTh1 19 K, Exchange 22 K, Weather 51 K, Traffic 2 M: (3 channels + 4) 768.
    tokenizer = SeriesTokens(768, 8, channels, calendar=4)
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), record(tokenizer))["params"]
    assert count_parameters(shapes) == trained == (3 * channels + 4) * 768


def test_a_graph_is_a_set():
    """Nodes renumbered and edges in another order: the same tokens in that order."""
    tokenizer = TOKENIZERS["graph"][0]
    x, params, _ = tokenized("graph")
    random = np.random.default_rng(3)
    x = x | {"edges": random.integers(0, 5, (BATCH, 6, 2), np.int32)}
    nodes, edges = random.permutation(5), random.permutation(6)
    ranks = np.argsort(nodes)  # node i is now number ranks[i]
    other = {name: x[name][:, nodes] for name in ("nodes", "identifiers", "node_mask")}
    other |= {name: x[name][:, edges] for name in ("edge_features", "edge_mask")}
    other["edges"] = ranks[x["edges"]][:, edges].astype(np.int32)
    both = jax.tree.map(lambda *y: np.concatenate(y), x, other)
    tokens = numbers(call(tokenizer, params, both))
    order = np.concatenate([nodes, 5 + edges])
    np.testing.assert_allclose(tokens.x[:BATCH][:, order], tokens.x[BATCH:], rtol=1e-6, atol=1e-6)
    assert np.array_equal(tokens.mask[:BATCH][:, order], tokens.mask[BATCH:])
    # An edge's identifiers are those of its ends.
    u, v = x["edges"][0, 0]
    own = x["identifiers"][0]
    edge = x["edge_features"][0, 0] @ params["edge"]["kernel"] + params["edge"]["bias"] + params["types"][1]
    expected = edge + np.concatenate([own[u], own[v]]) @ params["identifier"]["kernel"]
    np.testing.assert_allclose(tokens.x[0, 5], expected, rtol=1e-5, atol=1e-5)


def test_pools_by_hand():
    x = jnp.asarray([[[1.0, 2.0], [3.0, 9.0], [5.0, -4.0], [100.0, 100.0]]])
    mask = jnp.asarray([[True, True, True, False]])
    assert pool_tokens(x, mask, "class").tolist() == [[1, 2]]
    assert pool_tokens(x, mask, "mean").tolist() == [[4, 2.5]]
    assert pool_tokens(x, mask, "class_max").tolist() == [[1, 2, 5, 9]]
    alone = jnp.asarray([[True, False, False, False]])
    assert pool_tokens(x, alone, "class_max").tolist() == [[1, 2, 0, 0]]
    assert pool_tokens(x, mask, "flat").tolist() == [[3, 9, 5, -4, 0, 0]]


def test_the_largest_and_its_gradient():
    x = np.float32([[1.0, 5.0, 5.0], [7.0, -1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(largest(x, 1) * np.float32([2.0, 3.0])))(x)
    assert float(value) == 2 * 5 + 3 * 7 and gradient.tolist() == [[0, 2, 0], [3, 0, 0]]


def test_heads_measure_by_hand():
    said, wanted = (
        jnp.asarray([[[1.0], [3.0]], [[0.0], [9.0]]]),
        jnp.asarray([[[2.0], [1.0]], [[0.0], [0.0]]]),
    )
    batch = {"targets": wanted, "weights": jnp.asarray([1.0, 0.0])}
    for head in (ForecastHead(2, 1), NumberHead()):
        found = head.measure(said, batch)  # of record 0 alone: (1 + 4) / 2 and (1 + 2) / 2
        assert {name: (float(a), float(b)) for name, (a, b) in found.items()} == {
            "loss": (2.5, 1.0),
            "error": (1.5, 1.0),
        }
    with pytest.raises(UserError, match=r"targets of a record are \[\]; its head says \[1\]"):
        NumberHead().measure(jnp.zeros((2, 1)), batch | {"targets": jnp.zeros(2)})


class Numbers:
    """Batches of random records with labels or targets, as a dataset is asked for them."""

    def __init__(self, name, outputs=None):
        self.tokenizer, self.outputs = TOKENIZERS[name][0], outputs

    def element_spec(self):
        return {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in self.take(np.arange(1)).items()}

    def __len__(self):
        return 8

    def take(self, numbers):
        one = {k: np.asarray(x) for k, x in record(self.tokenizer, batch=8).items()}
        if self.outputs is None:
            one["labels"] = np.arange(8, dtype=np.int32) % 3
        else:
            one["targets"] = np.ones((8, *self.outputs), np.float32)
        one["weights"] = np.ones(8, np.float32)
        return {k: x[np.asarray(numbers) % 8] for k, x in one.items()}


DATA = {"image": Numbers("image"), "table": Numbers("table"), "series": Numbers("series", (3, 2))}
MODEL = meta(DATA, series=ForecastHead(3, 2))


def trained(params, names, frozen=("^encoder/",), steps=2):
    stage = Stage(
        "transfer",
        steps,
        4,
        build(of(sgd, schedule=of(constant, peak=0.5))),
        frozen=frozen,
        loss_weights={f"{name}/loss": 1.0 for name in names},
    )
    data = SideBySide({name: DATA[name] for name in names})
    trainer = Trainer(Transfer(MODEL), data, (stage,), clip=None)
    mask = stage.mask(params)
    state, _ = trainer.train(progress=False, params=params, devices=jax.devices()[:1])
    return state.params, mask


@functools.cache
def initial():
    task = Transfer(MODEL)
    return drawn_like(lambda: task.init(jax.random.key(0)))


def test_a_frozen_encoder_keeps_its_bits_and_modalities_learn_as_they_would_alone():
    params = initial()
    both, mask = trained(params, ("image", "table"))
    before, after = named_leaves(params), named_leaves(both)
    for path, leaf in before.items():
        kept = path.startswith(("encoder/", "series/"))  # series had no data: no gradient
        assert np.array_equal(leaf, after[path]) == kept, path
    counted = sum(x.size for x, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True) if m)
    own = {name: count_parameters(params[name]) for name in DATA}
    assert counted == sum(own.values())
    # image: projection 12 x 8 + 8, class token 8, 5 positions of 8, norm 16, head 8 x 3 + 3.
    assert own["image"] == 104 + 8 + 40 + 16 + 27
    alone, _ = trained(params, ("image",))
    # One program of two modalities and one of one: float32 rounding of two steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both["image"], alone["image"]
    )


def test_tuned_trains_everything():
    params = initial()
    after, _ = trained(params, ("table",), frozen=(), steps=1)
    # A bias of keys moves no softmax: its gradient is 0 up to rounding.
    for path, leaf in named_leaves(after["encoder"]).items():
        assert path.endswith("key/bias") or not np.array_equal(leaf, named_leaves(params["encoder"])[path]), (
            path
        )


def test_the_encoder_computes_in_half_precision_where_that_is_asked():
    batch = SideBySide(DATA).take(np.arange(2))
    task = Transfer(MODEL, compute_dtype="bfloat16")
    found = []

    def loss(params):
        def seen(run, args, kwargs, context):
            if isinstance(context.module, Block) and context.method_name == "__call__":
                found.append(args[0].dtype)
            return run(*args, **kwargs)

        with nn.intercept_methods(seen):
            return task.loss(params, batch, jax.random.key(0))["loss"][0]

    assert jax.eval_shape(loss, initial()).dtype == jnp.float32
    assert found == [jnp.dtype("bfloat16")] * len(DATA)


def test_one_encoder_serves_all():
    params = initial()
    assert sorted(params) == ["encoder", "image", "series", "table"] and list(params["encoder"]) == [
        "layer_0"
    ]
    records = {name: record(TOKENIZERS[name][0]) for name in DATA}
    plain = call(MODEL, params, records)
    assert plain["image"].shape == (BATCH, 3) and plain["series"].shape == (BATCH, 3, 2)
    # One leaf of the one encoder changes what every modality says.
    louder = jax.tree.map(lambda x: x, params)
    louder["encoder"]["layer_0"]["mlp"]["down"]["kernel"] *= 2.0
    changed = call(MODEL, louder, records)
    assert all(np.abs(changed[name] - plain[name]).max() > 1e-3 for name in DATA)


def test_places_are_added_before_every_block():
    encoder = Encoder(blocks=(block(),), num_layers=2)
    one = Encoder(blocks=(block(),), num_layers=1)
    x, places = np.random.default_rng(0).standard_normal((2, BATCH, 5, D), np.float32)
    params = drawn(encoder, x)
    by_hand = call(one, {"layer_0": params["layer_0"]}, x + places)
    by_hand = call(one, {"layer_0": params["layer_1"]}, by_hand + places)
    np.testing.assert_allclose(call(encoder, params, x, None, places), by_hand, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_tower_alone_are_taken(tmp_path):
    """As saved by a run whose model has a tower; class token, positions and norm stay the modality's own."""
    params, alone = initial(), meta(("table",))
    blocks = drawn(MODEL.encoder, jnp.zeros((1, 2, D)), seed=7)
    config = of(Encoder, blocks=(config_of_block(),), num_layers=1)
    save_model(tmp_path / "clip", config, blocks, inputs=(WIDE,))
    started = Transfer(alone, encoder=str(tmp_path / "clip"), inside="").start(jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, started["encoder"], blocks)))
    whole = drawn(tower(class_token=True), media_of_tower(), seed=8)
    taken = with_blocks(params, whole)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, taken["encoder"], {k: whole[k] for k in blocks})))
    assert all(taken[name] is params[name] for name in DATA)
    with pytest.raises(UserError, match="Transfer.encoder: what is saved does not fit"):
        with_blocks(params, {"layer_1": whole["layer_0"]})


WIDE = jax.ShapeDtypeStruct((1, 2, D), jnp.float32)


def config_of_block():
    attention = of(Attention, num_heads=2, head_dim=D // 2, rule=of(Full), use_bias=True, output_bias=True)
    return of(Block, attention=attention, mlp=of(MLP, hidden_dim=2 * D), norm=of(LayerNorm))


def media_of_tower():
    grid = jnp.full((1, 1, 2), 2)
    return Media(jnp.zeros((1, 1, 4, 12)), grid, jnp.zeros((1, 1), int))


def test_mistakes_are_told():
    params = initial()
    with pytest.raises(UserError, match="no modality 'imag'; did you mean image?"):
        MODEL.apply({"params": params}, {"imag": record(TOKENIZERS["image"][0])})
    with pytest.raises(UserError, match=r"image: images is \[4, 5, 3\]; \[4, 4, 3\] is expected"):
        MODEL.apply({"params": params}, {"image": {"images": jnp.zeros((1, 4, 5, 3))}})
    with pytest.raises(UserError, match=r"a window of \(16, 16\) does not fit into a grid of \(12, 40\)"):
        _ = GridTokens(D, (12, 40, 1), (16, 16), (10, 10)).count
    with pytest.raises(UserError, match="9 centres with 3 neighbours of 8 points"):
        PointTokens(D, 8, 9, 3, 6)
    with pytest.raises(UserError, match="features=9: from 1 to width=8"):
        TextTokens(D, 6, 20, 9)
    with pytest.raises(UserError, match="can't be called 'encoder'"):
        MetaTransformer(MODEL.encoder, {"encoder": MODEL.modalities["image"]}).init(jax.random.key(0), {})
