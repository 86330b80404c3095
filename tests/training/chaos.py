"""A run that is disturbed at random moments and started again each time ends in the bits of one that nobody disturbed.

    make chaos                                  200 steps by two processes, 24 disturbances; some minutes
    python -m tests.training.chaos --seed=3     other moments

The moments come from a fixed list of seeds, so a failure can be repeated up to what the machine's timing adds. Kinds:

    kill        SIGKILL to every process          lose       SIGKILL to one process of two
    terminate   SIGTERM to one process            truncate   as kill; then a file of the newest checkpoint is cut
    fill        the disk becomes full             clock      as kill; the next process lives in another year

The disk is a file system in memory, where this user may mount one; elsewhere `fill` is left out, and said so.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (11, 12, 13, 14)
KINDS = ("kill", "lose", "truncate", "terminate", "fill", "clock")
STEPS = 200
# Steps of this model take a millisecond; a moment's sleep lets something happen to each of them.
CHILD = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, all_threads=True)
years, nap = int(sys.argv[1]), float(sys.argv[2])
now = time.time
time.time = lambda: now() + years * 365 * 24 * 3600
from experiments import train
from research.data.pipeline import RecordDataset
from research.training import hosts
hosts.ASSEMBLY = 60  # for the others of this run, which may be gone before they came
batches = RecordDataset.batches
def slow(self, *args, **kwargs):
    for batch in batches(self, *args, **kwargs):
        time.sleep(nap)
        yield batch
RecordDataset.batches = slow
sys.exit(train.PROGRAM.call(train.main, sys.argv[3:]))
"""
CONFIG = '''
"""A decoder of one layer on generated sums, for runs that are not left in peace."""
from configs.matlm import decoder
from research.config import of
from research.data.text import TokenDataset
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny",)


def get_config(preset="tiny"):
    model = decoder(width=16, num_layers=1, num_heads=2, hidden_dim=32, length=16)
    data = of(TokenDataset, sources="jsonl:sums.jsonl:text", split="all", length=16)
    optimizer = of(adamw, schedule=of(cosine, peak=1e-2, warmup=4))
    return of(
        Trainer,
        task=of(LanguageModelling, model=model),
        data=data,
        stages=(of(Stage, name="main", steps=STEPS, batch_size=8, optimizer=optimizer),),
        evaluators=(of(Evaluate, name="seen", data=data, batch_size=8, every=10, batches=1),),
        mesh=dict(data=2, fsdp=2),
        ema=0.9,
        checkpoint_every=5,
        log_every=1,
    )
'''


