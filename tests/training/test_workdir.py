"""Workdirs and model directories: one config, one writer; models come back exactly or one line says why."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from research.config import build, of, to_json
from research.data.tokenizer import SHIPPED, Tokenizer
from research.elastic.matformer import MatFormer
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.transformer import Block
from research.nn.weights import LowRank
from research.training.checkpoints import Checkpoints
from research.training.model_directory import abstract_params
from research.training.paths import named_leaves
from research.training.state import initial_state
from research.training.task import Classification, LanguageModelling
from research.training.workdir import begin, load_model, open_workdir, save_model
from research.vision.vit import ViT
from tests.programs import call, drawn, drawn_like

ROOT = Path(__file__).resolve().parents[2]


class Experiment(NamedTuple):
    """Fields of the names that a trainer has."""

    task: Any
    seed: int = 0
    stages: tuple[Any, ...] = ()
    log_every: int = 10
    mesh: dict[str, int] | None = None


class Span(NamedTuple):
    steps: int
    batch_size: int = 8


def block(width: int = 16) -> ConfigDict:
    return of(Block, attention=of(Attention, num_heads=2, head_dim=4), mlp=of(GatedMLP, hidden_dim=width))


def decoder(**changes: Any) -> ConfigDict:
    fields = {"blocks": (block(),), "num_layers": 2, "vocab_size": 11, "width": 8, "max_length": 8}
    return of(DecoderLM, **fields | changes)


def experiment(model: ConfigDict | None = None, **changes: Any) -> ConfigDict:
    task = of(LanguageModelling, model=model or decoder())
    return of(Experiment, **{"task": of(MatFormer, task=task), "stages": (of(Span, steps=3),)} | changes)


def random_params(model: Any, *inputs: jax.Array, seed: int = 0) -> dict:
    inputs = inputs or (jnp.zeros((1, 2), jnp.int32),)
    return drawn(model, *inputs, seed=seed)


def assert_same(a: Any, b: Any) -> None:
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


# Workdirs


def test_a_workdir_holds_the_config_and_the_tokenizer_exactly(tmp_path):
    config = experiment()
    with open_workdir(tmp_path / "a" / "run", config, tokenizer_path=SHIPPED) as workdir:
        assert workdir.path == tmp_path / "a" / "run"
        assert (workdir.path / "config.json").read_text() == to_json(config)
        assert (workdir.path / "tokenizer.json").read_bytes() == SHIPPED.read_bytes()
    with open_workdir(workdir.path, config, tokenizer_path=SHIPPED):
        pass
    with pytest.raises(UserError, match="already holds a run: resume it or choose another workdir"):
        open_workdir(workdir.path, config, resume=False)


def test_length_cadence_and_placement_may_change_and_are_rewritten(tmp_path):
    open_workdir(tmp_path / "run", experiment()).close()
    longer = experiment(stages=(of(Span, steps=9),), log_every=1, mesh={"fsdp": 2})
    with open_workdir(tmp_path / "run", longer) as workdir:
        # What is refused before a run goes on leaves the config that its checkpoints fit.
        assert (tmp_path / "run" / "config.json").read_text() == to_json(experiment())
        begin(workdir, resumed=True)
    assert (tmp_path / "run" / "config.json").read_text() == to_json(longer)


def test_another_config_is_refused_with_both_values(tmp_path):
    open_workdir(tmp_path / "run", experiment()).close()
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = experiment(decoder(width=12), seed=1, stages=(of(Span, steps=9, batch_size=16),))
    with pytest.raises(UserError) as caught:
        open_workdir(tmp_path / "run", other)
    text = str(caught.value)
    assert "seed is 0 there and 1 here" in text
    assert "stages.0.batch_size is 8 there and 16 here" in text
    assert "task.task.model.width is 8 there and 12 here" in text and "steps" not in text
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    open_workdir(tmp_path / "run", experiment()).close()


def test_a_run_that_never_began_leaves_no_config(tmp_path):
    other = experiment(seed=1)
    with (
        pytest.raises(ZeroDivisionError),
        open_workdir(tmp_path / "run", experiment(), tokenizer_path=SHIPPED),
    ):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), open_workdir(tmp_path / "run", other) as workdir:
        workdir.metrics.write_text("{}\n")  # it began
        raise ZeroDivisionError
    with pytest.raises(UserError, match="seed is 1 there and 0 here"):
        open_workdir(tmp_path / "run", experiment())
    # Opened again it is not new, whatever happens.
    workdir.metrics.unlink()
    with pytest.raises(ZeroDivisionError), open_workdir(tmp_path / "run", other):
        raise ZeroDivisionError
    assert (tmp_path / "run" / "config.json").read_text() == to_json(other)


def test_another_tokenizer_is_refused(tmp_path):
    open_workdir(tmp_path / "run", experiment(), tokenizer_path=SHIPPED).close()
    other = tmp_path / "tokenizer.json"
    other.write_text(SHIPPED.read_text() + "\n")
    with pytest.raises(
        UserError, match="tokenizer .* is not the one that the run in .*/run was started with"
    ):
        open_workdir(tmp_path / "run", experiment(), tokenizer_path=other)
    with pytest.raises(UserError, match="tokenizer .*/absent.json does not exist"):
        open_workdir(tmp_path / "new", experiment(), tokenizer_path=tmp_path / "absent.json")


def test_only_new_empty_or_own_directories(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a workdir: it holds thesis.tex but no config.json"):
        open_workdir(tmp_path, experiment())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(
        UserError, match="workdir .*/thesis.tex cannot be opened: .*Not a directory|is a file"
    ):
        open_workdir(tmp_path / "thesis.tex", experiment())
    (tmp_path / "empty").mkdir()
    open_workdir(tmp_path / "empty", experiment()).close()
    # A process that died while making it leaves no more than this.
    died = tmp_path / "died"
    died.mkdir()
    for name in ("lock", "config.json.tmp", "tokenizer.json"):
        (died / name).write_text("half")
    open_workdir(died, experiment(), tokenizer_path=SHIPPED).close()
    assert (died / "tokenizer.json").read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\x00", "[" * 100_000])
def test_a_broken_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        open_workdir(tmp_path, experiment())
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path)


HOLD = """
    import sys, time
    from research.training.workdir import open_workdir
    from research.config import from_json
    workdir = open_workdir(sys.argv[1], from_json(open(sys.argv[2]).read()))
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    config = of(LanguageModelling, model=decoder())
    (tmp_path / "c.json").write_text(to_json(config))
    code = "\n".join(line.strip() for line in HOLD.splitlines())
    command = [sys.executable, "-c", code, tmp_path / "run", tmp_path / "c.json"]
    holder = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(
        UserError, match=f"run is in use by process {holder.pid} on {os.uname().nodename}: wait"
    ):
        open_workdir(tmp_path / "run", config)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with (
        open_workdir(tmp_path / "run", config),
        pytest.raises(UserError, match=f"by process {os.getpid()} on"),
    ):
        open_workdir(tmp_path / "run", config)


