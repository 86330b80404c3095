"""Flags, overrides, help, one-line errors and exit codes, shared by every program."""

import errno
import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from experiments import cli
from research.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = """
from research.config import of
from research.nn.mlp import GatedMLP
PRESETS = ("tiny",)
def get_config(preset="tiny"):
    return of(GatedMLP, hidden_dim=8)
"""


class Run:
    """A program with every kind of flag; `seen` is what `main` was given."""

    def __init__(self, arguments: str | None = None):
        self.program = cli.Program(
            "Does a thing.\n\n    python -m experiments.thing --config=x.py:tiny\n", arguments
        )
        self.config = self.program.config_flag()
        self.workdir = self.program.workdir_flag("Where.", default="runs/x")
        self.samples = self.program.define(flags.DEFINE_integer, "samples", 1, "How many.", lower_bound=1)
        self.kind = self.program.define(flags.DEFINE_enum, "kind", "a", "Which.", ["a", "b"])
        self.program.define(flags.DEFINE_multi_string, "word", [], "Some. Repeatable.")
        self.json = self.program.define(flags.DEFINE_boolean, "json", False, "As JSON.")
        self.seen: dict[str, object] = {}

    def __call__(self, *argv: str) -> int:
        def main(arguments: list[str]) -> None:
            self.seen = {"arguments": arguments, "samples": self.samples.value, "kind": self.kind.value}
            self.seen |= {"json": self.json.value, "workdir": self.workdir.value}
            self.seen |= {"config": self.config.value, "overrides": self.config.overrides}

        return self.program.call(main, argv)


def test_flags_overrides_and_arguments_in_any_order():
    run = Run("SYSTEM...")
    argv = [
        "one",
        "--config=x.py:tiny",
        "--config.a.b=c=d",
        "two",
        "--samples",
        "3",
        "--json",
        "--config.s.0.n=-1",
    ]
    assert run(*argv, "--", "--three") == 0
    assert run.seen == {
        "arguments": ["one", "two", "--three"],
        "samples": 3,
        "kind": "a",
        "json": True,
        "workdir": "runs/x",
        "config": "x.py:tiny",
        "overrides": ["a.b=c=d", "s.0.n=-1"],
    }
    assert run("--config=y.py", "--kind=b") == 0  # nothing is left from the call before
    assert (run.seen["arguments"], run.seen["samples"], run.seen["overrides"]) == ([], 1, [])


