"""Hecate: fully sharded sparse data parallelism, FSSDP (arXiv 2502.02581).

Parameters and optimizer state of every expert live at one home. For one step the hot experts are copied to more
devices (SparseAllGather), the gradients of the copies are summed at the homes (SparseReduceScatter), and the copies
are thrown away; no optimizer state moves, so every step may have another placement.

    load      F(e): mean token count of the last w steps (section 4.2)
    copies    algorithm 1, `plan.materialise`, from F; after the gate once more from the real counts, kept only if
              the predicted time falls (calibration)
    homes     algorithm 2, `sharding.plan_shards`, over all layers together, every `reshard_every` steps
    tokens    `plan.eligible`: this device, else a holder in this node, else any holder; evenly
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.moe.placement import plan, sharding
from research.moe.placement.cost import CostModel, Work
from research.moe.placement.plan import Topology
from research.moe.placement.policies import Slots


@dataclass(frozen=True)
class FSSDP:
    """The policy.

    overlap: t, experts that can be moved while attention runs; `CostModel.overlap_degree` gives it. memory: m, copies
        that a device has room for. With t <= m the hottest are broadcast to all devices. window: w. reshard_every:
        steps between runs of algorithm 2, None: even homes for good.
    own_factor: with algorithm 2, how many experts of one layer a device may own, as a multiple of E / D. It bounds
        the slots that every device keeps.
    pair_limit: where copies are not broadcast, the most from one home to one device, None for any. All pairs
        exchange that many rows, so a small limit is what keeps the all-to-all as small as the plan: memory / (D - 1),
        rounded up, suffices where hot experts live on many devices, as algorithm 2 sees to.
    calibration: slots for copies made after the gate, 0 for none; `cost` decides whether they are used.
    """

    overlap: int = 8
    memory: int = 4
    window: int = 5
    reshard_every: int | None = 100
    own_factor: float = 2.0
    pair_limit: int | None = None
    calibration: int = 0
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        for name in ("overlap", "memory", "calibration"):
            if getattr(self, name) < 0:
                raise UserError(f"FSSDP.{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("window", "reshard_every", "pair_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"FSSDP.{name} is {getattr(self, name)}; it must be at least 1")
        if self.own_factor < 1:
            raise UserError(
                f"FSSDP.own_factor is {self.own_factor}; below 1 the experts do not fit on the devices"
            )

    def slots(self, num_experts: int, topology: Topology) -> Slots:
        factor = 1.0 if self.reshard_every is None else self.own_factor
        own = plan.most_owned(num_experts, topology.devices, factor)
        alone = topology.devices == 1
        ahead = 0 if alone else min(self.memory, self.overlap, num_experts)
        late = 0 if alone else min(self.calibration, num_experts)
        limit = num_experts if self.pair_limit is None else self.pair_limit
        broadcast = self.overlap <= self.memory
        ahead_limit = min(ahead, own) if broadcast else min(ahead, own, limit)
        return Slots(own, ahead, late, ahead_limit, min(late, own, limit), ahead_broadcast=broadcast)

    def ahead(self, load: jax.Array, owner: jax.Array, topology: Topology) -> jax.Array:
        home = owner[None] == jnp.arange(topology.devices)[:, None]
        return plan.materialise(
            load,
            owner,
            home,
            topology,
            reach=self.overlap,
            memory=self.slots(owner.shape[0], topology).ahead,
            pair_limit=None if self.overlap <= self.memory else self.pair_limit,
        )

    def late(
        self,
        counts: jax.Array,
        copies: jax.Array,
        owner: jax.Array,
        topology: Topology,
        work: Work,
        rematerialise: bool,
    ) -> jax.Array:
        num_experts = counts.shape[1]
        room = self.slots(num_experts, topology).late
        none = jnp.full((topology.devices, room), -1, jnp.int32)
        if not room:
            return none
        home = owner[None] == jnp.arange(topology.devices)[:, None]
        held = home | plan.hold(copies, num_experts)
        load = jnp.sum(counts, axis=0).astype(jnp.float32)
        more = plan.materialise(
            load, owner, held, topology, reach=num_experts, memory=room, pair_limit=self.pair_limit
        )

        broadcast = self.slots(num_experts, topology).ahead_broadcast
        ahead = self.cost.moving(copies, owner, topology, work, broadcast)

        def seconds(late: jax.Array) -> jax.Array:
            flow = plan.traffic(counts, held | plan.hold(late, num_experts), topology)
            after = self.cost.moving(late, owner, topology, work, broadcast=False)
            return self.cost.seconds(flow, ahead, after, topology, work, rematerialise=rematerialise)

        return jnp.where(seconds(more) < seconds(none), more, none)

    def homes(self, loads: np.ndarray, topology: Topology) -> np.ndarray | None:
        if self.reshard_every is None:
            return None
        most = self.slots(loads.shape[1], topology).own
        return sharding.plan_shards(loads, topology, reach=self.overlap, most=most)
