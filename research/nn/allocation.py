"""Which option each layer gets under a budget of bits: an integer program (arXiv 2311.12023, section 3.2).

minimise    sum_lo loss[l, o] x[l, o]
subject to  sum_o x[l, o] = 1,   sum_lo bits[l, o] x[l, o] <= budget,   x binary
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from research.errors import UserError

Option = tuple[float, float]


def allocate(
    options: Sequence[Sequence[Option]], budget: float, time_limit: float = 60.0
) -> tuple[list[int], float, float]:
    """options[layer]: (bits, loss) of each of its options; budget: bits of all layers together.

    -> the option of every layer of least total loss, that loss, and the bits. The loss is least to 1e-6 of it.

    Raises:
        UserError: there are no layers, or a layer has no option; a number is not finite, or bits are negative; no
            choice fits the budget; the solver finds none in time_limit seconds.
    """
    if not options:
        raise UserError("a budget is shared out among layers, and there are none")
    for layer, choices in enumerate(options):
        if not choices:
            raise UserError(f"layer {layer} has no option to choose from")
        if not np.isfinite(choices).all() or min(bits for bits, _ in choices) < 0:
            raise UserError(
                f"layer {layer}: its options need finite losses and at least 0 bits: {list(choices)}"
            )
    least = sum(min(bits for bits, _ in choices) for choices in options)
    if least > budget:
        raise UserError(f"no choice fits {budget:g} bits: the smallest options of all layers need {least:g}")
    counts = [len(choices) for choices in options]
    layer = np.repeat(np.arange(len(options)), counts)
    bits, loss = np.concatenate([np.asarray(choices, np.float64) for choices in options]).T
    # Above the best option of each layer, and of order 1: the solver's tolerances are absolute.
    floor = np.array([min(loss for _, loss in choices) for choices in options])
    excess = loss - floor[layer]
    scale = max(excess.max(), np.finfo(float).tiny)
    one = sparse.csr_matrix((np.ones(len(layer)), (layer, np.arange(len(layer)))), (len(options), len(layer)))
    # Feasible to the solver is what is above a bound by less than 1e-6: of the budget, 1e-10.
    unit = max(budget, np.finfo(float).tiny) / 1e4
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(bits[None] / unit, -np.inf, 1e4)]
    starts = np.cumsum(counts) - counts
    while True:
        found = milp(
            excess / scale,
            integrality=np.ones(len(layer)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options=dict(time_limit=time_limit, mip_rel_gap=1e-6),
        )
        if found.x is None:
            raise UserError(f"the solver found no choice in {time_limit:g} s: {found.message}")
        chosen = [int(np.argmax(found.x[at : at + count])) for at, count in zip(starts, counts, strict=True)]
        picked = [choices[option] for choices, option in zip(options, chosen, strict=True)]
        total = sum(bits for bits, _ in picked)
        if total <= budget:
            return chosen, sum(loss for _, loss in picked), total
        # By less than the solver can tell. Everything but this choice remains.
        cut = np.zeros(len(layer))
        cut[starts + chosen] = 1
        constraints.append(LinearConstraint(cut[None], -np.inf, len(options) - 1))
