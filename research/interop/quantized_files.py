"""Kernels of GPTQ's and AWQ's checkpoints, 4 bits in groups of inputs, as `research.nn.quantized.Quantized`.

A linear layer X is X.qweight and X.qzeros (int32, eight codes a word, the lowest bits first), X.scales and, of GPTQ,
X.g_idx. With q the codes and g the group of input k, which is g_idx[k] or k // group size, both mean

    kernel[k, n] = (q[k, n] - zero[g, n]) * scale[g, n]

| | qweight | qzeros | scales |
|---|---|---|---|
| gptq | [in / 8, out], a word has eight inputs | [groups, out / 8], in the order of outputs | [groups, out] |
| awq (gemm) | [in, out / 8], a word has eight outputs | [groups, out / 8] | [groups, out] |

With act-order (`desc_act`) g_idx puts inputs of similar importance together: such a kernel is `Permuted`, its inputs in
the order of their groups. GPTQ's format of before `gptq_v2` stores zeros minus 1: GPTQModel takes 1 from all eight of a
word at once, and a zero of 0 borrows from the next; AutoGPTQ damages the word then. Nibble i of a word of AWQ is output
(0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight. Sources: the file formats of AutoGPTQ, GPTQModel and AutoAWQ (arXiv 2210.17323
and 2306.00978 are the methods).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.interop.fields import Fields, read_json
from research.interop.files import some
from research.nn.quantized import Quantized
from research.nn.weights import Permuted

ENTRY = "quantization_config"
BITS, CODES = 4, 8  # bits of a code, codes of a word
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the kernels of a checkpoint are packed.

    method: whose layout. group: inputs that share a scale; None: all. offset: what is added to stored zeros.
    borrows: they were lessened eight at once, as one number.
    """

    method: Literal["gptq", "awq"]
    group: int | None
    offset: int = 0
    borrows: bool = False

    @property
    def file(self) -> str:
        """What AutoGPTQ calls the file that is model.safetensors elsewhere."""
        return f"gptq_model-{BITS}bit-{self.group or -1}g.safetensors"


def read_packing(directory: Path, entries: Mapping[str, Any]) -> Packing | None:
    """The packing that `config.json` (`entries`) or a file beside it describes; None: nothing is packed.

    Raises:
        UserError: another method, format or number of bits, or an option that changes how codes are read.
    """
    if entries.get(ENTRY):
        section = Fields(entries, str(directory / "config.json")).section(ENTRY, {})
        return _packing(section.entries, section.where, None)
    for name, method in _OWN_FILES.items():
        if (directory / name).is_file():
            return _packing(read_json(directory / name), str(directory / name), method)
    return None


def _packing(entries: Mapping[str, Any], where: str, method: str | None) -> Packing:
    old = {"w_bit": "bits", "q_group_size": "group_size", "format": "checkpoint_format"}
    renamed = {new: entries[name] for name, new in old.items() if name in entries}
    defaults = {
        "quant_method": method,
        "checkpoint_format": "gptq",
        "version": "gemm",
        "pack_dtype": "int32",
    }
    config = Fields({**renamed, **entries}, where, defaults)
    method = config.choice("quant_method", {"gptq": "gptq", "awq": "awq"})
    if config.raw("bits") != BITS:
        raise config.refuse("bits", config.raw("bits"), f"{BITS}")
    group = None if config.raw("group_size") == -1 else config.integer("group_size")
    if method == "awq":
        if str(config.raw("version")).lower() != "gemm":
            raise config.refuse("version", config.raw("version"), "gemm")
        return Packing("awq", group)
    config.choice("pack_dtype", {"int32": None})
    for name in ("dynamic", "is_marlin_format"):
        if config.entries.get(name):
            raise config.refuse(name, config.entries[name], "nothing: one layout for all layers, GPTQ's own")
    offset = config.choice("checkpoint_format", {"gptq": 1, "gptq_v2": 0})
    meta = config.section("meta", {})
    writers = meta.entries.get("quantizer", []) if meta else []
    return Packing("gptq", group, offset, offset == 1 and "gptqmodel:" in str(writers).lower())


class Files(Protocol):
    """Tensors by name, as `research.interop.files.TensorFiles`."""

    directory: Path
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...
    def read_words(self, name: str) -> np.ndarray: ...


