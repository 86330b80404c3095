"""Generated graphs of four families, with identifiers of their nodes."""

import dataclasses

import numpy as np

from research.data.generated import Generated

FAMILIES = ("ring", "two rings", "tree", "star")


def laplacian_identifiers(count: int, edges: np.ndarray, size: int) -> np.ndarray:
    """f32[count, size]: eigenvectors of the normalised Laplacian I - D^-1/2 A D^-1/2, the smallest eigenvalue first.

    edges int[M, 2], of an undirected graph of `count` nodes. The largest entry of each is positive, so that signs are
    settled; columns are 0 where the graph has fewer nodes than `size`.
    """
    adjacency = np.zeros((count, count))
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = 1.0
    scale = np.maximum(adjacency.sum(axis=1), 1.0) ** -0.5
    _, vectors = np.linalg.eigh(np.eye(count) - scale[:, None] * adjacency * scale)
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)])
    result = np.zeros((count, size), np.float32)
    result[:, : min(count, size)] = vectors[:, :size]
    return result


@dataclasses.dataclass(frozen=True)
class Graphs(Generated):
    """Rings, two rings side by side, random trees and stars, of 6 to `nodes` nodes in random order.

    Arrays: nodes f32[nodes, 1] and edge_features f32[nodes, 1], which say nothing (noise); edges int32[nodes, 2];
    identifiers f32[nodes, identifiers]; node_mask, edge_mask bool[nodes]; labels int32[], the place in `FAMILIES`.
    Trees and stars have as many edges as each other, and so have one ring and two: counting does not tell them apart.
    """

    nodes: int = 12
    identifiers: int = 6

    num_classes = len(FAMILIES)

    def record(self, random: np.random.RandomState) -> dict[str, np.ndarray]:
        label, count = random.randint(len(FAMILIES)), random.randint(6, self.nodes + 1)
        steps = np.arange(count)
        if FAMILIES[label] in ("ring", "two rings"):
            cut = count // 2 if label else count
            ends = np.where(steps < cut, (steps + 1) % cut, cut + (steps - cut + 1) % max(count - cut, 1))
            edges = np.stack([steps, ends], axis=1)
        else:
            parents = [0 if FAMILIES[label] == "star" else random.randint(i) for i in range(1, count)]
            edges = np.stack([steps[1:], parents], axis=1)
        edges = random.permutation(random.permutation(count)[edges])
        padded = np.zeros((self.nodes, 2), np.int32)
        padded[: len(edges)] = edges
        own = np.zeros((self.nodes, self.identifiers), np.float32)
        own[:count] = laplacian_identifiers(count, edges, self.identifiers)
        noise = random.standard_normal((2, self.nodes, 1)).astype(np.float32)
        return {
            "nodes": noise[0],
            "edges": padded,
            "edge_features": noise[1],
            "identifiers": own,
            "node_mask": np.arange(self.nodes) < count,
            "edge_mask": np.arange(self.nodes) < len(edges),
            "labels": np.int32(label),
        }