# Models of workdirs


def trained(path: Path, *, ema: bool = False, config: ConfigDict | None = None) -> list[Any]:
    """A workdir with checkpoints of steps 1 and 2; their parameters."""
    config = config or experiment()
    model = build(config.task.task.model)
    with open_workdir(path, config, tokenizer_path=SHIPPED) as workdir:
        checkpoints = Checkpoints(workdir.checkpoints, warn=pytest.fail)
        trees = [random_params(model, seed=seed) for seed in (1, 2)]
        for step, tree in enumerate(trees, 1):
            state = initial_state(tree, {"momentum": tree}, 0, ema=ema)
            if ema:
                state = state.replace(ema=jax.tree.map(lambda x: 2 * x, tree))
            checkpoints.save(step, state, {})
        checkpoints.close()
    return trees


def test_the_newest_or_the_named_checkpoint_of_a_workdir(tmp_path):
    first, second = trained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.step == 2 and loaded.config == decoder() and loaded.model == build(decoder())
    assert_same(loaded.params, second)
    assert loaded.tokenizer.fingerprint == Tokenizer.load().fingerprint
    assert_same(load_model(tmp_path, step=1).params, first)
    logits = call(loaded.model, loaded.params, jnp.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 11)
    with pytest.raises(UserError, match="there is no checkpoint of step 5 in .*; there are: 1, 2"):
        load_model(tmp_path, step=5)
    with pytest.raises(UserError, match="has no ema: the run keeps no moving average"):
        load_model(tmp_path, ema=True)


def test_the_moving_average(tmp_path):
    _, second = trained(tmp_path, ema=True)
    assert_same(load_model(tmp_path, ema=True).params, jax.tree.map(lambda x: 2 * x, second))
    assert_same(load_model(tmp_path).params, second)


def test_only_the_parameters_are_read(tmp_path, monkeypatch):
    from research.training import checkpoint_files

    trained(tmp_path)
    names = []
    read = checkpoint_files.read_arrays
    monkeypatch.setattr(checkpoint_files, "read_arrays", lambda d, m, w: names.extend(w) or read(d, m, w))
    load_model(tmp_path)
    assert names and all(name.startswith("params/") for name in names)


