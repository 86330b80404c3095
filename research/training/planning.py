"""What a training step needs and how long it takes on devices that are not here, from abstract evaluation only.

The step itself is traced, with the shapes and shardings that it would have, and `propagation` counts. The time is a
roofline of three: FLOPs of products over the chip's peak, bytes that products and the update move over its memory's
bandwidth, bytes sent over its links. If all three overlap, the step takes the longest of them; if communication
overlaps with nothing, computation and it together. The truth should lie between, and above where kernels are small.
"""

import dataclasses
import math
from typing import Any

import jax

from research.errors import UserError
from research.nn.accounting import count_parameters
from research.nn.cpu_kernels import without_cpu_kernels
from research.training.feed import batch_spec
from research.training.loop import Trainer
from research.training.partitioning import BATCH_AXES, axis_sizes, batch_parts, device_bytes
from research.training.propagation import Spec, Tally, tally
from research.training.state import State
from research.training.topologies import Topology

USABLE = 0.92  # of a chip's memory; the rest is the runtime's, the program's and fragments


@dataclasses.dataclass(frozen=True)
class Plan:
    """One stage's step on one device of a topology; bytes, FLOPs and seconds.

    activations: intermediate arrays alive together at most, gradients and gathered weights among them. model_flops: of
    all devices, of the forward pass three times, which MFU counts; a recomputing step does more. cache: of decoding
    one sequence of the model's `max_length`, on one device; `None` for a model that does not decode. largest_batch:
    records, `None` if not even one for each part of the mesh fits.
    """

    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activations: float
    costs: Tally
    model_flops: float
    cache: int | None
    largest_batch: int | None
    in_bfloat16: bool
    groups: dict[str, int]

    @property
    def needed(self) -> float:
        """Bytes a device needs at the peak of a step."""
        return self.parameter_bytes + self.optimizer_bytes + self.batch_bytes + self.activations

    @property
    def fits(self) -> bool:
        return self.needed <= USABLE * self.topology.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """{resource: seconds} that it takes at least, were it alone."""
        chip = self.topology.chip
        moved = self.costs.moved + 2 * (self.parameter_bytes + self.optimizer_bytes)
        sent = self.costs.gathered + self.costs.reduced
        return {
            "compute": self.costs.products / (chip.bfloat16 if self.in_bfloat16 else chip.float32),
            "memory": moved / chip.bandwidth,
            "links": sent / self.topology.rate(max(self.groups.values(), default=1)),
        }

    @property
    def step_seconds(self) -> tuple[float, float]:
        """(if everything overlaps, if communication overlaps with nothing)."""
        times = self.seconds
        return max(times.values()), max(times["compute"], times["memory"]) + times["links"]

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs over the peak of all devices during a step: as `step_seconds`, the lower one last."""
        chip = self.topology.chip
        peak = self.topology.devices * (chip.bfloat16 if self.in_bfloat16 else chip.float32)
        return tuple(self.model_flops / peak / seconds for seconds in self.step_seconds)


def plan(trainer: Trainer, topology: Topology) -> Plan:
    """The plan of the first stage. Raises `UserError` for what would stop the run before its first step."""
    stage = trainer.stages[0]
    mesh, step, state = place(trainer, topology)
    data = trainer.data if stage.data is None else stage.data
    batch = batch_spec(data, stage.batch_size)
    costs = _measure(step, state, batch, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    weights = device_bytes(state.params, shardings.params)
    fixed = device_bytes(state, shardings)
    batch_bytes = sum(math.prod(s.shape) * s.dtype.itemsize for s in batch.values()) // batch_parts(mesh)
    alone = dict.fromkeys(mesh.shape, 1)
    # A foreign function hides what it computes.
    with jax.sharding.use_abstract_mesh(topology.mesh(alone)), without_cpu_kernels():
        forward = jax.make_jaxpr(trainer.task.loss)(state.params, batch, jax.random.key(0))
    once = tally(forward, [_undivided(v) for v in forward.jaxpr.invars], {})
    room = USABLE * topology.chip.memory - fixed
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=stage.batch_size,
        parameters=count_parameters(state.params),
        parameter_bytes=weights,
        optimizer_bytes=fixed - weights,
        batch_bytes=batch_bytes,
        activations=costs.peak,
        costs=costs,
        model_flops=3 * once.products,
        cache=_cache(trainer.task),
        largest_batch=_largest(step, state, data, stage, mesh, costs.peak + batch_bytes, room),
        in_bfloat16=_compute_dtype(trainer.task) == "bfloat16",
        groups={name: size for name, size in mesh.shape.items() if size > 1},
    )


def place(trainer: Trainer, topology: Topology) -> tuple[jax.sharding.AbstractMesh, Any, State]:
    """(mesh, step, state) of the first stage; the state is shapes and shardings."""
    mesh = topology.mesh(axis_sizes(trainer.mesh, topology.devices))
    return mesh, *trainer.abstract_first_stage(mesh)


def _measure(step: Any, state: State, batch: dict[str, Any], mesh: jax.sharding.AbstractMesh) -> Tally:
    with jax.sharding.use_abstract_mesh(mesh), without_cpu_kernels():
        closed = jax.make_jaxpr(step)(state, batch)
    specs = [_spec(leaf.sharding.spec, leaf.ndim) for leaf in jax.tree.leaves(state)]
    specs += [_spec((BATCH_AXES,), leaf.ndim) for leaf in jax.tree.leaves(batch)]
    shardings = [_spec(leaf.sharding.spec, leaf.ndim) for leaf in jax.tree.leaves(state.params)]
    dividing = {name for spec in shardings for name in sum(spec, ())}
    return tally(closed, specs, dict(mesh.shape), [name for name in BATCH_AXES if name in dividing])


def _spec(partition: Any, ndim: int) -> Spec:
    axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in partition]
    return tuple(axes) + ((),) * (ndim - len(axes))


def _undivided(value: Any) -> Spec:
    return ((),) * len(value.aval.shape)


def _largest(
    step: Any, state: State, data: Any, stage: Any, mesh: Any, at_given: float, room: float
) -> int | None:
    """The largest batch whose intermediate arrays fit `room` bytes, a multiple of the mesh's parts and microbatches.

    They grow linearly with the batch, so two sizes say how; the answer is traced once more, and lowered while wrong.
    """
    unit = batch_parts(mesh) * stage.accumulate

    def need(batch_size: int) -> float:
        batch = batch_spec(data, batch_size)
        size = sum(math.prod(s.shape) * s.dtype.itemsize for s in batch.values()) / batch_parts(mesh)
        return _measure(step, state, batch, mesh).peak + size

    other = stage.batch_size + unit * max(1, stage.batch_size // unit)
    slope = (need(other) - at_given) / (other - stage.batch_size)
    if slope <= 0:
        raise UserError(f"stage {stage.name!r}: the memory of its step does not grow with its batch")
    guess = stage.batch_size + (room - at_given) / slope
    found = math.floor(guess / unit) * unit
    while found >= unit and need(found) > room:
        found -= unit * max(1, found // unit // 16)
    return found if found >= unit else None


def _compute_dtype(task: Any) -> str:
    """Of the products: that of the innermost task, where one wraps another."""
    while not hasattr(task, "compute_dtype") and hasattr(task, "task"):
        task = task.task
    return getattr(task, "compute_dtype", "float32")


def _cache(task: Any) -> int | None:
    model = getattr(task, "model", None)
    if not hasattr(model, "init_cache") or not hasattr(model, "max_length"):
        return None
    dtype = jax.numpy.dtype(_compute_dtype(task))
    cache = jax.eval_shape(lambda: model.init_cache(1, model.max_length, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
