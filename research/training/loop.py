"""The training loop: stages, evaluators, checkpoints and records around one compiled step per stage."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.errors import UserError
from research.nn.accounting import count_parameters
from research.training import checkpoint_files as files
from research.training import hosts, partitioning
from research.training.checkpoints import Checkpoints
from research.training.clock import Clock
from research.training.evaluators import Evaluate, Evaluation
from research.training.feed import Dataset, batch_spec, check_batch_size, check_fit, feed
from research.training.metrics import MetricsWriter, final_metrics, metric_label
from research.training.monitor import Diverged, Monitor, Pending
from research.training.partial import kept
from research.training.partitioning import REPLICATE_BELOW, Axis
from research.training.profiling import Profile
from research.training.progress import Progress, human
from research.training.stages import Stage, split
from research.training.state import State, init_key, initial_state
from research.training.step import make_step
from research.training.structures import with_structures
from research.training.task import Task
from research.training.termination import Termination
from research.training.topologies import compiler_options
from research.training.workdir import begin, read_checkpoint

PyTree = Any


@dataclass(frozen=True)
class Trainer:
    """An experiment's training, as a config builds it.

    data: read by every stage and evaluator that brings none of its own.
    mesh: {axis: size}, see `partitioning.make_mesh`; empty is data parallelism over all devices.
    rules: ((pattern, spec), ...), tried before `partitioning.DEFAULT_RULES`.
    replicate_below: parameters of fewer elements may go without a rule.
    clip: the largest global norm of a gradient, `None` for any.
    ema: decay of the moving average of the parameters that evaluators then measure; `None` keeps none.
    log_every, checkpoint_every: steps. The last step of every stage is saved too.
    keep_last, keep_best: checkpoints kept; best by the loss of the first evaluator's first variant.
    explode: stop when the loss exceeds this many times its usual height (see `monitor`); `None`: for NaN only.
    """

    task: Task
    data: Dataset
    stages: tuple[Stage, ...]
    evaluators: tuple[Evaluate, ...] = ()
    mesh: dict[str, int] = field(default_factory=dict)
    rules: tuple[tuple[str, tuple[Axis, ...]], ...] = ()
    replicate_below: int = REPLICATE_BELOW
    seed: int = 0
    clip: float | None = 1.0
    ema: float | None = None
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    explode: float | None = 10.0

    def __post_init__(self):
        if not self.stages:
            raise UserError("trainer: there is no stage to train")
        for kind, members in (("stage", self.stages), ("evaluator", self.evaluators)):
            names = [member.name for member in members]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"trainer: two {kind}s are called {name!r}")
        for name, least in dict(log_every=1, checkpoint_every=1, keep_last=1, keep_best=0).items():
            if getattr(self, name) < least:
                raise UserError(f"trainer: {name} is {getattr(self, name)}; it must be at least {least}")
        for name, least in dict(clip=0.0, explode=1.0).items():
            if (value := getattr(self, name)) is not None and not value > least:
                raise UserError(f"trainer: {name} is {value}; it must be more than {least} or None")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"trainer: seed is {self.seed}; from 0 to 2**32 - 1 is expected")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UserError(f"trainer: ema is {self.ema}; it must lie between 0 and 1")

    @property
    def steps(self) -> int:
        """Updates over all stages."""
        return sum(stage.steps for stage in self.stages)

    def run(
        self,
        workdir: Any = None,
        progress: bool = True,
        devices: Sequence[jax.Device] | None = None,
        profile: tuple[int, int] | None = None,
    ) -> dict[str, float]:
        """Trains to the end, from the latest checkpoint of `workdir` if there is one; returns final metrics.

        `train/loss` and the like are of the last step, `<evaluator>/<variant>/<metric>` of the last
        evaluation (without the variant where it has no name).
        """
        return self.train(workdir, progress, devices=devices, profile=profile)[1]

    def train(
        self,
        workdir: Any = None,
        progress: bool = True,
        params: PyTree | None = None,
        devices: Sequence[jax.Device] | None = None,
        profile: tuple[int, int] | None = None,
    ) -> tuple[State, dict[str, float]]:
        """As `run`, but also returns the final state.

        workdir: a directory, an open `Workdir`, or `None` to write nothing. params: what to start from
        instead of `task.init`; it is copied. devices: those of the mesh, by default all. profile: (first step, steps)
        that are traced into `profile/` of the workdir. Raises `UserError`
        for what the config, the data or the workdir got wrong, and `Diverged`. On SIGTERM a run with a
        workdir saves and exits with code 75 (`hosts.CONTINUES`).
        """
        directory = None if workdir is None else Path(getattr(workdir, "path", workdir))
        if profile is not None and directory is None:
            raise UserError("a profile is written into the workdir, and this run has none")
        return _Run(self, directory, progress, params, devices, profile=profile).train(workdir)

    def compile_first_stage(
        self, devices: Sequence[jax.Device] | None = None
    ) -> tuple[jax.stages.Compiled, State, jax.sharding.Mesh]:
        """(step, state, mesh): what `train` runs first, for those who drive it themselves.

        `step(state, batch) -> (state, metrics)` donates its state; `feed` makes batches for the mesh.
        """
        run = _Run(self, None, False, None, devices)
        return run.compile(run.plans[0]), run.initial(), run.mesh

    def lower_for(self, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
        """The step of the first stage, to be compiled for devices that may be another machine's, or none's."""
        run = _Run(self, None, False, None, devices)
        return run.lower(run.plans[0])

    def abstract_first_stage(self, mesh: jax.sharding.AbstractMesh) -> tuple[Callable[..., Any], State]:
        """(step, state) as `compile_first_stage` makes them, on devices that need not exist: the step is not compiled,
        and the state is shapes and shardings."""
        run = _Run(self, None, False, None, None, mesh)
        return run.step(run.plans[0]), run.plans[0].abstract

    def restore(
        self, workdir: Any, step: int | None = None, devices: Sequence[jax.Device] | None = None
    ) -> tuple[State, jax.sharding.Mesh]:
        """The state of the latest checkpoint of `workdir`, or of `step`, and the mesh that it lies on."""
        run = _Run(self, Path(getattr(workdir, "path", workdir)), False, None, devices)
        try:
            state = run.restore(step)
        finally:
            run.close()
        if state is None:
            raise UserError(f"{run.directory}: there is no checkpoint yet")
        return state, run.mesh


@dataclass(frozen=True)
class _Plan:
    """A stage placed in the run: steps first + 1 ... last, reading `data` from `record` on."""

    index: int
    stage: Stage
    first: int
    last: int
    data: Dataset
    record: int
    mask: PyTree
    transformation: optax.GradientTransformation
    abstract: State  # shapes and shardings of the state during the stage


class _Run:
    """One call of `Trainer.train`: everything that has a lifetime."""

    def __init__(
        self,
        trainer: Trainer,
        directory: Path | None,
        progress: bool,
        params: PyTree | None,
        devices: Sequence[jax.Device] | None,
        mesh: jax.sharding.AbstractMesh | None = None,
        profile: tuple[int, int] | None = None,
    ):
        self.trainer, self.directory, self._given = trainer, directory, params
        self.main = jax.process_index() == 0
        folder = None if directory is None else directory / "profile"
        self.profile = Profile(profile if self.main else None, folder)
        check_fit(getattr(trainer.task, "model", None), trainer.data, trainer.stages, trainer.evaluators)
        self.mesh = partitioning.make_mesh(trainer.mesh, devices) if mesh is None else mesh
        partitioning.check_positions(getattr(trainer.task, "model", None), self.mesh)
        if hasattr(trainer.task, "check_mesh"):
            trainer.task.check_mesh(self.mesh)
        self.shown = progress and self.main
        self.progress = Progress(trainer.steps, 0, shown=self.shown)
        task = trainer.task
        self.shapes = self._shapes()
        self.shardings = partitioning.parameter_shardings(
            self.shapes, self.mesh, trainer.rules, replicate_below=trainer.replicate_below
        )
        self.plans = list(self._plan())
        self.evaluation = Evaluation(task, self.mesh)
        for evaluator in trainer.evaluators:
            self.evaluation.check(evaluator)
        self.writer: MetricsWriter | None = None
        self.best: str | None = None
        if trainer.evaluators:
            self.best = metric_label(
                trainer.evaluators[0].name, self.evaluation.variants(self.shapes)[0], "loss"
            )
        self.checkpoints: Checkpoints | None = None
        if directory is not None:
            self.checkpoints = Checkpoints(
                directory / "checkpoints",
                keep_last=trainer.keep_last,
                keep_best=trainer.keep_best,
                best_metric=self.best,
                warn=self._warn,
            )

    # What is going to happen, checked before anything does.

    def _shapes(self) -> PyTree:
        """Shapes of the parameters. A task that begins with some that were saved, or recalls them, says with these what
        they are: kernels may be structured weights where `init` has arrays."""
        task = self.trainer.task
        if self._given is None and hasattr(task, "start"):
            saved = (
                None
                if self.directory is None
                else files.newest_intact(self.directory / "checkpoints", self._warn)
            )
            if saved is None:
                self._given = task.start(init_key(self.trainer.seed))
            elif hasattr(task, "recall"):
                params = task.recall(read_checkpoint(self.directory, None, saved[1]["step"])[0])
                return jax.eval_shape(lambda: params)
            else:
                prefix = "params/"
                described = {
                    name.removeprefix(prefix): entry
                    for name, entry in saved[1].get("structures", {}).items()
                    if name.startswith(prefix)
                }
                abstract = jax.eval_shape(task.init, jax.random.key(0))
                return with_structures(abstract, described, f"checkpoint {saved[0]}")
        return (
            jax.eval_shape(task.init, jax.random.key(0))
            if self._given is None
            else jax.eval_shape(lambda: self._given)
        )

    def _plan(self) -> Iterator[_Plan]:
        step = shared = 0
        for index, stage in enumerate(self.trainer.stages):
            where = f"stage {stage.name!r}"
            data = self.trainer.data if stage.data is None else stage.data
            check_batch_size(where, stage.batch_size, self.mesh, stage.accumulate)
            mask = stage.mask(self.shapes)
            trainable = split(self.shapes, mask)[0]
            rule = stage.optimizer.transformation(stage.steps, trainable, where)
            reported = jax.eval_shape(
                self.trainer.task.loss, self.shapes, batch_spec(data, stage.batch_size), jax.random.key(0)
            )
            # What layers measure may be a vector, which can't be an objective.
            stage.check_metrics([name for name, (total, _) in reported.items() if not total.ndim])
            record = shared if stage.data is None else 0
            shared += stage.steps * stage.batch_size if stage.data is None else 0
            abstract = self._abstract(mask, rule)
            yield _Plan(index, stage, step, step + stage.steps, data, record, mask, rule, abstract)
            step += stage.steps

    def _abstract(self, mask: PyTree, rule: optax.GradientTransformation) -> State:
        trainable = split(self.shapes, mask)[0]
        state = jax.eval_shape(
            lambda params: initial_state(
                params, rule.init(split(params, mask)[0]), self.trainer.seed, ema=self.trainer.ema is not None
            ),
            self.shapes,
        )
        everywhere = partitioning.replicated(self.mesh)
        shardings = State(
            step=everywhere,
            params=self.shardings,
            opt_state=partitioning.follow_parameters(
                state.opt_state,
                trainable,
                split(self.shardings, mask)[0],
                replicate_below=self.trainer.replicate_below,
            ),
            key=everywhere,
            ema=None if state.ema is None else self.shardings,
        )
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, shardings)

    def records(self, step: int) -> int:
        """The global record count after `step`."""
        return sum(p.stage.batch_size * (min(step, p.last) - p.first) for p in self.plans if step > p.first)

    def plan_of(self, step: int) -> _Plan:
        """The stage that made `step`; the first for step 0."""
        return next((plan for plan in self.plans if step <= plan.last), self.plans[-1])

    # State

    def initial(self) -> State:
        """The state before step 1, made on the devices where it lives."""
        plan, trainer = self.plans[0], self.trainer
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)

        given = self._given
        if given is None and hasattr(trainer.task, "start"):
            given = trainer.task.start(init_key(trainer.seed))
        if jax.process_count() > 1:
            # Of arrays on its own devices a process knows alone; numpy's are every process's.
            given = jax.tree.map(np.asarray, given)

        def init(source: Any, seed: jax.Array) -> State:
            # Copies, because the step donates its state: neither the caller's arrays nor, through a buffer
            # shared with the average, the state's own may go with it.
            params = trainer.task.init(init_key(seed)) if given is None else _copy(source)
            opt_state = plan.transformation.init(split(params, plan.mask)[0])
            state = initial_state(params, opt_state, seed, ema=trainer.ema is not None)
            return state.replace(ema=_copy(state.ema))

        # A seed that is no constant of the program: one compilation serves all.
        seed = np.uint32(trainer.seed)
        return self.rearrange(jax.jit(init, out_shardings=shardings)(given, seed), None)

    def enter(self, plan: _Plan, state: State) -> State:
        """The state with a fresh optimizer state for `plan`."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract.opt_state)
        make = jax.jit(
            lambda params: plan.transformation.init(split(params, plan.mask)[0]), out_shardings=shardings
        )
        return state.replace(opt_state=make(state.params))

    def restore(self, step: int | None = None) -> State | None:
        """The state of `step`, or of the newest intact checkpoint; `None` where there is none."""
        if self.checkpoints is None:
            return None
        # The stage decides what an optimizer state looks like, and the step decides the stage.
        if step is None:
            found = self.checkpoints.restore_latest(lambda step: self.kept(self.plan_of(step).abstract))
            if found is None:
                return None
            state, position = found
            step = int(state.step)
        else:
            state, position = self.checkpoints.restore(step, self.kept(self.plan_of(step).abstract))
        expected = {"records": self.records(step), "stage": self.plan_of(step).index}
        if step > self.trainer.steps or position != expected:
            raise UserError(
                f"{self.directory}: the checkpoint of step {step} stands at {position}, but the config's "
                f"stages put that step at {expected}; give the config it was trained with, or another workdir"
            )
        if hasattr(self.trainer.task, "recall"):
            state = self.recalled(state)
        return self.rearrange(state, None)

    def kept(self, state: State) -> State:
        """What is saved of a state."""
        task = self.trainer.task
        ema = None if state.ema is None else kept(task, state.ema)
        return state.replace(params=kept(task, state.params), ema=ema)

    def recalled(self, state: State) -> State:
        """A state of which a part was saved, whole again."""

        def whole(saved: PyTree) -> PyTree:
            return jax.device_put(self.trainer.task.recall(saved), self.shardings)

        return state.replace(params=whole(state.params), ema=None if state.ema is None else whole(state.ema))

    def rearrange(self, state: State, step: int | None) -> State:
        """The state after `step`, or at the start of a run, as a task that moves its parameters wants it."""
        task = self.trainer.task
        return task.rearrange(state, self.mesh, step) if hasattr(task, "rearrange") else state

    # Training

    def train(self, workdir: Any) -> tuple[State, dict[str, float]]:
        # A state may be in the middle of being written when an error passes through: `close` waits for it.
        try:
            state = self.restore()
            resumed = state is not None
            step = int(state.step) if resumed else 0
            hosts.first_decides(lambda: self.profile.check(step, self.trainer.steps))
            hosts.first_decides(lambda: begin(workdir, resumed))
            state = self.initial() if state is None else state
            self.progress = Progress(self.trainer.steps, step, shown=self.shown)
            self.writer = MetricsWriter(self.directory, step, writes=self.main)
            with self.progress, Termination(self.directory is not None) as termination:
                self._announce(step, resumed)
                if resumed:
                    self._evaluate(step, state, again=False)
                for plan in self.plans:
                    if step < plan.last:
                        if step == plan.first and plan.index:
                            state = self.enter(plan, state)
                        state = self._train_stage(plan, step, state, termination)
                        step = plan.last
                if self.checkpoints is not None:
                    self.checkpoints.wait()
            return state, final_metrics(self.writer.rows)
        except Exception:
            if self.checkpoints is not None:
                self.checkpoints.abandon()
            raise
        finally:
            self.close()

    def _train_stage(self, plan: _Plan, start: int, state: State, termination: Termination) -> State:
        stage, trainer = plan.stage, self.trainer
        step_function = self.compile(plan)
        spec = batch_spec(plan.data, stage.batch_size)
        record = plan.record + (start - plan.first) * stage.batch_size
        batches = feed(plan.data, record, stage.batch_size, self.mesh, spec)
        monitor = Monitor("objective" if stage.loss_weights else "loss", trainer.explode)
        clock = Clock(
            plan.data,
            plan.stage.batch_size,
            getattr(trainer.task, "model", None),
            self.shapes,
            self.mesh,
            start,
        )
        batch = self._next(batches, plan, record)
        for step in range(start + 1, plan.last + 1):
            self.profile.before(step, state)
            state, metrics = step_function(state, batch)
            if self.profile.after(step, state):
                self.progress.message(f"steps up to {step} are traced in {self.directory / 'profile'}")
                clock.restart(step)
            state = self.rearrange(state, step)
            end = record + stage.batch_size
            source = f"records {record}..{end - 1} of stage {stage.name!r}"
            last = step == plan.last
            logged = step % trainer.log_every == 0 or step == 1 or last
            monitor.add(Pending(step, source, metrics, logged))
            record = end
            if not last:
                # The device is busy with this step while the next batch is made.
                batch = self._next(batches, plan, record)
            # All must save the same step, whichever was asked to stop.
            stop = hosts.any_of(termination.requested) if logged or jax.process_count() == 1 else False
            evaluated = any(e.due(step, trainer.steps) for e in trainer.evaluators) and not stop
            saved = self.checkpoints is not None and (step % trainer.checkpoint_every == 0 or last or stop)
            if logged or evaluated or saved:
                # What is saved or measured has been checked to its last step.
                self._log(plan, monitor, clock, everything=evaluated or saved)
            scores = self._evaluate(step, state, again=True) if evaluated else {}
            if saved:
                position = {"records": self.records(step), "stage": plan.index}
                self.checkpoints.save(
                    step, self.kept(state), position, scores if self.best in scores else None
                )
            if evaluated or saved:
                clock.restart(step)
            if stop:
                self._exit(step)
        self._log(plan, monitor, clock, everything=True)
        return state

    def step(self, plan: _Plan) -> Callable[..., Any]:
        """The step of the stage, not compiled."""
        return make_step(
            self.trainer.task,
            plan.stage,
            plan.transformation,
            plan.mask,
            self.mesh,
            first_step=plan.first,
            clip=self.trainer.clip,
            ema=self.trainer.ema,
        )

    def lower(self, plan: _Plan) -> jax.stages.Lowered:
        """The step of the stage, traced for its shapes on this mesh."""
        state = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        given = state, partitioning.batch_sharding(self.mesh)
        made = state, partitioning.replicated(self.mesh)
        jitted = jax.jit(self.step(plan), in_shardings=given, out_shardings=made, donate_argnums=0)
        with jax.set_mesh(self.mesh):
            return jitted.lower(plan.abstract, batch_spec(plan.data, plan.stage.batch_size))

    def compile(self, plan: _Plan) -> jax.stages.Compiled:
        """The step of the stage, compiled ahead for its shapes: others are an error, not a compilation."""
        began, stage = time.perf_counter(), plan.stage
        options = compiler_options(self.mesh.devices.flatten())
        compiled = self.lower(plan).compile(compiler_options=options)
        seconds = time.perf_counter() - began
        self.progress.message(f"stage {stage.name!r}: {stage.steps} steps, compiled in {seconds:.1f} s")
        self.progress.begin()
        return compiled

    def _next(self, batches: Iterator[Any], plan: _Plan, record: int) -> Any:
        batch = next(batches, None)
        if batch is None:
            raise UserError(
                f"stage {plan.stage.name!r}: its data ended at record {record}, before its last step"
            )
        return batch

    # Reporting

    def _announce(self, step: int, resumed: bool) -> None:
        size = count_parameters(self.shapes)
        abstract = self.plan_of(step + 1).abstract
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        resident = partitioning.device_bytes(abstract, shardings)
        if math.prod(self.mesh.shape.values()) > 1:
            below = self.trainer.replicate_below
            self.progress.message(partitioning.table(self.shapes, self.shardings, large=below))
        axes = ", ".join(f"{name}={n}" for name, n in self.mesh.shape.items() if n > 1) or "1 device"
        self.progress.message(
            f"{human(size)} parameters; state of {human(resident)}B per device; mesh: {axes}"
            + (f"; resuming after step {step}" if resumed else "")
        )

    def _log(self, plan: _Plan, monitor: Monitor, clock: Clock, *, everything: bool) -> None:
        try:
            settled = monitor.settle(0) if everything else monitor.settle()
        except Diverged as error:
            good = None
            if self.checkpoints is not None:
                self.checkpoints.wait()
                good = self.checkpoints.latest_step()
            last = (
                "no checkpoint yet"
                if good is None
                else f"last good checkpoint: {self.checkpoints.directory}/{good}"
            )
            raise Diverged(f"{error}; {last}") from None
        if not settled:
            return
        rate, unit, mfu = clock.rate(settled[-1][0])
        for step, values in settled:
            row = {"step": step, "kind": "train", "stage": plan.stage.name, **values}
            if rate is not None:
                row[f"{unit}_per_second"] = round(rate, 1)
            # Shown first: the first write imports TensorBoard's writer.
            text = "" if rate is None else f"{human(rate)} {unit}/s"
            self.progress.update(plan.stage.name, step, values, text, mfu)
            self.writer.write(row)

    def _evaluate(self, step: int, state: State, *, again: bool) -> dict[str, float]:
        """Runs the evaluators due after `step`, recorded ones only `again`. Returns their flat metrics."""
        scores: dict[str, float] = {}
        params = state.params if state.ema is None else state.ema
        names = [row["name"] for row in self.writer.rows if row["kind"] == "eval" and row["step"] == step]
        # The others may have read an older file of metrics.
        done = hosts.same(np.array([evaluator.name in names for evaluator in self.trainer.evaluators], bool))
        for evaluator, known in zip(self.trainer.evaluators, done, strict=True):
            if not evaluator.due(step, self.trainer.steps) or (known and not again):
                continue
            for variant, values in self.evaluation.run(evaluator, params).items():
                self.writer.write(
                    {"step": step, "kind": "eval", "name": evaluator.name, "variant": variant, **values}
                )
                scores |= {
                    metric_label(evaluator.name, variant, name): value
                    for name, value in values.items()
                    if not isinstance(value, list)
                }
                label = " ".join(part for part in (evaluator.name, variant) if part)
                self.progress.message(f"step {step}: {label} loss {values['loss']:.4f}")
        return scores

    def _warn(self, text: str) -> None:
        if self.main:
            self.progress.warn(text)

    def _exit(self, step: int) -> None:
        self.checkpoints.wait()
        self._warn(f"stopped by SIGTERM after step {step}; saved; the same command continues")
        raise SystemExit(hosts.CONTINUES)

    def close(self) -> None:
        """Waits for a checkpoint in the making and closes the files."""
        self.profile.close()
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            if self.checkpoints is not None:
                self.checkpoints.close()


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)
