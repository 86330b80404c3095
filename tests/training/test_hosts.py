"""Two hosts, as two processes of two devices each: stopped, continued, one of them killed, continued by one process.

One run serves all tests, started by hand and by slurm.sbatch. Its data are packed rows of two sources, filtered and
mixed; every process notes which records it reads.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import train
from research.config import build, load_config
from research.data.pipeline import RecordDataset
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.training import hosts
from research.training.feed import own_rows
from research.training.partitioning import batch_sharding, make_mesh
from research.training.workdir import open_workdir

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8
CONFIG = """
from configs.matlm import decoder
from research.config import of
from research.data.filters import Gopher
from research.data.text import TokenDataset
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny",)


def get_config(preset="tiny"):
    model = decoder(width=16, num_layers=1, num_heads=2, hidden_dim=32, length=16)
    sources = (("jsonl:sums.jsonl:text", 2.0), ("jsonl:notes.jsonl:text", 1.0))
    held_out = of(TokenDataset, sources="jsonl:notes.jsonl:text", split="all", length=16, shuffle=False)
    optimizer = of(adamw, schedule=of(constant, peak=1e-2))
    return of(
        Trainer,
        task=of(LanguageModelling, model=model),
        data=of(TokenDataset, sources=sources, split="all", length=16, keep=of(Gopher, least=4)),
        stages=(of(Stage, name="main", steps=100_000, batch_size=8, optimizer=optimizer),),
        evaluators=(of(Evaluate, name="validation", data=held_out, batch_size=8, every=4, batches=2),),
        mesh=dict(data=2, fsdp=2),
        checkpoint_every=4,
        log_every=1,
    )
"""
CHILD = """
import sys
from experiments import train
from research.data.pipeline import RecordDataset
import test_hosts
log, argv = sys.argv[1], sys.argv[2:]
test_hosts.note_records(RecordDataset, log)
sys.exit(train.PROGRAM.call(train.main, argv))
"""


def note_records(base, log):
    """Makes every dataset write the numbers of the records of the training batches it hands out."""
    batches = base.batches

    def noted(self, start, batch_size, *, rows=None, epochs=None):
        found = batches(self, start, batch_size, rows=rows, epochs=epochs)
        chosen = list(range(batch_size)) if rows is None else [int(row) for row in rows]
        for batch in found:
            if epochs is None:
                with open(log, "a") as file:
                    file.write(json.dumps([[start + row for row in chosen], batch["tokens"].tolist()]) + "\n")
            start += batch_size
            yield batch

    base.batches = noted


def noted_records(*logs) -> dict[int, list[int]]:
    """{record: tokens} of all that was read; the same each time."""
    records: dict[int, list[int]] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            for number, tokens in zip(*json.loads(line), strict=True):
                assert records.setdefault(number, tokens) == tokens
    return records


# What slurm.sbatch calls. Two tasks; srun ends with the larger of their codes.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] && shift || exit 98
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for k in 0 1; do
  SLURM_PROCID=$k SLURM_LOCALID=$k "$@" 2> task$k.txt &
  echo $! >> tasks
done
most=0
for task in $(cat tasks); do
  wait "$task"; code=$?
  echo $code >> codes
  [ $code -gt $most ] && most=$code
done
exit $most
"""
SCONTROL = '#!/bin/bash\necho "$@" > queued\n'
PYTHON = """#!/bin/bash
[ "$1 $2" = "-m experiments.train" ] || exit 99
exec {python} -c "$CHILD" "second$SLURM_PROCID.log" "${{@:3}}"
"""


