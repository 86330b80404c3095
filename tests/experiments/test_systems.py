"""The catalogue: its entries point at files that exist, mistakes are named, verdicts come from results."""

import dataclasses
import json

import pytest

from experiments import systems
from research.errors import UserError

ENTRY = """
[[system]]
name = "a"
title = "A"
arxiv = "1234.56789"
family = "moe"
module = "research/moe/a.py"
config = "configs/a.py"
claim = "experiments/claims/a.py"
"""


def test_every_entry_points_at_files_of_its_family():
    entries = systems.read_catalogue()
    assert entries
    for system in entries:
        assert system.module.startswith(f"research/{system.family}/")
        for path in (system.module, system.config, system.claim):
            assert (systems.ROOT / path).is_file(), f"{system.name}: {path} is missing"


def test_the_verdict_is_the_recorded_one(tmp_path):
    assert systems.read_catalogue(ENTRY, tmp_path)[0].holds is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text('{"holds": "partly"}')
    assert systems.read_catalogue(ENTRY, tmp_path)[0].holds == "partly"
    (tmp_path / "a" / "result.json").write_text('{"hold')
    with pytest.raises(UserError, match="a/result.json: not a recorded result"):
        systems.read_catalogue(ENTRY, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY + ENTRY, "systems.toml: a: named twice"),
        (ENTRY.replace("title", "titel"), "systems.toml: a: unknown key titel; did you mean title?"),
        (ENTRY.replace('title = "A"', ""), "systems.toml: a: missing title"),
        (ENTRY.replace('name = "a"', ""), "systems.toml: entry 1: missing name"),
    ],
)
def test_a_wrong_entry_is_named(text: str, message: str, tmp_path):
    with pytest.raises(UserError) as caught:
        systems.read_catalogue(text, tmp_path)
    assert str(caught.value) == message


def test_the_program_prints_json_and_a_table(capsys):
    assert systems.PROGRAM.call(systems.main, ["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [dataclasses.asdict(system) for system in systems.read_catalogue()]
    assert list(printed[0]) == ["name", "title", "arxiv", "family", "module", "config", "claim", "holds"]
    assert systems.PROGRAM.call(systems.main, ["--family=elastic"]) == 0
    assert "matformer" in capsys.readouterr().out
    assert systems.PROGRAM.call(systems.main, ["--family=elastc"]) == 2
    assert capsys.readouterr().err == "error: no family 'elastc'; did you mean elastic?\n"
    assert systems.PROGRAM.call(systems.main, ["--json", "--markdown"]) == 2
    assert capsys.readouterr().err == "error: --json and --markdown: one at a time\n"


def test_the_results_page_is_up_to_date():
    """Mend it with: python -m experiments.systems --markdown > docs/results/README.md"""
    assert (systems.RESULTS / "README.md").read_text(encoding="utf-8") == systems.results_page(
        systems.read_catalogue()
    )
