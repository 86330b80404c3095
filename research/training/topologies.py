"""Accelerators and how many of them: what a plan is made for. Numbers are the makers' data sheets', one direction."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax

from research.errors import UserError, nearest

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    platform, kind: as jax calls its devices. bfloat16, float32: FLOP/s of dense matrix products. memory: bytes.
    bandwidth: of its memory, bytes/s. link: bytes/s that it sends to its neighbours in a ring, one direction. per_host:
    how many one host has. slow_link: bytes/s of each chip beyond `fast_within` chips, over which `link` does not reach
    (`None`: it reaches all of a slice).
    """

    name: str
    platform: str
    kind: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    per_host: int
    fast_within: int | None = None
    slow_link: float | None = None


def _tpu(
    name: str, kind: str, bfloat16: float, gib: int, bandwidth: float, link: float, per_host: int = 4
) -> Chip:
    # A product in float32 is six in bfloat16, of parts of the operands.
    return Chip(name, "tpu", kind, bfloat16, bfloat16 / 6, gib * GiB, bandwidth, link, per_host)


def _gpu(
    name: str,
    kind: str,
    bfloat16: float,
    float32: float,
    gib: int,
    bandwidth: float,
    link: float,
    slow: float,
) -> Chip:
    return Chip(name, "gpu", kind, bfloat16, float32, gib * GiB, bandwidth, link, 8, 8, slow)


# TPU: one ring uses one axis of the torus, both ways: twice the one-way rate of a link. GPU: NVLink one way, and one
# network card of 400 (A100: 200) Gbit/s a GPU.
CHIPS = {
    "v4": _tpu("TPU v4", "TPU v4", 275e12, 32, 1228e9, 90e9),
    "v5e": _tpu("TPU v5e", "TPU v5 lite", 197e12, 16, 819e9, 90e9),
    "v5p": _tpu("TPU v5p", "TPU v5", 459e12, 95, 2765e9, 180e9),
    "v6e": _tpu("TPU v6e", "TPU v6 lite", 918e12, 32, 1640e9, 180e9),
    "a100": _gpu("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 80, 2039e9, 300e9, 25e9),
    "h100": _gpu("H100 SXM", "NVIDIA H100 80GB HBM3", 989e12, 67e12, 80, 3352e9, 450e9, 50e9),
    "h200": _gpu("H200", "NVIDIA H200", 989e12, 67e12, 141, 4800e9, 450e9, 50e9),
}


# bfloat16 FLOP/s by the beginnings of jax's names, which for a TPU are of either kind; also of devices that no plan is
# made for.
_PEAKS = {name: chip.bfloat16 for chip in CHIPS.values() for name in (chip.kind, chip.name)} | {
    "NVIDIA A100": CHIPS["a100"].bfloat16,
    "NVIDIA H100": CHIPS["h100"].bfloat16,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
}


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of dense products of one device of this `jax.Device.device_kind`, None where none are known."""
    # The longest: "TPU v5" begins "TPU v5 lite". A number is not cut: "NVIDIA L4" is no "NVIDIA L40S".
    names = [name for name in _PEAKS if re.match(rf"{re.escape(name)}(?!\d)", kind)]
    return _PEAKS[max(names, key=len)] if names else None


# TPU v5e's compiler gathers weights beside products of itself; v6e's is to be told, by both of these
# (openxla.org/xla/flags_guidance; experiments.bench.aot shows what they make).
_ASYNCHRONOUS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, str] | None:
    """What the compiler of these devices is told, of a program that is divided among them."""
    divided = len(devices) > 1 and devices[0].device_kind == CHIPS["v6e"].kind
    return _ASYNCHRONOUS if divided else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind."""

    text: str
    chip: Chip
    devices: int

    def rate(self, parts: int) -> float:
        """Bytes/s at which a chip sends in a ring of `parts` chips."""
        chip = self.chip
        reaches = chip.fast_within is None or parts <= chip.fast_within
        return chip.link if reaches else chip.slow_link

    def mesh(self, sizes: Mapping[str, int]) -> jax.sharding.AbstractMesh:
        """Of such chips, {axis: size}; what is traced in it is traced for them (`target_platform`)."""
        device = jax.sharding.AbstractDevice(self.chip.kind, None, self.chip.platform)
        return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=device)


def parse_topology(text: str) -> Topology:
    """`v5e:4x4`, `h100:8`: a chip, and the sizes whose product is their number. Raises `UserError`."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        close = nearest(name, CHIPS)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(CHIPS)}"
        raise UserError(f"--topology={text}: no chip {name!r}; {hint}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology={text}: expected {name}:COUNT or {name}:AxB, such as {name}:4x4")
    return Topology(text, CHIPS[name], math.prod(int(size) for size in shape.split("x")))
