"""The encoder-decoder: what each side sees, decoding through the engine, its cache, its task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import build, of
from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.proposers import Plain
from research.decoding.sampling import Sampling
from research.decoding.verify import Greedy
from research.errors import UserError
from research.language.encoder_decoder import Encoder, EncoderDecoder, SequenceToSequence, shift_right
from research.nn.attention import Attention
from research.nn.cross_attention import CrossAttention, CrossBlock
from research.nn.masks import Full
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.model_directory import load_model_directory, save_model
from tests.programs import call, drawn

VOCAB, SOURCE, TARGET = 53, 20, 24
SOURCES = [[5, 9, 2], list(range(20, 40)), [7]]  # unequal lengths, the second as long as allowed


def config(scan: bool = False, **fields):
    attention = dict(num_heads=2, head_dim=8, rotary=of(Rotary))
    return of(
        EncoderDecoder,
        encoder=of(
            Encoder,
            blocks=(
                of(
                    Block,
                    attention=of(Attention, rule=of(Full), **attention),
                    mlp=of(GatedMLP, hidden_dim=24),
                ),
            ),
            num_layers=2,
        ),
        blocks=(
            of(
                CrossBlock,
                attention=of(Attention, **attention),
                cross_attention=of(CrossAttention, **attention),
                mlp=of(GatedMLP, hidden_dim=24),
            ),
        ),
        num_layers=2,
        vocab_size=VOCAB,
        width=16,
        source_length=SOURCE,
        max_length=TARGET,
        scan_layers=scan,
        tied_head=False,
        **fields,
    )


def make(scan: bool = False):
    model = build(config(scan))
    params = drawn(model, jnp.zeros((1, 2), jnp.int32), seed=1)
    return model, jax.tree.map(
        lambda x: jnp.asarray(2.0 * np.asarray(x)), params
    )  # sharper logits: outputs that vary


@pytest.fixture(scope="module")
def made():
    return make()


@pytest.fixture(scope="module")
def plain(made):
    return Generator(*made)


def padded(sources):
    rows = np.zeros((len(sources), SOURCE), np.int32)
    for row, source in enumerate(sources):
        rows[row, : len(source)] = source
    return rows, np.asarray([len(source) for source in sources], np.int32)


def without_cache(model, params, source: list[int], count: int) -> list[int]:
    """Greedy decoding by a full forward pass for every token."""
    tokens = np.full((1, TARGET), model.bos, np.int32)
    for at in range(count):
        tokens[0, at + 1] = np.argmax(np.asarray(call(model, params, *padded([source]), tokens))[0, at])
    return tokens[0, 1 : count + 1].tolist()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_the_engine_decodes_it(scan):
    model, params = make(scan)
    result = Generator(model, params).generate(SOURCES, max_new_tokens=20)
    for source, sample in zip(SOURCES, result.samples, strict=True):
        assert sample.tokens == without_cache(model, params, source, 20) and sample.finish == "length"
    assert len({token for sample in result.samples for token in sample.tokens}) > 8
    assert len({tuple(sample.tokens) for sample in result.samples}) == 3  # the source is read


def test_samples_share_their_source(plain):
    options = dict(max_new_tokens=12, sampling=Sampling(1.0), seed=3)
    rows = [sample.tokens for sample in plain.generate(SOURCES, samples=2, **options).samples]
    assert rows[0] != rows[1]
    for prompt in range(3):
        # Beside itself, for which no other program is needed.
        alone = plain.generate([SOURCES[prompt]] * 3, ids=[prompt] * 3, samples=2, **options)
        assert [sample.tokens for sample in alone.samples] == rows[2 * prompt : 2 * prompt + 2] * 3


def test_lengths_have_limits_of_their_own(plain):
    """A source may fill its context, and output, behind the start token, fills the decoder's whatever the source."""
    result = plain.generate(SOURCES, max_new_tokens=1000)
    assert [len(sample.tokens) for sample in result.samples] == [TARGET - 1] * 3
    assert {sample.finish for sample in result.samples} == {"context"}
    with pytest.raises(UserError, match="prompt 2 has 21 tokens and the model reads sources of at most 20"):
        plain.generate([[1], [1] * 21])


