"""The program compress: the directory it writes is taken by the other programs, and mistakes are one line."""

import json

import jax
import numpy as np
import pytest

from experiments import compress, convert, evaluate
from research.compression.blocks import plain
from research.config import build, of
from research.config_capture import capture
from research.data.text import TokenDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop import huggingface
from research.interop.families import read_config
from research.nn.quantized import Quantized
from research.nn.weights import Sum
from research.training.loop import Trainer
from research.training.model_directory import load_model_directory
from research.training.optimizers import constant, sgd
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import load_model, open_workdir, save_model
from tests.programs import call, drawn

ENTRIES = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
EVALUATORS = {
    "evaluators": {
        "__tuple__": [
            {
                "cls": "research.training.evaluators:Evaluate",
                "name": "validation",
                "batch_size": 8,
                "batches": 1,
                "data": {
                    "cls": "research.data.text:TokenDataset",
                    "sources": "arithmetic",
                    "split": "validation",
                    "length": 32,
                    "shuffle": False,
                },
            }
        ]
    }
}


def run(program, *arguments):
    return program.PROGRAM.call(program.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model directory that knows what it was trained on."""
    _, model = read_config(ENTRIES, "config.json")
    directory = tmp_path_factory.mktemp("compress") / "trained"
    save_model(directory, capture(model), drawn(model, np.zeros((1, 2), np.int32)), Tokenizer.load())
    (directory / "experiment.json").write_text(json.dumps(EVALUATORS))
    return directory


@pytest.fixture(scope="module")
def compressed(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compress") / "small"
    arguments = (
        f"--workdir={trained}",
        f"--output={directory}",
        "--method=finequant,eora",
        "--bits=4",
        "--rank=2",
    )
    data = ("--calibration=arithmetic", "--calibration_tokens=256", "--batches=1", "--per_layer")
    assert run(compress, *arguments, *data) == 0
    return directory


def test_the_new_directory_is_taken_by_the_other_programs(trained, compressed, tmp_path, capsys):
    loaded = load_model(compressed)
    kernel = loaded.params["layer_1"]["mlp"]["down"]["kernel"]
    assert isinstance(kernel, Sum) and isinstance(kernel.terms[0], Quantized)
    # 4 bits, a 16-bit scale for each of 16 outputs, two factors of rank 2 in 16 bits.
    assert kernel.stored_bits() == 16 * 16 * 4 + 16 * 16 + 2 * 2 * 16 * 16
    card = (compressed / "README.md").read_text()
    assert (
        "FineQuant(bits=4" in card and "| eora | " in card and (compressed / "compression.png").stat().st_size
    )
    before = load_model(trained).params
    np.testing.assert_array_equal(loaded.params["embedding"]["table"], before["embedding"]["table"])

    assert run(evaluate, f"--workdir={compressed}", "--batches=1", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["results"]["validation"][""]["loss"]
    row = next(line for line in card.splitlines() if line.startswith("| eora"))
    assert measured == pytest.approx(float(row.split("|")[4]), abs=2e-4)

    assert run(convert, f"--from={compressed}", f"--to={tmp_path / 'hf'}", "--format=huggingface") == 0
    # Of a directory that says nothing of its data: measured on that of another.
    assert run(convert, f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'floats'}", "--format=lathe") == 0
    assert run(evaluate, f"--workdir={tmp_path / 'floats'}", "--batches=1") == 2
    assert "does not say what it was trained on (--like)" in capsys.readouterr().err
    like = (f"--workdir={tmp_path / 'floats'}", f"--like={trained}", "--batches=1", "--json")
    assert run(evaluate, *like) == 0
    again = json.loads(capsys.readouterr().out)["results"]["validation"][""]["loss"]
    assert again == pytest.approx(measured, rel=1e-4)  # the order of sums
    model, variables, _ = huggingface.load(tmp_path / "hf")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    # Products of a kernel and of its terms are summed in another order.
    packed, dense = (call(model, params, tokens) for params in (loaded.params, variables["params"]))
    np.testing.assert_allclose(packed, dense, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, plain(loaded.params), variables["params"])


def test_the_tables(trained, compressed, tmp_path, capsys):
    """By kernel and by step, from a chain that goes on from the compressed model, towards the one before."""
    arguments = (
        f"--workdir={compressed}",
        f"--original={trained}",
        f"--output={tmp_path / 'more'}",
        "--method=svd",
    )
    data = ("--rank=16", "--calibration=arithmetic", "--batches=1", "--per_layer", "--speed")
    assert run(compress, *arguments, *data) == 0
    out = capsys.readouterr().out
    # The model has room for 32 tokens, of which the prompt takes 8.
    assert "median of 3 greedy decodes of 24 tokens after 8" in out
    rows = [line.split("│") for line in out.splitlines() if line.startswith(("│ before", "│ svd"))]
    assert [len(row) for row in rows] == [9, 9] and all(float(row[7]) > 0 for row in rows)
    lines = [line for line in out.splitlines() if "layer_0/attention/query/kernel" in line]
    assert len(lines) == 1 and "4 bits in groups of 16 + rank 2 + rank 16" in " ".join(lines[0].split())
    # 4 bits and a scale, and 2 * 18 factors of 16 bits for each of 16 weights; nothing is left to correct but rounding.
    cells = [cell.strip() for cell in lines[0].split("│")]
    assert cells[4] == f"{4 + 1 + 36:.3f}" and float(cells[5]) < 2e-3
    assert "svd of " in out.splitlines()[-1]


def test_training_goes_on_from_it(compressed, tmp_path):
    """Scales and factors are trained, in float32; codes are not; a run that is taken up again finds all of it."""
    data = of(TokenDataset, sources="arithmetic", length=32)
    optimizer = of(sgd, schedule=of(constant, peak=0.1))
    task = of(LanguageModelling, model=load_model(compressed).config, start_from=str(compressed))
    states = []
    for steps in (1, 2):
        stage = of(Stage, name="tune", steps=steps, batch_size=8, optimizer=optimizer)
        config = of(Trainer, task=task, data=data, stages=(stage,), checkpoint_every=1)
        with open_workdir(tmp_path / "run", config) as workdir:
            state, _ = build(config).train(workdir, progress=False, devices=jax.devices()[:1])
        assert int(state.step) == steps
        states.append(state.params["layer_0"]["mlp"]["up"]["kernel"])
    start = load_model(compressed).params["layer_0"]["mlp"]["up"]["kernel"]
    for before, after in zip((start, *states), states, strict=False):
        np.testing.assert_array_equal(before.terms[0].codes, after.terms[0].codes)
        assert after.terms[0].scale.dtype == after.terms[1].up.dtype == np.float32
        assert (before.terms[0].scale != after.terms[0].scale).any()
        assert (before.terms[1].down != after.terms[1].down).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--method or --config is required; methods are round_to_nearest"),
        (("--method=decoupelq",), "no compression method 'decoupelq'; did you mean decoupleq?"),
        (("--method=finequant", "--rank=4"), "rank=4: none of finequant has this option"),
        (("--method=gptq", "--bits=5"), "bits=5 is not supported: there are 2, 3, 4, 8"),
        (
            ("--method=finequant,eora", "--rank=17", "--calibration=arithmetic"),
            "rank=17: a matrix of 16 by 16",
        ),
        (("--method=gptq", "--calibration_tokens=1"), "--output={taken} exists already"),
        (("--method=gptq", "--calibration={empty}"), "the corpus is empty"),
        (
            ("--method=gptq", "--calibration={one}", "--calibration_tokens=99999"),
            "calibration data too short",
        ),
        (
            ("--method=eora", "--calibration=arithmetic", "--rank=2"),
            "eora repairs what was compressed before",
        ),
        (("--config=configs/matlm.py",), "builds a Trainer, not a compression Chain"),
        (("--config=configs/eora.py", "--bits=3"), "--bits and --config both say what to do"),
    ],
)
def test_mistakes_are_one_line(arguments, message, trained, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "{split}").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("one two three")
    places = {"taken": trained, "empty": tmp_path / "empty.txt", "one": tmp_path / "{split}.txt"}
    output = trained if "{taken}" in message else tmp_path / "out"
    filled = [str(argument) for argument in arguments]
    for name, place in places.items():
        filled = [text.replace(f"{{{name}}}", str(place)) for text in filled]
        message = message.replace(f"{{{name}}}", str(place))
    assert run(compress, f"--workdir={trained}", f"--output={output}", "--batches=1", *filled) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_is_found(compressed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((compressed / name).read_bytes())
    load_model_directory(copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is damaged: its bytes have the checksum"):
        load_model_directory(copy)
