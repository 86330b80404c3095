"""Models that hear: spectrograms as AST cuts them, their tower, prompts with sounds, files of sound."""

import json
import logging
import struct

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from experiments import generate
from research.config import build, load_config
from research.config_capture import capture
from research.data.dialogues import LlavaFiles
from research.data.hearing import SpokenQuestions, make_hearing_vocabulary, vocabulary
from research.data.shapes import vocabulary as words_of_shapes
from research.data.sounds import read_wave
from research.data.spoken import SpokenDigits, log_mel
from research.decoding.generator import Generator
from research.errors import UserError
from research.multimodal.connectors import StepProjection
from research.multimodal.conversations import Conversations
from research.multimodal.media import Square
from research.multimodal.padded import Padded
from research.multimodal.prompts import Prompts
from research.multimodal.sound import Spectrogram
from research.multimodal.tower import SpectrogramTower
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.patch import windows
from research.nn.transformer import Block
from research.training.model_directory import save_model
from tests.multimodal.test_model import is_the_decoder_without_media, louder, reread
from tests.multimodal.toys import WIDTH, decoder, entry, image, media, vlm
from tests.programs import call, drawn
from tests.test_catalogue import few_steps, keep_their_bits

PLANNER = Spectrogram(
    frames=40, size=(8, 32), stride=(4, 32), merge=2
)  # at most 9 steps of 2 bands, in 5 rows
BLOCK = Block(Attention(2, 4, rule=Full(), use_bias=True, output_bias=True), MLP(16), LayerNorm())


def tower(**fields):
    return SpectrogramTower(blocks=(BLOCK,), num_layers=2, width=8, steps=9, bands=2, **fields)


def hearing():
    words = decoder().clone(vocab_size=vocabulary().vocab_size)
    return vlm(
        planner=PLANNER, decoder=words, tower=tower(), connector=StepProjection(WIDTH, bands=2, merge=2)
    )


def sound(frames=40, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, 200 + 80 * (frames - 1)).astype(np.float32)


@pytest.fixture(scope="module")
def toy():
    model = hearing()
    return model, louder(drawn(model, np.zeros((1, 2), np.int32)))


def test_a_spectrogram_is_cut_as_ast_cuts_it():
    planner = Spectrogram(frames=56)  # 16 x 16 every 10: 5 steps of 5 bands
    wave = sound(50)
    read, spelled = planner.read(wave)
    mel = log_mel(wave)
    mel = (mel - mel.mean()) / (2 * mel.std())
    np.testing.assert_allclose([mel.mean(), mel.std()], [0, 0.5], atol=1e-5)
    whole = np.pad(mel, ((0, 6), (0, 0)))  # what is behind the last whole window is heard, too
    wanted = jax.jit(windows, static_argnums=(1, 2))(whole[None, ..., None], (16, 16), (10, 10))
    np.testing.assert_allclose(read.patches, wanted, atol=1e-5)
    assert read.grid.tolist() == [[5, 5]] and spelled == [0, 1, 2, 3, 4] and planner.rows == 5
    short, spelled = PLANNER.read(sound(13))  # steps begin at 0, 4 and 8, the last one is short
    assert short.grid.tolist() == [[3, 2]] and spelled == [0, 1] and not short.patches[0, 6:].any()
    assert short.patches[0, 5].reshape(8, 32)[4].any() and not short.patches[0, 5].reshape(8, 32)[5:].any()
    assert PLANNER.read(sound(3))[0].grid.tolist() == [[1, 2]]
    # At twice the rate windows have twice the samples.
    read, _ = Spectrogram(frames=40, rate=16_000).read(np.repeat(sound(40), 2))
    assert read.grid.tolist() == [[4, 5]]
    # Silence has no spectrum, and is no error.
    np.testing.assert_allclose(PLANNER.read(np.zeros(800, np.float32))[0].patches, 0, atol=1e-6)
    for wrong, message in (
        (dict(size=(41, 16)), "does not fit into a grid"),
        (dict(stride=(0, 10)), "as many positive numbers"),
        (dict(merge=0), "merge=0: at least 1"),
        (dict(rate=0), "rate=0: at least 100"),
        (dict(bins=128), "128 mel bins: some lie between two of the 129 frequencies of 8000 Hz"),
    ):
        with pytest.raises(UserError, match=message):
            Spectrogram(frames=40, **wrong)
    for wrong in (sound()[None], (sound() * 100).astype(np.int16)):
        with pytest.raises(UserError, match=r"a sound is float32\[samples\], not "):
            PLANNER.read(wrong)


