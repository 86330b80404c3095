"""LLaVA-MoLE's sparse mixture of LoRA experts, on the MLPs of a decoder (arXiv 2401.16160); attention has a plain LoRA.

Of a frozen MLP, for a token with MLP input x:

    p = softmax(x W_r + b_r),  e = argmax p
    proj'(z) = z W + (alpha / r) (z A_e) B_e       for proj in {gate, up} with z = x, and down with z the hidden units

One router and one e for the projections of a block; the chosen expert is not multiplied by p_e, so the loss of the text
gives the router no gradient, and only the balance loss trains it. `routing="dense"` is the variant of the released
code, the sum over e of p_e times every expert, whose router does learn from the text.

Balance loss of a block, for every sequence over its valid tokens, then their mean:

    E_t[p] . E_t[onehot(e)], the second constant      1 / E where routing is uniform; weight 0.01, divided by the blocks

where the released code takes the mean tokens of all blocks together, which can hide one expert a block.

Sparse terms are computed in one of two ways with the same result: every expert's for every token, masked by e, or with
the tokens sorted by e at the entrance of the MLP, each by its own expert's factors. See `SORTED_FROM`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.common import target_platform
from research.adapters.lora import (
    LoRA,
    adapted,
    check_fit,
    check_rank,
    chosen_kernels,
    flat,
    keys_like,
    merge,
    tree,
    with_dropout,
)
from research.errors import UserError
from research.moe.dispatch import SortedDispatch
from research.moe.routing import Routing as Choices
from research.nn import weights
from research.nn.attention import Context
from research.nn.dropout import dropped
from research.nn.linear import Linear
from research.nn.mlp import MLP, GatedMLP
from research.nn.reports import report_loss, report_measurement
from research.nn.transformer import LayerStack
from research.nn.weights import Kernel, Spec, Wrapped, array_bits, stored_bits

PyTree = Any
Routing = Literal["sparse", "dense"]

SORTED_FROM = 128
"""E r from which tokens are sorted by experts. CPU time of an MLP with its terms, of that with masks: 1.0 to 1.1 at
E r = 96 (the paper's 3 experts of rank 32), 0.8 to 1.0 at 128, 0.6 to 0.8 at 256, 0.4 to 0.6 at 512; the less with
gradients. Measured on CPUs alone, so that accelerators, and meshes of several devices, have masks."""


class LoRAExperts(struct.PyTreeNode):
    """A frozen kernel and the low-rank terms of E experts: down [.., E, in, r], up [.., E, r, out].

    Which expert a token goes to its MLP decides: `routed` gives what multiplies. key, rate: of dropout on the inputs of
    the terms, while a step runs.
    """

    base: Kernel
    down: jax.Array
    up: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)
    key: jax.Array | None = struct.field(default=None, metadata={"saved": False})
    rate: float = struct.field(pytree_node=False, default=0.0, metadata={"saved": False})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def inputs(self, x: jax.Array) -> jax.Array:
        """What the terms multiply of x: in training, with dropout."""
        return x if self.key is None else dropped(x, self.rate, self.key)

    def routed(self, gates: jax.Array) -> "Routed":
        """gates [..., E], of every token."""
        return Routed(self, gates)

    def sorted(self, dispatch: SortedDispatch) -> "Sorted":
        """For rows that lie as `dispatch` has scattered them."""
        return Sorted(self, dispatch)

    def dot(self, x: jax.Array) -> jax.Array:
        raise UserError("a kernel of LoRA experts is multiplied by its MLP alone, which chooses the expert")

    def materialize(self) -> jax.Array:
        raise UserError("a kernel of LoRA experts is another one for every token: it can't be one array")

    def narrow(self, inputs: int | None, outputs: int | None) -> "LoRAExperts":
        base = weights.narrow(self.base, inputs, outputs)
        return self.replace(base=base, down=self.down[..., :inputs, :], up=self.up[..., :outputs])

    def expert(self, number: int) -> weights.Sum:
        """The kernel of a token that goes to this expert."""
        term = weights.LowRank(self.down[..., number, :, :], self.up[..., number, :, :], self.scale)
        return weights.Sum((self.base, term))

    @property
    def size(self) -> int:
        return self.base.size + self.down.size + self.up.size

    def stored_bits(self) -> int:
        return stored_bits(self.base) + array_bits(self.down) + array_bits(self.up)

    def leaf_specs(self, spec: Spec) -> list[Spec]:
        lead, outputs = spec[:-2], spec[-1]
        inputs = spec[-2] if len(spec) > 1 else None
        base = self.base.leaf_specs(spec) if isinstance(self.base, weights.StoredWeight) else [spec]
        return [*base, (*lead, None, inputs, None), (*lead, None, None, outputs)]


class _Running(Wrapped):
    """Base of what `LoRAExperts` are while the model runs."""

    kernel: LoRAExperts

    def materialize(self) -> jax.Array:
        return self.kernel.materialize()

    def narrow(self, inputs: int | None, outputs: int | None) -> "_Running":
        return self.replace(kernel=self.kernel.narrow(inputs, outputs))


class Routed(_Running):
    """`LoRAExperts` with the gates [..., E] of the tokens that are multiplied; it lives while the model runs.

    All experts' A are one product, and so are all B.
    """

    gates: jax.Array

    def dot(self, x: jax.Array) -> jax.Array:
        own = self.kernel
        z, down, up = own.inputs(x), own.down.astype(x.dtype), own.up.astype(x.dtype)
        low = jnp.einsum("...d,edr->...er", z, down, preferred_element_type=jnp.float32)
        low = (low * self.gates[..., None] * own.scale).astype(x.dtype)
        term = jnp.einsum("...er,ero->...o", low, up, preferred_element_type=jnp.float32)
        return term.astype(x.dtype) + weights.dot(x, own.base)


class Sorted(_Running):
    """`LoRAExperts` for rows [S, in] that are sorted by their experts; it lives while the model runs."""

    dispatch: SortedDispatch

    def dot(self, x: jax.Array) -> jax.Array:
        own, dispatch = self.kernel, self.dispatch
        low = dispatch.dot(own.inputs(x), own.down) * jnp.asarray(own.scale, x.dtype)
        return dispatch.dot(low, own.up) + weights.dot(x, own.base)


class MixtureOfLoRA(nn.Module):
    """An MLP whose kernels are `LoRAExperts`, with a router of `num_experts`.

    balance: weight of the balance loss of this block. Parameters: base/..., those of `base`, and router/{kernel, bias}.
    """

    base: nn.Module
    num_experts: int
    routing: Routing = "sparse"
    balance: float = 0.0

    takes_context = True

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        router = Linear(self.num_experts, use_bias=True, name="router")
        logits = router(x.astype(jnp.float32))
        p = jax.nn.softmax(logits, axis=-1)
        expert = jnp.argmax(p, axis=-1)
        chosen = jax.nn.one_hot(expert, self.num_experts)
        self._report(p, chosen, context)
        if self.routing == "sparse" and self._sorts():
            index = expert.reshape(-1, 1)
            scores, every = (y.reshape(-1, self.num_experts) for y in (logits, p))
            choices = Choices(scores, every, index, jnp.ones(index.shape), jnp.ones(len(index), bool))
            dispatch = SortedDispatch.make(choices)
            rows = self._run(
                lambda kernel: kernel.sorted(dispatch), dispatch.scatter(x.reshape(-1, x.shape[-1]))
            )
            return dispatch.gather_slots(rows).reshape(*x.shape[:-1], -1)
        gates = chosen if self.routing == "sparse" else p
        return self._run(lambda kernel: kernel.routed(gates), x)

    def _run(self, give: Callable[[LoRAExperts], Kernel], x: jax.Array) -> jax.Array:
        """The MLP, with what `give` makes of its kernels of experts."""

        def given(variables: PyTree) -> PyTree:
            ours = lambda node: isinstance(node, LoRAExperts)  # noqa: E731
            return jax.tree.map(lambda leaf: give(leaf) if ours(leaf) else leaf, variables, is_leaf=ours)

        run = nn.map_variables(
            lambda module, x: module(x), "params", trans_in_fn=given, init=self.is_initializing()
        )
        return run(self.base, x)

    def _sorts(self) -> bool:
        """Whether there is one CPU, and the factors of all experts together are thick enough."""
        several = math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1
        if target_platform() != "cpu" or several:
            return False
        base = self.variables.get("params", {}).get("base", {})
        leaves = jax.tree.leaves(base, is_leaf=lambda node: isinstance(node, LoRAExperts))
        ranks = [leaf.down.shape[-1] for leaf in leaves if isinstance(leaf, LoRAExperts)]
        return self.num_experts * max(ranks, default=0) >= SORTED_FROM

    def _report(self, p: jax.Array, chosen: jax.Array, context: Context) -> None:
        shape = context.positions.shape
        p, chosen = (y.reshape(*shape, self.num_experts) for y in (p, chosen))
        valid = jnp.ones(shape) if context.segments is None else (context.segments > 0).astype(jnp.float32)
        tokens = jnp.maximum(jnp.sum(valid, axis=1), 1.0)[:, None]
        mean_p, share = (jnp.einsum("bte,bt->be", y, valid) / tokens for y in (p, chosen))
        rows = jnp.maximum(jnp.sum(jnp.any(valid > 0, axis=1)), 1)
        loss = jnp.sum(mean_p * jax.lax.stop_gradient(share)) / rows
        if self.balance:
            report_loss(self, "balance", self.balance * loss)
        report_measurement(self, "load", jnp.einsum("bte,bt->e", chosen, valid), jnp.sum(valid))


@dataclasses.dataclass(frozen=True)
class MoLE(LoRA):
    """The mixture as an adapter: LoRA experts on the MLPs among `targets`, plain LoRA on the rest.

    Args:
        num_experts: E.
        routing: "sparse" is the paper's; "dense" sums over all experts, by p.
        balance: weight of the mean of the blocks' balance losses.
    """

    rank: int = 32
    alpha: float | None = 64.0
    dropout: float = 0.05
    num_experts: int = 3
    routing: Routing = "sparse"
    balance: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts < 1:
            raise UserError(f"num_experts={self.num_experts}: a mixture has at least one")

    def create(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        self.model(model)
        kernels = chosen_kernels(params, self.targets)
        check_rank(self.rank, kernels)
        fixed = {path: self.rounded(path, kernel) for path, kernel in kernels.items()}
        adapter: dict[str, Any] = {}
        routers = {}
        for number, (path, kernel) in enumerate(kernels.items()):
            if "mlp" not in path.split("/"):
                adapter[path] = self.drawn(kernel, number, key)
                continue
            draws = [
                self.drawn(kernel, number * self.num_experts + i, jax.random.fold_in(key, 1))
                for i in range(self.num_experts)
            ]
            axis = len(kernel.shape) - 2
            adapter[f"{path}/experts_down"] = jnp.stack([draw.down for draw in draws], axis)
            adapter[f"{path}/experts_up"] = jnp.stack([draw.up for draw in draws], axis)
            mlp, module = path.rsplit("/", 2)[0], path.rsplit("/", 2)[1]
            if module != "down":
                routers[mlp] = kernel.shape[:-1]
        for number, (mlp, shape) in enumerate(routers.items()):
            # Drawn, not 0: of equal logits every token would go to expert 0.
            own = jax.random.fold_in(jax.random.fold_in(key, 2), number)
            adapter[f"{mlp}/router/kernel"] = 0.02 * jax.random.normal(own, (*shape, self.num_experts))
            adapter[f"{mlp}/router/bias"] = jnp.zeros((*shape[:-1], self.num_experts))
        rounded = {path: kernel for path, kernel in fixed.items() if kernel is not None}
        return ({"kernel": tree(rounded)} if rounded else {}), tree(adapter)

    def draw(self, model: nn.Module, params: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self.create(model, params, key)

    def check(self, model: nn.Module, params: PyTree, adapter: PyTree) -> None:
        plain, experts, routers = self._parts(adapter)
        check_fit(params, plain)
        kernels = flat(params)
        for path, parts in experts.items():
            shape = (*kernels[path].shape[:-1], self.rank) if path in kernels else None
            found = parts["experts_down"].shape
            if shape is None or (*found[:-3], *found[-2:]) != tuple(shape):
                raise UserError(
                    f"the adapter does not fit the base: {path} is {shape} there and {found} in the adapter"
                )

    def model(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, LayerStack):
            raise UserError(
                f"a {type(model).__name__} is no stack of blocks, so it has no MLPs to mix experts into"
            )
        weight = self.balance / model.num_layers

        def mixed(mlp: nn.Module) -> nn.Module:
            if type(mlp) not in (MLP, GatedMLP):
                raise UserError(f"LoRA experts stand in MLP or GatedMLP, not in {type(mlp).__name__}")
            base = mlp.clone(parent=None, name=None)
            return MixtureOfLoRA(base, self.num_experts, self.routing, weight, parent=None)

        return model.clone(blocks=tuple(block.clone(mlp=mixed(block.mlp)) for block in model.blocks))

    def assemble(self, params: PyTree, key: jax.Array | None) -> PyTree:
        plain, experts, routers = self._parts(params["adapter"])
        kernels = {**flat(params["base"]), **flat(params["fixed"].get("kernel", {}))}
        if key is not None and self.dropout:
            key, own = jax.random.split(key)
            plain = with_dropout(plain, self.dropout, own)
        leaves = flat(adapted(kernels, plain))
        for number, (path, parts) in enumerate(experts.items()):
            experts_ = LoRAExperts(leaves[path], parts["experts_down"], parts["experts_up"], self.scale)
            if key is not None and self.dropout:
                experts_ = experts_.replace(key=keys_like(key, number, experts_.shape), rate=self.dropout)
            leaves[path] = experts_
        moved = {path.replace("/mlp/", "/mlp/base/"): leaf for path, leaf in leaves.items()}
        return tree({**moved, **routers})

    def merge(self, model: nn.Module, params: PyTree) -> tuple[nn.Module, PyTree, str]:
        if self.num_experts > 1:
            raise UserError(
                "a mixture of LoRA experts can't be merged: which expert is added depends on the token"
            )
        terms, experts, _ = self._parts(params["adapter"])
        for path, parts in experts.items():
            down, up = (parts[f"experts_{name}"][..., 0, :, :] for name in ("down", "up"))
            terms[path] = weights.LowRank(down, up, self.scale)
        kernels = {**flat(params["base"]), **flat(params["fixed"].get("kernel", {}))}
        return model, *merge(adapted(kernels, terms))

    def _parts(
        self, adapter: PyTree
    ) -> tuple[dict[str, Kernel], dict[str, dict[str, jax.Array]], dict[str, jax.Array]]:
        """The plain terms, {path: down and up} of the experts, and the routers."""
        plain, experts, routers = {}, {}, {}
        for path, leaf in flat(adapter).items():
            if "/router/" in path:
                routers[path] = leaf
            elif isinstance(leaf, jax.Array) or not hasattr(leaf, "dot"):
                experts.setdefault(path.rpartition("/")[0], {})[path.rpartition("/")[2]] = leaf
            else:
                plain[path] = leaf
        return plain, experts, routers
