"""A layer of experts against a dense FFN of equal active FLOPs, and against the Mixtral layer of `transformers`.

Top-2 of 8 gated SiLU experts, float32, random tokens and a random router, so that experts are about equally loaded;
the dense FFN has twice an expert's units. Contenders take turns in one process. Times are of one call:

- training: forward and backward with gradients of the input and of all parameters, 4096 tokens, for every dispatch.
  What dispatch costs is the same call with the experts left out.
- inference: the same weights in `transformers`, at several numbers of tokens; of its implementations of experts the
  fastest counts. Outputs must be equal to 1e-4 of their largest. On one CPU our experts' kernels are laid out for
  inference beforehand, as decoding does it (`research.nn.panels`; not with LATHE_CPU_KERNELS=off).
- decoding: one token through a layer of 4 to 64 experts, laid out alike, the same token in every call, so that the two
  experts it goes to are as likely to be in the processor's cache at 64 as at 4. The others are not read, so time must
  not grow.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.turns import take_turns
from research.errors import UserError
from research.moe.dispatch import make_dispatch
from research.moe.layer import MoE
from research.moe.routing import route
from research.nn.attention import Context
from research.nn.cpu_kernels import use_cpu_kernels
from research.nn.mlp import GatedMLP
from research.nn.panels import to_panels

EXPERTS, K, TOKENS = 8, 2, 4096
SIZES = ((128, 256), (256, 512), (512, 1024))  # width, units of an expert
INFERENCE = (1, 16, 128, 1024, 4096)
DECODED = (4, 8, 16, 32, 64)
DISPATCHES = {"sorted": ("sorted", None), "capacity 1.25": ("capacity", 1.25)}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of experts, in `transformers`
COPIED = 128  # the most tokens for batched_mm, which copies the kernels of every choice
REPEATS = 0.2  # seconds that a contender's turn takes at least


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender beside its baseline: seconds a call, one of each for every round.

    `ratio` compares medians and `best_ratio` the best rounds, contender over baseline: below 1 it is faster.
    """

    kind: str
    width: int
    hidden: int
    name: str
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.seconds) / statistics.median(self.baseline)

    @property
    def best_ratio(self) -> float:
        return min(self.seconds) / min(self.baseline)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "best_ratio": self.best_ratio}

    def line(self, what: str) -> str:
        milliseconds = 1e3 * statistics.median(self.seconds)
        return f"{milliseconds:9.3f} ms, {self.ratio:.2f}x (best turns {self.best_ratio:.2f}x) the time of {what}"


