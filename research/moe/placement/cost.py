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

    The defaults are one NVIDIA V100 of a node of eight (NVLink 300 GB/s, 100 Gb/s between nodes shared by the
    node's eight), as in the paper's first cluster, at half of its peak.
    """

    flops: float = 50e12
    bandwidth: float = 130e9
    node_bandwidth: float = 1.5e9
    latency: float = 20e-6
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "node_bandwidth"):
            if not getattr(self, name) > 0:
                raise UserError(f"CostModel.{name} is {getattr(self, name)}; it must be above 0")

    def overlap_degree(self, work: Work, topology: Topology) -> int:
        """t: how many experts can be moved to a device while `hidden` passes."""
        slow = self.bandwidth if topology.nodes == 1 else self.node_bandwidth
        return int(self.hidden * slow / work.expert_bytes)

    def seconds(
        self,
        flow: jax.Array,
        copies: jax.Array,
        owner: jax.Array,
        topology: Topology,
        work: Work,
        *,
        rematerialise: bool,
        late: jax.Array | None = None,
    ) -> jax.Array:
        """Seconds f32[] of a layer: traffic int32[D, D] of tokens, copies int32[D, m] of experts.

        late int32[D, n]: copies made after the gate, which nothing hides in forward. Backward computes twice what
        forward does; tokens travel there and back in both passes; copies are gathered in forward, again in backward
        where they are rematerialised, and their gradients are summed at the homes.
        """
        compute = 3 * work.token_flops * jnp.max(jnp.sum(flow, axis=0)) / self.flops
        passes = 4 * self._transfer(flow, work.token_bytes, topology)
        ahead = self._transfer(copy_flow(copies, owner), work.expert_bytes, topology)
        after = 0.0 if late is None else self._transfer(copy_flow(late, owner), work.expert_bytes, topology)
        forward = jnp.maximum(ahead - self.hidden, 0.0) + after  # nothing is left to hide `late` behind
        backward = jnp.maximum((1 + rematerialise) * (ahead + after) - 2 * self.hidden, 0.0)
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