def test_a_tower_hears_what_is_there():
    both = media(PLANNER, sound(40), sound(13))
    module = tower(class_token=True, norm_all=True, feature=-2)
    params = drawn(module, both)
    seen = jax.tree.map(np.asarray, call(module, params, both))
    assert seen.taps.shape == (3, 1, 2, 1, 19, 8) and seen.tokens.shape == (1, 2, 1, 18, 8)
    np.testing.assert_array_equal(seen.tokens, seen.taps[-2][..., 1:, :])
    assert seen.mask.sum(-1).tolist() == [[[18], [6]]]
    louder_behind = both.replace(patches=both.patches + 9.0 * ~seen.mask[..., None])
    other = call(module, params, louder_behind)
    np.testing.assert_array_equal(np.asarray(other.taps)[:, 0, 1, 0, :7], seen.taps[:, 0, 1, 0, :7])
    # Rows of steps: those that a sound does not have are nothing, so that they do not reach the last one's row.
    connector = StepProjection(WIDTH, bands=2, merge=2)
    own = drawn(connector, seen, both)
    rows = np.asarray(call(connector, own, seen, both))
    assert rows.shape == (1, 2, 5, WIDTH)
    np.testing.assert_array_equal(call(connector, own, other, louder_behind), rows)
    with pytest.raises(UserError, match="StepProjection: 18 windows are no steps of bands=4"):
        jax.eval_shape(StepProjection(WIDTH, bands=4).init, jax.random.key(0), seen, both)
    with pytest.raises(UserError, match="steps=9 of bands=2 are 18 positions, and sounds have 20 windows"):
        jax.eval_shape(
            module.init,
            jax.random.key(0),
            media(Spectrogram(frames=44, size=(8, 32), stride=(4, 32)), sound(40)),
        )


def test_without_a_sound_it_is_the_decoder_bit_for_bit(toy):
    is_the_decoder_without_media(*toy)


def test_prompts_with_sounds_decode_as_they_are_read(toy):
    model, params = toy
    prompts = (
        ("<audio> which <audio> digits", [sound(40), sound(13, 1)]),
        ("which", []),
        ("said <audio>", [sound(21, 2)]),
    )
    asked = Prompts.of(prompts, model.planner, words_of_shapes())
    assert [len(row) for row in asked.tokens] == [1 + 5 + 1 + 2 + 1, 2, 1 + 1 + 3]
    generator = Generator(model, params, ends=())
    outputs = [
        sample.tokens
        for sample in generator.generate(asked.tokens, beside=asked.beside, max_new_tokens=8).samples
    ]
    for logits, output in zip(reread(model, params, prompts, outputs), outputs, strict=True):
        np.testing.assert_array_equal(logits.argmax(-1), output)
    # As they are where rows are padded on the left.
    rows = [
        [3 if slot >= 0 else token for token, slot in zip(r.tokens, r.slots, strict=True)]
        for r in asked.written
    ]
    mask = np.array([[0] * (10 - len(row)) + [1] * len(row) for row in rows])
    tokens = np.array([[0] * (10 - len(row)) + row for row in rows])
    sounds = [x for _, own in prompts for x in own]
    batch = Padded.of(tokens, mask, sounds, model.planner, vocabulary(), placeholder=3)
    jax.tree.map(np.testing.assert_array_equal, batch.asked.beside(16), asked.beside(16))


