"""The short form of `make chaos`: one process, killed, its newest checkpoint cut, and killed in another year."""

from tests.training.chaos import chaos


def test_a_disturbed_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("LATHE_DATA_DIR", str(tmp_path / "data"))
    # Of these seeds the first draw is above 0.2: both moments are after some steps.
    met = chaos(tmp_path, ("clock", "truncate"), (1, 2), processes=1, steps=60, here=True)
    assert met == {"truncate": 1, "clock": 1}
