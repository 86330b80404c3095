"""What every program shares: flags, configs with overrides, help that teaches, errors in one line.

    PROGRAM = cli.Program(__doc__)
    CONFIG = PROGRAM.config_flag()
    WORKDIR = PROGRAM.workdir_flag("Where the run is kept.")
    STEPS = PROGRAM.define(flags.DEFINE_integer, "steps", 10, "How many.", lower_bound=1)

    def main(arguments: list[str]) -> None:
        from research.config import build     # jax only from here on: --help stays instant

        build(CONFIG.load()).run(WORKDIR.value)

    if __name__ == "__main__":
        PROGRAM.run(main)

Each program has flags of its own (nothing global), so that any number of programs can be imported together.
What exit codes mean is a table of docs/scale.md, to which --help leads.
"""

import _thread
import contextlib
import errno
import os
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from research import runtime
from research.errors import UserError, nearest
from research.paths import expand

if TYPE_CHECKING:
    from ml_collections import ConfigDict

INTERRUPTED = 130
# The state of the machine, not a defect of ours: told in one line.
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# The same where the error names a path: it is one that the user chose.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)


class _PathParser(flags.ArgumentParser):
    """A path: `~` is expanded, which a shell does not do behind `--flag=`, and an unset variable's is refused."""

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("an empty path; leave the flag out for its default")
        try:
            return str(expand(argument)) if argument.startswith("~") else argument
        except UserError as error:
            raise ValueError(str(error)) from error


class _NewDirectoryParser(_PathParser):
    """A directory to write: one that holds anything is refused before there is any work to lose."""

    def parse(self, argument: str) -> str:
        text = super().parse(argument)
        folder = Path(text)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder} exists already; name a new directory")
        return text


def path(name: str, default: str | None, help: str, **kwargs: Any) -> flags.FlagHolder:
    """The kind of flag that is a path, for `Program.define`."""
    return flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), **kwargs)


def new_directory(name: str, default: str | None, help: str, **kwargs: Any) -> flags.FlagHolder:
    """Like `path`, of a directory that is new or empty."""
    parser, serializer = _NewDirectoryParser(), flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, default, help, serializer=serializer, **kwargs)


def paths(name: str, default: list[str], help: str, **kwargs: Any) -> flags.FlagHolder:
    """Like `path`, repeatable."""
    return flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, default, help, **kwargs)


@contextlib.contextmanager
def _interrupts_count() -> Iterator[None]:
    """An interrupt that falls into a callback (of the garbage collector, of LLVM), where Python can only report it and
    go on, is delivered again."""

    def report(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, _thread.interrupt_main).start()  # when the callback is over
        else:
            before(unraisable)

    before, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    finally:
        sys.unraisablehook = before


class ConfigFlag:
    """The `--config` flag with its `--config.a.b=value` overrides."""

    def __init__(self, holder: flags.FlagHolder, program: "Program"):
        self._holder = holder
        self._program = program

    @property
    def value(self) -> str | None:
        """What was given: `file.py:preset`."""
        return self._holder.value

    @property
    def overrides(self) -> list[str]:
        """`["a.b=value", ...]` in the order they were given."""
        return list(self._program.overrides)

    def load(self) -> "ConfigDict":
        """The config with its overrides, checked. Raises UserError."""
        from research.config import load_config

        return load_config(self.value, self.overrides)


