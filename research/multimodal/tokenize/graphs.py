"""Graphs as sets of nodes and edges: TokenGT (arXiv 2207.02505, section 3.1), which Meta-Transformer takes."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.multimodal.tokenize.contract import Tokens
from research.nn.linear import Linear, parameter


class GraphTokens(nn.Module):
    """A token a node and a token an edge, told apart by who they join:

        x_v  = A f_v  + I [p_v, p_v] + t_node          p f32[N, K]: orthonormal identifiers of the nodes, such as
        x_uv = E f_uv + I [p_u, p_v] + t_edge          eigenvectors of the Laplacian (`research.data.graphs`)

    Args:
        width: D.
        nodes, edges: the most that a record has; the others are masked.
        node_features, edge_features: numbers of f_v and f_uv.
        identifiers: K.

    A record: nodes f32[N, F], edges int32[M, 2], edge_features f32[M, G], identifiers f32[N, K], node_mask bool[N],
    edge_mask bool[M]. Parameters: node, edge, identifier/kernel, types [2, D].
    """

    width: int
    nodes: int
    edges: int
    node_features: int
    edge_features: int
    identifiers: int

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {
            "nodes": ((self.nodes, self.node_features), jnp.float32),
            "edges": ((self.edges, 2), jnp.int32),
            "edge_features": ((self.edges, self.edge_features), jnp.float32),
            "identifiers": ((self.nodes, self.identifiers), jnp.float32),
            "node_mask": ((self.nodes,), jnp.bool_),
            "edge_mask": ((self.edges,), jnp.bool_),
        }
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

    @property
    def count(self) -> int:
        return self.nodes + self.edges

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        own = record["identifiers"]
        ends = jax.vmap(lambda table, index: table[index])(own, record["edges"])  # [B, M, 2, K]
        pairs = jnp.concatenate(
            [jnp.concatenate([own, own], axis=-1), ends.reshape(*ends.shape[:2], -1)], axis=1
        )
        node = Linear(self.width, use_bias=True, name="node")(record["nodes"])
        edge = Linear(self.width, use_bias=True, name="edge")(record["edge_features"])
        types = parameter(self, "types", nn.initializers.normal(0.02), (2, self.width)).astype(node.dtype)
        x = jnp.concatenate([node + types[0], edge + types[1]], axis=1)
        x = x + Linear(self.width, name="identifier")(pairs)
        return Tokens(x, mask=jnp.concatenate([record["node_mask"], record["edge_mask"]], axis=1))
