"""The training loop: same bits after a restart, one compilation a stage, nothing silent."""

import errno
import json
import logging
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.training.checkpoints import Checkpoints
from research.training.evaluators import Evaluate
from research.training.metrics import MetricsWriter
from research.training.monitor import Diverged, Monitor, Pending
from research.training.optimizers import adamw, constant, sgd
from research.training.state import initial_state, step_key

UNTIMED = ("tokens_per_second", "seconds")


def rows(directory) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in UNTIMED} for row in lines]


def two_stages(toy, **changes):
    """Steps 1-4 of stage a, 5-9 of stage b, which trains the MLP only, on data of its own."""
    second = toy.stage(name="b", steps=5, data=toy.Tokens(48), trainable=("mlp/",), batch_size=16)
    return toy.trainer(
        stages=(toy.stage(name="a", steps=4), second),
        evaluators=(Evaluate("validation", toy.Tokens(20), batch_size=16, every=3),),
        checkpoint_every=2,
        keep_last=5,
        ema=0.9,
        **changes,
    )


class Stop(Exception):
    """Stands for a process that dies."""


class DiesAfter:
    """A dataset whose reader dies after a number of batches."""

    def __init__(self, data, batches: int):
        self.data, self.count = data, batches

    def __len__(self):
        return len(self.data)

    def element_spec(self):
        return self.data.element_spec()

    def batches(self, *args, **kwargs):
        for number, batch in enumerate(self.data.batches(*args, **kwargs)):
            if number == self.count:
                raise Stop
            yield batch


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    state, metrics = two_stages(toy).train(directory, progress=False, devices=toy.one_device)
    return directory, state, metrics


@pytest.mark.parametrize("dies_in_stage", [0, 1])
def test_a_restarted_run_ends_in_the_same_bits(toy, tmp_path, uninterrupted, dies_in_stage):
    directory, state, metrics = uninterrupted
    trainer = two_stages(toy)
    dying = two_stages(toy)
    if dies_in_stage == 0:
        object.__setattr__(dying, "data", DiesAfter(dying.data, 3))
    else:
        object.__setattr__(dying.stages[1], "data", DiesAfter(dying.stages[1].data, 3))
    with pytest.raises(Stop):
        dying.train(tmp_path, progress=False, devices=toy.one_device)
    # It died asking for batch 4 of the stage; the newest checkpoint is of step 2, or of 6 (4 + 2).
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == (2, 6)[dies_in_stage]
    resumed, resumed_metrics = trainer.train(tmp_path, progress=False, devices=toy.one_device)
    assert toy.bits(resumed) == toy.bits(state)
    assert rows(tmp_path) == rows(directory)
    timed = re.compile("second")
    assert {k: v for k, v in resumed_metrics.items() if not timed.search(k)} == {
        k: v for k, v in metrics.items() if not timed.search(k)
    }


