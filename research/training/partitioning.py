"""Sharding by rule: path patterns to partition specs over the mesh axes.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer divided, gathered for use),
`tensor` (matrices cut across their products), `expert` (experts), `seq` (positions). A batch is divided over
`data`, `fsdp` and `expert` together. See docs/sharding.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.errors import UserError, nearest
from research.nn.weights import StoredWeight
from research.training.paths import first_match, map_named, named_leaves, path_of

PyTree = Any
Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[Axis, ...]]]

AXES = ("data", "fsdp", "tensor", "expert", "seq")
BATCH_AXES = ("data", "fsdp", "expert")
REPLICATE_BELOW = 2**16

# (pattern, spec). A spec names the axes of a leaf's *last* dimensions, so that it also fits scanned models
# and stacks of experts; leading dimensions are not divided. The first rule found in a path counts.
DEFAULT_RULES: Rules = (
    # Thin factors of adapters that are no low-rank kernels of their own: of LoRA experts, of a mask's mixing.
    (r"^adapter/(mixing/|.*/experts_(down|up)$)", ()),
    # The experts of all layers in one store (research.moe.placement), divided among the nodes and in them.
    (r"(^|/)store/experts/(gate|up)/kernel$", (("fsdp", "expert"), None, "tensor")),
    (r"(^|/)store/experts/down/kernel$", (("fsdp", "expert"), "tensor", None)),
    (r"(^|/)store/experts/\w+/bias$", (("fsdp", "expert"), None)),
    (r"^placement/", ()),
    (r"(^|/)experts/(query|gate|up)/kernel$", ("expert", "fsdp", "tensor")),
    (r"(^|/)experts/(output|down)/kernel$", ("expert", "tensor", "fsdp")),
    (r"(^|/)experts/\w+/bias$", ("expert", None)),
    (r"(^|/)router/kernel$", ("fsdp", None)),
    # Heads of a few numbers: their outputs are not divided.
    (r"(^drafter/head|(^|/)(image|text)_predictor)/output/kernel$", ("fsdp", None)),
    (r"^\w+/head/out/kernel$", ("fsdp", None)),
    (r"^drafter/head/block_\d+/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(image|text)_predictor/\w+/kernel$", ("fsdp", "tensor")),
    (r"^projector$", ("fsdp", "tensor")),
    (r"^\w+/tokenizer/projection/kernel$", (None, "fsdp")),  # as many rows as a patch has numbers
    # Of state-space mixers: step sizes a head, and parts of unlike sizes in one product.
    (r"(^|/)attention/(dt|input)/kernel$", ("fsdp", None)),
    (r"(^|/)(query|key|value|gate|up|head|projection)/kernel", ("fsdp", "tensor")),
    (r"(^|/)(output|down)/kernel", ("tensor", "fsdp")),
    (r"^drafter/head_\d+/\w+/layer_\d+/kernel$", ("fsdp", "tensor")),  # blocks of drafted heads
    # Rows only: a lookup in a table of divided rows sums masked parts, while a divided width would have to
    # change into a divided batch, for which XLA copies the whole activation to every device.
    (r"(^|/)embedding/table", (("tensor", "fsdp"), None)),
    # As many rows as positions, often an odd number: only the width is divided.
    (r"(^|/)\w+/positions$", (None, "fsdp")),
    (r"^connector/mix/kernel$", ()),  # over tokens, of which there are as many as there are
    # What stands between a tower and a decoder, and tables of its learned rows.
    (r"^(teacher/)?(tower|connector|align|hooks_\d+)/(.*/)?\w+/kernel$", ("fsdp", "tensor")),
    (r"^connector/((pool|ladder)/)?(queries|prompt|columns_\d+)$", ()),
    (r"(^|/)(scale|bias|class_token)$", ()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `AXES` of the devices (all of the run's, if not given), see `axis_sizes`.

    Of several TPU slices, which a slower network connects, each holds an equal part of `data`, or of `fsdp` where
    `data` is no multiple of their number. Raises `UserError` if neither is, or for sizes that do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = axis_sizes(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(tuple(shape.values()), devices=devices), AXES)
    across = next((name for name in ("data", "fsdp") if shape[name] % slices == 0), None)
    if across is None:
        raise UserError(
            f"mesh: {slices} slices lie along data or fsdp, of which neither data={shape['data']} nor "
            f"fsdp={shape['fsdp']} is a multiple"
        )
    between = tuple(slices if name == across else 1 for name in AXES)
    within = tuple(size // outer for size, outer in zip(shape.values(), between, strict=True))
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices=devices), AXES)


def axis_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of each of `AXES` on `count` devices. One of `sizes` may be -1 (what is left), absent ones are 1.

    Without any -1 and without `data`, `data` takes what is left. Raises `UserError` if the sizes do not multiply to the
    number of devices.
    """
    for name, size in sizes.items():
        if name not in AXES:
            close = nearest(name, AXES)
            raise UserError(
                f"mesh: unknown axis {name!r}; {f'did you mean {close!r}?' if close else f'axes: {AXES}'}"
            )
        if size < 1 and size != -1:
            raise UserError(f"mesh: axis {name!r} has size {size}; give at least 1, or -1 for what is left")
    shape = {name: sizes.get(name, 1) for name in AXES}
    if "data" not in sizes and -1 not in sizes.values():
        shape["data"] = -1
    open_axes = [name for name, size in shape.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(open_axes)}")
    known = math.prod(size for size in shape.values() if size != -1)
    if open_axes and count % known == 0:
        shape[open_axes[0]] = count // known
    if math.prod(shape.values()) != count:
        text = ", ".join(f"{name}={size}" for name, size in shape.items() if size != 1)
        raise UserError(f"mesh: {text} does not divide {count} devices")
    return shape


