"""mmMamba: attention layers of a trained decoder turned into Mamba-2 layers (arXiv 2502.13145, section 3).

The mixer has the attention's own projections, as C = q, B = k, x = v, and a few parameters more:

    q, k, v = u W_Q, u W_K, u W_V                       no rotary embedding, no scale
    v, k, q = silu(conv(v, k, q))                       depthwise, causal, over two tokens
    dt = softplus(u W_dt + dt_bias)   A = -exp(A_log)   one a head; k and v are repeated for the heads that share them
    S_t = exp(dt_t A) S_{t-1} + dt_t v_t k_t^T          y_t = S_t q_t           (`research.ssm.ssd`)
    out = W_O concat(RMSNorm(y) * silu(u W_G))          the norm is over a head, with one scale for all of them

`seed_mixers` takes W_Q, W_K, W_V, W_O, their biases and norms from attention, to the bit, and starts the rest so that
the layer remembers everything ("mimic"): W_dt = 0, dt from 0.001 to 0.1, A = -e, so that exp(dt A) is from 0.997 to
0.76; a convolution that passes the token itself; W_G Xavier with gain 2^-2.5. `research.ssm.distillation` trains it.

A student is `student_model(teacher)`: every `Attention`, or all but one in `period` layers, becomes a `MMMamba`. The
teacher is a decoder, or a model that reads images and has one or several stacks of causal layers as its parts; in a
HoVLE, the paper's teacher, the holistic module's layers are converted as the decoder's are. The paper's students learn
in all layers before some get their attention back; here those are never converted, which is the same, as layers learn
apart from each other.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.nn.attention import Attention, Context, project_heads
from research.nn.fuse import unfuse
from research.nn.linear import Linear, parameter
from research.nn.masks import Causal, Window
from research.nn.norm import RMSNorm
from research.nn.transformer import LayerStack, unscan_layers
from research.nn.weights import Weight, materialize
from research.ssm.recurrent import Convolution, RecurrentCache, Rows, init_a, init_dt, recur
from research.ssm.ssd import PlainScan, Scan

Hybrid = Literal["head", "tail", "head_stacked", "tail_stacked"]
Seeding = Literal["mimic", "inherit", "scratch"]
HYBRIDS: tuple[Hybrid, ...] = ("head", "tail", "head_stacked", "tail_stacked")
SEEDINGS: tuple[Seeding, ...] = ("mimic", "inherit", "scratch")
INHERITED = ("query", "key", "value", "output", "query_norm", "key_norm")


class MMMamba(nn.Module):
    """Args:
        num_heads, num_kv_heads, head_dim: H, Hkv (None: H) and d, as the attention had them; a state is [d, d] a head.
        query_norm, key_norm, use_bias, output_bias: what else the attention's projections had.
        conv_width: tokens that the convolution sees.
        chunk: tokens of a chunk of the scan; changes speed alone.
        scan: how the scan is computed, see `research.ssm.ssd`.
        norm_eps: of the norm of every head.

    x is [B, T, width] or [B * T, width]. Returns the output and the `Rows` of the new tokens. Tokens of different
    segments do not meet. Parameters: {query,key,value,output}/{kernel,bias}, query_norm and key_norm of the attention;
    conv/{kernel,bias} [conv_width, (2 Hkv + H) d] in the order v, k, q; dt/kernel [width, H]; A_log, dt_bias [H];
    gate/kernel [width, H d]; norm/scale [d].
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    use_bias: bool = False
    output_bias: bool = False
    conv_width: int = 2
    chunk: int = 128
    scan: Scan = PlainScan()
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}")
        if self.conv_width < 2:
            raise UserError(f"conv_width={self.conv_width}: the convolution sees at least 2 tokens")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def channels(self) -> int:
        """Of the convolution: v, k and q."""
        return (2 * self.kv_heads + self.num_heads) * self.head_dim

    @nn.compact
    def __call__(
        self, u: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, Rows]:
        batch, length = context.positions.shape
        query, key, value = project_heads(self, u, (batch, length))
        inputs = jnp.concatenate([value, key, query], axis=2).reshape(batch, length, -1)
        mixed = nn.silu(Convolution(self.conv_width, True, name="conv")(inputs, context, cache))
        heads = mixed.reshape(batch, length, -1, self.head_dim)
        value, key, query = jnp.split(heads, [self.kv_heads, 2 * self.kv_heads], axis=2)

        dt = Linear(self.num_heads, name="dt")(u).reshape(batch, length, -1).astype(jnp.float32)
        dt = jax.nn.softplus(dt + self._vector("dt_bias", init_dt))
        log_decay = -jnp.exp(self._vector("A_log", init_a)) * dt
        shared = self.num_heads // self.kv_heads
        scaled = jnp.repeat(value, shared, axis=2).astype(jnp.float32) * dt[..., None]
        scaled = scaled.astype(value.dtype)
        keys = jnp.repeat(key, shared, axis=2)
        y = recur(scaled, log_decay, keys, query, context, cache, self.chunk, self.scan)
        gate = Linear(self.num_heads * self.head_dim, name="gate")(u).reshape(y.shape)
        y = RMSNorm(self.norm_eps, name="norm")(y) * nn.silu(gate)
        out = Linear(u.shape[-1], self.output_bias, name="output")(y.reshape(*u.shape[:-1], -1))
        rows = Rows(
            inputs[:, None], scaled.swapaxes(1, 2), key.swapaxes(1, 2), log_decay.swapaxes(1, 2)[..., None]
        )
        return out, rows

    def init_cache(self, batch: int, capacity: int, margin: int, dtype: jnp.dtype) -> RecurrentCache:
        """Of a size that `capacity` and `margin` do not change."""
        state = (self.num_heads, self.head_dim, self.head_dim)
        return RecurrentCache.empty(batch, (self.conv_width - 1, self.channels), state, dtype)

    def _vector(self, name: str, init: nn.initializers.Initializer) -> jax.Array:
        return parameter(self, name, init, (self.num_heads,)).astype(jnp.float32)


