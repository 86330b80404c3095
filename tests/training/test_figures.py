"""Figures are drawn from the record alone."""

import json

import pytest

from research.errors import UserError
from research.training.figures import draw_figures, heat, last_evaluation, read_baseline, smoothed


def write(directory, rows) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(step):
    return {"step": step, "kind": "train", "stage": "main", "loss": 4.0 / step}


def evaluation(step, variant, parameters, loss):
    row = {"step": step, "kind": "eval", "name": "validation", "variant": variant}
    return {**row, "parameters": parameters, "loss": loss}


def is_image(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_single_model_gets_its_loss_curve(tmp_path):
    write(tmp_path, [train(1), train(2), evaluation(2, "", 100, 2.5)])
    drawn = draw_figures(tmp_path)
    assert drawn == [tmp_path / "figures" / "loss.png"] and is_image(drawn[0])


def test_variants_and_baselines_get_the_trade_off(tmp_path):
    write(tmp_path, [train(1), evaluation(1, "S", 10, 3.0), evaluation(1, "XL", 100, 2.5)])
    drawn = draw_figures(tmp_path, baselines={"S alone": (10, 3.1)})
    assert [path.name for path in drawn] == ["loss.png", "loss_against_parameters.png"]
    assert all(map(is_image, drawn))


def test_a_baseline_is_a_finished_run_of_one_model(tmp_path):
    def refused(message, *rows):
        write(tmp_path, rows)
        with pytest.raises(UserError, match=f"baseline {tmp_path}: {message}"):
            read_baseline(tmp_path, "validation")

    with pytest.raises(UserError, match="config.json does not exist"):
        read_baseline(tmp_path, "validation")
    (tmp_path / "config.json").write_text('{"stages": [{"steps": 2}, {"steps": 1}]}')
    refused("nothing was measured by an evaluator 'validation'", train(3))
    refused("nothing was .*; it has test", evaluation(3, "", 10, 3.0) | {"name": "test"})
    refused("measured last after 2 of 3 steps", evaluation(2, "", 10, 3.0))
    refused("2 models, not one", evaluation(3, "S", 10, 3.0), evaluation(3, "XL", 100, 2.5))
    write(tmp_path, [evaluation(2, "", 10, 3.0), evaluation(3, "", 10, 2.5)])
    assert read_baseline(tmp_path, "validation") == (10, 2.5)


def test_the_last_evaluation_counts():
    rows = [evaluation(1, "S", 10, 3.0), evaluation(2, "S", 10, 2.0), evaluation(2, "XL", 100, 1.5), train(3)]
    assert last_evaluation(rows) == {"validation": {"S": rows[1], "XL": rows[2]}}


def test_smoothing_averages_groups():
    # 125 points in groups of 125 // 50 = 2, the last of one: means 0.5, 2.5, ... and 124.
    steps, values = smoothed(list(range(125)), [float(2 * i) for i in range(125)])
    assert (steps[:2], steps[-1], values[:2], values[-1]) == ([0.5, 2.5], 124, [1.0, 5.0], 248.0)


def test_nothing_logged_is_named(tmp_path):
    write(tmp_path, [])
    with pytest.raises(UserError, match="metrics.jsonl: nothing was logged"):
        draw_figures(tmp_path)


def test_vectors_of_layers_become_heat_maps(tmp_path):
    rows = [
        {**train(step), "layer_0/mlp/load": [step / 10, 0.5], "layer_10/mlp/load": [0.25, 0.75]}
        for step in (1, 5, 9)
    ]
    assert heat(rows, "layer_0/mlp/load") == ([1, 5, 9], [[0.1, 0.5, 0.9], [0.5, 0.5, 0.5]])
    write(tmp_path, rows)
    drawn = draw_figures(tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "load.png"] and all(map(is_image, drawn))