def parameter_shardings(
    params: PyTree, mesh: Mesh, rules: Rules = (), *, replicate_below: int = REPLICATE_BELOW
) -> PyTree:
    """The tree of `NamedSharding`s of `params` (shapes suffice).

    The run's own `rules` are tried before `DEFAULT_RULES`. A structured weight is divided like the kernel whose place
    it takes: a rule for that path says how, and its codes, factors and scales follow; a dimension of scales that the
    axes do not divide is not divided. Raises `UserError` if one of `rules` matches no
    parameter, if no rule matches a leaf of at least `replicate_below` elements (smaller ones are replicated),
    or if a spec does not fit a leaf: too many entries, an unknown axis, a dimension that is not divisible.
    """
    leaves = named_leaves(params)
    paths = list(leaves)
    first_match(paths, [pattern for pattern, _ in rules], "rules")
    everything = [*rules, *DEFAULT_RULES]
    # The defaults cover several families of models, so not each of them must match.
    patterns = [pattern for pattern, _ in everything]
    found = first_match(paths, patterns, "rules", strict=False)
    of_kernels = _of_kernels(params, everything, mesh)
    shardings = []
    for (path, leaf), index in zip(leaves.items(), found, strict=True):
        kernel, spec = of_kernels.get(path, (None, ()))
        if kernel is not None and (index is None or kernel <= index):
            spec = _fit(path, leaf.shape, spec, mesh)
        elif index is not None:
            spec = _fit(path, leaf.shape, everything[index][1], mesh)
        elif math.prod(leaf.shape) < replicate_below:
            spec = PartitionSpec()
        else:
            raise UserError(
                f"rules: no rule matches {path} of shape {tuple(leaf.shape)}; add ({path!r}, spec) to rules, "
                f"with () as the spec to replicate it"
            )
        shardings.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def _of_kernels(params: PyTree, rules: Rules, mesh: Mesh) -> dict[str, tuple[int, tuple[Axis, ...]]]:
    """{path of a leaf: (number of the rule of its kernel, spec)} of the leaves of structured weights."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, StoredWeight))
    kernels = {path_of(keys): node for keys, node in nodes if isinstance(node, StoredWeight)}
    found = first_match(list(kernels), [pattern for pattern, _ in rules], "rules", strict=False)
    specs = {}
    for (path, kernel), index in zip(kernels.items(), found, strict=True):
        if index is None:
            continue
        spec = tuple(rules[index][1])
        leaves = named_leaves(kernel)
        divided = kernel.leaf_specs(spec) if spec else [()] * len(leaves)
        most = max(math.prod(leaf.shape) for leaf in leaves.values())
        for (name, leaf), own in zip(leaves.items(), divided, strict=True):
            if math.prod(leaf.shape) < most:
                own = _without_odd(leaf.shape, kernel.shape, own, mesh)
            specs[f"{path}/{name}"] = index, own
    return specs


def _without_odd(
    shape: tuple[int, ...], kernel: tuple[int, ...], spec: tuple[Axis, ...], mesh: Mesh
) -> tuple[Axis, ...]:
    """The spec of scales, with None for what a kernel has more of than they and the axes do not divide."""

    def keeps(size: int, whole: int, axis: Axis) -> bool:
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        return size == whole or size % math.prod(mesh.shape.get(name, 1) for name in names) == 0

    count = len(spec)
    if len(shape) != len(kernel) or count > len(shape):
        return spec
    parts = zip(shape[-count:], kernel[-count:], spec, strict=True)
    return tuple(axis if keeps(size, whole, axis) else None for size, whole, axis in parts)


def _fit(path: str, shape: tuple[int, ...], spec: Sequence[Axis], mesh: Mesh) -> PartitionSpec:
    """The spec aligned to the last dimensions of `shape`, checked."""
    spec = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in spec)
    if len(spec) > len(shape):
        raise UserError(f"rules: the spec {spec} has {len(spec)} entries but {path} has shape {tuple(shape)}")
    aligned = (None,) * (len(shape) - len(spec)) + spec
    for dimension, entry in zip(shape, aligned, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        for name in names:
            if name not in AXES:
                close = nearest(name, AXES)
                hint = f"did you mean {close!r}?" if close else f"axes: {AXES}"
                raise UserError(f"rules: the spec {spec} of {path} names the unknown axis {name!r}; {hint}")
        parts = math.prod(mesh.shape[name] for name in names)
        if dimension % parts:
            raise UserError(
                f"rules: {path} of shape {tuple(shape)} cannot be divided by {spec}: "
                f"{dimension} is not a multiple of {parts} ({' x '.join(names)})"
            )
    while aligned and aligned[-1] is None:
        aligned = aligned[:-1]
    return PartitionSpec(*aligned)


def follow_parameters(
    tree: PyTree, params: PyTree, shardings: PyTree, *, replicate_below: int = REPLICATE_BELOW
) -> PyTree:
    """Shardings of a tree with parameter-shaped leaves below parameter paths, such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its shape is divided like it; other leaves are
    replicated, which is a `UserError` from `replicate_below` elements on.
    """
    targets = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            named_leaves(params).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    mesh = next(iter(targets.values()))[1].mesh

    def choose(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            target = targets.get("/".join(parts[start:]))
            if target is not None and target[0] == leaf.shape:
                return target[1]
        if leaf.shape and math.prod(leaf.shape) >= replicate_below:
            raise UserError(f"optimizer state {path} of shape {tuple(leaf.shape)} follows no parameter")
        return NamedSharding(mesh, PartitionSpec())

    return map_named(choose, tree)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Records divided over `BATCH_AXES`; `leading` axes before the record axis are not divided."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """In how many parts a batch is divided."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def device_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of `tree` (shapes suffice) on one device."""
    sizes = jax.tree.map(_leaf_bytes, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _leaf_bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def table(params: PyTree, shardings: PyTree, *, large: int = REPLICATE_BELOW) -> str:
    """One line per kind of parameter: path, count, shape, spec, bytes on one device. Layers are collapsed.

    Where the mesh divides parameters, those of `large` elements or more that every device holds whole are marked.
    """
    rows: dict[tuple[str, str, str], tuple[int, int]] = {}
    for (path, leaf), sharding in zip(named_leaves(params).items(), jax.tree.leaves(shardings), strict=True):
        kind = "/".join("layer_*" if part.startswith("layer_") else part for part in path.split("/"))
        spec = ", ".join("+".join(e) if isinstance(e, tuple) else str(e or "-") for e in sharding.spec)
        divides = any(sharding.mesh.shape[name] > 1 for name in ("fsdp", "tensor", "expert"))
        if divides and sharding.is_fully_replicated and math.prod(leaf.shape) >= large:
            spec = f"{spec or 'replicated'} (large, and whole on every device)"
        key = (kind, "x".join(map(str, leaf.shape)), spec or "replicated")
        count, size = rows.get(key, (0, 0))
        rows[key] = (count + 1, size + _leaf_bytes(leaf, sharding))
    cells = [("parameter", "count", "shape", "spec", "bytes per device")]
    cells += [(kind, str(n), shape, spec, f"{size:,}") for (kind, shape, spec), (n, size) in rows.items()]
    cells.append(("total", "", "", "", f"{device_bytes(params, shardings):,}"))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def check_positions(model: Any, mesh: Mesh) -> None:
    """Raise UserError where `seq` divides positions, and nothing in the model does."""
    if mesh.shape["seq"] > 1 and not _divides_positions(model):
        raise UserError(
            f"mesh: seq={mesh.shape['seq']} divides positions, but nothing in the model does; give its "
            "attention kernel=of(RingAttention) (research.nn.ring_attention)"
        )


def _divides_positions(part: Any) -> bool:
    """Whether a module, or one in its fields, works where positions are divided among devices."""
    if isinstance(part, tuple | list):
        return any(map(_divides_positions, part))
    if getattr(part, "divides_positions", False):
        return True
    names = [each.name for each in fields(part)] if is_dataclass(part) else []
    return any(_divides_positions(getattr(part, name)) for name in names if name != "parent")
