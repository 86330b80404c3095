"""EoRA: a compressed layer stays as it is, and a low-rank path repairs its outputs (arXiv 2410.21271).

For a kernel W [in, out], its compressed W^, and C = X^T X / T of its inputs, C = V diag(l) V^T,

    S = V diag(sqrt l),   S^T (W - W^) = U diag(s) Y^T,   A = S^-T U_r sqrt(s_r),   B = sqrt(s_r) Y_r^T
    y = x W^ + (x A) B

is the rank-r correction of the least error |X (W - W^ - A B)|, by Eckart and Young: truncation drops what changes
outputs least. No gradient steps. The two baselines differ in S alone: the identity (plain SVD, ZeroQuant-V2), and
diag(sqrt(mean |x_j|)) ("Act-S").

Blocks in sequence: C comes from a block's original weights behind the blocks that are compensated already. Directions
of the inputs that never occurred are left out of C (a pseudo-inverse) and not clipped to a small eigenvalue, which
would make A huge there.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research.compression.blocks import SELECT, Notes, Walk, each, kernels_at, replace, selected
from research.compression.chain import PyTree, Subject
from research.errors import UserError
from research.nn.lowrank import Root, low_rank, root
from research.nn.packed import check_bits
from research.nn.quantized import quantize
from research.nn.weights import Kernel, LowRank, Sum, Weight, materialize
from research.training.observe import Gram

Space = Literal["eigen", "plain", "activation"]
_NAMES = {"eigen": "eora", "plain": "svd", "activation": "act_s"}


@dataclasses.dataclass(frozen=True)
class EoRA:
    """Beside every structured kernel that `select` takes, a low-rank correction.

    Args:
        rank: r.
        space: where errors are truncated: the eigenspace of the inputs, plain SVD, or scaled by activations.
        factor_bits: round both factors to a grid of so many bits in groups of `factor_group` inputs; None: they are of
            `factor_dtype`.
        factor_group: None is a scale for each column of a factor.
        accept_short: also calibrate on fewer tokens than a kernel has inputs; directions that weren't seen stay as they
            are.
    """

    rank: int = 128
    space: Space = "eigen"
    factor_bits: int | None = None
    factor_group: int | None = None
    factor_dtype: str = "float16"
    accept_short: bool = False
    select: str = SELECT

    needs_compressed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.space not in _NAMES:
            raise UserError(f"space={self.space!r} is not one of {', '.join(_NAMES)}")
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: at least 1")
        if self.factor_bits is not None:
            check_bits(self.factor_bits)

    @property
    def name(self) -> str:
        return _NAMES[self.space]

    @property
    def needs_data(self) -> bool:
        return self.space != "plain"

    def compress(self, subject: Subject) -> tuple[PyTree, list[str]]:
        original, params, notes = subject.original, dict(subject.params), Notes()
        if not self.needs_data:
            paths = selected(params, self.select)
            return replace(params, self._corrections("", original, params, paths, {}, notes)), notes.lines()
        walk = Walk(subject.model, params, subject.batches, self.select)
        for _ in range(walk.layers):
            subject.tell(f"{self.name}: block {walk.index + 1} of {walk.layers}")
            name, block = walk.name, params[walk.name]
            paths = [
                path
                for path, kernel in kernels_at(block, walk.paths(block)).items()
                if isinstance(kernel, Weight)
            ]
            grams = walk.grams(original[name], paths, self.accept_short)
            params[name] = replace(
                block, self._corrections(f"{name}/", original[name], block, paths, grams, notes)
            )
            walk.advance(params[name])
        return params, notes.lines()

    def _corrections(
        self,
        prefix: str,
        original: PyTree,
        params: PyTree,
        paths: Sequence[str],
        grams: dict[str, Gram],
        notes: Notes,
    ) -> dict[str, Kernel]:
        """{path: the compressed kernel plus its correction} of the structured kernels among `paths`."""
        found, roots = {}, {}
        wanted = kernels_at(original, paths)
        for path, kernel in kernels_at(params, paths).items():
            if not isinstance(kernel, Weight):
                continue
            gram = grams.get(path)
            if id(gram) not in roots:  # kernels of the same inputs are decomposed once
                roots[id(gram)] = self._weights(prefix + path, gram, notes)
            residual = np.asarray(wanted[path], np.float64) - np.asarray(materialize(kernel), np.float64)
            terms = kernel.terms if isinstance(kernel, Sum) else (kernel,)
            try:
                found[path] = Sum((*terms, self.fit(residual, roots[id(gram)])))
            except UserError as error:
                raise UserError(f"{prefix}{path}: {error}") from None
        return found

    def _weights(self, path: str, gram: Gram | None, notes: Notes) -> list[Root | np.ndarray | None]:
        """S of every matrix of a stack, None where there is none or where an expert saw no token."""
        if gram is None:
            return [None]
        means, counts = gram.mean().reshape(-1, gram.width, gram.width), gram.count.reshape(-1)
        if unseen := int((counts == 0).sum()):
            notes.add(f"{unseen} of {len(counts)} experts saw no token: corrected by plain SVD", path)
        if self.space == "activation":
            sizes = gram.magnitude.reshape(-1, gram.width) / np.maximum(counts, 1)[:, None]
            return [
                np.sqrt(size.astype(np.float64)) if n else None for size, n in zip(sizes, counts, strict=True)
            ]
        found = [root(mean) if n else None for mean, n in zip(means, counts, strict=True)]
        if any(own is not None and own.unseen for own in found):
            notes.add(
                "the Gram matrix is singular to float32: directions of no inputs stay uncorrected", path
            )
        return found

    def fit(self, residual: np.ndarray, spaces: Sequence[Root | np.ndarray | None]) -> LowRank:
        """residual float64[..., in, out] -> its correction, by one S for each matrix of the stack or for all."""
        count = int(np.prod(residual.shape[:-2], dtype=int))
        remaining = iter(list(spaces) * (count if len(spaces) == 1 else 1))

        def one(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            fit = low_rank(matrix, self.rank, next(remaining))
            return fit.down, fit.up

        down, up = (jnp.asarray(part, jnp.float32) for part in each(one, residual))
        if self.factor_bits is not None:
            return LowRank(*(_rounded(part, self.factor_bits, self.factor_group) for part in (down, up)))
        down, up = (part.astype(self.factor_dtype) for part in (down, up))
        if not (jnp.isfinite(down).all() and jnp.isfinite(up).all()):
            raise UserError(
                f"the correction overflows {self.factor_dtype}; factor_dtype takes bfloat16 or float32"
            )
        return LowRank(down, up)


def _rounded(factor: jax.Array, bits: int, group: int | None) -> Kernel:
    return quantize(factor, bits, group, symmetric=False, scale_dtype=jnp.float16)