def test_a_damaged_checkpoint_of_a_workdir_is_named_and_passed_over(tmp_path, capsys):
    first, _ = trained(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "2" / "manifest.json", 9)
    assert_same(load_model(tmp_path).params, first)
    expected = f"warning: checkpoint {tmp_path}/checkpoints/2 is damaged: manifest.json cannot be read; using"
    assert capsys.readouterr().err == f"{expected} step 1 instead\n"


def test_what_is_not_a_model_is_said(tmp_path):
    with pytest.raises(UserError, match="absent does not exist: a workdir"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match="is neither: a workdir"):
        load_model(tmp_path)
    open_workdir(tmp_path / "run", experiment()).close()
    with pytest.raises(UserError, match="the run in .*/run has not saved a checkpoint yet"):
        load_model(tmp_path / "run")
    open_workdir(tmp_path / "none", of(Span, steps=3)).close()
    with pytest.raises(UserError, match="no `model` in its `task`"):
        load_model(tmp_path / "none")


# Model directories


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_directory_comes_back_exactly(tmp_path, dtype):
    params = random_params(build(decoder()))
    save_model(tmp_path / "m", decoder(), params, Tokenizer.load(), dtype=dtype, card="# Card\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    loaded = load_model(tmp_path / "m")
    assert_same(loaded.params, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))
    assert loaded.config == decoder() and loaded.step is None
    assert loaded.tokenizer.fingerprint == Tokenizer.load().fingerprint
    assert (tmp_path / "m" / "README.md").read_text() == "# Card\n"
    stored = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {jnp.dtype(dtype)}
    assert "layer_1/mlp/down/kernel" in stored


def test_a_vision_model_remembers_the_shape_of_its_images(tmp_path):
    model = of(ViT, blocks=(block(),), num_layers=1, num_classes=3, width=8, patch=2)
    config = of(Experiment, task=of(Classification, model=model, image_shape=(4, 6, 1)))
    params = drawn_like(lambda: build(config.task).init(jax.random.key(0)))
    with open_workdir(tmp_path / "run", config) as workdir:
        checkpoints = Checkpoints(workdir.checkpoints, warn=pytest.fail)
        checkpoints.save(1, initial_state(params, {}, 0, ema=False), {})
        checkpoints.close()
    loaded = load_model(tmp_path / "run")
    save_model(tmp_path / "m", loaded.config, loaded.params, loaded.tokenizer, inputs=loaded.inputs)
    again = load_model(tmp_path / "m")
    assert_same(again.params, params)
    assert again.tokenizer is None and [x.shape for x in again.inputs] == [(1, 4, 6, 1)]
    images = jax.random.normal(jax.random.key(1), (2, 4, 6, 1))
    logits = [call(x.model, x.params, images) for x in (loaded, again)]
    assert np.array_equal(*logits)


def test_replaces_a_model_directory_and_nothing_else(tmp_path):
    model = build(decoder())
    first, second = random_params(model, seed=1), random_params(model, seed=2)
    save_model(tmp_path / "m", decoder(), first, Tokenizer.load())
    save_model(tmp_path / "m", decoder(), second)
    assert_same(load_model(tmp_path / "m").params, second)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="/m is not a model directory, it holds notes.txt"):
        save_model(tmp_path / "m", decoder(), first)
    assert_same(load_model(tmp_path / "m").params, second)
    with pytest.raises(UserError, match="notes.txt is a file"):
        save_model(tmp_path / "m" / "notes.txt", decoder(), first)


def test_a_failing_save_leaves_the_old_directory_and_no_half(tmp_path, monkeypatch):
    params = random_params(build(decoder()))
    save_model(tmp_path / "m", decoder(), params)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    # embedding 11 * 8, final norm 8, 2 layers of norms 2 * 8, attention 4 * 8 * 8, mlp 3 * 8 * 16: 1408
    with pytest.raises(
        UserError, match="no room for model .*/m: up to 5632 bytes are needed, [0-9]+ are free"
    ):
        save_model(tmp_path / "m", decoder(), params)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_same(load_model(tmp_path / "m").params, params)


