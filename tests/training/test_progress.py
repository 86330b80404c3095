"""What a person sees: a bar on a terminal, sparse lines elsewhere, nothing when asked for nothing."""

import io

import jax

from research.training import progress
from research.training.clock import matrix_elements
from research.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(shown: bool = True) -> None:
    with Progress(20, 0, shown=shown) as bar:
        bar.message("compiled in 1.0 s")
        for step in (10, 20):
            bar.update("main", step, {"loss": 1.25}, "17.4k tokens/s", 0.314)
        bar.warn("checkpoint 5 is damaged")


def test_a_terminal_gets_a_live_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    show()
    text = terminal.getvalue()
    assert "20/20" in text
    assert "loss 1.2500 · 17.4k tokens/s · MFU 31.4 % · 0:00 left" in text
    assert "compiled in 1.0 s" in text and "warning: checkpoint 5 is damaged" in text


def test_elsewhere_lines_are_sparse(monkeypatch, capsys):
    show()
    # Step 10 came less than LINE_EVERY seconds after the start; the last step always shows.
    assert capsys.readouterr().err.splitlines() == [
        "compiled in 1.0 s",
        "main 20/20 · loss 1.2500 · 17.4k tokens/s · MFU 31.4 % · 0:00 left",
        "warning: checkpoint 5 is damaged",
    ]
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    show()
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_warnings_are_shown_even_when_nothing_is(capsys):
    show(shown=False)
    assert capsys.readouterr().err == "warning: checkpoint 5 is damaged\n"


def test_numbers_are_short():
    assert [progress.human(x) for x in (7, 950, 17_412, 1_234_567, 2e9)] == [
        "7",
        "950",
        "17.4k",
        "1.23M",
        "2G",
    ]
    assert [progress.duration(x) for x in (5, 125, 3723)] == ["0:05", "2:05", "1:02:03"]


def test_matrix_elements_count_a_table_only_where_it_is_the_head(toy):
    params = jax.eval_shape(toy.trainer().task.init, jax.random.key(0))
    # up 8 x 16, down 16 x 8, head 8 x 16; the embedding 16 x 8 is a lookup beside a head of its own.
    assert matrix_elements(params) == 3 * 128
    tied = {name: value for name, value in params.items() if name != "head"}
    assert matrix_elements(tied) == 3 * 128