def test_the_config_is_loaded_with_its_overrides(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(CONFIG)
    program = cli.Program("doc")
    config = program.config_flag()
    loaded = []
    main = lambda arguments: loaded.append(config.load())  # noqa: E731
    assert program.call(main, ["--config=x.py:tiny", "--config.hidden_dim=16"]) == 0
    assert loaded[0].hidden_dim == 16
    assert program.call(main, ["--config=x.py", "--config.hiden_dim=16"]) == 2
    assert capsys.readouterr().err == (
        "error: config.hiden_dim: unknown field of GatedMLP; did you mean hidden_dim?\n"
    )
    assert program.call(main, ["--config=z.py"]) == 2
    assert capsys.readouterr().err == "error: z.py: no such config file; did you mean x.py?\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=x", "--sampels=3"], "unknown flag --sampels; did you mean --samples?"),
        (["--config=x", "--zzz"], "unknown flag --zzz; --help lists the flags"),
        (["--config=x", "--samples=abc"], "--samples=abc: invalid literal for int() with base 10: 'abc'"),
        (["--config=x", "--samples=0"], "--samples=0: 0 is not a positive integer"),
        (["--config=x", "--kind=c"], "--kind=c: value should be one of <a|b>"),
        (["--config=x", "--config.a.b"], "--config.a.b: expected --config.a.b=value"),
        (["--config=x", "jsn"], "unexpected argument 'jsn'; did you mean --json?"),
        (["--config=x", "--workdir="], "--workdir=: an empty path"),
        (["--config="], "--config=: an empty path"),
        (
            ["--config=x", "--workdir=~nobody-here/x"],
            "--workdir=~nobody-here/x: no home folder of ~nobody-here",
        ),
        (["--config"], "Missing value for flag --config"),
        ([], "--config is required; --help shows how"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(argv: list[str], message: str, capsys):
    run = Run()
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and out == ""
    assert run.seen == {}


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = Run()
    files = run.program.define(cli.paths, "file", [], "Some.")
    words = run.program.define(flags.DEFINE_string, "text", None, "One.")
    assert run("--config=~/x.py:tiny", "--workdir=~/runs//a/", "--file=~/b", "--file=./~", "--text=~/c") == 0
    assert (run.seen["config"], run.seen["workdir"]) == ("/home/me/x.py:tiny", "/home/me/runs/a")
    assert (files.value, words.value) == (["/home/me/b", "./~"], "~/c")


def test_overrides_need_a_config(capsys):
    program = cli.Program("doc")
    program.config_flag(required=False)
    assert program.call(lambda arguments: None, ["--config.a=1"]) == 2
    assert capsys.readouterr().err == "error: --config.a=1: there is no --config to change\n"
    assert cli.Program("doc").call(lambda arguments: None, ["--config.a=1"]) == 2  # a program without configs
    assert capsys.readouterr().err.startswith("error: unknown flag --config.a")


def raises(error: BaseException):
    def main(arguments: list[str]) -> None:
        raise error

    return main


def test_exit_codes(capsys):
    program = cli.Program("doc")
    assert program.call(lambda arguments: 3, []) == 3
    assert program.call(raises(UserError("no such thing")), []) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    assert program.call(raises(UserError("no such thing")), ["--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and err.endswith("\nerror: no such thing\n")
    assert program.call(raises(KeyboardInterrupt()), []) == 130
    assert program.call(raises(OSError(errno.ENOSPC, "x", "runs/a")), []) == 2
    assert capsys.readouterr().err.endswith("error: runs/a: No space left on device\n")
    assert program.call(lambda arguments: Path("x" * 256).stat(), []) == 2
    assert capsys.readouterr().err == f"error: {'x' * 256}: File name too long\n"
    with pytest.raises(NotADirectoryError):  # of no path that anybody chose
        program.call(raises(NotADirectoryError(errno.ENOTDIR, "x")), [])
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        program.call(raises(ZeroDivisionError()), [])
    with pytest.raises(FileNotFoundError):
        program.call(raises(FileNotFoundError(errno.ENOENT, "x", "y")), [])


def test_an_interrupt_in_a_callback_is_not_lost(capsys):
    """Python reports what a callback of the garbage collector raises, and goes on."""

    def callback(phase: str, info: dict) -> None:
        gc.callbacks.remove(callback)
        raise KeyboardInterrupt

    def main(arguments: list[str]) -> None:
        gc.callbacks.append(callback)
        gc.collect()
        for _ in range(1000):
            time.sleep(0.001)

    assert cli.Program("x").call(main, []) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_help_teaches_and_shows_our_flags_only(capsys):
    assert Run("SYSTEM...")("--help", "--nonsense") == 0
    out = capsys.readouterr().out
    assert out.startswith("Does a thing.\n\n    python -m experiments.thing --config=x.py:tiny\n")
    assert "Arguments: SYSTEM..." in out
    flags_shown = [line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  --")]
    assert flags_shown == ["--config", "--json", "--kind", "--samples", "--traceback", "--word", "--workdir"]
    assert "How many. (default: 1)" in out and "(required)" in out
    assert out.count("Which. One of: a, b. (default: a)\n") == 1 and "<a|b>" not in out
    assert "      Some. Repeatable.\n" in out
    assert "docs/scale.md" in out and "| 130 |" in (ROOT / "docs" / "scale.md").read_text()


def programs() -> list[str]:
    files = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("*/__main__.py")]
    runnable = [file for file in files if '\nif __name__ == "__main__"' in file.read_text()]
    return sorted(str(file.relative_to(ROOT).with_suffix("")).replace("/", ".") for file in runnable)


@pytest.mark.parametrize("program", programs())
def test_help_of_every_program_needs_no_jax_and_shows_a_command(program: str):
    # In a process of its own, because this one has jax.
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print('code', end.code, sorted({'jax', 'flax', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout.endswith("code 0 []\n")
    assert f"python -m {program.removesuffix('.__main__')}" in result.stdout