def kept_layers(num_layers: int, hybrid: Hybrid | None, period: int) -> tuple[int, ...]:
    """The layers that stay attention, one in `period`: the first ("head") or last ("tail") of every `period` layers, or
    as many at the beginning or end of all; none without `hybrid`. Raises `UserError`."""
    if hybrid is None:
        return ()
    if hybrid not in HYBRIDS:
        raise UserError(
            f"hybrid {hybrid!r}: attention stays at one of {', '.join(HYBRIDS)}, or nowhere (None)"
        )
    if not 2 <= period <= num_layers:
        raise UserError(f"period={period}: one in 2 to {num_layers} layers, all there are, stays attention")
    count = num_layers // period
    layers = {
        "head": range(0, count * period, period),
        "tail": range(period - 1, num_layers, period),
        "head_stacked": range(count),
        "tail_stacked": range(num_layers - count, num_layers),
    }
    return tuple(layers[hybrid])


def stacks(model: nn.Module) -> dict[str, LayerStack]:
    """The stacks of causal layers of a model, by the names of its parts, in the order in which a token passes them:
    its `stacks` where it has any, its `decoder`, or {"": itself}. Raises `UserError`."""
    if isinstance(model, LayerStack):
        return {"": model}
    found = getattr(model, "stacks", None) or {"decoder": getattr(model, "decoder", None)}
    if not all(isinstance(stack, LayerStack) for stack in found.values()):
        raise UserError(f"mmMamba converts stacks of layers, and a {type(model).__name__} has none")
    return found


def with_stacks(model: nn.Module, made: dict[str, LayerStack]) -> nn.Module:
    """The model with others in the places of its `stacks`."""
    return made[""] if "" in made else model.clone(**made)


def student_model(
    teacher: nn.Module, hybrid: Hybrid | None = None, period: int = 4, **fields: Any
) -> nn.Module:
    """The model with an `MMMamba` in the place of every `Attention` but the kept ones (`kept_layers`, which counts
    the attention layers alone, through all `stacks`); `fields` are further ones of the mixer. Layers are unrolled.

    Raises:
        UserError: there is no attention to convert; an attention that is not causal, or of another class.
    """
    parts = stacks(teacher)
    blocks = {
        name: [stack.blocks[i % len(stack.blocks)] for i in range(stack.num_layers)]
        for name, stack in parts.items()
    }
    attending = [
        (name, i)
        for name, own in blocks.items()
        for i, block in enumerate(own)
        if isinstance(block.attention, Attention)
    ]
    if not attending:
        kinds = sorted({type(block.attention).__name__ for own in blocks.values() for block in own})
        raise UserError(f"mmMamba converts Attention, and the teacher's layers have {', '.join(kinds)} alone")
    kept = [attending[i] for i in kept_layers(len(attending), hybrid, period)]
    for name, i in attending:
        if (name, i) not in kept:
            block = blocks[name][i]
            blocks[name][i] = block.clone(attention=_mixer(block.attention, _path(name, i), fields))
    made = {
        name: stack.clone(blocks=_pattern(blocks[name]), scan_layers=False) for name, stack in parts.items()
    }
    return with_stacks(teacher, made)


