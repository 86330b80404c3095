"""The record of a run: cut at the resumed step, safe after a kill, the same numbers in TensorBoard."""

import json
import re
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from research.errors import UserError
from research.training.metrics import MetricsWriter, read_rows


def events(directory) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar."""
    return [(value.tag, step, value.simple_value) for step, value in written(directory)]


def written(directory) -> list:
    """(step, value) of everything, read with the record framing of the format."""
    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)  # length, its checksum, the event, its checksum
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, value) for value in event.summary.value]
            at += 12 + size + 4
    return found


def train(step: int, loss: float) -> dict:
    return {"step": step, "kind": "train", "stage": "main", "loss": loss}


def test_rows_are_lines_and_scalars(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    evaluation = {"step": 2, "kind": "eval", "name": "validation", "variant": "S", "loss": 0.25}
    for row in (train(1, 1.5), train(2, 0.5), evaluation):
        writer.write(row)
    writer.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [train(1, 1.5), train(2, 0.5), evaluation]
    assert events(tmp_path / "tensorboard") == [
        ("train/loss", 1, 1.5),
        ("train/loss", 2, 0.5),
        ("validation/S/loss", 2, 0.25),
    ]


def test_resuming_cuts_the_later_rows_and_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(train(step, step / 8)) + "\n" for step in (1, 2, 3, 4))
    path.write_text(text + '{"step": 5, "ki')
    writer = MetricsWriter(tmp_path, 2)
    assert writer.rows == [train(1, 0.125), train(2, 0.25)]
    writer.write(train(3, 9.0))
    writer.close()
    assert read_rows(path) == [train(1, 0.125), train(2, 0.25), train(3, 9.0)]


@pytest.mark.parametrize(
    "line", ["nonsense", '{"step": 1}', '{"step": 1, "kind": "eval"}', pytest.param("[" * 100_000, id="deep")]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(train(1, 1.0))}\n{line}\n{json.dumps(train(2, 1.0))}\n")
    with pytest.raises(
        UserError, match=rf"metrics.jsonl:2 is not a line of metrics: b'{re.escape(line[:40])}"
    ):
        read_rows(path)


def test_what_takes_the_place_of_the_record_is_named(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="tensorboard is a file, and the folder of event files belongs there"):
        MetricsWriter(tmp_path, 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl can't be read: Is a directory"):
        MetricsWriter(tmp_path, 0)


def test_without_a_directory_rows_stay_in_memory():
    writer = MetricsWriter(None, 0)
    writer.write(train(1, 1.0))
    writer.close()
    assert writer.rows == [train(1, 1.0)]


def test_a_vector_is_a_list_in_the_rows_and_a_histogram_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({**train(1, 1.5), "layer_0/mlp/load": [0.25, 0.75]})
    writer.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["layer_0/mlp/load"] == [0.25, 0.75]
    tag = "train/layer_0/mlp/load"
    (event,) = [value for _, value in written(tmp_path / "tensorboard") if value.tag == tag]
    assert (list(event.histo.bucket_limit), list(event.histo.bucket)) == ([1, 2], [0.25, 0.75])


def test_a_full_disk_is_an_error_at_the_next_row(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "kind": "train", "loss": 1.0})

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write({"step": 2, "kind": "train", "loss": 1.0})
