"""Zipper: what the paper says must hold exactly, on tiny towers of different widths and depths.

That a frozen tower keeps its bits under weight decay is tested for the tiny config (tests/test_catalogue.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.utterances import MODALITIES, PADDING, lay_out
from research.decoding.generator import Generator
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.multimodal.zipper import Interleaved, Streams, Zipper, take_turns
from research.nn.attention import Attention, Context
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import call, drawn

BOS, EOS = 1, 2
ROWS, PLACES = 8, 12  # of every batch here, so that one program reads them all


def tower(width, layers, vocab_size, **fields):
    block = Block(Attention(2, width // 2, rotary=Rotary()), GatedMLP(8))
    sizes = dict(vocab_size=vocab_size, width=width, max_length=64, num_layers=layers)
    return DecoderLM(blocks=(block,), **sizes, **fields)


MODEL = Zipper(tower(8, 4, 11), tower(12, 2, 13), every=(2, 1), num_heads=2, head_dim=4)
NUMBERS = jnp.zeros((1, 2), jnp.int32)


def opened(params, gate):
    """Gates of alternating sign."""
    gates = [name for name in params if name.startswith("fusion_")]
    return params | {
        name: params[name] | {"gate": jnp.asarray(gate * (-1.0) ** i)} for i, name in enumerate(gates)
    }


@pytest.fixture(scope="module")
def params():
    return opened(drawn(MODEL, NUMBERS), 0.9)


def strands(*sequences):
    """Both streams of sequences [(modality, tokens), ...], padded to the size of all batches here."""
    laid = [lay_out([(m, tokens, False) for m, tokens in segments]) for segments in sequences]
    rows = tuple(laid + [lay_out([])] * (ROWS - len(laid)))
    return {m: Streams(rows, m).strand(m, PLACES) for m in MODALITIES}


def zipped(params, both, model=MODEL):
    return {m: np.asarray(x) for m, x in call(model, params, **both, method="zipped").items()}


# Text at times 0-2, speech at 3-6, text at 7-8, speech at 9-10; the second begins with speech.
FIRST = [("text", [1, 5, 7]), ("speech", [1, 9, 4, 2]), ("text", [3, 8]), ("speech", [6, 10])]
SECOND = [("speech", [1, 12]), ("text", [1, 4])]


def test_streams_have_times_of_the_whole_sequence():
    both = strands(FIRST, SECOND)
    assert both["text"].tokens[:2, :5].tolist() == [[1, 5, 7, 3, 8], [1, 4, 0, 0, 0]]
    assert both["text"].times[:2, :5].tolist() == [[0, 1, 2, 7, 8], [2, 3, PADDING, PADDING, PADDING]]
    assert both["speech"].times[0, :7].tolist() == [3, 4, 5, 6, 9, 10, PADDING]
    # Beside a prompt of a padded length the other stream has a multiple of it, however long it is.
    for count, wanted in ((0, 4), (4, 4), (5, 8)):
        asked = Streams.of([[("speech", [1] * count), ("text", [1])], [("text", [1])]], "text")
        (beside,) = asked.beside(4)
        assert (beside.times.shape, beside.other.tokens.shape) == ((2, 4), (2, wanted))
        assert (np.asarray(beside.other.times) < PADDING).sum(axis=1).tolist() == [count, 0]
    with pytest.raises(UserError, match="sequence 2 does not end with a begun segment of text"):
        Streams.of([SECOND, FIRST], "text")


def test_with_closed_gates_a_tower_reads_its_own_stream_alone(params):
    closed, both = opened(params, 0.0), strands(FIRST, SECOND)
    together = zipped(closed, both)
    kernels = closed["input_text"]
    embedded = call(MODEL.text, closed["text"], both["text"].tokens, method="embed")
    hidden = np.maximum(embedded @ kernels["up"]["kernel"] + kernels["up"]["bias"], 0)
    entered = np.maximum(hidden @ kernels["down"]["kernel"] + kernels["down"]["bias"], 0)
    positions = np.broadcast_to(np.arange(PLACES), (ROWS, PLACES))
    context = Context(positions, (both["text"].times < PADDING).astype(jnp.int32))
    states, _ = call(MODEL.text, closed["text"], entered, context, hooks={}, method="run")
    alone = call(MODEL.text, closed["text"], states, method="logits")
    np.testing.assert_allclose(together["text"], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(zipped(params, both)["text"] - together["text"])[0, 3:5].max() > 0.01


def test_alone_the_tower_is_its_language_model_bit_for_bit(params):
    tokens = jnp.asarray([[1, 5, 9, 2]])
    for m in MODALITIES:
        alone = call(MODEL.clone(writes=m), params, tokens)
        np.testing.assert_array_equal(alone, call(getattr(MODEL, m), params[m], tokens))


@pytest.mark.parametrize("m, other", [MODALITIES, MODALITIES[::-1]])
def test_a_token_sees_the_other_towers_tokens_before_its_time(params, m, other):
    both = strands(*[FIRST] * ROWS)
    # Row i has another token i, the last row none.
    changed = both[m].replace(tokens=both[m].tokens + jnp.eye(ROWS, PLACES, dtype=jnp.int32))
    changed = changed.replace(tokens=changed.tokens.at[-1].set(both[m].tokens[-1]))
    logits = zipped(params, both | {m: changed})[other]
    real = np.asarray(both[other].times[0]) < PADDING
    for i, time in enumerate(both[m].times[0, : sum(len(t) for n, t in FIRST if n == m)].tolist()):
        before = np.asarray(both[other].times[0]) <= time
        np.testing.assert_array_equal(logits[i][before], logits[-1][before])
        assert (logits[i] != logits[-1]).any(-1)[real & ~before].all()


def test_a_token_before_all_of_the_other_tower_gets_nothing_from_it(params):
    both = strands(FIRST)
    nothing = both["speech"].replace(times=jnp.full((ROWS, PLACES), PADDING))
    alone, together = zipped(params, both | {"speech": nothing})["text"], zipped(params, both)["text"]
    np.testing.assert_array_equal(together[0, :3], alone[0, :3])
    assert np.isfinite(alone).all() and (together[0, 3:5] != alone[0, 3:5]).any(-1).all()


def test_neither_tower_is_first(params):
    """The towers in each other's place: the same logits, since both are updated from the states before."""
    mirrored = Zipper(MODEL.speech, MODEL.text, every=(1, 2), num_heads=2, head_dim=4)
    names = {n: n.replace("text", "*").replace("speech", "text").replace("*", "speech") for n in params}
    both = strands(FIRST, SECOND)
    swapped = {"text": both["speech"], "speech": both["text"]}
    logits, other = zipped(params, both), zipped({names[n]: x for n, x in params.items()}, swapped, mirrored)
    np.testing.assert_allclose(other["speech"], logits["text"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other["text"], logits["speech"], rtol=1e-5, atol=1e-6)


def test_the_cache_gives_what_one_call_gives(params):
    *before, (_, last) = FIRST
    full = zipped(params, strands(FIRST))["speech"][0, 4:6]
    asked = Streams.of([[*before, ("speech", last[:1])]], "speech")
    model, tokens = MODEL.clone(writes="speech"), jnp.asarray(asked.tokens)
    lengths = jnp.asarray([tokens.shape[1]])
    logits, _, fresh = call(model, params, tokens, lengths, *asked.beside(tokens.shape[1]), method="prefill")
    cache = model.init_cache(1, 16).commit(fresh, None, lengths)
    rest, _, fresh = call(model, params, jnp.asarray([last[1:]]), cache, method="extend")
    np.testing.assert_allclose(jnp.concatenate([logits, rest[0]]), full, rtol=1e-5, atol=1e-5)
    # Rows for two layers, and for what the other tower reads at two fusions.
    assert [x[0].shape[2] for x in fresh] == [1] * 4


def test_generators_and_towers_that_take_turns(params):
    """Speech is given; text is written, then speech that reads both: by two generators, whose cached output of unequal
    rows is what one call over all says, and by one program."""
    rows = [[("speech", [1, 9, 4, 6, 2])], [("speech", [1, 12, 2])]]
    both = strands(*rows)
    given = [jax.tree.map(lambda x: x[:2, :6], both[m]) for m in MODALITIES]
    marks = ((BOS, EOS), (BOS, EOS))
    turns = take_turns(MODEL, params, *given, order=MODALITIES, marks=marks, most=5)
    for m, (tokens, count) in zip(MODALITIES, turns, strict=True):
        asked = Streams.of([[*row, (m, [BOS])] for row in rows], m)
        generator = Generator(MODEL.clone(writes=m), params, ends=(EOS,))
        wanted = generator.generate(asked.tokens, beside=asked.beside, max_new_tokens=5).samples
        for row, sample, mine, number in zip(rows, wanted, tokens.tolist(), count.tolist(), strict=True):
            assert mine[:number] == sample.tokens and not any(mine[number:])
            row.append((m, [BOS, *sample.tokens, EOS]))
    logits = zipped(params, strands(*rows))
    for i, row in enumerate(rows):
        for m in MODALITIES:
            written, stream = row[-2:][MODALITIES.index(m)][1], sum((t for n, t in row if n == m), [])
            start = len(stream) - len(written)
            said = logits[m][i, start : len(stream) - 1].argmax(-1)
            assert said.tolist()[: len(written) - 2] == written[1:-1]


def test_a_tower_generates_alone(params):
    prompt = [BOS, 5]
    tokens = Generator(MODEL, params, ends=()).generate([prompt], max_new_tokens=3).samples[0].tokens
    logits = call(MODEL.text, params["text"], jnp.asarray([prompt + tokens]))
    assert logits[0, 1:-1].argmax(-1).tolist() == tokens


def test_the_loss_is_of_what_is_written(params):
    both = strands(FIRST, SECOND)
    batch = {f"{m}/{n}": getattr(both[m], n) for m in MODALITIES for n in ("tokens", "times")}
    places = {"text": [(0, 0), (0, 1)], "speech": [(0, 4)]}
    logits, nats = zipped(params, both), []
    for m in MODALITIES:
        batch[f"{m}/targets"] = jnp.roll(both[m].tokens, -1, axis=1)
        weights = np.zeros((ROWS, PLACES), np.float32)
        for place in places[m]:
            weights[place] = 1
            nats.append(-jax.nn.log_softmax(logits[m][place])[batch[f"{m}/targets"][place]])
        batch[f"{m}/weights"] = weights
    metrics = jax.jit(Interleaved(MODEL).evaluate)(params, batch)
    np.testing.assert_allclose(metrics["loss"], (sum(nats), 3), rtol=1e-5)
    assert metrics["segments"][1] == 1 and metrics["accuracy"][1] == 3


def test_towers_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError, match="4 layers of text with a fusion behind every 2, 2 of speech behind every 2"
    ):
        dataclasses.replace(MODEL, every=(2, 2)).init(jax.random.key(0), NUMBERS)
    scanned = dataclasses.replace(MODEL, text=tower(8, 4, 11, scan_layers=True))
    with pytest.raises(UserError, match="set scan_layers=False in both towers"):
        scanned.init(jax.random.key(0), NUMBERS)


def test_a_run_begins_with_parts_or_with_a_run():
    with pytest.raises(UserError, match="Interleaved: start_from and parts are both given"):
        Interleaved(MODEL, start_from="runs/a", parts=(("text", "runs/b", ""),)).start  # noqa: B018
    assert not hasattr(Interleaved(MODEL), "start")


def test_shared_defaults_are_no_shared_parameters():
    """Both towers have the default norm, one object, of width 8 and 12."""
    assert MODEL.text.final_norm is tower(2, 1, 1).final_norm
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), NUMBERS)["params"])
    assert [shapes[m]["final_norm"]["scale"].shape for m in MODALITIES] == [(8,), (12,)]