def _pattern(blocks: list[nn.Module]) -> tuple[nn.Module, ...]:
    """The shortest pattern that the blocks repeat."""
    size = next(n for n in range(1, len(blocks) + 1) if all(b == blocks[i % n] for i, b in enumerate(blocks)))
    return tuple(blocks[:size])


def _path(stack: str, layer: int) -> str:
    return f"{stack}/layer_{layer}".lstrip("/")


def _mixer(attention: Attention, layer: str, fields: dict[str, Any]) -> MMMamba:
    if not isinstance(attention.rule, Causal | Window):
        raise UserError(f"{layer} attends by {type(attention.rule).__name__}; a recurrence is causal")
    names = ("num_heads", "head_dim", "num_kv_heads", "query_norm", "key_norm", "use_bias", "output_bias")
    return MMMamba(**{name: getattr(attention, name) for name in names}, **fields)


def converted(model: nn.Module) -> Iterator[tuple[str, MMMamba]]:
    """("layer_3", or "decoder/layer_3", and its mixer) of every converted layer of a student."""
    for name, stack in stacks(model).items():
        for i in range(stack.num_layers):
            mixer = stack.blocks[i % len(stack.blocks)].attention
            if isinstance(mixer, MMMamba):
                yield _path(name, i), mixer


def seed_mixers(
    student: nn.Module, teacher: nn.Module, params: Any, key: jax.Array, seeding: Seeding = "mimic"
) -> dict[str, Any]:
    """{"layer_3": {"attention": parameters of its mixer}} of every converted layer, float32; below the names of the
    stacks where there are several.

    params: the teacher's, scanned or fused or structured. seeding: "mimic" as the docstring of this file says; the
    ablations "inherit", where what attention has not begins as in any Mamba-2, and "scratch", where all does.
    """
    if seeding not in SEEDINGS:
        raise UserError(f"seeding {seeding!r}: one of {', '.join(SEEDINGS)} is expected")
    _, params = unscan_layers(teacher, params)
    mixers: dict[str, Any] = {}
    for layer, mixer in converted(student):
        key, drawn, mimicked = jax.random.split(key, 3)
        made = _drawn(mixer, drawn, student.width)
        if seeding != "scratch":
            attention = unfuse(part(params, layer)["attention"], mixer.num_heads, mixer.kv_heads)
            made |= {name: _plain(attention[name]) for name in INHERITED if name in attention}
        if seeding == "mimic":
            made |= _remember_everything(made, mimicked)
        *stack, name = layer.split("/")
        (mixers.setdefault(stack[0], {}) if stack else mixers)[name] = {"attention": made}
    return mixers


def graft(params: Any, mixers: dict[str, Any]) -> Any:
    """The student's parameters: the teacher's (unrolled) with `mixers` in their layers; all else is shared."""
    own = {name: tree if name == "attention" else graft(params[name], tree) for name, tree in mixers.items()}
    return params | own


def part(params: Any, path: str) -> Any:
    """The subtree at a path."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), params)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _drawn(mixer: MMMamba, key: jax.Array, width: int) -> dict[str, Any]:
    context = Context(jnp.zeros((1, 2), jnp.int32))
    return mixer.init(key, jnp.zeros((1, 2, width)), context)["params"]


def _remember_everything(mixer: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    taps, gate = mixer["conv"]["kernel"], mixer["gate"]["kernel"]
    dt_key, gate_key = jax.random.split(key)
    xavier = nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")  # a gain is squared
    return {
        "dt": {"kernel": jnp.zeros_like(mixer["dt"]["kernel"])},
        "dt_bias": init_dt(dt_key, mixer["dt_bias"].shape, jnp.float32),
        "A_log": jnp.ones_like(mixer["A_log"]),
        "conv": {"kernel": jnp.zeros_like(taps).at[-1].set(1.0), "bias": jnp.zeros(taps.shape[1])},
        "gate": {"kernel": xavier(gate_key, gate.shape, jnp.float32)},
    }


def _plain(tree: Any) -> Any:
    is_weight = lambda leaf: isinstance(leaf, Weight)  # noqa: E731
    return jax.tree.map(lambda leaf: materialize(leaf).astype(jnp.float32), tree, is_leaf=is_weight)
