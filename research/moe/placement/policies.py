"""What is copied where: the policies that stand beside FSSDP under one interface.

A policy says the static sizes of a plan, and makes plans as data: `ahead` of the gate from expected loads, which
can be hidden behind attention, and `late`, after the gate, from the counts of this very step.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.moe.placement import plan
from research.moe.placement.cost import CostModel, Work
from research.moe.placement.plan import Topology


@dataclass(frozen=True)
class Slots:
    """Static sizes on one device: at most `own` experts of a layer at home, `ahead` and `late` copies, of which one
    home has `ahead_limit` and `late_limit` at most. complete: every device holds every expert, no token travels.

    ahead_broadcast, late_broadcast: those copies are the same on all devices; slot i has the same expert on each, or
    is empty where that is at home.
    """

    own: int
    ahead: int
    late: int
    ahead_limit: int
    late_limit: int
    ahead_broadcast: bool = False
    late_broadcast: bool = False
    complete: bool = False


@runtime_checkable
class Policy(Protocol):
    """The contract. `window`: steps whose mean load is the expected one. `reshard_every`: steps between new homes,
    None for never. Frozen and hashable: it is a static part of the program."""

    window: int
    reshard_every: int | None

    def slots(self, num_experts: int, topology: Topology) -> Slots: ...

    def ahead(self, load: jax.Array, owner: jax.Array, topology: Topology) -> jax.Array:
        """Expected load f32[E], homes int32[E] -> copies int32[D, slots.ahead]."""

    def late(
        self,
        counts: jax.Array,
        copies: jax.Array,
        owner: jax.Array,
        topology: Topology,
        work: Work,
        rematerialise: bool,
    ) -> jax.Array:
        """Counts int32[D, E] of this step's choices by device, and the copies made ahead -> more copies int32[D,
        slots.late]."""

    def homes(self, loads: np.ndarray, topology: Topology) -> np.ndarray | None:
        """Expected loads [L, E] -> new homes int[L, E] for all layers; None: the even ones."""


class _Plain:
    """What policies share that copy nothing late and leave every expert at its even home."""

    window = 5
    reshard_every: int | None = None

    def late(self, counts, copies, owner, topology, work, rematerialise):
        return jnp.full((topology.devices, 0), -1, jnp.int32)

    def homes(self, loads, topology):
        return None


@dataclass(frozen=True)
class ExpertParallel(_Plain):
    """Plain expert parallelism: nothing is copied, every token travels to its experts' homes."""

    def slots(self, num_experts: int, topology: Topology) -> Slots:
        return Slots(num_experts // topology.devices, 0, 0, 0, 0)

    def ahead(self, load: jax.Array, owner: jax.Array, topology: Topology) -> jax.Array:
        return jnp.full((topology.devices, 0), -1, jnp.int32)


@dataclass(frozen=True)
class FullySharded(_Plain):
    """FSDP of the experts: all are copied to all devices every step, no token travels."""

    def slots(self, num_experts: int, topology: Topology) -> Slots:
        each = num_experts // topology.devices
        ahead = 0 if topology.devices == 1 else num_experts
        return Slots(each, ahead, 0, each, 0, ahead_broadcast=True, complete=True)

    def ahead(self, load: jax.Array, owner: jax.Array, topology: Topology) -> jax.Array:
        if topology.devices == 1:
            return jnp.full((1, 0), -1, jnp.int32)
        return plan.everything(owner, topology.devices)


@dataclass(frozen=True)
class Replicated(_Plain):
    """Dynamic shadowing (FasterMoE, PPoPP 2022): hot experts are copied to all devices or not at all, chosen after
    the gate.

    The n hottest of this step's counts are shadowed, for the n in 0..most of which `cost` predicts the least time.
    As it decides after the gate, nothing hides the copying.
    """

    most: int = 8
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        _positive("Replicated.most", self.most)

    def slots(self, num_experts: int, topology: Topology) -> Slots:
        each = num_experts // topology.devices
        most = 0 if topology.devices == 1 else min(self.most, num_experts)
        return Slots(each, 0, most, 0, min(most, each), late_broadcast=True)

    def ahead(self, load: jax.Array, owner: jax.Array, topology: Topology) -> jax.Array:
        return jnp.full((topology.devices, 0), -1, jnp.int32)

    def late(self, counts, copies, owner, topology, work, rematerialise):
        devices, num_experts = counts.shape
        most = self.slots(num_experts, topology).late
        home = owner[None] == jnp.arange(devices)[:, None]
        load = jnp.sum(counts, axis=0).astype(jnp.float32)
        everywhere = plan.materialise(load, owner, home, topology, reach=most, memory=most)
        heat = plan.rank(-load)

        def shadowing(number: jax.Array) -> jax.Array:
            hot = (everywhere >= 0) & (heat[everywhere] < number)
            return jnp.where(hot, everywhere, -1)

        def seconds(number: jax.Array) -> jax.Array:
            chosen = shadowing(number)
            flow = plan.traffic(counts, home | plan.hold(chosen, num_experts), topology)
            late = self.cost.moving(chosen, owner, topology, work, broadcast=True)
            return self.cost.seconds(flow, 0.0, late, topology, work, rematerialise=rematerialise)

        return shadowing(jnp.argmin(jax.vmap(seconds)(jnp.arange(most + 1))))


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{name} is {value}; it must be at least 1")
