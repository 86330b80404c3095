"""Union of Experts against a standard SMoE and dense models, on text and images; and slices of a trained dense model.

UoE, SMoE and the half model have as many parameters at work on a token; the dense model, "full attention", has those of
all slices at work. All arms of a family see the same data in the same number of updates, under an optimizer that works
element by element, so that it makes no difference how a matrix is cut. Floating-point operations are XLA's count of the
forward pass, of experts with exactly the places that tokens need.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import uoe
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.matformer import byte_tokenizer
from research.config import build, of
from research.data.images import ImageDataset
from research.data.text import TokenDataset
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.moe.selective_attention import SMHA
from research.moe.union import UoME, to_union, union_model
from research.nn.accounting import count_bytes, count_flops
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block, LayerStack
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.paths import named_leaves
from research.training.stages import Stage
from research.training.task import Classification, LanguageModelling, Task
from research.training.workdir import load_model, open_workdir
from research.vision.vit import ViT

LENGTH, TEXT_BATCH, TEXT_STEPS = 128, 8, 120
IMAGE_BATCH, IMAGE_STEPS = 64, 100
MORE_STEPS = TEXT_STEPS // 4  # with half the slices, from the dense model
RATE = 4e-3
SLICES, HELD_OUT = 4, 192
SHARES = (1.0, 0.75, 0.5, 0.25)  # of a dense model's slices


def text_model(kind: str) -> ConfigDict:
    """4 layers of width 64 over bytes: 8 heads of 8 and 256 hidden units in all."""
    width, heads, units = 64, 8, 256
    if kind.startswith("UoE"):
        slices = dict(num_experts=SLICES, k=SLICES // 2, hidden_dim=units // SLICES)
        both = dict(capacity_factor=1.25) | (dict(norm="unit") if kind == "UoE unit" else {})
        return uoe.decoder(width, 4, heads, heads // 2, slices, LENGTH, 259, **both)
    active = heads if kind == "dense" else heads // 2
    attention = of(Attention, num_heads=active, head_dim=width // heads, rotary=of(Rotary))
    block = of(Block, attention=attention, mlp=feed_forward(kind, units))
    return of(DecoderLM, vocab_size=259, width=width, max_length=LENGTH, num_layers=4, blocks=(block,))


def image_model(kind: str) -> ConfigDict:
    """4 layers of width 32 over 16 patches: 4 heads of 8 and 128 hidden units in all."""
    width, heads, units = 32, 4, 128
    sizes = dict(num_classes=10, patch=2)
    if kind.startswith("UoE"):
        slots = dict(capacity_factor=1.0) | (dict(norm="unit") if kind == "UoE unit" else {})
        slices = dict(num_experts=SLICES, k=SLICES // 2, hidden_dim=units // SLICES)
        how = dict(selection="sample") if kind == "UoE by sample" else dict(selection="ranked", **slots)
        return uoe.vit(width, 4, heads, heads // 2, slices | how, slots, **sizes)
    active = heads if kind == "dense" else heads // 2
    biases = dict(use_bias=True, output_bias=True)
    attention = of(Attention, num_heads=active, head_dim=width // heads, rule=of(Full), **biases)
    block = of(Block, attention=attention, mlp=feed_forward(kind, units), norm=of(LayerNorm))
    return of(ViT, width=width, num_layers=4, blocks=(block,), **sizes)


def feed_forward(kind: str, units: int) -> ConfigDict:
    if kind != "SMoE":
        return of(MLP, hidden_dim=units if kind == "dense" else units // 2)
    experts = dict(num_experts=SLICES, k=SLICES // 2, hidden_dim=units // SLICES)
    return of(MoE, activation="gelu", gated=False, use_bias=True, router_bias=True, **experts)


def text(kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """A language model over bytes, measured on held-out files."""
    tokenizer = byte_tokenizer(workdir)
    task = of(LanguageModelling, model=text_model(kind))
    data = of(TokenDataset, length=LENGTH, tokenizer=tokenizer, seed=seed)
    model, params = fit(task, data, TEXT_STEPS, TEXT_BATCH, seed, workdir / "run", progress)
    measured = text_loss(model, params, tokenizer)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return measured | costs(model, params, tokens, LENGTH) | {"budget": TEXT_STEPS * TEXT_BATCH * LENGTH}


def image(
    kind: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """A vision transformer on digits, measured on held-out ones."""
    task = of(Classification, model=image_model(kind), image_shape=(8, 8, 1))
    model, params = fit(
        task, of(ImageDataset, seed=seed), IMAGE_STEPS, IMAGE_BATCH, seed, workdir / "run", progress
    )
    held_out = build(of(ImageDataset, split="test", shuffle=False))
    metrics = evaluation(build(task))(params, held_out.take(np.arange(len(held_out))))
    measured = {name: float(metrics[name][0] / metrics[name][1]) for name in ("loss", "accuracy")}
    pixels = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    return measured | costs(model, params, pixels, 16) | {"budget": IMAGE_STEPS * IMAGE_BATCH * 16}


def cut(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The dense text model as a union with fewer and fewer slices at work, and trained a little further with half."""
    dense = load_model(needs["text dense"].workdir / "run")
    tokenizer = byte_tokenizer(workdir)
    heads = dense.model.blocks[0].attention.num_heads
    params = to_union(dense.params, SLICES, heads, jax.random.key(seed))
    losses = []
    for share in SHARES:
        model = union_model(dense.model, SLICES, round(share * SLICES), round(share * heads))
        losses.append(text_loss(model, params, tokenizer)["loss"])
    half = text_model("UoE")
    data = of(TokenDataset, length=LENGTH, tokenizer=tokenizer, seed=seed + 1000)
    task = of(LanguageModelling, model=half)
    model, params = fit(task, data, MORE_STEPS, TEXT_BATCH, seed, workdir / "run", progress, params)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return {
        "cut losses": losses,
        **text_loss(model, params, tokenizer),
        **costs(model, params, tokens, LENGTH),
        "budget": (TEXT_STEPS + MORE_STEPS) * TEXT_BATCH * LENGTH,
    }