class Runs:
    """Starts one training run in `folder` again and again, by `processes` of 4 / `processes` devices each."""

    def __init__(self, folder: Path, processes: int, steps: int):
        self.folder, self.processes, self.steps = folder, processes, steps
        (folder / "disk").mkdir(parents=True, exist_ok=True)
        (folder / "chaos.py").write_text(CONFIG.replace("STEPS", str(steps)))
        lines = [json.dumps({"text": f"{i} + {7 * i} = {8 * i}"}) for i in range(60)]
        (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
        self.workdir = folder / "disk" / "run"

    def start(self, years: int = 0, nap: float = 0.05) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={4 // self.processes}")
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(flags),
            "PYTHONPATH": str(ROOT),
            "LATHE_DATA_DIR": str(self.folder / "data"),
        }
        argv = ["--config=chaos.py", f"--workdir={self.workdir}", "--quiet", "--nofigures"]
        children = []
        for k in range(self.processes):
            joining = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={self.processes}",
                f"--process_id={k}",
            ]
            command = [sys.executable, "-c", CHILD, str(years), str(nap), *argv]
            command += joining if self.processes > 1 else []
            with open(self.folder / f"errors{k}.txt", "w") as errors:
                children.append(
                    subprocess.Popen(
                        command, env=environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=errors
                    )
                )
        return children

    def logged(self) -> int:
        """How many lines of metrics there are."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, children: list[subprocess.Popen], timeout: float = 600) -> list[int]:
        """Their exit codes. AssertionError, with the stacks of all threads, if one does not end in time."""
        try:
            return [child.wait(timeout=timeout) for child in children]
        except subprocess.TimeoutExpired:
            for child in children:
                child.send_signal(signal.SIGUSR1)
            time.sleep(2)
            raise AssertionError(f"a process does not end: {self.errors(20_000)}") from None

    def errors(self, most: int = 2000) -> str:
        return "\n".join((self.folder / f"errors{k}.txt").read_text()[-most:] for k in range(self.processes))

    def finish(self, years: int = 0, *, here: bool = False) -> None:
        """Runs to the end; AssertionError unless every process says that it is there. `here`: in this process."""
        if here:
            import jax

            from research.config import build, load_config
            from research.training.workdir import open_workdir

            with contextlib.chdir(self.folder):
                config = load_config("chaos.py")
                with open_workdir(self.workdir, config) as workdir:
                    build(config).run(workdir, progress=False, devices=jax.devices()[:4])
            return
        codes = self.wait(self.start(years, nap=0.0))
        assert codes == [0] * self.processes, f"{codes}: {self.errors()}"

    def disturb(self, kind: str, random: np.random.Generator, years: int = 0) -> bool:
        """One life of the run, ended by `kind` at a moment of `random`. Whether it was still alive then."""
        children = self.start(years)
        try:
            if random.random() < 0.2:
                time.sleep(
                    random.uniform(0, 8)
                )  # before its first step, or in the middle of one, or of saving
            else:
                goal = self.logged() + int(random.integers(1, 14))
                while self.logged() < goal and all(child.poll() is None for child in children):
                    time.sleep(0.01)
                time.sleep(random.uniform(0, 0.3))
            alive = all(child.poll() is None for child in children)
            if kind == "fill":
                ballast = self.workdir.parent / "ballast"
                fill(ballast)
                try:
                    codes = self.wait(children)
                finally:
                    ballast.unlink()
                assert set(codes) <= {0, 2, 75}, f"{codes}: {self.errors()}"
            elif kind == "terminate":
                children[int(random.integers(self.processes))].send_signal(signal.SIGTERM)
                codes = self.wait(children)
                # Before the loop listens, a signal ends the process as it ends any, and see `lose`.
                assert set(codes) <= {0, 75, -signal.SIGTERM, -signal.SIGABRT}, f"{codes}: {self.errors()}"
            elif kind == "lose":
                victim = int(random.integers(self.processes))
                children[victim].kill()
                codes = self.wait(children)
                others = {code for k, code in enumerate(codes) if k != victim}
                # One that has joined, but has no lifeline yet, is ended by jax itself, with SIGABRT.
                assert others <= {0, 75, 2, -signal.SIGABRT}, f"{codes}: {self.errors()}"
            else:
                for child in children:
                    child.kill()
        finally:
            for child in children:
                child.kill()
                child.wait()
        if kind == "truncate":
            self.truncate(random)
        return alive

    def truncate(self, random: np.random.Generator) -> None:
        """Cuts a file of the newest checkpoint, if there is one before it to fall back on."""
        found = sorted(int(p.name) for p in (self.workdir / "checkpoints").glob("*") if p.name.isdigit())
        if len(found) > 1:
            newest = self.workdir / "checkpoints" / str(found[-1])
            files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
            path = files[int(random.integers(len(files)))]
            os.truncate(path, int(random.integers(path.stat().st_size)))

    def result(self) -> dict[str, bytes]:
        """Every array of the last checkpoint, and every number of the metrics but speeds and times."""
        import jax

        from research.training import checkpoint_files as files

        # Without the key of the random numbers, which follows from the seed.
        path, manifest = files.checkpoint_of_step(self.workdir / "checkpoints", self.steps)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in files.stored_leaves(manifest).items()
            if leaf.impl is None
        }
        found = {
            name: np.asarray(x).tobytes() for name, x in files.read_arrays(path, manifest, wanted).items()
        }
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in lines]
        return found | {
            "position": json.dumps(manifest["position"]).encode(),
            "rows": json.dumps(rows).encode(),
        }


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass


def small_disk(path: Path) -> bool:
    """Mounts a file system of 8 MiB at `path`, if this user may."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode


def chaos(
    folder: Path,
    kinds: Sequence[str],
    seeds: Sequence[int],
    processes: int,
    steps: int,
    here: bool = False,
    report: Callable[[str], None] = print,
) -> Counter:
    """Disturbs a run in each of the ways, in turn, each drawn from its seed, and compares how it ends.

    here: nobody disturbs this process, so the undisturbed run and the last life may be its own. Returns how often each
    kind met a living run. Raises AssertionError if the results differ in a bit, if a process ends in a way that it
    should not, or if the run was over before its last disturbance.
    """
    disturbed = Runs(folder / "disturbed", processes, steps)
    mounted = "fill" in kinds and small_disk(disturbed.folder / "disk")
    if "fill" in kinds and not mounted:
        report("fill is left out: this user may not mount a small file system")
        kinds = [kind for kind in kinds if kind != "fill"]
    met: Counter = Counter()
    try:
        years = 0
        for seed, kind in zip(seeds, kinds, strict=False):
            random = np.random.default_rng(seed)
            before = disturbed.logged()
            if disturbed.disturb(kind, random, years):
                met[kind] += 1
            years = int(random.integers(-20, 20)) if kind == "clock" else 0
            report(f"{kind}: {before} -> {disturbed.logged()} lines of metrics")
            assert not (disturbed.workdir / "checkpoints" / str(steps)).exists(), "the run was over too early"
        disturbed.finish(years, here=here)
        left = Runs(folder / "left", processes, steps)
        left.finish(here=here)
        one, other = disturbed.result(), left.result()
        different = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
        assert not different, f"the disturbed run ended otherwise: {different}"
        report(
            f"{met.total()} disturbances of a living run ({dict(met)}): the same {len(one)} values, to the bit"
        )
        return met
    finally:
        if mounted:
            subprocess.run(["umount", str(disturbed.folder / "disk")], check=True)


def main() -> None:
    first = int(sys.argv[1].removeprefix("--seed=")) if len(sys.argv) > 1 else SEEDS[0]
    kinds = KINDS * 4
    with tempfile.TemporaryDirectory() as folder:
        seeds = [100 * first + k for k in range(len(kinds))]
        met = chaos(
            Path(folder), kinds, seeds, processes=2, steps=STEPS, report=lambda x: print(x, flush=True)
        )
    if met.total() < 20:
        sys.exit(f"only {met.total()} of the disturbances met a living run; 20 are asked for")


if __name__ == "__main__":
    main()
