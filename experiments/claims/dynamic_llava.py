"""Dynamic-LLaVA against the dense model, random image tokens and the most attended ones (FastV), on generated glyphs.

One dense decoder is trained for all arms; every trained arm then goes on for as many updates. The answers are forced,
so that all arms are measured on the same tokens; what is dropped is dropped as in decoding, which the tests show to be
the same numbers. A picture's own tokens never count.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import dynamic_llava
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.glyphs import GlyphAnswers
from research.language.decoder import DecoderLM
from research.multimodal.dynamic_llava import DynamicLM, Sparsity, dynamic
from research.nn.accounting import count_bytes
from research.nn.attention_kernels import DenseAttention, group_queries
from research.sparse.tokens import keep_best
from research.training.loop import Trainer
from research.training.task import LanguageModelling, language_metrics
from research.training.workdir import load_model, open_workdir

DENSE_STEPS, MORE_STEPS, BATCH, ROWS = 160, 80, 16, 64


def dense(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The decoder that all begin with, and then as many updates more as the others have."""
    data = GlyphAnswers()
    model = of(DecoderLM, **dynamic_llava.toy_decoder(data))
    fit(of(LanguageModelling, model=model), DENSE_STEPS, seed, workdir / "first")
    progress(0.6, "the same again")
    first = str(workdir / "first")
    fit(of(LanguageModelling, model=model, start_from=first), MORE_STEPS, seed + 100, workdir / "run")
    progress(0.9, "measuring")
    loaded = load_model(workdir / "run")
    sparse, params = undecided(loaded)
    whole = jnp.ones((ROWS, data.image[1])), jnp.ones((ROWS, data.length))
    return measured(sparse, params, *whole) | costs(params)