class Program:
    """A program: its flags and how it runs.

    Args:
      doc: the module's docstring; `--help` prints it above the flags.
      arguments: what `--help` calls the arguments that are not flags, e.g. "SYSTEM..."; without it there are
        none, and one that is given is an error.
    """

    def __init__(self, doc: str, arguments: str | None = None):
        self.doc = doc
        self.arguments = arguments
        self.values = flags.FlagValues()
        self.values.set_gnu_getopt(True)  # flags may follow arguments
        self.overrides: list[str] = []
        self._required: list[str] = []
        self._help: dict[str, str] = {}  # absl adds to that of some kinds what is said here already
        self._has_config = False
        self.define(flags.DEFINE_boolean, "traceback", False, "Show where an error came from.")

    def define(
        self, kind: Callable[..., Any], name: str, default: Any, help: str, *args: Any, **kwargs: Any
    ) -> Any:
        """One flag of this program: `kind` is any `absl.flags.DEFINE_*`, `path`, `paths` or `new_directory`.

        Returns its holder (`.value`). Keyword `required=True` makes leaving it out an error.
        """
        if kwargs.pop("required", False):
            self._required.append(name)
        self._help[name] = help
        order = (name, default, *args, help) if kind in (flags.DEFINE_enum,) else (name, default, help, *args)
        return kind(*order, flag_values=self.values, **kwargs)

    def config_flag(self, required: bool = True) -> ConfigFlag:
        """Defines `--config=file.py:preset` and its dotted overrides."""
        self._has_config = True
        holder = self.define(
            path,
            "config",
            None,
            "The experiment: file.py:preset, or a saved config.json. Any of its values is changed by "
            "--config.path.to.field=value (stages.0.steps=10 names an entry of a tuple).",
            required=required,
        )
        return ConfigFlag(holder, self)

    def workdir_flag(self, help: str, default: str | None = None, required: bool = False) -> flags.FlagHolder:
        """Defines `--workdir=folder`."""
        return self.define(path, "workdir", default, help, required=required)

    def run(self, main: Callable[[list[str]], int | None]) -> None:
        """Runs `main(arguments)` with the flags of the command line, and exits."""
        code = self.call(main, sys.argv[1:], before=runtime.prepare)
        if code == INTERRUPTED:
            # XLA's threads may be compiling still, and crash when what they use is taken down under them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def call(
        self,
        main: Callable[[list[str]], int | None],
        argv: Sequence[str],
        before: Callable[[], None] = lambda: None,
    ) -> int:
        """Parses `argv`, runs `before()` and `main(arguments)`, and returns the exit code."""
        try:
            if any(word in ("--help", "-h", "-help") for word in argv):
                print(self.help(), flush=True)
                return 0
            arguments = self._parse(argv)
            before()
            with _interrupts_count():
                return main(arguments) or 0
        except UserError as error:
            return self._fail(str(error), argv, error.exit_code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (`| head`) has gone: keep Python from complaining once more when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if error.errno not in _MACHINE_ERRORS and not (error.filename and error.errno in _PATH_ERRORS):
                raise
            where = f"{error.filename}: " if error.filename else ""
            return self._fail(f"{where}{os.strerror(error.errno)}", argv)

    def help(self) -> str:
        """The docstring, then this program's flags."""
        width = max(60, min(shutil.get_terminal_size().columns, 110))
        lines = [textwrap.dedent(self.doc).strip(), ""]
        if self.arguments:
            lines += [f"Arguments: {self.arguments}", ""]
        lines.append("Flags:")
        for name in sorted(self.values, key=lambda name: (name not in self._required, name)):
            flag = self.values[name]
            form = f"--{name}" if flag.boolean else f"--{name}=..."
            if name in self._required:
                note = " (required)"
            else:
                note = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
            choices = (
                f" One of: {', '.join(flag.parser.enum_values)}."
                if hasattr(flag.parser, "enum_values")
                else ""
            )
            text = f"{self._help[name]}{choices}{note}"
            lines.append(f"  {form}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += ["", "Exit codes: 0 done, 2 a mistake of yours or of a file; all are in docs/scale.md."]
        return "\n".join(lines)

    def _parse(self, argv: Sequence[str]) -> list[str]:
        """Sets the flags; returns the arguments that are not flags."""
        self.values.unparse_flags()
        for name in self.values:
            self.values[name].unparse()
        self.overrides = []
        words = []
        for i, word in enumerate(argv):
            if word == "--":
                words += argv[i:]
                break
            if self._has_config and word.lstrip("-").startswith("config.") and word.startswith("-"):
                override = word.lstrip("-").removeprefix("config.")
                if "=" not in override:
                    raise UserError(f"{word}: expected {word}=value")
                self.overrides.append(override)
            else:
                words.append(word)
        try:
            arguments = self.values(["program", *words])[1:]
        except flags.UnrecognizedFlagError as error:
            name = error.flagname.partition("=")[0]
            found = nearest(name, self.values)
            known = f"did you mean --{found}?" if found else "--help lists the flags"
            raise UserError(f"unknown flag --{name}; {known}") from error
        except flags.Error as error:
            raise UserError(str(error).removeprefix("flag ")) from error
        for name in self._required:
            if self.values[name].value is None:
                raise UserError(f"--{name} is required; --help shows how")
        if self.overrides and self.values["config"].value is None:
            raise UserError(f"--config.{self.overrides[0]}: there is no --config to change")
        if arguments and self.arguments is None:
            found = nearest(arguments[0].partition("=")[0], self.values)
            known = f"; did you mean --{found}?" if found else ""
            raise UserError(f"unexpected argument {arguments[0]!r}{known}")
        return arguments

    def _fail(self, message: str, argv: Sequence[str], code: int = 2) -> int:
        # Looked up in argv, because parsing itself may be what failed.
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return code
