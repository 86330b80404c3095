"""Training with placed experts: a task around any task whose model has mixtures of experts.

    of(ExpertPlacement, task=of(LanguageModelling, model=...), placement="fssdp")

The experts' parameters live in one store (`store.py`), which the trainer divides by its rules over the axes `fsdp`
(nodes) and `expert` (devices of a node). Where they are (`placement/rows`) and the loads of the last steps
(`placement/history`) are integer leaves of the parameters: the state of a run is all in its checkpoint, and a
resumed run makes the same plans. Plans are made inside the step, from that; new homes, every `reshard_every`
steps, between two steps on the host (`rearrange`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from research.errors import UserError, nearest
from research.moe.placement import collectives, plan, sharding
from research.moe.placement.hecate import FSSDP
from research.moe.placement.placed import (
    EXPERT_AXES,
    PlacedExperts,
    check_capacity,
    current_mesh,
    topology_of,
)
from research.moe.placement.plan import Topology
from research.moe.placement.policies import ExpertParallel, FullySharded, Policy, Replicated
from research.moe.placement.store import (
    EXPERTS,
    PLACEMENT,
    STORE,
    ExpertLayers,
    is_packed,
    pack,
    unpack,
)
from research.nn.transformer import LayerStack
from research.training.paths import map_named
from research.training.state import State
from research.training.task import Batch, Metrics, Task

PyTree = Any
Name = Literal["fssdp", "expert_parallel", "fsdp", "replicated"]

_POLICIES = {
    "fssdp": FSSDP,
    "expert_parallel": ExpertParallel,
    "fsdp": FullySharded,
    "replicated": Replicated,
}
_OF_LAYERS = ("imbalance", "moved_bytes", "moved_share", "crossed")


@dataclass(frozen=True)
class ExpertPlacement:
    """Trains `task` with its experts placed by a policy.

    placement: a policy, such as `of(FSSDP, memory=8)`, or the name of one with its defaults.
    capacity, rematerialise: see `PlacedExperts`.

    To the task's metrics it adds, over all its layers: `imbalance` (load of the fullest device over the mean, mean
    of the layers), `moved_bytes` (of parameters copied between devices, once, all layers), `crossed` (share of the
    choices computed on another device); and the same of every layer.
    """

    task: Task
    placement: Policy | Name = "fssdp"
    capacity: float | None = None
    rematerialise: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.placement, str) and self.placement not in _POLICIES:
            names = get_args(Name)
            close = nearest(self.placement, names)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(names)}"
            raise UserError(f"placement={self.placement!r}: no such placement; {hint}")
        check_capacity(self.capacity, "ExpertPlacement")
        self.layers  # noqa: B018  a model without experts is an error now

    @property
    def model(self) -> LayerStack:
        return self.task.model

    @property
    def policy(self) -> Policy:
        return _POLICIES[self.placement]() if isinstance(self.placement, str) else self.placement

    @property
    def layers(self) -> ExpertLayers:
        return ExpertLayers.of(self.model)

    # The task

    def init(self, key: jax.Array) -> PyTree:
        return self.pack(self.task.init(key))

    @property
    def start(self) -> Callable[[jax.Array], PyTree]:
        """As that of the wrapped task; there is none where that has none."""
        inner = self.task.start
        return lambda key: self.pack(inner(key))

    def loss(self, params: PyTree, batch: Batch, key: jax.Array) -> Metrics:
        return self._with_totals(self.task.loss(self._placed(params), batch, key))

    def evaluate(self, params: PyTree, batch: Batch) -> Metrics:
        if not is_packed(params):
            return self.task.evaluate(params, batch)
        return self._with_totals(self.task.evaluate(self._placed(params), batch))

    def variants(self, params: PyTree) -> dict[str, PyTree]:
        """Those of the task; a task with one keeps its experts placed, others are measured on plain parameters."""
        plain = functools.partial(unpack, layers=self.layers)
        if len(jax.eval_shape(lambda p: self.task.variants(plain(p)), params)) == 1:
            return {"": params}
        return self.task.variants(plain(params))

    def pack(self, params: PyTree) -> PyTree:
        """A model's parameters as this task trains them."""
        return pack(params, self.layers, self.policy.window)

    def unpack(self, params: PyTree) -> PyTree:
        """The parameters as the wrapped task has them."""
        return unpack(params, self.layers)

    # Between the steps

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise `UserError` if the experts do not divide over the devices of the mesh."""
        mlp = self.model.blocks[self.layers.indices[0] % self.layers.period].mlp
        plan.check_divides(mlp.num_experts, topology_of(mesh).devices, "placement")

    def remember(self, params: PyTree, metrics: Metrics) -> PyTree:
        """The parameters with the loads of this step in their history, the oldest forgotten."""
        loads = [metrics[f"{name}/load"][0] for name in self.layers.names()]
        newest = jnp.round(jnp.stack(loads)).astype(jnp.int32)
        history = jnp.concatenate([params[PLACEMENT]["history"][1:], newest[None]])
        return {**params, PLACEMENT: {**params[PLACEMENT], "history": history}}

    def rearrange(self, state: State, mesh: Mesh, step: int | None) -> State:
        """The state with new homes after `step`, if it is time for that; else the state itself.

        step None: at the start of a run, whose mesh may be another one than that of the run before; then only
        homes that the policy can't have on this mesh are changed.
        """
        policy, topology = self.policy, topology_of(mesh)
        if step is None:
            if self._fits(np.asarray(state.params[PLACEMENT]["rows"]), topology):
                return state
        elif policy.reshard_every is None or step % policy.reshard_every or topology.devices == 1:
            return state
        old = np.asarray(state.params[PLACEMENT]["rows"])
        history = np.asarray(state.params[PLACEMENT]["history"])
        homes = policy.homes(expected_load(history, np), topology)
        even = sharding.even_rows(*old.shape)
        rows = even if homes is None else sharding.assign_rows(old, homes, topology.devices)
        return move_experts(state, rows, sharding.sources(old, rows), mesh)

    def _fits(self, rows: np.ndarray, topology: Topology) -> bool:
        most = self.policy.slots(rows.shape[1], topology).own
        return sharding.owned(rows, topology.devices).max() <= most

    # Inside the step

    def _placed(self, params: PyTree) -> PyTree:
        """The tree that the model reads: the plan of every layer in place of its experts."""
        rows, topology = params[PLACEMENT]["rows"], topology_of(current_mesh())
        load = expected_load(params[PLACEMENT]["history"], jnp)
        owner = rows // (rows.size // topology.devices)
        ahead = jax.vmap(lambda load, owner: self.policy.ahead(load, owner, topology))(load, owner)
        placed = [
            PlacedExperts(rows[i], ahead[i], self.policy, topology, self.capacity, self.rematerialise)
            for i in range(rows.shape[0])
        ]
        rest = {name: value for name, value in params.items() if name != PLACEMENT}
        return self.layers.write(rest, placed)

    def _with_totals(self, metrics: Metrics) -> Metrics:
        found = {name: [metrics[f"{layer}/{name}"] for layer in self.layers.names()] for name in _OF_LAYERS}
        totals = {
            name: tuple(sum(part) for part in zip(*pairs, strict=True)) for name, pairs in found.items()
        }
        total, layers = totals["moved_bytes"]
        totals["moved_bytes"] = (total, layers / len(found["moved_bytes"]))
        return metrics | totals


def expected_load(history: Any, numpy: Any) -> Any:
    """history int32[w, L, E], zeros before the first step -> f32[L, E]: mean counts of the steps there were."""
    known = numpy.maximum(numpy.sum(numpy.any(history > 0, axis=(1, 2))), 1)
    return (numpy.sum(history, axis=0) / known).astype(numpy.float32)


def move_experts(state: State, rows: np.ndarray, source: np.ndarray, mesh: Mesh) -> State:
    """The state with the experts, and what the optimizer and the average keep of them, moved to other rows.

    source int32[R]: the row each row's new content comes from. Leaf by leaf, and the old leaf is deleted, so that
    only one is there twice.
    """
    if np.array_equal(source, np.arange(source.size)):
        return state
    order = jnp.asarray(source)

    def move(path: str, leaf: Any) -> Any:
        inside = f"{STORE}/{EXPERTS}/" in path
        if not inside or not leaf.shape or leaf.shape[0] != source.size:
            return leaf
        moved = _mover(mesh, leaf.sharding)(leaf, order)
        leaf.delete()
        return moved

    def told(params: PyTree | None) -> PyTree | None:
        if params is None:
            return None
        new = jax.device_put(rows, params[PLACEMENT]["rows"].sharding)
        return {**params, PLACEMENT: {**params[PLACEMENT], "rows": new}}

    moved = map_named(move, state)
    return moved.replace(params=told(moved.params), ema=told(moved.ema))


@functools.lru_cache
def _mover(mesh: Mesh, sharding: jax.sharding.Sharding) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(leaf [R, ...], source int32[R]) -> leaf with row r from row source[r], divided as before."""
    if mesh.size == 1:
        return jax.jit(functools.partial(collectives.permute_rows, axes=()), out_shardings=sharding)
    move = jax.shard_map(
        functools.partial(collectives.permute_rows, axes=EXPERT_AXES),
        mesh=mesh,
        in_specs=(PartitionSpec(EXPERT_AXES), PartitionSpec()),
        out_specs=PartitionSpec(EXPERT_AXES),
        axis_names=set(EXPERT_AXES),
    )
    return jax.jit(move, out_shardings=sharding)
