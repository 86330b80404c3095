"""A trained model made ready to decode: unrolled layers, fused projections, one dtype, kernels in panels."""

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform
from kernels_pallas.skinny_matmul import Unsupported, panel_columns
from research.errors import UserError
from research.nn.accounting import count_parameters
from research.nn.fuse import fuse_projections
from research.nn.panels import to_panels
from research.nn.transformer import LayerStack, unscan_layers
from research.nn.weights import Weight

# Measured on two cores: at 40M parameters fused projections are 1.16 times as fast, at 1M 0.86 times.
_FUSE_FROM = 10_000_000


def prepare(model: LayerStack, params: Any, dtype: str = "float32") -> tuple[LayerStack, Any]:
    """The same model and its parameters in the form that decodes fastest; same logits up to rounding.

    Arrays of floats are cast to `dtype`; structured weights keep the precision they were given. On one CPU, in float32,
    large kernels are laid out in panels (`research.nn.panels`; the environment's LATHE_PRODUCTS=xla leaves them).

    Raises UserError for another value of LATHE_PRODUCTS.
    """
    model, params = unscan_layers(model, params)

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Weight) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, dtype)

    params = jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, Weight))
    if target_platform() != "cpu":
        return model, params
    panels = dtype == "float32" and _products() == "panels" and _on_one_device(params)
    if panels or count_parameters(params) >= _FUSE_FROM:
        params = fuse_projections(params)
    return model, to_panels(params) if panels else params


def _products() -> str:
    """What multiplies on a CPU, as the environment's LATHE_PRODUCTS says."""
    choice = os.environ.get("LATHE_PRODUCTS", "panels")
    if choice not in ("panels", "xla"):
        raise UserError(f"LATHE_PRODUCTS={choice}: expected panels or xla")
    if choice == "panels":
        try:
            panel_columns()
        except Unsupported as error:
            warnings.warn(f"decoding with XLA's own products, which are slower: {error}", stacklevel=3)
            return "xla"
    return choice


def _on_one_device(params: Any) -> bool:
    return all(leaf.sharding.num_devices == 1 for leaf in jax.tree.leaves(params))