def run(
    sizes: Sequence[tuple[int, int]] = SIZES,
    tokens: int = TOKENS,
    inference: Sequence[int] = INFERENCE,
    decoded: Sequence[int] = DECODED,
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure everything and report a line for each number. Without `transformers`, its part is left out aloud."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    report(f"top-{K} of {EXPERTS} experts, float32; {load}")
    rows = []
    for width, hidden in sizes:
        rows += _training(width, hidden, tokens, rounds, report)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        report(f"transformers: not compared, {error}; install .[parity]")
        inference = ()
    for width, hidden in sizes:
        rows += _inference(width, hidden, inference, rounds, report)
    for width, hidden in sizes:
        rows += _decoding(width, hidden, decoded, rounds, report)
    return rows


def _training(width: int, hidden: int, tokens: int, rounds: int, report: Callable[[str], None]) -> list[Row]:
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    context = _context(tokens)
    dense = GatedMLP(K * hidden)
    calls = {"dense": (_gradient(dense.apply), dense.init(jax.random.key(1), x))}
    for name, (dispatch, factor) in DISPATCHES.items():
        layer = MoE(EXPERTS, K, hidden, dispatch=dispatch, capacity_factor=factor)
        params = {"params": layer.init(jax.random.key(1), x, context)["params"]}
        calls[name] = (_gradient(lambda p, x, layer=layer: layer.apply(p, x, context)), params)
        router = {"kernel": params["params"]["router"]["kernel"]}
        calls[f"{name}, dispatch alone"] = (_gradient(_without_experts(dispatch, factor)), router)
    seconds = take_turns(
        {name: _compiled(call, params, x) for name, (call, params) in calls.items()}, rounds, REPEATS
    )
    rows = []
    for name, times in seconds.items():
        alone = name.endswith("alone")
        against = name.removesuffix(", dispatch alone") if alone else "dense"
        rows.append(Row("training", width, hidden, name, times, seconds[against]))
        if name != "dense":
            what = "the layer" if alone else f"a dense FFN of {K * hidden}"
            report(f"{width}x{hidden} training, {tokens} tokens, {name}: {rows[-1].line(what)}")
    return rows


def _without_experts(dispatch: Any, factor: float | None) -> Callable[[Any, jax.Array], jax.Array]:
    """Router, scatter and combine, as in the layer."""

    def call(params: Any, x: jax.Array) -> jax.Array:
        routing = route(x @ params["kernel"], K)
        way = make_dispatch(routing, dispatch, factor)
        return way.combine(way.scatter(x), routing.gate)

    return call


def _gradient(call: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    return jax.grad(lambda params, x: jnp.sum(jnp.square(call(params, x))), argnums=(0, 1))


def _inference(
    width: int, hidden: int, counts: Sequence[int], rounds: int, report: Callable[[str], None]
) -> list[Row]:
    rows = []
    for tokens in counts:
        layer, context = MoE(EXPERTS, K, hidden), _context(tokens)
        x = jax.random.normal(jax.random.key(0), (tokens, width))
        params = {"params": layer.init(jax.random.key(1), x, context)["params"]}
        laid_out = _laid_out(params)
        ours = _compiled(lambda p, x, layer=layer, context=context: layer.apply(p, x, context), laid_out, x)
        peers, outputs = mixtral_layers(params["params"], np.asarray(x))
        expected = np.asarray(layer.apply(laid_out, x, context))
        for name, y in outputs.items():
            if not np.abs(y - expected).max() <= 1e-4 * np.abs(expected).max():
                raise RuntimeError(f"transformers ({name}) computes something else than this layer")
        seconds = take_turns({"ours": ours, **peers}, rounds, REPEATS)
        best = min(peers, key=lambda name: statistics.median(seconds[name]))
        rows.append(Row("inference", width, hidden, f"{tokens} tokens", seconds["ours"], seconds[best]))
        report(f"{width}x{hidden} inference, {tokens} tokens: {rows[-1].line(f'transformers ({best})')}")
    return rows


def mixtral_layers(params: Any, x: np.ndarray) -> tuple[dict[str, Callable[[], None]], dict[str, np.ndarray]]:
    """Mixtral's layer of `transformers` with these weights, by implementation of its experts: what calls it once on x
    [N, width], and what it gives. Raises `UserError` where it is not installed."""
    try:
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise UserError(f"the layer is compared with transformers: {error}; install .[parity]") from error
    experts = {name: np.asarray(part["kernel"]).swapaxes(1, 2) for name, part in params["experts"].items()}
    state = {
        "gate.weight": np.asarray(params["router"]["kernel"]).T,
        "experts.gate_up_proj": np.concatenate([experts["gate"], experts["up"]], axis=1),
        "experts.down_proj": experts["down"],
    }
    count, hidden, width = experts["up"].shape
    calls, outputs = {}, {}
    for implementation in IMPLEMENTATIONS:
        if implementation == "batched_mm" and len(x) > COPIED:
            continue
        config = MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=count, num_experts_per_tok=K
        )
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config).eval()
        block.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
        inputs = torch.from_numpy(x.copy())[None]

        def call(block: Any = block, inputs: Any = inputs) -> Any:
            with torch.inference_mode():
                return block(inputs)

        outputs[implementation] = call()[0].numpy()
        calls[implementation] = call
    return calls, outputs


def _decoding(
    width: int, hidden: int, counts: Sequence[int], rounds: int, report: Callable[[str], None]
) -> list[Row]:
    x, calls = jax.random.normal(jax.random.key(0), (1, width)), {}
    context = _context(1).replace(length=jnp.zeros(1, jnp.int32))
    for count in counts:
        layer = MoE(count, K, hidden)
        params = _laid_out({"params": layer.init(jax.random.key(1), x, context)["params"]})
        calls[count] = _compiled(lambda p, x, layer=layer: layer.apply(p, x, context), params, x)
    seconds = take_turns(calls, rounds, REPEATS)
    rows = []
    for count in counts:
        rows.append(Row("decoding", width, hidden, f"{count} experts", seconds[count], seconds[counts[0]]))
        report(f"{width}x{hidden} decoding, {count} experts: {rows[-1].line(f'{counts[0]} experts')}")
    return rows


def _laid_out(params: Any) -> Any:
    return to_panels(params) if use_cpu_kernels() else params


def _context(tokens: int) -> Context:
    return Context(jnp.arange(tokens)[None])


def _compiled(call: Callable[[Any, jax.Array], Any], params: Any, x: jax.Array) -> Callable[[], None]:
    program = jax.jit(call).lower(params, x).compile()
    return lambda: jax.block_until_ready(program(params, x))