def test_a_run_that_fails_abandons_its_checkpoints_before_it_closes_them(toy, tmp_path, monkeypatch):
    called = []
    for name in ("abandon", "close"):
        whole = getattr(Checkpoints, name)
        monkeypatch.setattr(Checkpoints, name, lambda self, n=name, f=whole: (called.append(n), f(self))[1])
    writes = MetricsWriter.write

    def full(self, row):
        if row["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        writes(self, row)

    monkeypatch.setattr(MetricsWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        toy.trainer().train(tmp_path, progress=False, devices=toy.one_device)
    assert called == ["abandon", "close"]


def test_a_finished_run_is_not_trained_again(toy, uninterrupted):
    directory, state, metrics = uninterrupted
    again, again_metrics = two_stages(toy).train(directory, progress=False, devices=toy.one_device)
    assert toy.bits(again) == toy.bits(state)
    assert again_metrics == metrics


def test_a_run_whose_checkpoints_are_gone_does_not_begin_afresh(toy, tmp_path, uninterrupted):
    written = (uninterrupted[0] / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(written)
    with pytest.raises(UserError, match=r"tells of a run, but its checkpoints/ is gone: put it back"):
        two_stages(toy).train(tmp_path, progress=False, devices=toy.one_device)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == written
    (tmp_path / "checkpoints").mkdir()  # a run that died before its first one begins afresh
    state, _ = two_stages(toy).train(tmp_path, progress=False, devices=toy.one_device)
    assert toy.bits(state) == toy.bits(uninterrupted[1])


def test_a_damaged_checkpoint_of_a_later_stage_falls_back_to_an_earlier_stage(toy, tmp_path, capsys):
    trainer = two_stages(toy)
    state, _ = trainer.train(tmp_path, progress=False, devices=toy.one_device)
    for step in (6, 8, 9):
        next((tmp_path / "checkpoints" / str(step)).rglob("manifest*")).write_text("{}")
    resumed, _ = trainer.train(tmp_path, progress=False, devices=toy.one_device)
    assert toy.bits(resumed) == toy.bits(state)
    assert "checkpoints/9 is damaged" in capsys.readouterr().err


def test_parameters_outside_the_stage_keep_their_bits_and_take_no_memory(toy):
    stage = toy.stage(trainable=("mlp",), frozen=("down",), optimizer=adamw(constant(1e-2)))
    trainer = toy.trainer(stages=(stage,))
    start = trainer.task.init(jax.random.key(3))
    before = toy.bits(start)
    state, _ = trainer.train(progress=False, params=start, devices=toy.one_device)
    after = toy.bits(state.params)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"['mlp']['up']['kernel']", "['mlp_norm']['scale']"}
    # Two counts (Adam's and the schedule's), two moments of up [8, 16] and of the norm's scale [8].
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert sizes == [1, 1, 8, 8, 128, 128]
    assert toy.bits(start) == before  # the caller's arrays were not donated


def test_each_stage_is_compiled_once(toy, caplog):
    trainer = toy.trainer(stages=(toy.stage(name="a", steps=3), toy.stage(name="b", steps=4, accumulate=2)))
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        trainer.train(progress=False, devices=toy.one_device)
    compiled = [
        r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()
    ]
    assert len(compiled) == 2


def test_sigterm_saves_and_says_that_there_is_more(toy, tmp_path, capsys, uninterrupted):
    class Terminates(DiesAfter):
        def batches(self, *args, **kwargs):
            for number, batch in enumerate(self.data.batches(*args, **kwargs)):
                if number == self.count:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    trainer = two_stages(toy)
    object.__setattr__(trainer, "data", Terminates(trainer.data, 3))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        trainer.train(tmp_path, progress=False, devices=toy.one_device)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    # The signal came while batch 3 was made, that is after step 3 was dispatched.
    assert "stopped by SIGTERM after step 3; saved" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "3").is_dir()
    # Step 3 is due for evaluation, which the signal cut; the restart makes up for it.
    state, _ = two_stages(toy).train(tmp_path, progress=False, devices=toy.one_device)
    assert toy.bits(state) == toy.bits(uninterrupted[1])
    assert rows(tmp_path) == rows(uninterrupted[0])


def test_nan_names_the_step_the_records_and_the_last_good_checkpoint(toy, tmp_path):
    # Record 35 is in the fifth batch of 8: records 32..39, step 5. Checkpoints: 2 and 4.
    trainer = toy.trainer(data=toy.Tokens(poisoned=35), checkpoint_every=2, log_every=10)
    with pytest.raises(Diverged) as caught:
        trainer.train(tmp_path, progress=False, devices=toy.one_device)
    assert str(caught.value) == (
        "the loss is nan at step 5 (records 32..39 of stage 'main'); "
        f"last good checkpoint: {tmp_path / 'checkpoints'}/4"
    )


def test_exploding_loss_stops_the_run(toy):
    # Plain gradient ascent (a negative rate) grows the loss geometrically from about ln 16.
    stage = toy.stage(steps=400, optimizer=sgd(constant(-1.0)))
    with pytest.raises(
        Diverged, match=r"the loss exploded at step \d+ \(records \d+\.\.\d+ of stage 'main'\)"
    ):
        toy.trainer(stages=(stage,), explode=2.0).train(progress=False, devices=toy.one_device)


def test_records_continue_across_stages_that_share_data(toy):
    class Recorder(DiesAfter):
        starts = []

        def batches(self, start, *args, **kwargs):
            self.starts.append(start)
            return self.data.batches(start, *args, **kwargs)

    own = Recorder(toy.Tokens(), 0)
    stages = (
        toy.stage(name="a", steps=3, batch_size=8),
        toy.stage(name="b", steps=2, batch_size=4, data=own),
        toy.stage(name="c", steps=1, batch_size=2),
    )
    toy.trainer(stages=stages, data=own).train(progress=False, devices=toy.one_device)
    assert own.starts == [0, 0, 24]  # b reads its own data from 0; c goes on after a's 3 * 8 records


def test_every_step_draws_from_a_key_of_its_own(toy):
    state = initial_state({"w": jnp.ones(1)}, (), seed=3, ema=False)
    draws = [float(jax.random.normal(step_key(state.replace(step=jnp.int32(i))))) for i in (0, 1, 2, 1)]
    assert len(set(draws)) == 3 and draws[1] == draws[3]
    other = initial_state({"w": jnp.ones(1)}, (), seed=4, ema=False)
    assert float(jax.random.normal(step_key(other))) != draws[0]


def test_average_is_over_the_parameters_seen(toy):
    params = []
    for steps in (1, 2):
        state, _ = toy.trainer(stages=(toy.stage(steps=steps),), ema=0.5).train(
            progress=False, devices=toy.one_device
        )
        params.append(state.params["head"]["kernel"])
    start = toy.trainer().task.init(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0))["head"][
        "kernel"
    ]
    # Decay min(1/2, (1 + t) / (10 + t)): 2/11 at update 1, 3/12 at update 2.
    expected = 2 / 11 * start + 9 / 11 * params[0]
    expected = 3 / 12 * expected + 9 / 12 * params[1]
    np.testing.assert_allclose(state.ema["head"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stages=()), "there is no stage"),
        (dict(ema=1.5), "ema is 1.5"),
        (dict(log_every=0), "log_every is 0"),
        (dict(keep_last=0), "keep_last is 0; it must be at least 1"),
        (dict(keep_best=-1), "keep_best is -1; it must be at least 0"),
        (dict(clip=0.0), "clip is 0.0; it must be more than 0.0 or None"),
        (dict(explode=0.5), "explode is 0.5; it must be more than 1.0 or None"),
        (dict(seed=1 << 32), "seed is 4294967296; from 0 to 2**32 - 1 is expected"),
        (dict(mesh={"fspd": 2}), "unknown axis 'fspd'; did you mean 'fsdp'?"),
        (dict(mesh={"fsdp": 2, "data": 1}), "mesh: fsdp=2 does not divide 1 devices"),
        (
            dict(rules=(("mpl/up", ()),)),
            "rules: 'mpl/up' matches none of the 5 parameters; did you mean 'mlp/up'?",
        ),
        (dict(replicate_below=1, rules=(), task=None), "no rule matches"),
    ],
)
def test_mistakes_are_found_before_the_first_step(toy, change, message):
    if change.get("task", 0) is None:

        class Renamed:
            def __init__(self):
                self.inner = toy.trainer().task

            def __getattr__(self, name):
                return getattr(self.inner, name)

            def init(self, key):
                return {"odd": self.inner.init(key)["head"]}

        change = change | {"task": Renamed()}
    with pytest.raises(UserError, match=re.escape(message)):
        toy.trainer(**change).train(progress=False, devices=toy.one_device)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(trainable=("mlq/up",)),
            "stage 'main'.trainable: 'mlq/up' matches none of the 5 parameters; did you",
        ),
        (dict(frozen=("nothing",)), "stage 'main'.frozen: 'nothing' matches none"),
        (dict(frozen=(".*",)), "leave no parameter to train"),
        (dict(frozen=("(",)), "'(' is not a regular expression"),
        (dict(loss_weights={"los": 1.0}), "names 'los', which the task does not report; it reports loss"),
        (dict(optimizer=adamw(constant(1.0), rates=(("hed", 0.5),))), "optimizer.rates: 'hed' matches none"),
        (dict(optimizer=adamw(constant(1.0, warmup=6))), "stage 'main': 6 warm-up steps do not fit in a"),
    ],
)
def test_mistakes_in_a_stage_are_found_before_the_first_step(toy, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        toy.trainer(stages=(toy.stage(**change),)).train(progress=False, devices=toy.one_device)


def test_a_changed_earlier_stage_contradicts_the_checkpoint(toy, tmp_path):
    two_stages(toy).train(tmp_path, progress=False, devices=toy.one_device)
    changed = two_stages(toy)
    object.__setattr__(changed.stages[0], "steps", 3)
    with pytest.raises(
        UserError, match="stands at {'records': 112, 'stage': 1}, but the config's stages put"
    ):
        changed.train(tmp_path, progress=False, devices=toy.one_device)


def test_data_that_ends_is_an_error(toy):
    class Short(DiesAfter):
        def batches(self, start, batch_size, **_):
            return self.data.batches(start, batch_size, epochs=1)

    with pytest.raises(UserError, match="stage 'main': its data ended at record 16, before its last step"):
        toy.trainer(data=Short(toy.Tokens(16), 0)).train(progress=False, devices=toy.one_device)


def see(monitor: Monitor, *losses: float) -> None:
    for loss in losses:
        monitor.add(Pending(1, "records", {"loss": (np.float32(loss), np.float32(1.0))}, False))
    monitor.settle(0)


def test_small_losses_may_scatter():
    """9 of 10 losses stay below 0.05, so 0.45 is usual and 0.51 is over ten times it."""
    monitor = Monitor("loss", 10.0)
    see(monitor, *[0.01] * 18, 0.05, 0.05, 0.05)
    see(monitor, 0.45)
    with pytest.raises(Diverged, match="exploded at step 1 .*: 0.51, over 10 times .* 0.05"):
        see(monitor, *[0.01] * 8, 0.51)


def test_what_is_far_below_the_first_losses_is_no_explosion():
    """From 4.0 to 0.001: 0.39 is less than a tenth of where it began, 0.41 is not."""
    monitor = Monitor("loss", 10.0)
    see(monitor, *[4.0] * 20, *[0.001] * 100, 0.39)
    with pytest.raises(Diverged, match="exploded at step 1 .*: 0.41, over 10 times .* 0.001"):
        see(monitor, 0.41)


def test_nan_of_a_router_names_the_layer():
    monitor = Monitor("loss", None)
    one = jnp.float32(1.0)
    metrics = {"loss": (jnp.float32(jnp.nan), one), "layer_1/mlp/router_non_finite": (one, 8 * one)}
    monitor.add(Pending(3, "records 0..7", metrics, False))
    with pytest.raises(Diverged, match="nan at step 3 .*: 1 of the 8 router logits of layer_1/mlp are NaN"):
        monitor.settle(0)