def pruned(
    kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """As many image tokens as are learned to stay, untrained: random ones or the most attended."""
    loaded = load_model(needs["dense"].workdir / "run")
    sparse, params = undecided(loaded)
    data, batch = GlyphAnswers(), held_out()
    if kind == "random":
        scores = jax.random.uniform(jax.random.key(seed), (ROWS, data.image[1]))
    else:
        scores = attention_to_image(loaded.model, loaded.params, batch["tokens"][:, : data.prompt])
    kept = keep_best(scores, jnp.ones(scores.shape, bool), sparse.sparsity.kept)
    return measured(sparse, params, kept, jnp.ones((ROWS, data.length))) | costs(params)


def learned(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Predictors and decoder trained together, from the dense one."""
    data = GlyphAnswers()
    task = dynamic_llava.training(
        dynamic_llava.toy_decoder(data),
        of(Sparsity, image=data.image, **dynamic_llava.SPARSITY),
        MORE_STEPS,
        start_from=str(needs["dense"].workdir / "first"),
    )
    fit(task, MORE_STEPS, seed + 100, workdir / "run")
    progress(0.8, "measuring")
    loaded = load_model(workdir / "run")
    own = measured(loaded.model, loaded.params, None, None)
    text = measured(loaded.model, loaded.params, None, jnp.ones((ROWS, data.length)))
    named = {f"{name}, text whole": text[name] for name in ("accuracy", "glyphs")}
    return own | named | costs(loaded.params)


def fit(task: ConfigDict, steps: int, seed: int, workdir: Path) -> None:
    stage = dynamic_llava.stage(steps, BATCH)
    data = of(GlyphAnswers, seed=seed)
    config = of(Trainer, task=task, data=data, stages=(stage,), seed=seed, checkpoint_every=steps)
    with open_workdir(workdir, config) as place:
        build(config).train(place, progress=False)


def undecided(loaded: Any) -> tuple[DynamicLM, Any]:
    """A dense decoder whose masks are given from outside."""
    data = GlyphAnswers()
    sparsity = Sparsity(data.image, **dynamic_llava.SPARSITY)
    return dynamic(loaded.model, loaded.params, jax.random.key(0), sparsity)


@functools.cache
def held_out() -> dict[str, np.ndarray]:
    return GlyphAnswers(split="test", size=ROWS).take(np.arange(ROWS))


@functools.lru_cache(maxsize=4)
def program(model: DynamicLM):
    def run(params: Any, batch: dict[str, jax.Array], image_keep: Any, text_keep: Any) -> tuple:
        places = (batch[name] for name in ("tokens", "positions", "segments", "prompt"))
        masks = dict(image_keep=image_keep, text_keep=text_keep)
        return model.apply({"params": params}, *places, method="policy_logits", **masks)

    return jax.jit(run)


def measured(model: DynamicLM, params: Any, image_keep: Any, text_keep: Any) -> dict[str, float]:
    """Of held-out answers: nats, right tokens, right colours and shapes, and what is held above the first layers."""
    data, batch = GlyphAnswers(), held_out()
    logits, image, text = program(model)(params, batch, image_keep, text_keep)
    metrics, _ = language_metrics(logits, batch)
    found = np.asarray(jnp.argmax(logits, axis=-1)) == batch["targets"]
    glyph = (batch["targets"] >= data.starts["shape"]) & (batch["targets"] < data.starts["glyph"])
    glyph &= batch["weights"] > 0
    answer = (np.arange(data.length) >= data.prompt) & (batch["segments"] > 0)
    held = 4 + np.asarray(image).sum(axis=1) + (np.asarray(text) * answer).sum(axis=1)
    return {
        "loss": float(metrics["loss"][0] / metrics["loss"][1]),
        "accuracy": float(metrics["accuracy"][0] / metrics["accuracy"][1]),
        "glyphs": float(found[glyph].mean()),
        "held": float(np.mean(held / batch["segments"].sum(axis=1))),
        "text kept": float((np.asarray(text) * answer).sum() / answer.sum()),
    }


def attention_to_image(model: DecoderLM, params: Any, tokens: jax.Array) -> jax.Array:
    """FastV's scores [B, n]: what the last token of the prompt attends to in the layer below the decision, a mean over
    heads."""
    start, count = GlyphAnswers().image
    layer = Sparsity((start, count)).layer - 1
    tap = Tap()
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    blocks[layer] = blocks[layer].clone(attention=blocks[layer].attention.clone(kernel=tap))
    model.clone(blocks=tuple(blocks)).apply({"params": params}, jnp.asarray(tokens))
    return tap.shares[:, start : start + count]


class Tap:
    """An attention kernel that writes down the shares of the last query."""

    def __call__(self, query, key, value, rule, *, scale, **places):
        kv_heads = key.shape[1]
        last = group_queries(query[:, :, -1:], kv_heads)
        shares = jax.nn.softmax(jnp.einsum("bhrd,bhkd->bhrk", last, key) * scale, axis=-1)
        self.shares = jnp.mean(shares, axis=(1, 2))
        return DenseAttention()(query, key, value, rule, scale=scale, **places)


def costs(params: Any) -> dict[str, float]:
    tokens = GlyphAnswers().length
    return {"budget": (DENSE_STEPS + MORE_STEPS) * BATCH * tokens, "bytes": count_bytes(params)}


def mean(results: Results, arm: str, name: str) -> float:
    return statistics.fmean(results[arm][name])


def judge(results: Results) -> tuple[str, str]:
    """Yes, if with a fifth of the image and about half of the text the answers lose at most two points of the dense
    model's right colours, shapes and places and beat random and attended image tokens; partly, if they beat both."""
    full, ours = mean(results, "dense", "glyphs"), mean(results, "learned", "glyphs")
    others = {kind: mean(results, kind, "glyphs") for kind in ("random", "attended")}
    beats = ours > max(others.values())
    near = full - ours <= 0.02 and abs(mean(results, "learned", "text kept") - 0.5) <= 0.05
    listed = ", ".join(f"{kind} {value:.3f}" for kind, value in others.items())
    return "yes" if beats and near else "partly" if beats else "no", (
        f"Right colours, shapes and places in answers: dense {full:.3f}, learned {ours:.3f} (with all of the text "
        f"{mean(results, 'learned', 'glyphs, text whole'):.3f}), untrained with as many image tokens {listed}; "
        f"{mean(results, 'learned', 'text kept'):.2f} of the answer's tokens are kept (0.5 wanted), and the layers "
        f"above hold {mean(results, 'learned', 'held'):.2f} of all keys and values."
    )


def figure(results: Results, path: Path) -> None:
    """Right words against what is held."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(5, 4), constrained_layout=True)
    for arm in results:
        panel.plot(results[arm]["held"], results[arm]["glyphs"], "o", label=arm)
    panel.set(xlabel="share of keys and values held above", ylabel="right colours, shapes, places")
    panel.legend()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="dynamic_llava",
    paper="arXiv 2412.00876, table 1",
    statement="With a fifth of the image tokens and about half of the generated ones, results are within a point of "
    "the full context's, and above those of other ways to drop as many image tokens.",
    setting="Generated pictures of 8 x 8 patch tokens with 6 to 10 glyphs, forced answers of 58 to 94 tokens; a "
    f"decoder of 4 layers of width 64 that drops in the third; {DENSE_STEPS} dense updates of {BATCH} "
    f"rows and {MORE_STEPS} more; two seeds. Not a vision-language model, and no photographs.",
    measures={
        "loss": "nats a token",
        "accuracy": "share of all answer tokens",
        "glyphs": "share of colours, shapes and places",
        "held": "share of keys and values above",
        "text kept": "share of answer tokens",
        "accuracy, text whole": "share",
        "glyphs, text whole": "share",
    },
    budget="training tokens",
    arms={
        "dense": Arm(dense, "everything is kept"),
        "learned": Arm(
            learned, "a fifth of the image and half of the answer, chosen by predictors", ("dense",)
        ),
        "random": Arm(
            functools.partial(pruned, "random"), "a fifth of the image at random, untrained", ("dense",)
        ),
        "attended": Arm(
            functools.partial(pruned, "attended"),
            "the most attended fifth of the image, untrained",
            ("dense",),
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
