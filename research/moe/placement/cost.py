"""The alpha-beta model of one MoE layer's training step: what calibration decides by, and what claims predict with.

    seconds = computation of the fullest device + its all-to-alls + what of moving experts is not hidden

It is a model: bandwidths and rates are parameters, contention and kernel launches are left out.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.errors import UserError
from research.moe.placement.plan import Topology


@dataclass(frozen=True)
class Work:
    """What one layer weighs: `expert_bytes` of one expert's parameters, `token_bytes` of one token's activation on
    the wire, `token_flops` of one token through one expert, forward."""

    expert_bytes: int
    token_bytes: int
    token_flops: int


@dataclass(frozen=True)
class CostModel:
    """Seconds of a layer's forward and backward pass.

    flops: FLOP/s that a device reaches. bandwidth, node_bandwidth: bytes/s into a device from its own node and from
    other nodes. latency: seconds every collective takes at least. hidden: seconds of other work (attention) of one
    pass that moving experts ahead of the gate may hide behind.

    The defaults are an NVIDIA V100 in a node of eight at 40 % of its peak, NVLink of 130 GB/s a way, 100 Gb/s between
    nodes shared by the node's eight: the paper's first cluster.
    """

    flops: float = 50e12
    bandwidth: float = 130e9
    node_bandwidth: float = 1.5625e9
    latency: float = 20e-6
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "node_bandwidth"):
            if not getattr(self, name) > 0:
                raise UserError(f"CostModel.{name} is {getattr(self, name)}; it must be above 0")

    def overlap_degree(self, work: Work, topology: Topology) -> int:
        """t: how many experts, of different homes, can be copied to all devices while `hidden` passes."""
        scatter, gather = self._broadcast_seconds(work, topology)
        return max(0, int((self.hidden - 2 * self.latency - scatter) / gather))

    def moving(
        self, copies: jax.Array, owner: jax.Array, topology: Topology, work: Work, broadcast: bool
    ) -> jax.Array:
        """Seconds f32[] of making copies int32[D, m] once: broadcast to all, or each sent by its home."""
        if not broadcast:
            return self._transfer(copy_flow(copies, owner), work.expert_bytes, topology)
        hot = jnp.max(copies, axis=0, initial=-1)
        homes = jnp.zeros(topology.devices, jnp.int32).at[jnp.where(hot < 0, topology.devices, owner[hot])]
        scatter, gather = self._broadcast_seconds(work, topology)
        count, busiest = jnp.sum(hot >= 0), jnp.max(homes.add(1, mode="drop"))
        return jnp.where(count > 0, 2 * self.latency + busiest * scatter + count * gather, 0.0)

    def _broadcast_seconds(self, work: Work, topology: Topology) -> tuple[float, float]:
        """(of a home to send the pieces of one expert, of all to gather them): all links of a node work at once in
        the second, one device's in the first."""
        nodes, size = topology.nodes, work.expert_bytes
        between = (nodes - 1) / nodes
        scatter = size * (between / self.node_bandwidth + (1 - between) / self.bandwidth)
        crossing = 1 / (topology.per_node * self.node_bandwidth) if nodes > 1 else 0.0
        return scatter, size * (1 / self.bandwidth + crossing)

    def seconds(
        self,
        flow: jax.Array,
        ahead: jax.Array | float,
        late: jax.Array | float,
        topology: Topology,
        work: Work,
        *,
        rematerialise: bool,
    ) -> jax.Array:
        """Seconds f32[] of a layer: traffic int32[D, D] of tokens; seconds of copying ahead of the gate and after it.

        Backward computes twice what forward does; tokens travel there and back in both passes; copies are gathered in
        forward, again in backward where they are rematerialised, and their gradients are summed at the homes.
        """
        compute = 3 * work.token_flops * jnp.max(jnp.sum(flow, axis=0)) / self.flops
        passes = 4 * self._transfer(flow, work.token_bytes, topology)
        forward = jnp.maximum(ahead - self.hidden, 0.0) + late  # nothing is left to hide `late` behind
        backward = jnp.maximum((1 + rematerialise) * (ahead + late) - 2 * self.hidden, 0.0)
        return compute + passes + forward + backward

    def _transfer(self, flow: jax.Array, size: int, topology: Topology) -> jax.Array:
        """Seconds until the last device has sent and received `flow` [D, D] pieces of `size` bytes."""
        away = ~jnp.eye(topology.devices, dtype=bool)
        near, far = flow * (away & topology.same_node), flow * ~topology.same_node
        busiest = lambda f: jnp.max(jnp.maximum(jnp.sum(f, axis=0), jnp.sum(f, axis=1)))  # noqa: E731
        beta = size * (busiest(near) / self.bandwidth + busiest(far) / self.node_bandwidth)
        return jnp.where(jnp.any(flow * away > 0), self.latency + beta, 0.0)


def copy_flow(copies: jax.Array, owner: jax.Array) -> jax.Array:
    """copies int32[D, m] -> int32[D, D]: experts sent from home to device."""
    devices = copies.shape[0]
    home = jnp.where(copies < 0, devices, owner[copies])
    flow = jnp.zeros((devices, devices), jnp.int32)
    return flow.at[home, jnp.arange(devices)[:, None]].add(1, mode="drop")