def test_the_tiny_config_learns_with_a_frozen_tower_and_one_program(monkeypatch, caplog):
    config = few_steps("hearing", load_config("configs/hearing.py"), "")
    stage = config.stages[0]
    stage.trainable, stage.optimizer.weight_decay = ("^connector/", "^decoder/"), 0.1
    config.data.source.source.size = 6
    trainer = build(config)
    params = drawn(trainer.task.model, np.zeros((1, 2), np.int32))
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        state, metrics = trainer.train(progress=False, devices=jax.devices()[:1], params=params)
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(compiled) == 1  # sounds of all lengths
    keep_their_bits(trainer, params, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.params["tower"], params["tower"])
    assert np.isfinite(metrics["train/loss"])


def test_questions_have_the_truth_as_their_answers():
    assert vocabulary().fingerprint == make_hearing_vocabulary().fingerprint
    source = SpokenDigits(digits=(1, 3), size=8)
    questions, planner = (
        SpokenQuestions(source),
        Spectrogram(frames=176, size=(8, 32), stride=(4, 32), merge=2),
    )
    batch = Conversations(questions, planner, 32, shuffle=False).take(np.arange(8))
    for number in range(8):
        digits, _ = source.truth(number)
        answer = batch["targets"][number][batch["weights"][number] > 0].tolist()
        assert answer == [*vocabulary().encode(" ".join(map(str, digits))), vocabulary().eos_id]
        assert 0 not in vocabulary().encode(questions[number].turns[0][0].replace("<audio>", ""))
        heard = planner.read(source[number].wave)[0]
        np.testing.assert_array_equal(batch["patches"][number, 0], heard.patches)
    silent = Conversations(SpokenQuestions(source, silent=True), planner, 32, shuffle=False).take(
        np.arange(8)
    )
    assert (silent["slot"] == -1).all() and not silent["grid"].any() and not silent["patches"].any()


def test_sounds_in_llavas_format(tmp_path):
    wavfile.write(tmp_path / "a.wav", 8000, sound())

    entries = [
        entry("<audio>\nwhich digits were said", "3 1", audio="a.wav"),
        entry("<audio> or <audio>", "3 1", audio="a.wav"),
        entry("<audio> <image>", "3 1", audio="a.wav", image="b.png"),
        entry("<image> and <audio>", "3 1", audio="a.wav"),
        entry("<audio>\nwhich digits were said", "3 1"),
    ]
    (tmp_path / "some.json").write_text(json.dumps(entries))
    source = LlavaFiles(str(tmp_path / "some.json"))
    vocabulary().save(tmp_path / "tokenizer.json")
    batch = Conversations(source, PLANNER, 24, str(tmp_path / "tokenizer.json"), shuffle=False)
    assert batch.take(np.arange(1))["grid"].tolist() == [[[[9, 2]]]]
    with pytest.raises(UserError, match="entry 1: 2 <audio> in the questions, but 1 audios"):
        source[1]
    with pytest.raises(UserError, match="entry 2: a sound beside images or videos"):
        source[2]
    with pytest.raises(UserError, match="entry 3: 1 <image> in the questions, but 0 images"):
        source[3]
    with pytest.raises(UserError, match="1 <audio> in the text, but 0 sounds are given"):
        batch.take(np.arange(4, 5))
    seeing = Conversations(
        source, Square(patch=4, side=8), 24, str(tmp_path / "tokenizer.json"), shuffle=False
    )
    with pytest.raises(UserError, match="a dialogue shows 1, and its questions have <image> for 0: '<audio>"):
        seeing.take(np.arange(1))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, "stereo"])