def fit(
    task: ConfigDict,
    data: ConfigDict,
    steps: int,
    batch_size: int,
    seed: int,
    workdir: Path,
    progress: Progress,
    params: Any = None,
) -> tuple[LayerStack, Any]:
    """-> model and parameters after `steps` updates."""
    optimizer = of(adamw, schedule=of(cosine, peak=RATE, warmup=20, floor=0.05))
    stage = of(Stage, name="train", steps=steps, batch_size=batch_size, optimizer=optimizer)
    config = of(Trainer, task=task, data=data, stages=(stage,), seed=seed, checkpoint_every=steps)
    trainer = build(config)
    progress(0.05, f"{steps} steps")
    with open_workdir(workdir, config) as place:
        state, _ = trainer.train(place, params=params, progress=False)
    progress(0.8, "measuring")
    return trainer.task.model, state.params


def text_loss(model: LayerStack, params: Any, tokenizer: str) -> dict[str, float]:
    metrics = evaluation(LanguageModelling(model))(params, held_out_text(tokenizer))
    return {name: float(metrics[name][0] / metrics[name][1]) for name in ("loss", "accuracy")}


@functools.cache
def evaluation(task: Task):
    """Compiled once for all seeds."""
    return jax.jit(task.evaluate)


@functools.cache
def held_out_text(tokenizer: str) -> dict[str, np.ndarray]:
    data = build(of(TokenDataset, split="test", length=LENGTH, tokenizer=tokenizer, shuffle=False))
    return data.take(np.arange(HELD_OUT))


def costs(model: LayerStack, params: Any, inputs: jax.ShapeDtypeStruct, length: int) -> dict[str, float]:
    """What works on a token, and what there is."""
    return {
        "active parameters": active_parameters(model, params) / 1e6,
        "forward": forward_flops(model, inputs) / length / 1e6,
        "bytes": count_bytes(params),
    }


def active_parameters(model: LayerStack, params: Any) -> float:
    """Parameters that work on a token: those of the chosen experts and heads, and all others."""
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    shares = {"/experts/": mlp.k / mlp.num_experts if hasattr(mlp, "num_experts") else 1.0}
    if isinstance(attention, SMHA):
        chosen = attention.k / attention.num_heads
        shares |= {f"/attention/{name}/": chosen for name in ("query", "key", "value", "output")}

    def share(path: str) -> float:
        return next((value for part, value in shares.items() if part in path), 1.0)

    return sum(leaf.size * share(path) for path, leaf in named_leaves(params).items())