def environment() -> dict[str, str]:
    """What SLURM gives to the script of a job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append("--xla_force_host_platform_device_count=2")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    slurm = {"SLURM_JOB_ID": "7", "JAX_COORDINATOR_PORT": port}
    return {**os.environ, **slurm, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": paths}


FLAGS = ["--config=two.py", "--workdir=run", "--nofigures"]


def start_two(folder: Path, name: str) -> list[subprocess.Popen]:
    """Two processes as SLURM starts them."""
    common = {**environment(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, f"{name}{k}.log", *FLAGS],
            env={**common, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]


def start_job(folder: Path) -> subprocess.Popen:
    """The same by slurm.sbatch, whose `srun` and `scontrol` are the scripts above."""
    scripts = {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        ".venv/bin/python": PYTHON.format(python=sys.executable),
    }
    for name, text in scripts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    common = environment()
    return subprocess.Popen(
        [ROOT / "experiments/launch/slurm.sbatch", *FLAGS],
        env={**common, "CHILD": CHILD, "PATH": f"{folder / 'bin'}{os.pathsep}{common['PATH']}"},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, children: list[subprocess.Popen]) -> None:
    until = time.monotonic() + 240
    while not path.exists():
        for child in children:
            assert child.poll() is None, child.communicate()
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What two processes did: stopped by a signal to one of them, started again, and one of them killed."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "two.py").write_text(CONFIG)
    prose = {
        "sums": "we have that number {i} and another number to it make {k}",
        "notes": "{i} is to be noted with care",
    }
    for name, text in prose.items():
        texts = [text.format(i=i, k=8 * i) if i % 3 else f"# rubbish {i}" for i in range(60)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATHE_DATA_DIR", str(folder / "data"))
        patch.chdir(folder)
        children = start_two(folder, "first")
        try:
            wait_for(folder / "run/checkpoints/4", children)
            with pytest.raises(UserError) as refused:
                open_workdir("run", load_config("two.py"))
            children[1].send_signal(signal.SIGTERM)
            stopped = [child.communicate(timeout=120)[1] for child in children]
            stopped_codes = [child.returncode for child in children]
            step = int(re.search(r"stopped by SIGTERM after step (\d+)", stopped[0])[1])
            holder = children[0].pid
            job = start_job(folder)
            children.append(job)
            wait_for(folder / f"run/checkpoints/{step // 4 * 4 + 8}", [job])
            os.kill(int((folder / "tasks").read_text().split()[1]), signal.SIGKILL)
            killed = time.monotonic()
            told = job.communicate(timeout=120)[1]
            seconds = time.monotonic() - killed
        finally:
            for child in children:
                child.kill()
            for task in (folder / "tasks").read_text().split() if (folder / "tasks").exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(task), signal.SIGKILL)
        last = max(int(path.name) for path in (folder / "run/checkpoints").iterdir() if path.name.isdigit())
        yield {
            "folder": folder,
            "refused": str(refused.value),
            "holder": holder,
            "stopped": stopped,
            "stopped_codes": stopped_codes,
            "step": step,
            "told": told,
            "lost": (folder / "task0.txt").read_text(),
            "lost_codes": [int(code) for code in (folder / "codes").read_text().split()],
            "seconds": seconds,
            "last": last,
        }


def test_a_second_process_is_refused_while_the_first_lives(run):
    assert f"in use by process {run['holder']} on " in run["refused"]


def test_a_signal_to_one_stops_all_at_the_same_step(run):
    assert run["stopped_codes"] == [hosts.CONTINUES] * 2
    assert "stopped by SIGTERM" not in run["stopped"][1], "one of them tells"
    assert (run["folder"] / "run/checkpoints").is_dir()


def test_a_killed_process_ends_the_others_at_once(run):
    assert run["lost_codes"] == [hosts.CONTINUES, 128 + signal.SIGKILL]
    assert "process 0 of 2 ends: process 1 of this run was lost; start all of them again" in run["lost"]
    assert (
        run["seconds"] < 15
    )  # closed connection: under a second, and one of grace, on a machine that is not busy
    assert f"resuming after step {run['step']}" in run["lost"]


def test_the_job_of_a_killed_process_is_queued_again(run):
    assert "the run ended with code 137: queued again, start 0 so far" in run["told"]
    assert (run["folder"] / "queued").read_text() == "requeue 7\n"


def test_one_process_continues_and_all_was_as_if_it_had_been_one(run, monkeypatch):
    """The loss of every step and evaluation, and every record in its place, of a run by two, two again, and one."""
    plain = RecordDataset.batches
    monkeypatch.setattr(RecordDataset, "batches", plain)  # so that it is put back
    steps = run["last"] + 3
    four = jax.devices()[:4]
    config = load_config("two.py", [f"stages.0.steps={steps}"])
    note_records(RecordDataset, run["folder"] / "third.log")
    with open_workdir("run", config) as workdir:
        build(config).run(workdir, progress=False, devices=four)
    RecordDataset.batches = plain
    note_records(RecordDataset, run["folder"] / "whole.log")
    build(config).run("whole", progress=False, devices=four)

    def logged(name):
        rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        return [(row["kind"], row["step"], row["loss"]) for row in rows]

    together, alone = logged("run"), logged("whole")
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    # Sums are divided otherwise between two processes and four devices of one.
    np.testing.assert_allclose([row[2] for row in together], [row[2] for row in alone], rtol=1e-5)

    logs = [run["folder"] / f"{name}.log" for name in ("first0", "first1", "second0", "second1", "third")]
    read, expected = noted_records(*logs), noted_records(run["folder"] / "whole.log")
    wanted = range(steps * BATCH)
    decode = Tokenizer.load(None).decode
    texts = "".join(decode(expected[number]) for number in wanted)
    assert "number" in texts and "noted" in texts and "rubbish" not in texts
    assert [read[number] for number in wanted] == [expected[number] for number in wanted]
    for k in range(2):
        own = noted_records(run["folder"] / f"first{k}.log")
        assert {number % BATCH for number in own} == set(
            range(4 * k, 4 * k + 4)
        )  # its own half, and nothing else


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-8]"}, "SLURM"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # sbatch's own shell, outside of srun
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU slice on GKE"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, "TPU slices"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "a Kubernetes job"),
    ],
)
def test_a_cluster_is_recognised(environment, expected):
    assert hosts.cluster(environment) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--coordinator=a:1", "--process_id=0"], "--num_processes: also needed"),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: of 2 processes, 0 to 1",
        ),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "--coordinator=a: expected host:port"),
    ],
)
def test_half_a_cluster_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text(CONFIG)
    assert train.PROGRAM.call(train.main, ["--config=two.py", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_process_whose_others_do_not_come_says_so():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    alone = f"from research.training import hosts; hosts.ASSEMBLY = 1; hosts.join({address!r}, 2, 1)"
    ended = subprocess.run(
        [sys.executable, "-c", alone], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == hosts.CONTINUES
    assert f"{address}: not all processes of this run came within 1 seconds; start all" in ended.stderr


def test_jax_says_where_process_0_was_reached_only_in_private():
    """Should `jax.distributed` come to say it, `hosts._coordinator` has no reason to read what is private."""
    assert hosts.distributed.State.coordinator_address is None
    assert not [name for name in dir(jax.distributed) if "coordinator" in name or "address" in name]


def test_rows_follow_the_devices_and_not_the_number_of_processes():
    """Where `tensor` spans what could be two processes, both hold every row."""

    class Half:
        """The sharding as the process sees it that owns the first four of eight devices."""

        def __init__(self, mesh):
            self.sharding = batch_sharding(mesh)

        def addressable_devices_indices_map(self, shape):
            every = self.sharding.devices_indices_map(shape)
            return {device: index for device, index in every.items() if device.id < 4}

    assert own_rows(Half(make_mesh({"data": 8})), 16).tolist() == list(range(8))
    assert own_rows(Half(make_mesh({"data": 2, "tensor": 4})), 4).tolist() == [0, 1]
    assert own_rows(Half(make_mesh({"tensor": 8})), 4).tolist() == [0, 1, 2, 3]
