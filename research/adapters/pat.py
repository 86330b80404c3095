"""PAT: pruning-aware tuning. LoRA, and a mask over the residual stream's channels that is learnt with it (arXiv
2408.14721).

After the embedding, every attention output and every FFN output z [D] stands the hybrid sparsification module

    H(z) = M * (D z),     D = I + L1 diag(v) L0        L0 [r, D], L1 [D, r], v [r] = 0 at the beginning

with one mask M [D] for the whole model, of a proxy w [D], 0 at the beginning, at step s of s0 (equations 2 to 4):

    M = sigmoid(tau w) + beta      tau = 1 / (1 - ln s / ln s0),   beta = max(1/2 - s / s0, 0)      M = 1 at s = 0
    M = 1[w > 0]                   from s0 on

so that the channels of the stream that are pruned are 0 in every layer, norms keep them 0, and the model with them cut
out computes the same: D and M are folded into the kernels before them, every other kernel loses rows, RMSNorm's gain is
multiplied by sqrt(D / D') and its epsilon by D / D'. A tied head is untied, since D joins the embedding only.

    loss + L_active + L_identity
    L_identity = sum over the modules of |L0 L0^T - I| + |L1^T L1 - I|
    L_active = 10 |sum STE(1[w >= 0]) - N| / N + mean_{w > 0} (w - 1/2)^2 + mean_{w <= 0} (w + 1/2)^2

The paper's L_active, |N - sum 1[w > 0]|, has no gradient; this is its code's, with a straight-through estimate. L0
and L1 begin orthonormal: the paper's L1 = 0 contradicts its L_identity, and v = 0 makes D = I already.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.adapters.lora import LoRA, adapted, flat, tree, with_dropout
from research.errors import UserError
from research.nn import weights
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import RMSNorm
from research.nn.transformer import LayerStack
from research.nn.weights import Weight, Wrapped, materialize

PyTree = Any

WRITERS = ("attention/output", "mlp/down")
READERS = ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up", "head")
NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "final_norm")
EMBEDDING = "embedding/table"


class Mixing(struct.PyTreeNode):
    """L0^T = down [.., D, r], v = middle [.., r], L1^T = up [.., r, D] of one module."""

    down: jax.Array
    middle: jax.Array
    up: jax.Array

    def __call__(self, z: jax.Array) -> jax.Array:
        """z [.., D] -> D z."""
        low = weights.dot(z, self.down) * self.middle.astype(z.dtype)
        return z + weights.dot(low, self.up)


class Sifted(Wrapped):
    """The kernel of a projection whose output goes through H: `kernel`, then `mixing`, then `mask` [.., D]."""

    mixing: Mixing
    mask: jax.Array

    def dot(self, x: jax.Array) -> jax.Array:
        return self.mixing(weights.dot(x, self.kernel)) * self.mask.astype(x.dtype)

    def materialize(self) -> jax.Array:
        return sifted(materialize(self.kernel), self.mixing, self.mask)

    def narrow(self, inputs: int | None, outputs: int | None) -> "Sifted":
        if outputs is not None and outputs != self.shape[-1]:
            raise UserError("the outputs of a kernel with PAT's mask are mixed: merge it before they are cut")
        return self.replace(kernel=weights.narrow(self.kernel, inputs))


def sifted(rows: jax.Array, mixing: Mixing, mask: jax.Array) -> jax.Array:
    """H of every row [.., n, D] of a kernel or an embedding, in float32 throughout."""
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    mixed = rows + product(product(rows, mixing.down) * mixing.middle[..., None, :], mixing.up)
    return mixed * mask[..., None, :]


def mask_at(proxy: jax.Array, step: jax.Array, steps: int) -> jax.Array:
    """M of a proxy f32[D] after `step` updates of `steps` (s0)."""
    s = jnp.maximum(step, 1).astype(jnp.float32)
    heat = 1.0 - jnp.log(s) / math.log(max(steps, 2))
    beta = jnp.maximum(0.5 - step / steps, 0.0)
    soft = jax.nn.sigmoid(proxy / jnp.maximum(heat, 1e-3)) + beta
    return jnp.where(step >= steps, (proxy > 0).astype(jnp.float32), soft)


@dataclasses.dataclass(frozen=True)
class PAT(LoRA):
    """PAT as an adapter. Stages: one of `steps` updates that trains all of `adapter/`, then one without
    `adapter/proxy`.

    Args:
        keep: share of the channels that stay, D' / D.
        mixing_rank: r of the modules.
        steps: s0, updates until the mask is 0 or 1.
    """

    rank: int = 20
    alpha: float | None = 4.0
    dropout: float = 0.05
    keep: float = 0.75
    mixing_rank: int = 200
    steps: int = 10_000

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.keep <= 1.0:
            raise UserError(f"keep={self.keep}: a share of the channels in (0, 1] is expected")
        if self.mixing_rank < 1 or self.steps < 1:
            raise UserError(
                f"mixing_rank={self.mixing_rank}, steps={self.steps}: at least 1 of each is needed"
            )

    def target(self, width: int) -> int:
        """N, channels that stay of `width`."""
        return max(round(self.keep * width), 1)

    def create(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        self.model(model)
        fixed, lora = super().create(model, params, key)
        leaves = flat(params)
        width = leaves[EMBEDDING].shape[-1]
        if self.mixing_rank > width:
            raise UserError(f"mixing_rank={self.mixing_rank}: the stream has {width} channels")
        mixing = {}
        for number, path in enumerate([EMBEDDING, *_writers(leaves)]):
            lead = leaves[path].shape[:-2]
            mixing[path] = _orthonormal(
                jax.random.fold_in(key, 7919 + number), (*lead, width, self.mixing_rank)
            )
        fixed["step"] = jnp.zeros((), jnp.int32)
        return fixed, {"lora": lora, "mixing": tree(mixing), "proxy": jnp.zeros((width,), jnp.float32)}

    def frozen(self, params: PyTree, fixed: PyTree) -> PyTree:
        base = super().frozen(params, fixed)
        return base if "head" in base else {**base, "head": {"kernel": base["embedding"]["table"].T}}

    def draw(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self.create(model, params, key)

    def check(self, model: nn.Module, params: PyTree, adapter: PyTree) -> None:
        super().check(model, params, adapter["lora"])
        width = params["embedding"]["table"].shape[-1]
        if adapter["proxy"].shape != (width,):
            found = adapter["proxy"].shape[0]
            raise UserError(
                f"the adapter does not fit the base: its mask has {found} channels, the base {width}"
            )

    def model(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, LayerStack) or not hasattr(model, "tied_head"):
            raise UserError(
                f"PAT prunes the residual stream of a decoder, and this is a {type(model).__name__}"
            )
        for block in model.blocks:
            biased = getattr(block.attention, "output_bias", None)
            if type(block.mlp) not in (MLP, GatedMLP) or biased is None:
                raise UserError(
                    f"PAT stands behind attention and MLP or GatedMLP; there is {type(block.attention).__name__} with "
                    f"{type(block.mlp).__name__}"
                )
            if biased or block.mlp.use_bias:
                raise UserError(
                    "PAT needs outputs of attention and FFN without biases, which the mask would not zero"
                )
            for norm in (block.norm, model.final_norm):
                if type(norm) is not RMSNorm or norm.groups != 1:
                    raise UserError(f"PAT needs RMSNorm, which keeps zeros; there is {type(norm).__name__}")
        return model.clone(tied_head=False)

    def assemble(self, params: PyTree, key: jax.Array | None) -> PyTree:
        adapter, fixed = params["adapter"], params["fixed"]
        terms = flat(adapter["lora"])
        if key is not None and self.dropout:
            terms = with_dropout(terms, self.dropout, key)
        kernels = {**flat(params["base"]), **flat(fixed.get("kernel", {}))}
        leaves = flat(adapted(kernels, terms))
        mask = mask_at(adapter["proxy"], fixed["step"], self.steps)
        for path, mixing in mixings(adapter["mixing"]).items():
            own = jnp.broadcast_to(mask, (*leaves[path].shape[:-2], *mask.shape))
            put = sifted if path == EMBEDDING else Sifted
            leaves[path] = put(leaves[path], mixing, own)
        return tree(leaves)

    def losses(self, params: PyTree) -> dict[str, jax.Array]:
        proxy = params["adapter"]["proxy"]
        done = params["fixed"]["step"] >= self.steps
        proxy = jnp.where(done, jax.lax.stop_gradient(proxy), proxy)
        identity = sum(
            _from_identity(mixing.down.swapaxes(-1, -2)) + _from_identity(mixing.up)
            for mixing in mixings(params["adapter"]["mixing"]).values()
        )
        return {"active": active_loss(proxy, self.target(proxy.shape[0])), "identity": identity}

    def remember(self, params: PyTree) -> PyTree:
        step = params["fixed"]["step"] + 1
        return {**params, "fixed": {**params["fixed"], "step": step}}

    def unpack(self, params: PyTree) -> PyTree:
        """Mask and mixing multiplied out, at full width."""
        leaves = flat(self.assemble(params, None))
        return tree(
            {path: leaf.materialize() if isinstance(leaf, Sifted) else leaf for path, leaf in leaves.items()}
        )

    def merge(self, model: nn.Module, params: PyTree) -> tuple[nn.Module, PyTree, str]:
        step = int(params["fixed"]["step"])
        if step < self.steps:
            raise UserError(
                f"the mask is not yet 0 or 1 after {step} of {self.steps} steps: train on, then merge"
            )
        kept = np.flatnonzero(np.asarray(params["adapter"]["proxy"]) > 0)
        width = params["adapter"]["proxy"].shape[0]
        if not len(kept):
            raise UserError(
                "the mask keeps no channel: train longer, or give the proxy a smaller learning rate"
            )
        leaves = flat(jax.jit(self.unpack)(params))
        plain = {
            path: materialize(leaf) if isinstance(leaf, Weight) else leaf for path, leaf in leaves.items()
        }
        cut = {path: cut_channels(path, leaf, kept, model) for path, leaf in plain.items()}
        small = self._smaller(self.model(model), width, len(kept))
        return small, tree(cut), f"{len(kept)} of {width} channels kept, {self.target(width)} asked for"

    def _smaller(self, model: nn.Module, width: int, kept: int) -> nn.Module:
        def norm(module: nn.Module) -> nn.Module:
            return module.clone(epsilon=module.epsilon * width / kept, parent=None)

        blocks = tuple(block.clone(norm=norm(block.norm), parent=None) for block in model.blocks)
        return model.clone(width=kept, blocks=blocks, final_norm=norm(model.final_norm))


def cut_channels(path: str, leaf: jax.Array, kept: np.ndarray, model: nn.Module) -> jax.Array:
    """A parameter of the full width D -> of the channels `kept` (D'), whose other channels are 0 in the stream."""
    module = path.rpartition("/")[0]
    if path == EMBEDDING or module.endswith(WRITERS):
        return leaf[..., kept]
    if module.endswith(READERS) and path.endswith("/kernel"):
        return leaf[..., kept, :]
    if module.endswith(NORMS):
        norm = model.final_norm if module == "final_norm" else model.blocks[0].norm
        offset = 1.0 if norm.unit_offset else 0.0
        # The mean over D channels is D' / D times that over D', so the small norm divides by more.
        return (leaf[..., kept] + offset) * math.sqrt(leaf.shape[-1] / len(kept)) - offset
    return leaf


def active_loss(proxy: jax.Array, target: int) -> jax.Array:
    """L_active of a proxy f32[D] for N = `target` channels."""
    hard = (proxy >= 0).astype(jnp.float32)
    through = hard + proxy - jax.lax.stop_gradient(proxy)
    above, below = proxy > 0, proxy <= 0

    def mean(values: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)

    count = 10.0 * jnp.abs(jnp.sum(through) - target) / target
    return count + mean(jnp.square(proxy - 0.5), above) + mean(jnp.square(proxy + 0.5), below)


def _from_identity(rows: jax.Array) -> jax.Array:
    """Frobenius' norm of rows rows^T - I, of every matrix [.., r, D] of a stack, summed."""
    gram = jnp.matmul(rows, rows.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(jnp.square(gram - jnp.eye(rows.shape[-2])), axis=(-2, -1))
    return jnp.sum(jnp.sqrt(squares + 1e-12))


def mixings(leaves: PyTree) -> dict[str, Mixing]:
    """{path: its module} of a tree that holds each as {"down", "middle", "up"}."""
    found: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in flat(leaves).items():
        found.setdefault(path.rpartition("/")[0], {})[path.rpartition("/")[2]] = leaf
    return {path: Mixing(**parts) for path, parts in found.items()}


def _orthonormal(key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """`Mixing` with L0 and L1 of orthonormal rows and columns, and v = 0."""
    keys = jax.random.split(key)
    draw = jax.nn.initializers.orthogonal()
    lead = shape[:-2]
    down, up = (
        jnp.stack([draw(jax.random.fold_in(k, i), shape[-2:]) for i in range(math.prod(lead))]).reshape(shape)
        for k in keys
    )
    return {"down": down, "middle": jnp.zeros((*lead, shape[-1])), "up": up.swapaxes(-1, -2)}


def _writers(leaves: dict[str, Any]) -> list[str]:
    """The paths of the kernels whose outputs join the stream."""
    return [path for path in leaves if path.endswith("/kernel") and path.rpartition("/")[0].endswith(WRITERS)]
