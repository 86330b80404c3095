"""Checkpoints: exact bits back on any devices, damage named, no crash and no full disk spoils a run."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from research.errors import UserError
from research.training import checkpoint_files as files
from research.training import hosts
from research.training.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


class Run(struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    ema: dict | None = None


def state_of(step: int, width: int = 4) -> Run:
    params = {"layer": {"kernel": jnp.arange(3.0 * width).reshape(3, width) / (step + 1)}}
    return Run(jnp.int32(step), params, optax.adam(1e-3).init(params), jax.random.key(step))


def bits(tree) -> dict[str, bytes]:
    leaves = files.named_leaves(tree)
    data = {n: jax.random.key_data(x) if files.is_key(x.dtype) else x for n, x in leaves.items()}
    return {name: np.asarray(x).tobytes() + str(x.dtype).encode() for name, x in data.items()}


def abstract(state) -> Run:
    return jax.eval_shape(lambda: state)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings):
    made = Checkpoints(tmp_path / "checkpoints", warn=warnings.append)
    yield made
    made.close()


def test_every_dtype_key_and_empty_array_comes_back_with_the_same_bits(checkpoints):
    values = np.array([0.1, -2.5, np.nan, np.inf], np.float32)
    dtypes = ["float32", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int4", "int32", "uint32", "bool"]
    state = {name: jnp.asarray(np.nan_to_num(values, posinf=3)).astype(name) for name in dtypes}
    state |= {"nan": jnp.asarray(values), "empty": jnp.zeros((0, 3), jnp.bfloat16), "scalar": jnp.int32(7)}
    state |= {"key": jax.random.key(1), "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3)}
    state |= {"optimizer": optax.adamw(1e-3).init({"a": jnp.ones(3)}), "none": None}
    checkpoints.save(3, state, {"records": np.int64(2**40), "stage": "warm"}, {"loss": jnp.float32(1.5)})
    restored, position = checkpoints.restore_latest(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert position == {"records": 2**40, "stage": "warm"}
    draw = jax.random.normal(restored["keys"][1], (4,))
    assert np.array_equal(draw, jax.random.normal(state["keys"][1], (4,)))


def test_arrays_may_be_donated_as_soon_as_save_returns(checkpoints):
    state = {"x": jnp.arange(1_000_000.0)}
    expected = bits(state)
    advance = jax.jit(lambda state: {"x": -state["x"]}, donate_argnums=0)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = advance(state)
    jax.block_until_ready(state)
    assert bits(checkpoints.restore_latest(abstract(state))[0]) == expected


EIGHT_DEVICES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from research.training.checkpoints import Checkpoints
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    shapes = {"kernel": struct((8, 6), jnp.float32, "fsdp", "tensor"), "bias": struct((6,), jnp.bfloat16),
              "key": struct((), jax.random.key(0).dtype)}
    state, position = Checkpoints(sys.argv[1], warn=print).restore_latest(shapes)
    assert {shard.data.shape for shard in state["kernel"].addressable_shards} == {(2, 3)}
    out = Checkpoints(sys.argv[2], warn=print)
    out.save(6, state, position)
    out.close()
"""


def child(code: str, *arguments: object, devices: int = 1, **options) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **options)


def test_one_device_to_eight_and_back_is_exact(tmp_path, warnings):
    key = jax.random.key(5)
    kernel = jax.random.normal(key, (8, 6))
    state = {"kernel": kernel, "bias": jnp.arange(6.0).astype(jnp.bfloat16), "key": key}
    first, second = (Checkpoints(tmp_path / name, warn=warnings.append) for name in ("one", "eight"))
    first.save(5, state, {"records": 50})
    first.close()
    assert child(EIGHT_DEVICES, first.directory, second.directory, devices=8).wait(60) == 0
    restored, position = second.restore_latest(abstract(state))
    assert bits(restored) == bits(state) and position == {"records": 50} and warnings == []