def test_parameters_that_do_not_belong_in_a_model_directory(tmp_path):
    params = random_params(build(decoder()))
    wide = decoder(blocks=(block(24),))
    shapes = r"layer_0/mlp/down/kernel is float32\[16, 8\] in the tree but float32\[24, 8\] here"
    with pytest.raises(UserError, match=shapes):
        save_model(tmp_path / "m", wide, params)
    query = params["layer_0"]["attention"]["query"]
    query["kernel"], kernel = LowRank(jnp.ones((8, 2)), jnp.ones((2, 9))), query["kernel"]
    with pytest.raises(
        UserError, match=r"layer_0/attention/query/kernel is \(8, 9\) there and \(8, 8\) here"
    ):
        save_model(tmp_path / "m", decoder(), params)
    query["kernel"] = kernel.astype(jnp.int8)
    with pytest.raises(UserError, match="layer_0/attention/query/kernel is int8"):
        save_model(tmp_path / "m", decoder(), params)
    query["kernel"] = kernel
    with pytest.raises(UserError, match="dtype float64 is not one of float32, bfloat16"):
        save_model(tmp_path / "m", decoder(), params, dtype="float64")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def directory(tmp_path) -> Path:
    save_model(tmp_path / "m", decoder(), random_params(build(decoder())))
    return tmp_path / "m"


def rewrite(directory: Path, changes: dict[str, np.ndarray | None], metadata: Any = None) -> None:
    path = directory / "model.safetensors"
    arrays = safetensors.numpy.load_file(path) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_1/mlp/up/kernel": None},
            r"layer_1/mlp/up/kernel float32\[8, 16\] is missing from model.safe",
        ),
        (
            {"../../evil": np.ones(2, np.float32)},
            r"../../evil float32\[2\] of model.safetensors is not expected",
        ),
        (
            {"layer_0/mlp/up/kernel": np.ones((8, 15), np.float32)},
            r"layer_0/mlp/up/kernel is float32\[8, 15\] in model.safetensors but float32\[8, 16\] here",
        ),
        (
            {"final_norm/scale": np.ones(8, np.float64)},
            "final_norm/scale has type F64; F32 or BF16 is expected",
        ),
        ({"final_norm/scale": np.ones(8, np.int8)}, "final_norm/scale has type I8"),
    ],
)
def test_a_tensor_that_is_missing_misshapen_or_not_expected(directory, changes, message):
    rewrite(directory, changes)
    with pytest.raises(UserError, match=message):
        load_model(directory)


def header(text: str | bytes, size: int | None = None, data: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if size is None else size) + text + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header("{}", size=2**63),
        header("{}", size=10**9),
        header("{"),
        header("[" * 50_000),
        header(json.dumps({"a": TENSOR}), data=b"1234"),
        header(json.dumps({"a": {**TENSOR, "shape": [2**40, 2**40]}}), data=b"1" * 8),
        header(json.dumps({"a": {**TENSOR, "data_offsets": [2**60, 2**60 + 8]}}), data=b"1" * 8),
        header(json.dumps({"a": TENSOR, "b": TENSOR}), data=b"1" * 8),
        header(json.dumps({"a": {**TENSOR, "dtype": "F99"}}), data=b"1" * 8),
        b"PK\x03\x04" + b"\0" * 60,
        b"\x80\x04\x95" + b"\0" * 60,
    ],
)
def test_hostile_or_cut_weights_are_one_line(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is not an intact safetensors file"):
        load_model(directory)


@pytest.mark.parametrize(
    "inputs", ["", "{", "5", "[]", '[["int32"]]', '[["int32",[-1]]]', '[["x",[1]]]', '[["int32",[1e30]]]']
)
def test_hostile_inputs_are_one_line(directory, inputs):
    rewrite(directory, {}, {"inputs": inputs})
    with pytest.raises(UserError, match="its `inputs` are malformed"):
        load_model(directory)


def test_truncated_weights(directory):
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="not an intact safetensors file"):
        load_model(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cls": "os:system", "command": "touch owned"}, "config.json"),
        ({"cls": "research.training.task:LanguageModelling"}, "config.json"),
        ({"model": 3}, "is not a config of this project"),
        (
            {"cls": "research.nn.mlp:GatedMLP", "hidden_dim": 4},
            "its model cannot be initialised|does not fit",
        ),
        ({"cls": "research.training.state:step_key", "state": 1}, "config.json"),
    ],
)
def test_a_config_that_is_no_model(directory, monkeypatch, config, message):
    monkeypatch.chdir(directory)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(directory)
    assert not (directory / "owned").exists()


def test_model_directories_have_no_steps(directory):
    with pytest.raises(UserError, match="with one set of parameters: no step 3"):
        load_model(directory, step=3)
    with pytest.raises(UserError, match="with one set of parameters: no moving average"):
        load_model(directory, ema=True)


def test_abstract_parameters_are_those_of_init():
    model = build(decoder())
    found = abstract_params(model, (jax.ShapeDtypeStruct((1, 5), jnp.int32),))
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, random_params(model))