def test_waves_of_all_types(tmp_path, kind):
    wave = sound(4)
    if kind == "stereo":
        samples = np.stack([wave + 0.25, wave - 0.25], axis=1)
    elif kind == np.uint8:
        samples = np.round(wave * 128 + 128).astype(np.uint8)
    else:
        samples = wave if kind == np.float32 else np.round(wave * -float(np.iinfo(kind).min)).astype(kind)
    wavfile.write(tmp_path / "a.wav", 8000, samples)
    found = read_wave(tmp_path / "a.wav", 8000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wave, atol=1 / 128 if kind == np.uint8 else 1e-4)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds")
    save_model(path / "model", capture(toy[0]), toy[1], vocabulary())
    seeing = vlm()
    save_model(path / "seeing", capture(seeing), drawn(seeing, np.zeros((1, 2), np.int32)), words_of_shapes())
    for name, rate, samples in (
        ("good", 8000, sound(30)),
        ("other", 8000, sound(12, 1)),
        ("rate", 16_000, sound()),
        ("none", 8000, sound()[:0]),
        ("short", 8000, sound()[:199]),
        ("long", 8000, np.zeros(200 + 80 * 40, np.float32)),
        ("nan", 8000, np.full(800, np.nan, np.float32)),
    ):
        wavfile.write(path / f"{name}.wav", rate, samples)
    whole = (path / "good.wav").read_bytes()
    hollow = b"RIFF" + struct.pack("<I", 28) + whole[8:36]  # no chunk of samples
    files = {
        "hollow.wav": hollow,
        "cut.wav": whole[:-600],
        "text.wav": b"some text",
        "empty.wav": b"",
        "head.wav": whole[:20],
    }
    for name, data in files.items():
        (path / name).write_bytes(data)
    Image.fromarray(image()).save(path / "a.png")
    return path


def run(folder, *flags, model="model"):
    return generate.PROGRAM.call(generate.main, [f"--workdir={folder / model}", "--max_new_tokens=2", *flags])


@pytest.mark.parametrize(
    ("files", "prompt", "message"),
    [
        (["absent.wav"], "said", "absent.wav: no such file"),
        (["empty.wav"], "said", "empty.wav: an empty file"),
        (["text.wav"], "said", "text.wav: not a readable WAV file: "),
        (["head.wav"], "said", "head.wav: not a readable WAV file: "),
        (["hollow.wav"], "said", "hollow.wav: not a readable WAV file: no samples are in it"),
        (["cut.wav"], "said", "cut.wav: not a readable WAV file: Reached EOF prematurely"),
        (["rate.wav"], "said", "rate.wav: 16000 Hz; 8000 Hz is expected"),
        (["none.wav"], "said", "none.wav: a sound without samples"),
        (
            ["short.wav"],
            "said",
            "short.wav: 199 samples, 0.02 s; from 200 to 3399 samples, 0.42 s, are heard",
        ),
        (["long.wav"], "said", "long.wav: 3400 samples, 0.42 s; from 200 to 3399 samples"),
        (["nan.wav"], "said", "nan.wav: some samples are no finite numbers"),
        (["."], "said", "Is a directory; a WAV file is expected"),
        (["good.wav"], "<audio> or <audio>", "2 <audio> in the text, but 1 sounds are given"),
        ([], "<audio> said", "1 <audio> in the text, but 0 sounds are given"),
    ],
)
def test_what_is_no_sound_is_told_in_one_line(folder, capsys, files, prompt, message):
    assert run(folder, *(f"--audio={folder / name}" for name in files), f"--prompt={prompt}") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_program_plays_sounds_to_models_that_hear(folder, capsys):
    flags = (
        f"--audio={folder / 'good.wav'}",
        f"--audio={folder / 'other.wav'}",
        "--prompt=which digits were said",
    )
    assert run(folder, *flags) == 0
    # <bos>, 7 steps in 4 rows, 2 steps in 1, four words.
    assert "10 prompt tokens" in capsys.readouterr().err
    picture = f"--image={folder / 'a.png'}"
    for wrong, model, message in (
        (picture, "model", "a.png: {} holds a VLM, which reads sounds, not images"),
        (flags[0], "seeing", "good.wav: {} holds a VLM, which reads images, not sounds"),
    ):
        assert run(folder, wrong, "--prompt=what", model=model) == 2
        assert message.format(folder / model) in capsys.readouterr().err