TWO_PROCESSES = """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from research.errors import UserError
    from research.training.checkpoints import Checkpoints

    process, directory, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("fsdp"))
    make = jax.jit(lambda k: {"x": jnp.arange(8.0) * k}, out_shardings={"x": rows})
    shapes = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=rows)}
    warnings = []
    checkpoints = Checkpoints(directory, warn=warnings.append)

    def restored():
        state, position = checkpoints.restore_latest(shapes)
        mine = np.arange(4 * process, 4 * process + 4, dtype=np.float32) * position["records"]
        shards = sorted(state["x"].addressable_shards, key=lambda shard: shard.index[0].start)
        assert np.array_equal(np.concatenate([shard.data for shard in shards]), mine)
        return position["records"]

    def damage(step):
        multihost_utils.sync_global_devices(f"before {step}")
        if process == 0:
            os.truncate(f"{directory}/{step}/manifest.json", 10)

    assert checkpoints.restore_latest(shapes) is None
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"records": step})
    assert restored() == 3 and checkpoints.steps() == [2, 3] and not warnings
    damage(3)
    assert restored() == 2 and len(warnings) == 1 - process
    damage(2)
    try:
        restored()
    except UserError:
        checkpoints.close()
        print("passed")
"""


def test_two_processes_write_one_checkpoint_and_agree_on_the_one_to_use(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = {"devices": 2, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [child(TWO_PROCESSES, i, tmp_path / "c", port, **options) for i in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert out.endswith("passed\n"), err


def test_a_process_that_fails_agrees_on_nothing(checkpoints, monkeypatch):
    """The others may be in another collective: one that they don't make would never end."""
    checkpoints.save(1, state_of(1), {"records": 1})
    while not checkpoints.steps():
        time.sleep(0.01)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "any_of", lambda flag: pytest.fail("a collective"))
    checkpoints.abandon()
    checkpoints.close()


def test_keeps_the_last_and_the_best(tmp_path, warnings):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2, best_metric="loss", warn=warnings.append)
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 4.0, 7: 5.0}
    for step, loss in losses.items():
        checkpoints.save(step, {"x": jnp.ones(2)}, {}, None if loss is None else {"loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [2, 5, 6, 7] and checkpoints.latest_step() == 7
    with pytest.raises(UserError, match="best_metric: loss is not among the metrics; did you mean losss?"):
        checkpoints.save(8, {"x": jnp.ones(2)}, {}, {"losss": 1.0})


def test_nothing_to_restore_is_none(checkpoints):
    assert checkpoints.restore_latest(abstract(state_of(0))) is None
    assert checkpoints.latest_step() is None and checkpoints.steps() == []


def save_two(checkpoints) -> tuple[Run, Path]:
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {"records": 10 * step})
    checkpoints.wait()
    return state_of(1), checkpoints.directory / "2"


def test_a_flipped_byte_in_any_file_is_found_and_named(checkpoints, warnings):
    expected, newest = save_two(checkpoints)
    paths = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(paths) > 5
    rng = random.Random(0)
    for path in paths:
        intact = path.read_bytes()
        where = rng.randrange(len(intact))
        path.write_bytes(
            intact[:where] + bytes([intact[where] ^ 1 << rng.randrange(8)]) + intact[where + 1 :]
        )
        with pytest.raises(files.Damaged, match=path.relative_to(newest).as_posix()):
            files.verify(newest)
        path.write_bytes(intact)
    files.verify(newest)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "no manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(checkpoints, warnings, harm):
    expected, newest = save_two(checkpoints)
    victim = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    size, name = victim.stat().st_size, victim.relative_to(newest).as_posix()
    if harm == "flip":
        content = bytearray(victim.read_bytes())
        content[size // 2] ^= 16
        victim.write_bytes(content)
        reason = f"the checksum of {name} differs"
    elif harm == "truncate":
        os.truncate(victim, size - 1)
        reason = f"{name} has {size - 1} bytes instead of {size}"
    elif harm == "remove":
        victim.unlink()
        reason = f"{name} is missing"
    else:
        (newest / "manifest.json").unlink()
        reason = "manifest.json is missing"
    state, position = checkpoints.restore_latest(abstract(expected))
    assert bits(state) == bits(expected) and position == {"records": 10}
    assert warnings == [f"checkpoint {newest} is damaged: {reason}; using step 1 instead"]
    # What the state looks like may depend on the step that is found.
    by_step = {1: abstract(expected), 2: None}
    assert bits(checkpoints.restore_latest(by_step.__getitem__)[0]) == bits(expected)
    with pytest.raises(UserError, match=f"checkpoint .*/2 is damaged: {reason}"):
        checkpoints.restore(2, abstract(expected))


def test_when_no_checkpoint_is_intact_the_run_stops(checkpoints):
    state, _ = save_two(checkpoints)
    for step in (1, 2):
        os.truncate(checkpoints.directory / str(step) / "manifest.json", 20)
    with pytest.raises(
        UserError, match=r"no checkpoint in .* can be read \(checkpoint .*/2 is damaged: manif"
    ):
        checkpoints.restore_latest(abstract(state))
    assert checkpoints.steps() == [1, 2]


def test_a_step_that_is_not_there(checkpoints):
    state, _ = save_two(checkpoints)
    with pytest.raises(UserError, match="there is no checkpoint of step 3 in .*; there are: 1, 2"):
        checkpoints.restore(3, abstract(state))
    restored, position = checkpoints.restore(1, abstract(state))
    assert bits(restored) == bits(state) and position == {"records": 10}


def test_another_tree_is_refused_with_names_and_shapes(checkpoints):
    save_two(checkpoints)
    with pytest.raises(UserError) as caught:
        checkpoints.restore_latest(abstract(state_of(2, width=5)))
    text = str(caught.value)
    assert "opt_state/0/mu/layer/kernel is float32[3, 4] in the checkpoint but float32[3, 5] here" in text
    assert text.count("float32[3, 4]") == 3 and "more" not in text
    wider = state_of(2).replace(ema={"layer": {"kernel": jnp.ones((3, 4))}}, params={})
    with pytest.raises(UserError) as caught:
        checkpoints.restore_latest(abstract(wider))
    text = str(caught.value)
    assert "ema/layer/kernel float32[3, 4] is missing from the checkpoint" in text
    assert "params/layer/kernel float32[3, 4] of the checkpoint is not expected here" in text
    half = jax.tree.map(lambda x: x, state_of(2)).replace(step=jnp.int16(2))
    with pytest.raises(UserError, match=r"step is int32\[\] in the checkpoint but int16\[\] here"):
        checkpoints.restore_latest(abstract(half))


def test_going_on_from_an_earlier_step_removes_what_came_after(checkpoints, warnings):
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    shutil.rmtree(checkpoints.directory / "30" / "state")
    assert checkpoints.restore_latest(abstract(state_of(0)))[0].step == 20
    checkpoints.save(25, state_of(25), {})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 25]


def test_a_background_failure_is_raised_once_at_the_next_call(checkpoints, monkeypatch):
    save_two(checkpoints)

    def broken(directory, content):
        raise RuntimeError("the manifest broke")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", broken)
        checkpoints.save(3, state_of(3), {})
        with pytest.raises(RuntimeError, match="the manifest broke"):
            checkpoints.save(4, state_of(4), {})
        checkpoints.save(5, state_of(5), {})
        with pytest.raises(RuntimeError, match="the manifest broke"):
            checkpoints.wait()
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "2"]
    checkpoints.save(6, state_of(6), {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 6]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; skips where this user may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoints(small_disk, warnings, caplog):
    checkpoints = Checkpoints(small_disk, warn=warnings.append)
    noise = np.random.default_rng(0).bytes(4 * 100_000)
    state, large = state_of(1), {"x": jnp.asarray(np.frombuffer(noise, np.uint32))}
    checkpoints.save(1, state, {"records": 1})
    checkpoints.save(2, large, {})
    with pytest.raises(UserError, match=r"no room for checkpoint .*/disk/2: up to 400000 bytes"):
        checkpoints.wait()
    assert [path.name for path in small_disk.iterdir()] == ["1"]
    assert bits(checkpoints.restore_latest(abstract(state))[0]) == bits(state)
    checkpoints.save(3, state_of(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3] and warnings == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_disk_that_fills_up_at_the_manifest(checkpoints, monkeypatch):
    state, _ = save_two(checkpoints)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(3, state, {})
        # step 4 + kernel, mu and nu 3 * 3 * 4 * 4 + count 4 + key 2 * 4 = 160
        with pytest.raises(UserError, match="no room for checkpoint .*/3: up to 160 bytes are needed"):
            checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_a_directory_that_cannot_be_written(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", warn=warnings.append)
    with pytest.raises(
        UserError, match="checkpoint .*/file/checkpoints/1 cannot be written: .*Not a directory"
    ):
        checkpoints.save(1, state_of(1), {})
    with pytest.raises(UserError, match="gs://bucket/run is not on a mounted file system"):
        Checkpoints("gs://bucket/run", warn=warnings.append)


class Killed(BaseException):
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_at_any_change_of_the_directory_leaves_it_usable(tmp_path, monkeypatch, warnings):
    """Saves steps 1, 2 (new), 2 (replaced) and 3 (1 is pruned), dying at the n-th change."""
    changes = {"left": 0}

    def dying(function, before=None):
        def call(*arguments, **options):
            changes["left"] -= 1
            if changes["left"] < 0:
                if before is not None and changes["left"] == -1:
                    before(*arguments)
                raise Killed
            return function(*arguments, **options)

        return call

    def half_removed(path, *_, **__):
        (Path(path) / "manifest.json").unlink(missing_ok=True)

    crashes = 0
    for n in range(100):
        directory = tmp_path / str(n)
        checkpoints = Checkpoints(directory, asynchronous=False, warn=warnings.append)
        checkpoints.save(1, state_of(1), {"save": 1})
        done = 1
        with monkeypatch.context() as patch:
            changes["left"] = n
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(files.Path, "rename", dying(files.Path.rename))
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree, half_removed))
            try:
                for save, step in ((2, 2), (3, 2), (4, 3)):
                    checkpoints.save(step, state_of(step), {"save": save})
                    done = save
            except Killed:
                crashes += 1
        survivor = Checkpoints(directory, asynchronous=False, warn=warnings.append)
        state, position = survivor.restore_latest(abstract(state_of(0)))
        assert position["save"] in (done, done + 1)
        assert bits(state) == bits(state_of({1: 1, 2: 2, 3: 2, 4: 3}[position["save"]]))
        survivor.save(9, state_of(9), {"save": 9})
        assert survivor.latest_step() == 9
        assert all(path.name.isdigit() for path in survivor.directory.iterdir())
        if done == 4:
            break
    assert crashes >= 8 and warnings == []


SAVE_FOR_EVER = """
    import sys
    import jax, jax.numpy as jnp
    from research.training.checkpoints import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], warn=print)
    shape = {"x": jax.ShapeDtypeStruct((64,), jnp.int32)}
    found = checkpoints.restore_latest(shape)
    step = 0 if found is None else int(found[0]["x"][0])
    print("from", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.full((64,), step, jnp.int32)}, {"records": 2 * step})
        print("complete", step - 1, flush=True)
"""


def test_kill_9_at_random_moments_loses_no_complete_checkpoint(tmp_path, warnings):
    rng = random.Random(4)
    checkpoints = Checkpoints(tmp_path, warn=warnings.append)
    last = 0
    for _ in range(5):
        process = child(SAVE_FOR_EVER, tmp_path, stdout=subprocess.PIPE)
        assert process.stdout.readline() == f"from {last}\n"
        lines = [process.stdout.readline() for _ in range(rng.randint(2, 6))]
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        complete = max(int(line.split()[1]) for line in lines if line.endswith("\n"))
        state, position = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((64,), jnp.int32)})
        assert complete > last  # at least one of this process
        last = position["records"] // 2
        assert last >= complete
        assert np.array_equal(state["x"], np.full(64, last))
    assert warnings == []
