"""Looking at decoding call by call: what was drafted, what was kept. For notebooks and figures, not for speed.

result, calls = watch(generator, "def main(")
draw(calls[0], tokenizer, axes)
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.generator import Generation, Generator
from research.decoding.proposers import Outcome, Prompt, Proposer, Round, Target
from research.decoding.sampling import Sampling
from research.decoding.verify import Draft

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from research.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the target: the drafted tree, and what became of it.

    tokens, parents [N], the root first (its parent is -1); real [N], False for padding and virtual nodes; path:
    the nodes that were kept, from the root on; gained: the tokens that the output grew by: those of the kept nodes
    below the root and then the target's own, without a token that ends the text.
    """

    tokens: list[int]
    parents: list[int]
    real: list[bool]
    path: list[int]
    gained: list[int]


@dataclasses.dataclass(frozen=True)
class Watched:
    """A proposer that reports every call: `record(tokens [B, N], parents, real, path [B, levels], count [B])`."""

    proposer: Proposer
    record: Callable[..., None]

    @property
    def size(self) -> int:
        return self.proposer.size

    @property
    def levels(self) -> int:
        return self.proposer.levels

    def init(self, params: Any, target: Target, prompt: Prompt) -> Any:
        return self.proposer.init(params, target, prompt)

    def propose(self, params: Any, target: Target, state: Any, round: Round) -> tuple[Draft, Any]:
        return self.proposer.propose(params, target, state, round)

    def observe(self, params: Any, target: Target, state: Any, outcome: Outcome) -> Any:
        draft, accept = outcome.draft, outcome.accept
        parent = jnp.broadcast_to(draft.tree.parent, draft.tokens.shape)
        real = jnp.broadcast_to(draft.tree.real, draft.tokens.shape)
        jax.debug.callback(self.record, draft.tokens, parent, real, accept.path, accept.count, ordered=True)
        return self.proposer.observe(params, target, state, outcome)


def watch(
    generator: Generator,
    prompt: str | list[int],
    *,
    max_new_tokens: int = 32,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int = 0,
) -> tuple[Generation, list[Call]]:
    """Decodes one prompt; the result, and the calls of the target after prefill, which gave the first token.

    Raises:
        UserError: as `Generator.stream` does.
    """
    calls: list[Call] = []

    def record(tokens: Any, parents: Any, real: Any, path: Any, count: Any) -> None:
        tokens, parents, real = (np.asarray(x)[0].tolist() for x in (tokens, parents, real))
        kept = np.asarray(path)[0, : int(count[0])].tolist()
        calls.append(Call(tokens, parents, real, kept, []))

    watched = Generator(
        generator.model,
        generator.params,
        generator.tokenizer,
        dtype=generator.dtype,
        proposer=Watched(generator.proposer, record),
        proposer_params=generator.proposer_params,
        verifier=generator.verifier,
        ends=generator.ends,
    )
    result = watched.generate([prompt], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    jax.effects_barrier()
    output, done = result.samples[0].tokens, 1
    for number, call in enumerate(calls):
        after = done + len(call.path)
        calls[number] = dataclasses.replace(call, gained=output[done:after])
        done = after
    return result, calls


def draw(call: Call, tokenizer: "Tokenizer", axes: "Axes") -> None:
    """The tree of a call from left to right: kept nodes filled, the target's own token at the end of the path."""
    children: dict[int, list[int]] = {}
    shown = [v for v in range(len(call.tokens)) if v == 0 or call.real[v]]
    for node in shown[1:]:
        children.setdefault(call.parents[node], []).append(node)
    place: dict[int, tuple[float, float]] = {}

    def lay_out(node: int, depth: int, row: float) -> float:
        """Places a subtree from `row` downwards; returns the next free row."""
        free = row
        for child in children.get(node, ()):
            free = lay_out(child, depth + 1, free)
        place[node] = (depth, (row + max(free - 1, row)) / 2)
        return max(free, row + 1)

    rows = lay_out(0, 0, 0)
    for node in shown[1:]:
        kept = node in call.path
        (x0, y0), (x1, y1) = place[call.parents[node]], place[node]
        axes.plot([x0, x1], [y0, y1], color="C2" if kept else "0.8", linewidth=2 if kept else 0.8, zorder=1)
    boxes = {node: call.tokens[node] for node in shown}
    depth, height = place[call.path[-1]] if call.path else (0, 0)
    for node, token in boxes.items():
        colour = "C2" if node in call.path else "white"
        _box(axes, place[node], _shown(tokenizer, token), colour)
    if call.gained:
        end = (depth + 0.55, height + 0.0)
        axes.annotate(
            _shown(tokenizer, call.gained[-1]),
            end,
            fontsize=7,
            color="C3",
            family="monospace",
            va="center",
            zorder=3,
        )
    axes.set(ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    axes.margins(x=0.15)
    axes.spines[:].set_visible(False)


def _box(axes: "Axes", place: tuple[float, float], text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "0.6", "linewidth": 0.6}
    axes.text(*place, text, fontsize=7, family="monospace", ha="center", va="center", bbox=style, zorder=2)


def _shown(tokenizer: "Tokenizer", token: int) -> str:
    return repr(tokenizer.decode([token]))[1:-1].replace(" ", "␣") or "∅"
