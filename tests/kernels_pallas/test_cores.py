"""How many cores a process may use: the affinity mask and the quotas of control groups, read from made-up files."""

import os

import pytest

from kernels_pallas import cores

UNIFIED = "0::/user.slice/job\n"
DIVIDED = "3:memory:/other\n2:cpu,cpuacct:/docker/0123\n1:name=systemd:/\n0::/\n"


def write(root, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        (UNIFIED, {"user.slice/job/cpu.max": "150000 100000\n"}, 1.5),
        (UNIFIED, {"user.slice/job/cpu.max": "max 100000\n"}, None),
        # The narrowest of a group and those above it.
        (UNIFIED, {"user.slice/job/cpu.max": "max 100000\n", "user.slice/cpu.max": "50000 100000\n"}, 0.5),
        (UNIFIED, {"user.slice/job/cpu.max": "10000 10000", "user.slice/cpu.max": "300000 100000"}, 1.0),
        # Inside of a container its own group is the topmost, whatever the path from outside.
        (UNIFIED, {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2.0),
        (DIVIDED, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        (DIVIDED, {"cpu/docker/cpu.cfs_quota_us": "1000", "cpu/docker/cpu.cfs_period_us": "2000"}, 0.5),
        ("\n" + DIVIDED, {"cpu,cpuacct/cpu.cfs_quota_us": "3", "cpu,cpuacct/cpu.cfs_period_us": "2"}, 1.5),
        (DIVIDED, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        # Another controller's group, a file that says nothing, a neighbour's, no files at all.
        (DIVIDED, {"cpu/other/cpu.cfs_quota_us": "1", "cpu/other/cpu.cfs_period_us": "1"}, None),
        (UNIFIED, {"user.slice/job/cpu.max": ""}, None),
        (UNIFIED, {"user.slice/else/cpu.max": "1 1"}, None),
        (UNIFIED, {}, None),
    ],
)
def test_the_narrowest_quota_of_a_process(tmp_path, groups, files, expected):
    write(tmp_path, {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": x for name, x in files.items()}})
    assert cores.quota(tmp_path) == expected


def test_a_system_without_control_groups_sets_no_limit(tmp_path):
    assert cores.quota(tmp_path) is None


@pytest.mark.parametrize(
    "quota, mask, expected",
    [(None, 64, 64), (2.0, 64, 2), (1.5, 64, 2), (0.25, 64, 1), (8.0, 4, 4)],
)
def test_cores_are_the_mask_and_the_quota_rounded_up(monkeypatch, quota, mask, expected):
    monkeypatch.setattr(cores, "quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(mask)), raising=False)
    assert cores.cores() == expected
