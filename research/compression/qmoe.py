"""QMoE: experts of three values a weight, coded in less than one bit (arXiv 2310.16795).

    python -m experiments.compress --workdir=runs/qmoe --method=qmoe --output=runs/small

Block by block, from the first to the last (section 3.2):

1. the block's inputs come from the compressed blocks before it; the tokens that each expert really gets are observed,
   H_e = X_e^T X_e, for all projections with the original weights
2. all experts are rounded at once by GPTQ to the ternary grid of their outputs, {w_min, 0, w_max} over all inputs, with
   damping 0.1 instead of 0.01. What can't be factored, and an expert that saw no token, is rounded to nearest
3. all tokens go through the compressed experts, times the router's probability, to the next block

and the result, about 88 % zeros, is coded by a fixed dictionary (section 4, `research/nn/ternary.py`). Attention,
routers, embeddings and dense layers stay as they are. The grid is that of the stored ends, which are bfloat16.

Tokens that mask others in a masked language model say nothing about text and can be left out of H (`exclude`); they
still go through the block. A Gram matrix takes the same room however many tokens it is of, so no expert's tokens are
cut off.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.compression.blocks import (
    Notes,
    Walk,
    check_array,
    kernels_at,
    observe,
    plain,
    replace,
    selected,
)
from research.compression.chain import PyTree, Subject
from research.compression.rounding import Ends, Ternary, feed_back, fit, round_to_nearest
from research.errors import UserError
from research.nn.attention import Context
from research.nn.mlp import feed_forward
from research.nn.ternary import TernaryCode
from research.training.observe import Gram, add, checked

EXPERTS = r"(^|/)layer_\d+/(.*/)?experts/\w+/kernel$"


@dataclasses.dataclass(frozen=True)
class QMoE:
    """A `Method`.

    Args:
        damp: times the mean of H's diagonal is added to its diagonal.
        feedback: False rounds to nearest, the baseline, and needs no data.
        exclude: tokens that are not observed, in FFNs.
        together: experts that are rounded in one program.
        select: which kernels; those of experts.
    """

    damp: float = 0.1
    feedback: bool = True
    exclude: tuple[int, ...] = ()
    together: int = 16
    select: str = EXPERTS

    name: ClassVar[str] = "qmoe"
    needs_compressed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.together < 1:
            raise UserError(f"together={self.together}: at least 1 expert at a time")

    @property
    def needs_data(self) -> bool:
        return self.feedback

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        params, notes = dict(subject.params), Notes()
        try:
            paths = selected(params, self.select)
        except UserError:
            raise UserError(
                "qmoe compresses experts, and this model has none: its layers have no .../experts/..."
            ) from None
        if not self.feedback:
            flat = kernels_at(params, paths)
            return replace(
                params, {path: self._round(path, w, None, notes) for path, w in flat.items()}
            ), notes.lines()
        walk = Walk(subject.model, params, subject.batches, self.select)
        for _ in range(walk.layers):
            subject.tell(f"{self.name}: block {walk.index + 1} of {walk.layers}")
            name, block = walk.name, params[walk.name]
            found = walk.paths(block)
            if found:
                grams = self._grams(walk, block, found)
                notes.unseen(name, grams)
                kernels = {
                    path: self._round(f"{name}/{path}", kernel, grams[path], notes)
                    for path, kernel in kernels_at(block, found).items()
                }
                params[name] = replace(block, kernels)
            walk.advance(params[name])
        return params, notes.lines()

    def _grams(self, walk: Walk, block: PyTree, paths: tuple[str, ...]) -> dict[str, Gram]:
        if not self.exclude:
            return walk.grams(block, paths)
        if other := [path for path in paths if not path.startswith("mlp/")]:
            raise UserError(
                f"exclude leaves tokens out of FFNs, and {walk.name}/{other[0]} is none: select others"
            )
        module = walk.block.clone(mlp=Keeping(Template(walk.block.mlp)))
        block, sums = plain(block), None
        for stream, place in walk.inputs():
            keep = ~jnp.isin(place["tokens"], jnp.asarray(self.exclude))
            found = observe(module, paths, replace(block, {"mlp/keep": keep}), stream, place)
            sums = found if sums is None else add(sums, found)
        return checked(sums, accept_short=False)

    def _round(self, path: str, kernel: Any, gram: Gram | None, notes: Notes) -> TernaryCode:
        check_array(self.name, path, kernel)
        stacked = kernel.ndim > 2
        w = kernel if stacked else kernel[None]
        w = w.reshape(-1, *w.shape[-2:])
        total = None if gram is None else gram.total.reshape(-1, w.shape[-2], w.shape[-2])
        symbols, ends, failed = [], [], 0
        for at in range(0, w.shape[0], self.together):
            some = slice(at, at + self.together)
            codes, fitted, nearest = _ternary(w[some], None if total is None else total[some], self.damp)
            symbols.append(np.asarray(codes, np.uint8))
            ends.append(fitted)
            failed += 0 if total is None else int(np.sum(nearest))
        if failed:
            notes.add(f"the Gram matrix of {failed} could not be factored: rounded to nearest", path)
        lead = kernel.shape[:-2]
        together = np.concatenate(symbols).reshape(kernel.shape)
        coded = TernaryCode.from_symbols(together, jnp.concatenate(ends).reshape(*lead, kernel.shape[-1], 2))
        zeros, bits = float(np.mean(together == 0)), coded.stored_bits() / kernel.size
        notes.add(f"{bits:.3f} bits a weight, {zeros:.1%} zeros", path)
        return coded


@functools.partial(jax.jit, static_argnums=2)
def _ternary(w: jax.Array, gram: jax.Array | None, damp: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w [E, in, out] -> symbols [E, in, out], ends bfloat16[E, out, 2], and whether each was rounded to nearest."""
    w, grid = w.astype(jnp.float32), Ternary()
    stored = jax.tree.map(lambda end: end.astype(jnp.bfloat16), fit(w, grid))
    fitted = jax.tree.map(lambda end: end.astype(jnp.float32), stored)
    if gram is None:
        rounded = round_to_nearest(w, grid, fitted=fitted)
    else:
        rounded = feed_back(w, gram, grid, fitted=fitted, damp=damp)
    return rounded.codes, _side_by_side(stored), rounded.nearest


def _side_by_side(ends: Ends) -> jax.Array:
    """Ends [E, 1, out] -> [E, out, 2]."""
    return jnp.stack([ends.low[:, 0], ends.high[:, 0]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Template:
    """A module, hidden from linen, which would make a submodule of it."""

    module: nn.Module


class Keeping(nn.Module):
    """An FFN for which tokens are padding where `keep` bool[B, T], beside its parameters, is False."""

    template: Template

    takes_context = True

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        segments = context.segments
        segments = jnp.ones(context.positions.shape, jnp.int32) if segments is None else segments
        kept = jnp.where(self.get_variable("params", "keep"), segments, 0)
        module = self.template.module.clone(parent=self.scope)
        return feed_forward(module, x, context.replace(segments=kept))
