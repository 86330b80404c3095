"""JetMoE: sparse attention and sparse FFNs, against FFN experts alone and dense models, at equal active parameters.

All models see the same text in the same number of updates. What is equal is the number of parameters that work on a
token; what differs is how many there are, and what a cache holds. Floating-point operations are XLA's count of the
forward pass over one sequence, of experts with exactly as many places as tokens need.
"""

import functools
import json
import statistics
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import jetmoe, matlm
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.matformer import byte_tokenizer
from research.config import build, of
from research.data.text import TokenDataset
from research.language.decoder import DecoderLM
from research.moe.layer import MoE
from research.nn.accounting import count_bytes, count_flops, count_parameters
from research.nn.attention import Attention
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import muon, wsd
from research.training.paths import named_leaves
from research.training.stages import Stage
from research.training.task import LanguageModelling
from research.training.workdir import open_workdir

STEPS, BATCH, LENGTH = 640, 8, 128
EVERY = 80
RATE = 1e-2
HELD_OUT = 192  # sequences
WIDTH, LAYERS, HEAD_DIM, VOCAB = 64, 4, 16, 259
EXPERTS, K = 8, 2


def dense() -> ConfigDict:
    return matlm.decoder(WIDTH, LAYERS, WIDTH // HEAD_DIM, 134, LENGTH, VOCAB, num_kv_heads=2)


def ffn_experts(hidden_dim: int, num_kv_heads: int) -> ConfigDict:
    heads = dict(num_heads=WIDTH // HEAD_DIM, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM)
    mlp = of(MoE, num_experts=EXPERTS, k=K, hidden_dim=hidden_dim, balance_weight=0.01, z_weight=0.001)
    block = of(Block, attention=of(Attention, rotary=of(Rotary), **heads), mlp=mlp)
    sizes = dict(vocab_size=VOCAB, width=WIDTH, max_length=LENGTH, num_layers=LAYERS)
    return of(DecoderLM, blocks=(block,), **sizes)


def both() -> ConfigDict:
    return jetmoe.decoder(WIDTH, LAYERS, 2, HEAD_DIM, 64, LENGTH, VOCAB, num_experts=EXPERTS, k=K)


# A layer has 38 000 parameters that work on a token in all of them. All have four query heads a token; two key heads
# halve the cache.
MODELS = {
    "dense": dense,
    "FFN experts": functools.partial(ffn_experts, hidden_dim=66, num_kv_heads=2),
    "FFN experts, 4 key heads": functools.partial(ffn_experts, hidden_dim=55, num_kv_heads=4),
    "JetMoE": both,
}


def run(name: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Trains one model, measuring it on held-out text as it goes."""
    tokenizer = byte_tokenizer(workdir)
    data = functools.partial(of, TokenDataset, length=LENGTH, tokenizer=tokenizer)
    optimizer = of(muon, schedule=of(wsd, peak=RATE, warmup=30, decay=0.5, floor=0.02))
    held_out = data(split="test", shuffle=False)
    config = of(
        Trainer,
        task=of(LanguageModelling, model=MODELS[name]()),
        data=data(split="train", seed=seed),
        stages=(of(Stage, name="train", steps=STEPS, batch_size=BATCH, optimizer=optimizer),),
        evaluators=(of(Evaluate, name="test", data=held_out, every=EVERY, batches=HELD_OUT // 32),),
        seed=seed,
        checkpoint_every=STEPS,
    )
    trainer = build(config)
    progress(0.05, f"{STEPS} steps")
    with open_workdir(workdir / "run", config) as place:
        state, _ = trainer.train(place, progress=False)
    rows = [json.loads(line) for line in (workdir / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["kind"] == "eval"]
    model = trainer.task.model
    return {
        "loss": measured[-1]["loss"],
        "curve": [row["loss"] for row in measured],
        "parameters": count_parameters(state.params) / 1e6,
        "active parameters": active_parameters(state.params) / 1e6,
        "forward": forward_flops(model) / LENGTH / 1e6,
        "cache": cache_bytes(model),
        "fullest expert": fullest_expert(measured[-1]),
        "budget": STEPS * BATCH * LENGTH,
        "bytes": count_bytes(state.params),
    }


def active_parameters(params: Any) -> float:
    """Parameters that work on a token: of every k experts in E."""
    return sum(
        leaf.size * (K / EXPERTS if "/experts/" in path else 1.0)
        for path, leaf in named_leaves(params).items()
    )


def forward_flops(model: DecoderLM) -> float:
    """FLOPs of one sequence. With a capacity of 1 experts have k / E of the tokens each, which is what they compute
    where choices are even; the loops of a dispatch that drops nothing would be counted once."""

    def exact(part: nn.Module) -> nn.Module:
        return (
            part.clone(dispatch="capacity", capacity_factor=1.0) if hasattr(part, "capacity_factor") else part
        )

    blocks = (block.clone(attention=exact(block.attention), mlp=exact(block.mlp)) for block in model.blocks)
    model = model.clone(blocks=tuple(blocks))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return count_flops(model.apply, params, tokens)


def cache_bytes(model: DecoderLM) -> int:
    """Bytes of the cache of one token, in float32."""
    cache = jax.eval_shape(lambda: model.init_cache(1, LENGTH)).layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // LENGTH


def fullest_expert(row: dict[str, Any]) -> float:
    """Load of the fullest expert over the mean, on average over the layers that route; 1 where none does."""
    found = [value for name, value in row.items() if name.endswith("/max_over_mean")]
    return statistics.fmean(found) if found else 1.0


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Holds if, at equal active parameters, JetMoE's loss is below the dense model's with every seed, no more than the
    spread of seeds above those of models with experts in the FFN alone, and its cache half of what four key heads need;
    partly, if it beats the dense model alone."""
    gaps = {name: mean(results, "JetMoE", "loss") - mean(results, name, "loss") for name in MODELS}
    mine, others = results["JetMoE"]["loss"], results["dense"]["loss"]
    every_seed = all(a < b for a, b in zip(mine, others, strict=True))
    spread = max(max(results[name]["loss"]) - min(results[name]["loss"]) for name in MODELS)
    cache = mean(results, "JetMoE", "cache") / mean(results, "FFN experts, 4 key heads", "cache")
    level = max(gaps["FFN experts"], gaps["FFN experts, 4 key heads"]) <= spread
    verdict = "yes" if every_seed and level and cache <= 0.5 else "partly" if every_seed else "no"
    sizes, works, work = (
        [mean(results, name, measure) for name in MODELS]
        for measure in ("parameters", "active parameters", "forward")
    )
    return verdict, (
        f"JetMoE minus dense {gaps['dense']:+.3f} nats a byte, minus FFN experts {gaps['FFN experts']:+.3f}, with 4 "
        f"key heads {gaps['FFN experts, 4 key heads']:+.3f} (seeds are up to {spread:.3f} apart); {sizes[3]:.2f}M "
        f"parameters against {sizes[0]:.2f}M, {sizes[1]:.2f}M and {sizes[2]:.2f}M, of which {min(works):.3f} to "
        f"{max(works):.3f}M work on a token, in {min(work):.2f} to {max(work):.2f} MFLOP; its cache is as large as "
        f"that of two key heads, {cache:.0%} of that of four."
    )


def figure(results: Results, path: Path) -> None:
    """Loss over training, and the final loss against the parameters that exist."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), constrained_layout=True)
    for colour, name in zip(("C7", "C0", "C9", "C3"), MODELS, strict=True):
        curves = np.asarray(results[name]["curve"])
        steps = np.linspace(0, STEPS, curves.shape[1] + 1)[1:]
        left.plot(steps, curves.mean(axis=0), "o-", color=colour, label=name, markersize=3)
        left.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2)
        size, works = mean(results, name, "parameters"), mean(results, name, "active parameters")
        losses = results[name]["loss"]
        right.plot([works, size], [np.mean(losses)] * 2, ":", color=colour)
        right.plot([size] * len(losses), losses, "o", color=colour, label=name)
        right.plot(works, np.mean(losses), "|", color=colour, markersize=12)
        right.annotate(f" {mean(results, name, 'cache'):.0f} B/token", (size, np.mean(losses)), fontsize=8)
    left.set(xlabel="updates", ylabel="held-out loss, nats per byte")
    left.legend(fontsize=8)
    right.set(
        xlabel="million parameters (bar: at work on a token)",
        ylabel="held-out loss, nats per byte",
        title="size, and bytes of cache",
    )
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="jetmoe",
    paper="arXiv 2404.07413, abstract and sections 3 and 6",
    statement="A model whose attention and FFNs are both sparse mixtures is better than dense models of similar "
    "training and inference computation.",
    setting=f"4 layers of width 64, byte-level, on Python's standard library: {STEPS} updates of 8 x 128 bytes, Muon "
    "with one learning rate for all. JetMoE: top-2 of 8 experts in attention (2 key heads of 16) and FFN (64 units). "
    "FFN experts alone: 4 query heads over 2 key heads, 66 units; and 4 key heads, 55 units. Dense: 4 query heads over "
    "2, 134 units. Two seeds; the benchmarks of the paper are out of reach of models this small.",
    measures={
        "loss": "nats/byte, held out",
        "curve": "nats/byte at each evaluation",
        "parameters": "million",
        "active parameters": "million a token",
        "forward": "MFLOP a token",
        "cache": "bytes a token, float32",
        "fullest expert": "load over the mean, held out",
    },
    budget="training bytes",
    arms={
        "dense": Arm(functools.partial(run, "dense"), "an ordinary decoder, grouped queries"),
        "FFN experts": Arm(functools.partial(run, "FFN experts"), "experts in the FFNs, grouped queries"),
        "FFN experts, 4 key heads": Arm(
            functools.partial(run, "FFN experts, 4 key heads"),
            "the same with a key head for every query head",
        ),
        "JetMoE": Arm(functools.partial(run, "JetMoE"), "experts in attention and FFNs"),
    },
    judge=judge,
    figure=figure,
    seeds=(0, 1),
)