@functools.cache
def forward_flops(model: LayerStack, inputs: jax.ShapeDtypeStruct) -> float:
    """FLOPs of one sequence, with places for just the tokens of even routing. Counted once for all seeds."""

    def exact(part: nn.Module) -> nn.Module:
        if not hasattr(part, "capacity_factor"):
            return part
        places = dict(capacity_factor=1.0, dispatch="capacity")
        if isinstance(part, UoME) and part.selection == "sample":
            places["selection"] = "ranked"  # as many slices at work, behind a gate as wide as a token
        return part.clone(**places)

    blocks = tuple(
        block.clone(attention=exact(block.attention), mlp=exact(block.mlp)) for block in model.blocks
    )
    model = model.clone(blocks=blocks)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return count_flops(model.apply, params, inputs)


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Yes, if UoE's loss is below SMoE's with every seed on text and on images, at no more than 1.05 times its FLOPs;
    partly, if it is so for one of the two, or UoE is on average within 1 % of SMoE on both; else no."""
    below, near, sentences = [], [], []
    for family, unit in (("text", "nats a byte"), ("image", "nats an image")):

        def gap(other: str, arm: str = "UoE", family: str = family) -> float:
            return mean(results, f"{family} {arm}", "loss") - mean(results, f"{family} {other}", "loss")

        pairs = zip(results[f"{family} UoE"]["loss"], results[f"{family} SMoE"]["loss"], strict=True)
        work = mean(results, f"{family} UoE", "forward") / mean(results, f"{family} SMoE", "forward")
        below.append(all(mine < other for mine, other in pairs) and work <= 1.05)
        near.append(gap("SMoE") <= 0.01 * mean(results, f"{family} SMoE", "loss"))
        spread = max(
            max(arm["loss"]) - min(arm["loss"]) for name, arm in results.items() if name.startswith(family)
        )
        sentences.append(
            f"{family}, {unit}: UoE minus SMoE {gap('SMoE'):+.3f} at {work:.2f} times its FLOPs, minus the half model "
            f"{gap('half'):+.3f}, minus dense {gap('dense'):+.3f}; the router trained straight through minus "
            f"untrained {gap('UoE unit'):+.3f} (seeds are up to {spread:.3f} apart)"
        )
    by_sample = mean(results, "image UoE by sample", "loss") - mean(results, "image UoE", "loss")
    losses = np.mean(results["text UoE from dense"]["cut losses"], axis=0)
    sentences[-1] += f", slices chosen by image minus by patch {by_sample:+.3f}"
    steps = ", ".join(f"{share:.0%} {loss:.2f}" for share, loss in zip(SHARES, losses, strict=True))
    after = mean(results, "text UoE from dense", "loss")
    sentences.append(
        f"a trained dense model with fewer of its slices at work: {steps} nats a byte, and with half of them "
        f"{after:.2f} after {MORE_STEPS} more updates"
    )
    verdict = "yes" if all(below) else "partly" if any(below) or all(near) else "no"
    return verdict, "; ".join(sentences) + "."


def figure(results: Results, path: Path) -> None:
    """Loss against FLOPs for text and images, and a dense model with fewer slices at work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    colours = {
        "dense": "C7",
        "half": "C9",
        "SMoE": "C0",
        "UoE": "C3",
        "UoE unit": "C1",
        "UoE by sample": "C4",
    }
    for panel, family, unit in zip(panels, ("text", "image"), ("byte", "image"), strict=False):
        for kind, colour in colours.items():
            arm = results.get(f"{family} {kind}")
            if arm is not None:
                # A little apart, as some arms cost exactly the same.
                work = mean(results, f"{family} {kind}", "forward") * (1 + 0.012 * list(colours).index(kind))
                panel.errorbar(
                    work,
                    np.mean(arm["loss"]),
                    np.std(arm["loss"]),
                    fmt="o",
                    color=colour,
                    label=kind,
                    capsize=3,
                )
        panel.set(xlabel="MFLOP a token", ylabel=f"held-out loss, nats per {unit}", title=family)
        panel.legend(fontsize=8)
    arm = results["text UoE from dense"]
    for losses in arm["cut losses"]:
        panels[2].plot(SHARES, losses, "o-", color="C7", alpha=0.6)
    panels[2].plot([0.5] * len(arm["loss"]), arm["loss"], "s", color="C3", label=f"{MORE_STEPS} more updates")
    panels[2].axhline(mean(results, "text UoE", "loss"), color="C3", linestyle=":", label="UoE from scratch")
    panels[2].set(
        xlabel="share of slices and heads at work",
        ylabel="held-out loss, nats per byte",
        title="cut from a dense model, one line a seed",
    )
    panels[2].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


KINDS = {
    "dense": "everything at work on every token",
    "half": "a dense model of half the heads and hidden units",
    "SMoE": "half the heads, top-2 of 4 independent experts with a balance loss",
    "UoE": "half of the heads and slices for every token, router trained straight through",
    "UoE unit": "the same with weights of 1: the router stays as it was drawn",
}

CLAIM = Claim(
    system="uoe",
    paper="arXiv 2503.02495, abstract",
    statement="UoE surpasses full attention and state-of-the-art MoEs: perplexity 2.38 lower than the best MoE's with "
    "76 % of its FLOPs, accuracy of image classification 1.75 % higher at comparable FLOPs.",
    setting="Text: 4 layers of width 64, 8 heads, 256 hidden units, bytes of Python's standard library, 120 updates of "
    "8 x 128 bytes. Images: ViT of 4 layers of width 32, 4 heads, 128 hidden units, scikit-learn's 8x8 digits, 100 "
    "updates of 64. 4 slices of an MLP, half of slices and heads for a token; causal slots for 1.25 times even routing "
    "in text, ranked ones in images. AdamW, one learning rate for all; two seeds. The other MoEs of the paper and "
    "its long sequences are out of reach here.",
    measures={
        "loss": "nats, held out",
        "accuracy": "share",
        "active parameters": "million a token",
        "forward": "MFLOP a token",
        "cut losses": "nats, by share of slices",
    },
    budget="training tokens",
    arms={
        **{f"text {kind}": Arm(functools.partial(text, kind), what) for kind, what in KINDS.items()},
        "text UoE from dense": Arm(
            cut, "the dense model's slices, half of them, trained a little further", needs=("text dense",)
        ),
        **{f"image {kind}": Arm(functools.partial(image, kind), what) for kind, what in KINDS.items()},
        "image UoE by sample": Arm(
            functools.partial(image, "UoE by sample"), "the slices of an image's MLPs chosen once (UoME-ES)"
        ),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