class PackedFiles:
    """The tensors of a checkpoint with packed kernels, under the names that they would have as floats.

    A layer whose kernel is packed has `X.weight` of shape [out, in], read by `kernel`. All else is as in `files`.
    """

    def __init__(self, files: Files, packing: Packing):
        self.directory = files.directory
        self._files, self._packing = files, packing
        held = set(files.names)
        self._layers = {
            f"{name.removesuffix('.qweight')}.weight": name.removesuffix("qweight")
            for name in files.names
            if name.endswith(".qweight")
        }
        if not self._layers:
            raise UserError(
                f"{self.directory}: no tensor is a qweight, though {packing.method} is what its config says"
            )
        for prefix in self._layers.values():
            if lacking := [prefix + part for part in _PARTS[:3] if prefix + part not in held]:
                raise UserError(f"{self.directory}: missing tensors {some(lacking)}")
        parts = {prefix + part for prefix in self._layers.values() for part in _PARTS}
        # AutoGPTQ writes biases of zeros for layers that have none.
        self._biases = {f"{prefix}bias" for prefix in self._layers.values()} & held
        self.names = [name for name in files.names if name not in parts] + list(self._layers)

    def packed(self, name: str) -> bool:
        """Whether `name` is of a packed kernel."""
        return name in self._layers

    def empty(self, name: str) -> bool:
        """Whether `name` is the bias of a packed layer and all zeros."""
        return name in self._biases and not np.any(self._files.read(name))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._layers:
            return self._files.shape(name)
        rows, columns = self._shape(self._layers[name])
        return columns, rows

    def read(self, name: str) -> np.ndarray:
        if name in self._layers:
            raise UserError(
                f"{self.directory}: {self._layers[name]}qweight is packed where floats are needed"
            )
        return self._files.read(name)

    def kernel(self, names: tuple[str, ...], stacked: bool) -> Quantized | Permuted:
        """The kernel [in, out] of one layer, or the stack [E, in, out] of those of several experts.

        Scales keep their stored type. Zeros that are all 8 are the fixed ones of a symmetric grid, and not kept.

        Raises:
            UserError: parts that do not fit each other; groups of different sizes; a zero of GPTQ's first format that
                programs read differently.
        """
        read = [self._read(self._layers[name]) for name in names]
        codes, scale, zero, order = (
            np.stack(part) if stacked else part[0] for part in zip(*read, strict=True)
        )
        fixed = np.all(zero == 2 ** (BITS - 1))
        kernel = Quantized.from_codes(
            jnp.asarray(codes), jnp.asarray(scale), None if fixed else jnp.asarray(zero), BITS
        )
        if np.all(order == np.arange(order.shape[-1])):
            return kernel
        return Permuted(kernel, jnp.asarray(order, jnp.uint16 if order.shape[-1] <= 1 << 16 else jnp.int32))

    def _shape(self, prefix: str) -> tuple[int, int]:
        """Inputs and outputs of a layer, its parts agreeing."""
        shapes = {part: self._files.shape(prefix + part) for part in _PARTS[:3]}
        if len(shapes["qweight"]) != 2:
            raise UserError(f"{self.directory}: {prefix}qweight is {list(shapes['qweight'])}, no matrix")
        rows, columns = shapes["qweight"]
        rows, columns = (rows * CODES, columns) if self._packing.method == "gptq" else (rows, columns * CODES)
        group = self._packing.group or rows
        if rows % group or columns % CODES:
            raise UserError(
                f"{self.directory}: {prefix}qweight is of {rows} inputs and {columns} outputs, which groups of {group} "
                f"inputs and words of {CODES} outputs don't divide"
            )
        wanted = {"qzeros": (rows // group, columns // CODES), "scales": (rows // group, columns)}
        if self._packing.method == "gptq" and prefix + "g_idx" in self._files.names:
            shapes["g_idx"], wanted["g_idx"] = self._files.shape(prefix + "g_idx"), (rows,)
        for part, shape in wanted.items():
            if shapes[part] != shape:
                raise UserError(
                    f"{self.directory}: {prefix}{part} is {list(shapes[part])}; groups of {group} inputs ask for "
                    f"{list(shape)}"
                )
        return rows, columns

    def _read(self, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Codes uint8[in, out], inputs group by group; scales [groups, out] and zeros uint8[groups, out]; and the order
        [in] in which the inputs are."""
        rows, _ = self._shape(prefix)
        words, zeros = (self._files.read_words(prefix + part) for part in ("qweight", "qzeros"))
        scales = self._files.read(prefix + "scales")
        if self._packing.method == "awq":
            return unpack(words, _AWQ_ORDER), scales, unpack(zeros, _AWQ_ORDER), np.arange(rows)
        order = np.arange(rows)
        if prefix + "g_idx" in self._files.names:
            owner, group = self._files.read_words(prefix + "g_idx"), self._packing.group or rows
            order = np.argsort(owner, kind="stable")
            if not np.array_equal(owner[order], np.arange(rows) // group):
                raise UserError(
                    f"{self.directory}: {prefix}g_idx does not give each of {rows // group} groups {group} inputs"
                )
        if self._packing.borrows:
            zeros = unpack(zeros.view(np.uint32) + np.uint32(0x11111111))
        else:
            zeros = unpack(zeros) + self._packing.offset
        if np.any(zeros >= 2**BITS):
            raise UserError(
                f"{self.directory}: {prefix}qzeros holds 15, which stands for 16 in some programs and for 0 in "
                f"others: write it as checkpoint_format gptq_v2"
            )
        return unpack(words.T).T[order], scales, zeros, order


def unpack(words: np.ndarray, order: tuple[int, ...] = tuple(range(CODES))) -> np.ndarray:
    """int32[..., n] -> uint8[..., 8 n]: nibble i of a word, from the lowest bits, is code `order[i]` of its eight."""
    codes = np.empty((*words.shape, CODES), np.uint8)
    for i, place in enumerate(order):
        codes[..., place] = (words >> (BITS * i)) & (2**BITS - 1)
    return codes.reshape(*words.shape[:-1], -1)