def test_what_each_side_sees(made):
    model, params = made
    source, lengths = padded([SOURCES[0]])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 6), np.int32)

    def changed(array, index, value):
        other = array.copy()
        other[index] = value
        return other

    def run(source, tokens):
        return np.asarray(call(model, params, source, lengths, tokens))

    logits = run(source, tokens)
    # A later token of the target changes nothing before it, padding of the source nothing at all.
    later = run(source, changed(tokens, (0, 4), (tokens[0, 4] + 1) % VOCAB))
    np.testing.assert_array_equal(later[:, :4], logits[:, :4])
    assert np.all(np.any(later[:, 4:] != logits[:, 4:], axis=-1))
    np.testing.assert_array_equal(run(changed(source, (0, slice(3, None)), 11), tokens), logits)
    # Every real token of the source, the last included, changes all.
    for place in range(3):
        assert np.all(np.any(run(changed(source, (0, place), 30), tokens) != logits, axis=-1))


def test_an_empty_source_decodes(made):
    model, params = made
    source, _ = padded([[1]])
    engine = engines.Engine(model, Plain(), Greedy(), capacity=16)
    weights = engines.Weights(params, (), ())
    keys, none = engines.row_keys(0, jnp.arange(1), 1), jnp.zeros((0,), jnp.int32)

    def run(source):
        state = engine.prefill(weights, source, jnp.zeros((1,), jnp.int32), jnp.asarray([8]), keys, none)
        return engine.decode(weights, state, jnp.zeros((1,), bool), jnp.int32(20), none)

    run = jax.jit(run)
    state = run(source)
    assert state.count.tolist() == [8] and np.isfinite(state.cache.layers[0].own.key).all()
    np.testing.assert_array_equal(run(source + 9).tokens, state.tokens)  # what is not there has no effect


def test_the_cache_keeps_the_source(made):
    """Roll-back forgets tokens and never the source; commit takes a path; select takes both along."""
    model, params = made
    apply = functools.partial(call, model, params)
    _, states, fresh = apply(*padded(SOURCES), method="prefill")
    assert states.shape == (3, SOURCE, 16)
    lengths = padded(SOURCES)[1]
    commit = jax.jit(lambda cache, fresh, count: cache.commit(fresh, None, count))
    rollback = jax.jit(lambda cache, length: cache.rollback(length))
    select = jax.jit(lambda cache, rows: cache.select(rows))
    start = commit(jax.jit(lambda: model.init_cache(3, 16))(), fresh, lengths)
    assert start.length.tolist() == [1, 1, 1] and np.sum(start.source, axis=1).tolist() == [3, 20, 1]
    tokens = np.random.default_rng(2).integers(0, VOCAB, (3, 4), np.int32)
    logits, _, rows = apply(tokens, start, method="extend")
    # The whole target at once gives the same.
    whole = apply(*padded(SOURCES), np.pad(tokens, ((0, 0), (1, 0)), constant_values=model.bos))
    np.testing.assert_allclose(logits, np.asarray(whole)[:, 1:], atol=2e-5)

    long = commit(start, rows, np.asarray([4, 2, 0]))
    assert long.length.tolist() == [5, 3, 1]
    for layer, before in zip(long.layers, start.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, layer.memory, before.memory)
    back = rollback(long, np.asarray([1, 1, 1]))
    np.testing.assert_array_equal(back.source, start.source)
    again, _, _ = apply(tokens, back, method="extend")
    np.testing.assert_array_equal(again, logits)
    chosen = select(long, np.asarray([2, 0, 2]))  # as many rows: the program that is there
    assert chosen.length.tolist() == [1, 5, 1] and np.sum(chosen.source, axis=1).tolist() == [1, 3, 1]
    moved, _, _ = apply(tokens[[2, 0, 2]], chosen, method="extend")
    there, _, _ = apply(tokens, long, method="extend")
    np.testing.assert_allclose(moved, np.asarray(there)[[2, 0, 2]], atol=1e-5)


