"""TidalDecode against the dense model, the best tokens of every layer, Quest and the newest tokens.

Everything is decoded token by token, since prefill is dense. Three parts. Recall: in a small trained model any of whose
layers can find a value by its key, the layer that reads everything is kept from writing, so that the answer has to
come from layers that read k tokens. Text: the model that ships, on held-out code. Time: a step of an untrained model of
6 layers over random caches, all methods in turns, the fastest of several.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import matlm, tidal_decode
from experiments.claims import compressing
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build
from research.data.recall import Recall, needle
from research.nn.accounting import count_bytes
from research.nn.cache import Cache, DenseCache
from research.nn.transformer import LayerStack
from research.sparse.gathered import Selector, gathered
from research.sparse.selectors import EveryLayer, Newest, PagedCache, Quest
from research.sparse.tidal import Tidal, muted, overlap, profile
from research.sparse.traffic import cache_bytes
from research.training.probes import measure
from research.training.stepwise import Stepwise, stepwise_logits
from research.training.workdir import load_model, open_workdir

RECALL_K, RECALL_LENGTH, RECALL_ROWS = (2, 4, 8), 128, 64
TEXT_K, TEXT_LENGTH, TEXT_ROWS = (16, 64), 384, 8
OVERLAP_K, OVERLAP_TOKENS = 16, 32
CLOCK_K, CONTEXTS, REPEATS = 256, (1024, 8192, 32768), 7
KINDS = ("tidal", "every layer", "quest", "newest")


def selector(kind: str, k: int, reselect: int | None = None) -> Selector:
    """Layers 0 and 1 are dense in all of them, and TidalDecode's `reselect`."""
    return {
        "tidal": Tidal(k, select=1, reselect=reselect),
        "every layer": EveryLayer(k),
        "quest": Quest(k, page=max(k // 4, 1)),
        "newest": Newest(k, sinks=min(4, k // 2)),
    }[kind]


def train(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The dense model of recall, and what dense models do."""
    config = tidal_decode.tiny(seed)
    config.evaluators = ()
    progress(0.05, "training")
    with open_workdir(workdir / "run", config) as place:
        build(config).train(place, progress=False)
    progress(0.7, "measuring")
    model, params = trained(workdir)
    found = share_right(model, params), share_right(model, mute(params))
    return {
        "recall": [found[0]] * len(RECALL_K),
        "recall of sparse layers": [found[1]] * len(RECALL_K),
        "text": [nats(*base(), seed)] * len(TEXT_K),
        "budget": traffic(None, CONTEXTS[-1]),
        "bytes": count_bytes(params),
    }


def decode(
    kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    model, params = trained(needs["dense"].workdir)
    sparse = [gathered(model, params, selector(kind, k))[0] for k in RECALL_K]
    progress(0.1, "recall")
    measured = {
        "recall": [share_right(one, params) for one in sparse],
        "recall of sparse layers": [share_right(one, mute(params)) for one in sparse],
    }
    progress(0.4, "text")
    reselect = 3 if kind == "tidal" else None
    measured["text"] = [
        nats(gathered(*base(), selector(kind, k, reselect))[0], base()[1], seed) for k in TEXT_K
    ]
    if kind == "tidal":
        measured |= persistence(model, params, seed, progress)
    return measured | {
        "budget": traffic(selector(kind, CLOCK_K, 3), CONTEXTS[-1]),
        "bytes": count_bytes(params),
    }


def persistence(model: LayerStack, params: Any, seed: int, progress: Progress) -> dict[str, Any]:
    """Where k covers everything, and how alike neighbouring layers choose."""
    progress(0.7, "exactness, overlap, profile")
    tokens = jnp.asarray(recall_rows().take(np.arange(4))["tokens"])
    whole = gathered(model, params, selector("tidal", RECALL_LENGTH))[0]
    half = RECALL_LENGTH // 2
    exact, dense = (
        jax.jit(functools.partial(stepwise_logits, one, prompt=half))(params, tokens)
        for one in (whole, model)
    )
    prompt = TEXT_LENGTH - OVERLAP_TOKENS
    text = overlap(*base(), jnp.asarray(text_rows(seed)["tokens"]), prompt, OVERLAP_K)
    looped = overlap(model, params, tokens, half, RECALL_K[1])
    found = needle(RECALL_LENGTH, split="test", size=RECALL_ROWS)
    swept = profile(model, mute(params), selector("tidal", RECALL_K[1]), found, found.prompt - 1)
    return {
        "difference where k covers all": float(jnp.abs(exact - dense).max()),
        "overlap of neighbours, text": np.diagonal(text, 1),
        "overlap by distance, text": [float(np.diagonal(text, d).mean()) for d in range(1, len(text))],
        "overlap of neighbours, looped": np.diagonal(looped, 1),
        "needles by re-selection layer": [swept.accuracy[layer] for layer in sorted(swept.accuracy)],
        "needles, dense": swept.dense,
    }


def clock(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Milliseconds of a step of every method by context."""
    measured: dict[str, Any] = {f"{kind} step": [] for kind in ("dense", *KINDS)}
    for number, context in enumerate(CONTEXTS):
        progress(number / len(CONTEXTS), f"{context} tokens")
        cache = random_cache(context, seed)
        steps = [timed(kind, cache) for kind in ("dense", *KINDS)]
        turns = [[step() for step in steps] for _ in range(REPEATS)]
        for kind, seconds in zip(("dense", *KINDS), zip(*turns, strict=True), strict=True):
            measured[f"{kind} step"].append(1e3 * min(seconds))
    params = sized()[1]
    return measured | {"budget": traffic(None, CONTEXTS[-1]), "bytes": count_bytes(params)}


def random_cache(context: int, seed: int) -> Cache:
    """`context` random tokens, and room for a page more."""
    model, _ = sized()
    shapes = jax.eval_shape(lambda: model.init_cache(1, context + CLOCK_K // 4))
    rng = np.random.default_rng(seed)
    layers = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes.layers)
    return Cache(layers, jnp.full((1,), context, jnp.int32))


@functools.cache
def program(model: LayerStack):
    return jax.jit(lambda *arguments: model.apply(*arguments, method="extend")[0])


def timed(kind: str, cache: Cache) -> Callable[[], float]:
    """A function that runs a step and gives its seconds."""
    model, params = sized()
    if kind != "dense":
        model, params = gathered(model, params, selector(kind, CLOCK_K, 3))
    if kind == "quest":
        cache = cache.replace(layers=tuple(paged(layer) for layer in cache.layers))
    run, inputs = program(model), ({"params": params}, jnp.zeros((1, 1), jnp.int32), cache)
    run(*inputs).block_until_ready()

    def step() -> float:
        start = time.perf_counter()
        run(*inputs).block_until_ready()
        return time.perf_counter() - start

    return step


def paged(layer: DenseCache) -> PagedCache:
    pages = layer.key.reshape(*layer.key.shape[:2], -1, CLOCK_K // 4, layer.key.shape[3])
    return PagedCache(layer.key, layer.value, jnp.min(pages, axis=3), jnp.max(pages, axis=3))


@functools.cache
def sized() -> tuple[LayerStack, Any]:
    """The base model's sizes, untrained, and a longer context."""
    config = matlm.decoder(width=256, num_layers=6, num_heads=4, hidden_dim=1024, length=1 << 17)
    model = build(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@functools.cache
def traffic(chooser: Selector | None, context: int) -> int:
    model, params = sized()
    if chooser is not None:
        model, params = gathered(model, params, chooser)
    return cache_bytes(model, params, jax.eval_shape(lambda: model.init_cache(1, context)))


def trained(workdir: Path) -> tuple[LayerStack, Any]:
    loaded = load_model(workdir / "run")
    return loaded.model, loaded.params


def mute(params: Any) -> Any:
    """Layer 1, the selection layer, adds nothing; layer 0 sees the previous token alone."""
    return params | {"layer_1": muted(params["layer_1"])}


def recall_rows() -> Recall:
    return Recall(RECALL_LENGTH, split="test", size=RECALL_ROWS)


def share_right(model: LayerStack, params: Any) -> float:
    return measure(Stepwise(model, prompt=RECALL_LENGTH // 2), params, recall_rows())["accuracy"]


def base() -> tuple[LayerStack, Any]:
    loaded = compressing.base()
    return loaded.model, loaded.params


def text_rows(seed: int) -> dict[str, np.ndarray]:
    return compressing.unseen(TEXT_LENGTH, TEXT_ROWS, seed)


@functools.cache
def evaluation(model: LayerStack):
    """Compiled once for all seeds."""
    return jax.jit(Stepwise(model, prompt=TEXT_LENGTH // 2).evaluate)


def nats(model: LayerStack, params: Any, seed: int) -> float:
    total, weight = evaluation(model)(params, text_rows(seed))["loss"]
    return float(total / weight)


def judge(results: Results) -> tuple[str, str]:
    """Four parts: the logits are the dense ones where k covers everything; the longest step takes at most 0.6 of the
    dense one; sparse layers recall, at every k, within 0.05 of the best tokens of every layer and 0.2 more than the
    newest ones; text loses, at the larger k, at most 0.02 nats more than with the best tokens of every layer. Yes if
    all hold, no if fewer than two."""

    def curve(arm: str, name: str) -> np.ndarray:
        return np.mean(results[arm][name], axis=0)

    difference = max(results["tidal"]["difference where k covers all"])
    steps = {kind: curve("time", f"{kind} step") for kind in ("dense", *KINDS)}
    recall = {kind: curve(kind, "recall of sparse layers") for kind in ("dense", *KINDS)}
    loss = {kind: curve(kind, "text") - curve("dense", "text") for kind in KINDS}
    ratio = steps["tidal"] / steps["dense"]
    parts = {
        "exact": difference < 1e-3,
        "faster": ratio[-1] <= 0.6,
        "recall": bool(
            np.all(recall["tidal"] >= recall["every layer"] - 0.05)
            and np.all(recall["tidal"] >= recall["newest"] + 0.2)
        ),
        "text": bool(loss["tidal"][-1] <= loss["every layer"][-1] + 0.02),
    }
    verdict = "yes" if all(parts.values()) else "partly" if sum(parts.values()) >= 2 else "no"

    def listed(values: np.ndarray, form: str = ".2f") -> str:
        return "/".join(format(value, form) for value in values)

    read = {kind: statistics.fmean(results[kind]["budget"]) for kind in ("dense", *KINDS)}
    shares = ", ".join(f"{kind} {read[kind] / read['dense']:.2f}" for kind in KINDS)
    kept = "; ".join(f"{kind} {listed(recall[kind])}" for kind in KINDS)
    lost = "; ".join(f"{kind} {listed(loss[kind], '+.3f')}" for kind in KINDS)
    near, looped = (curve("tidal", f"overlap of neighbours, {what}") for what in ("text", "looped"))
    found = curve("tidal", "needles by re-selection layer")
    others = ", ".join(f"{kind} {listed(steps[kind] / steps['dense'])}" for kind in KINDS[1:])
    return verdict, (
        f"With k over everything logits differ by {difference:.1e}. A step at {'/'.join(map(str, CONTEXTS))} tokens "
        f"takes {listed(ratio)} of the dense one's {listed(steps['dense'], '.1f')} ms ({others}), with k={CLOCK_K}, "
        f"and reads at the longest this share of its bytes: {shares}. Recall by layers that read "
        f"k={'/'.join(map(str, RECALL_K))} tokens (dense {recall['dense'][0]:.2f}): {kept}. Nats a token lost on text "
        f"with k={'/'.join(map(str, TEXT_K))} of up to {TEXT_LENGTH}: {lost}; TidalDecode has 3 sparse layers of 6 "
        f"there, the others 4. Neighbouring layers share {listed(near)} of their best {OVERLAP_K} tokens in the base "
        f"model (chance {OVERLAP_K / TEXT_LENGTH:.2f}), {listed(looped)} of {RECALL_K[1]} in the looped one (chance "
        f"{RECALL_K[1] / RECALL_LENGTH:.2f}), which is one layer four times and so shows the mechanism rather than "
        f"that positions persist. Needles found with the second selection in layer 2, 3: {listed(found)} (dense "
        f"{statistics.fmean(results['tidal']['needles, dense']):.2f})."
    )


def figure(results: Results, path: Path) -> None:
    """Time against context, recall and lost nats against k, and overlap against distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 4, figsize=(17, 3.8), constrained_layout=True)

    def curve(arm: str, name: str) -> np.ndarray:
        return np.mean(results[arm][name], axis=0)

    colors = dict(zip(("dense", *KINDS), ("black", "C0", "C2", "C1", "C3"), strict=True))
    for kind, color in colors.items():
        panels[0].loglog(CONTEXTS, curve("time", f"{kind} step"), "o-", color=color, label=kind)
    panels[0].set(xlabel="tokens in the cache", ylabel="ms a step", title=f"decode step, k={CLOCK_K}")
    panels[0].set_xticks(CONTEXTS, [f"{n // 1024}k" for n in CONTEXTS])
    panels[0].minorticks_off()
    panels[0].legend()
    for i, (kind, color) in enumerate(colors.items()):
        # Several may lie on each other: wide lines below narrow ones.
        width = 9 - 1.7 * i
        panels[1].plot(
            RECALL_K, curve(kind, "recall of sparse layers"), color=color, linewidth=width, label=kind
        )
    panels[1].legend(loc="center right")
    panels[1].set(xlabel="k", ylabel="right answers", title="recall by sparse layers alone", xticks=RECALL_K)
    for i, kind in enumerate(KINDS):
        lost = curve(kind, "text") - curve("dense", "text")
        panels[2].bar(np.arange(len(TEXT_K)) + 0.2 * (i - 1.5), lost, 0.18, color=colors[kind], label=kind)
    panels[2].axhline(0, color="grey", linewidth=0.8)
    panels[2].set(
        xticks=range(len(TEXT_K)), xticklabels=TEXT_K, xlabel="k", ylabel="nats a token lost", title="text"
    )
    distance = curve("tidal", "overlap by distance, text")
    panels[3].plot(range(1, len(distance) + 1), distance, "o-", label=f"base model, best {OVERLAP_K}")
    panels[3].axhline(OVERLAP_K / TEXT_LENGTH, color="grey", linestyle=":", label="chance")
    panels[2].legend()
    panels[3].set(xlabel="layers apart", ylabel="share in common", title="overlap", ylim=(0, 1))
    panels[3].legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="tidal_decode",
    paper="arXiv 2410.05076, abstract and sections 4 and 5",
    statement="Neighbouring layers attend to much the same tokens, so two selection layers suffice for all: generation "
    "matches full attention while decoding takes up to 2.1 times less time.",
    setting="Recall: 4 looped layers of attention of width 64, 32 pairs and then 32 queries decoded one by one, the "
    "selection layer kept from writing. Text: the base model that ships (6 layers, s=1, c=3), held-out code, 192 "
    "tokens given and 192 read one by one. Time: 6 untrained layers of 4 heads of 64, s=1, c=3, float32, batch 1, CPU, "
    "random caches. Layers 0 and 1 are dense in all methods; Quest's pages are k/4 tokens. Two seeds, of training and "
    "of the text. Our models are too small for a gain over Quest to be claimed.",
    measures={
        "recall": "share right, by k",
        "recall of sparse layers": "share right, by k",
        "text": "nats, by k",
        "difference where k covers all": "logits",
        "overlap of neighbours, text": "share, by layer",
        "overlap by distance, text": "share, by distance",
        "overlap of neighbours, looped": "share, by layer",
        "needles by re-selection layer": "share found",
        "needles, dense": "share found",
        **{f"{kind} step": "ms, by context" for kind in ("dense", *KINDS)},
    },
    budget="bytes of cache read a step at 32,768 tokens",
    arms={
        "dense": Arm(train, "full attention everywhere"),
        "tidal": Arm(functools.partial(decode, "tidal"), "two layers choose for all", needs=("dense",)),
        "every layer": Arm(
            functools.partial(decode, "every layer"),
            "the best k of every layer, which reads all keys",
            ("dense",),
        ),
        "quest": Arm(functools.partial(decode, "quest"), "pages by their bounds, in every layer", ("dense",)),
        "newest": Arm(functools.partial(decode, "newest"), "the first few and the newest tokens", ("dense",)),
        "time": Arm(clock, "all of them in turns, untrained"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
