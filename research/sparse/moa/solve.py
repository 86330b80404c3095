"""Which rule each head gets: a multi-objective integer program, one objective for every profiled length.

    minimise    loss_k(x) = sum_hr loss[k, h, r] x[h, r]            for every profiled length k
    subject to  sum_r x[h, r] = 1                                   one rule for every head
                lower rho H <= sum_hr density[n, r] x[h, r] <= rho H    at every constrained length n
                x[h, r] <= y[layer(h), r],  sum_r y[l, r] <= max_rules  few rules in a layer
                x, y binary

The Pareto front is searched by epsilon constraints (arXiv 2406.14909, section 4.2): each objective is minimised alone,
which gives the ranges; then each in turn under upper bounds on the others, from a grid over their ranges.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Program:
    """loss float64[K, H, R], density float64[N, R], layer int[H], rho: greatest mean density.

    lower: the least mean density, as a share of rho. max_rules: of a layer. time_limit: seconds for one solution.
    """

    loss: np.ndarray
    density: np.ndarray
    layer: np.ndarray
    rho: float
    lower: float = 0.9
    max_rules: int = 2
    time_limit: float = 60.0

    def minimise(self, objective: int, at_most: dict[int, float] | None = None) -> np.ndarray | None:
        """The rules int[H] of least loss at one profiled length, `at_most` so much at others; None: there are none.

        Raises UserError where the solver finds nothing in its time.
        """
        objectives, heads, rules = self.loss.shape
        layers = int(self.layer.max()) + 1
        width = heads * rules + layers * rules
        # Losses of very different size would make the solver's tolerances loose or tight.
        scale = np.maximum(np.abs(self.loss).sum((1, 2)) / heads, np.finfo(float).tiny)
        one = sparse.kron(sparse.eye(heads), np.ones((1, rules)))
        one = sparse.hstack([one, sparse.csr_matrix((heads, layers * rules))])
        costs = sparse.csr_matrix(np.pad(np.tile(self.density, (1, heads)), ((0, 0), (0, layers * rules))))
        member = sparse.csr_matrix((np.ones(heads), (np.arange(heads), self.layer)), (heads, layers))
        used = sparse.hstack([sparse.eye(heads * rules), -sparse.kron(member, sparse.eye(rules))])
        few = sparse.kron(sparse.eye(layers), np.ones((1, rules)))
        few = sparse.hstack([sparse.csr_matrix((layers, heads * rules)), few])
        constraints = [
            LinearConstraint(one, 1, 1),
            LinearConstraint(costs, self.lower * self.rho * heads, self.rho * heads * (1 + 1e-9)),
            LinearConstraint(used, -np.inf, 0),
            LinearConstraint(few, -np.inf, self.max_rules),
        ]
        for other, bound in (at_most or {}).items():
            row = np.pad(self.loss[other].reshape(1, -1) / scale[other], ((0, 0), (0, layers * rules)))
            constraints.append(LinearConstraint(row, -np.inf, bound / scale[other] + 1e-9))
        found = milp(
            np.pad(self.loss[objective].reshape(-1) / scale[objective], (0, width - heads * rules)),
            integrality=np.ones(width),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options=dict(time_limit=self.time_limit, mip_rel_gap=1e-6),
        )
        if found.x is None:
            if found.status == 2:
                return None
            raise UserError(f"the solver found no plan in {self.time_limit:g} s: {found.message}")
        return np.argmax(found.x[: heads * rules].reshape(heads, rules), axis=1)

    def losses(self, chosen: np.ndarray) -> np.ndarray:
        """int[H] -> float64[K], the loss at every profiled length."""
        return self.loss[:, np.arange(len(chosen)), chosen].sum(axis=1)

    def densities(self, chosen: np.ndarray) -> np.ndarray:
        """int[H] -> float64[N], the mean density at every constrained length."""
        return self.density[:, chosen].mean(axis=1)


def pareto_front(
    program: Program, points: int = 5, tell: Callable[[int, int], None] = lambda done, of: None
) -> list[np.ndarray]:
    """Plans int[H] none of which is at least as good as another at every profiled length, by their first loss.

    points: of the grid over each objective's range. tell(done, of): after every integer program.

    Raises:
        UserError: no plan has the densities asked for.
    """
    objectives = len(program.loss)
    grid = list(itertools.product(range(1, points), repeat=objectives - 1))
    total = objectives * (1 + (len(grid) if objectives > 1 else 0))
    alone = []
    for objective in range(objectives):
        chosen = program.minimise(objective)
        if chosen is None:
            heads = program.loss.shape[1]
            raise UserError(
                f"no choice of rules for {heads} heads has a mean density from {program.lower * program.rho:.3g} to "
                f"{program.rho:.3g} at all lengths, with {program.max_rules} rules a layer: allow a smaller lower "
                "bound, finer steps or more fractions"
            )
        alone.append(chosen)
        tell(len(alone), total)
    losses = np.array([program.losses(chosen) for chosen in alone])
    low, high = losses.min(axis=0), losses.max(axis=0)
    found, done = list(alone), objectives
    if objectives > 1:
        for objective in range(objectives):
            others = [other for other in range(objectives) if other != objective]
            for steps in grid:
                bounds = {
                    other: low[other] + (high[other] - low[other]) * step / (points - 1)
                    for other, step in zip(others, steps, strict=True)
                }
                chosen = program.minimise(objective, bounds)
                if chosen is not None:
                    found.append(chosen)
                done += 1
                tell(done, total)
    return _undominated(program, found)


def _undominated(program: Program, found: list[np.ndarray]) -> list[np.ndarray]:
    different = list({tuple(chosen.tolist()): chosen for chosen in found}.values())
    losses = np.array([program.losses(chosen) for chosen in different])
    kept = []
    for i, mine in enumerate(losses):
        better = (losses <= mine).all(axis=1) & (losses < mine).any(axis=1)
        same = (losses == mine).all(axis=1)[:i]
        if not better.any() and not same.any():
            kept.append(i)
    return [different[i] for i in sorted(kept, key=lambda i: tuple(losses[i]))]