def test_a_tree_is_scored_as_its_paths(made):
    model, params = made

    @jax.jit
    def begin(params):
        _, _, fresh = model.apply({"params": params}, *padded(SOURCES[:1]), method="prefill")
        return model.init_cache(1, 16).commit(fresh, None, np.asarray([3]))

    cache = begin(params)
    # Node 0, its children 1 and 2, and 3 below 2.
    tree = np.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    tokens = np.asarray([[4, 8, 15, 16]])
    logits, _, _ = call(model, params, tokens, cache, tree, np.asarray([0, 1, 1, 2]), method="extend")
    for path in ([0, 1], [0, 2, 3]):
        row = np.pad(tokens[:, path], ((0, 0), (0, 3 - len(path))))  # nothing sees what stands behind it
        alone, _, _ = call(model, params, row, cache, method="extend")
        np.testing.assert_allclose(np.asarray(logits)[:, path], np.asarray(alone)[:, : len(path)], atol=1e-5)


def test_a_decoder_with_a_full_rule_sees_both_ways():
    attention = dict(num_heads=2, head_dim=8, rotary=of(Rotary))
    block = of(
        CrossBlock,
        attention=of(Attention, rule=of(Full), **attention),
        cross_attention=of(CrossAttention, **attention),
        mlp=of(GatedMLP, hidden_dim=24),
    )
    full = config()
    full.blocks = (block,)
    model, (_, params) = build(full), make()
    source, lengths = padded([SOURCES[0]])
    texts = np.asarray([[1, 2, 3, 4, 5]]), np.asarray([[1, 2, 3, 9, 5]]), np.asarray([[1, 2, 3, 4, 9]])
    logits, later, beyond = (
        np.asarray(call(model, params, source, lengths, tokens, np.asarray([4]))) for tokens in texts
    )
    assert np.all(np.any(later[:, :4] != logits[:, :4], axis=-1))
    np.testing.assert_array_equal(beyond[:, :4], logits[:, :4])


def test_the_task_by_hand(made):
    model, params = made
    task = SequenceToSequence(model, label_smoothing=0.1)
    source, lengths = padded(SOURCES[:2])
    targets = np.asarray([[3, 4, 5], [6, 7, 0]])
    weights = np.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], np.float32)
    batch = {"source": source, "source_lengths": lengths, "targets": targets, "weights": weights}
    np.testing.assert_array_equal(shift_right(targets, 1), [[1, 3, 4], [1, 6, 7]])

    @jax.jit
    def run(params, batch):
        logits = model.apply({"params": params}, source, lengths, shift_right(batch["targets"], 1))
        return logits, task.evaluate(params, batch), task.loss(params, batch, jax.random.key(0))

    logits, evaluated, metrics = jax.tree.map(np.asarray, run(params, batch))
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    loss, weight = evaluated["loss"]
    assert weight == 5 and loss == pytest.approx(float(np.sum(nats * weights)), rel=1e-5)
    # One tenth of the mass is spread evenly.
    smooth = 0.9 * nats - 0.1 * np.mean(log_p, axis=-1)
    assert metrics["loss"][0] == pytest.approx(float(np.sum(smooth * weights)), rel=1e-5)
    assert metrics["cross_entropy"][0] == pytest.approx(float(loss), rel=1e-6)
    with pytest.raises(UserError, match="label_smoothing: 1.0 is not in"):
        SequenceToSequence(model, label_smoothing=1.0)


def test_it_is_saved_and_loaded(tmp_path, made):
    _, params = made
    save_model(tmp_path / "model", config(), params)
    loaded = load_model_directory(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.model == made[0]
