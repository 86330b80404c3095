"""Attention that chooses and over what was chosen in the catalogue: TidalDecode's layers in a small decoder."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.catalogue import Case, Cost, Kernel
from kernels_pallas.chosen_attention.api import listed_attention, select_attention
from kernels_pallas.tree_attention import entry


def cost_select(case: Case) -> Cost:
    s, plain = case.sizes, entry.cost(case)
    return plain._replace(bytes=plain.bytes + 4 * s["batch"] * s["heads"] * s["count"] * case.options["k"])


def make_listed(key: jax.Array, *, k: int, **sizes) -> tuple:
    """Every query head's own k slots of a full cache, ascending."""
    query, cached, fresh, *_ = entry.make(key, **sizes)
    places = jax.random.uniform(key, (*query.shape[:3], sizes["slots"]))
    choice = jnp.sort(jnp.argsort(places, axis=-1)[..., :k], axis=-1)
    return query, cached, fresh, choice.astype(jnp.int32)


def cost_listed(case: Case) -> Cost:
    s = case.sizes
    rows = s["batch"] * s["heads"] * s["count"]
    # A key and a value of every entry; the query, the result, the token's own key and value.
    return Cost(4 * rows * (s["k"] + 1) * s["dim"], 4 * rows * ((2 * s["k"] + 4) * s["dim"] + s["k"]))


def _case(name: str, kind: str, slots: int, k: int, **sizes: int) -> tuple[Case, Case]:
    """Of both kernels."""
    sizes = dict(batch=1, heads=4, kv_heads=4, count=1, slots=slots, dim=32, dtype="float32") | sizes
    return Case(name, kind, sizes, dict(k=k)), Case(name, kind, sizes | dict(k=k))


_LONG = _case("256 of 131072 slots, 4 heads", "decode", 131072, 256)
_SHORT = _case("256 of 4096 slots, 4 heads", "decode", 4096, 256)
_SMALL = _case("8 of 100 slots, 3 nodes", "small", 100, 8, batch=2, kv_heads=2, count=3)

KERNEL = (
    Kernel(
        "select_attention",
        select_attention,
        functools.partial(select_attention, implementation="reference"),
        entry.make,
        cost_select,
        cases=(_LONG[0], _SHORT[0]),
        small=_SMALL[0],
        implementations=("cpu",),
    ),
    Kernel(
        "listed_attention",
        listed_attention,
        functools.partial(listed_attention, implementation="reference"),
        make_listed,
        cost_listed,
        cases=(_LONG[1], _SHORT[1]),
        small=_SMALL[1],
        implementations=("cpu",),
    ),
)
