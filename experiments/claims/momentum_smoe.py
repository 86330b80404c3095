"""MomentumSMoE: momentum from MoE layer to MoE layer, on clean and attacked text, and on clean and corrupted images.

All arms of a family are one network: the same parameters, data and updates, another update of the residual stream. The
plain SMoE is the cell with mu = 0, so its residual branch can be scaled too: momentum adds the branches up to about
1 / (1 - mu) times, and a gain that scaling alone gives is not momentum's.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.momentum_smoe import ADAM, ROBUST, decoder, vmoe
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.corruptions import CORRUPTIONS, CorruptedImages
from research.data.images import ImageDataset
from research.data.text import TokenDataset
from research.data.token_swap import TokenSwap
from research.data.tokenizer import train as train_tokenizer
from research.moe.layer import MoE
from research.moe.momentum import HeavyBall
from research.nn.accounting import count_bytes
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.metrics import read_rows
from research.training.optimizers import muon, wsd
from research.training.stages import Stage
from research.training.task import Classification, LanguageModelling
from research.training.workdir import open_workdir

LAYERS = 4
LENGTH, TEXT_BATCH, TEXT_STEPS = 96, 8, 100
IMAGE_LAYERS, IMAGE_BATCH, IMAGE_STEPS = 6, 64, 80
ATTACK = 0.05  # share of the words
SEVERITY, STRENGTHS = 5, "cifar_c"  # of ImageNet-C's blurs nothing of 8 x 8 pixels is left
MUS = (-0.5, 0.0, 0.7)

Cells = tuple[ConfigDict, ...]


def heavy_ball(mu: float, gamma: float = 1.0) -> ConfigDict:
    """With frozen parameters for coefficients: all such arms are one program, compiled once."""
    return of(HeavyBall, mu=mu, gamma=gamma, learned=("mu", "gamma"))


def scaled(gamma: float) -> ConfigDict:
    """The plain SMoE with its residual branch times gamma."""
    return heavy_ball(0.0, gamma)


TEXT: dict[str, tuple[Cells, str]] = {
    "SMoE": ((scaled(1.0),), "plain residual"),
    "SMoE x 0.5": ((scaled(0.5),), "its residual branches halved"),
    "SMoE x 2": (
        (scaled(2.0),),
        "its residual branches doubled: nearly the mean weight that mu 0.7 gives in 4 layers",
    ),
    "heavy-ball": ((heavy_ball(0.7),), "mu 0.7, gamma 1"),
    "heavy-ball x 0.5": (
        (heavy_ball(0.7, 0.5),),
        "mu 0.7, gamma 0.5: nearly the plain residual's mean weight",
    ),
    "negative": ((heavy_ball(-0.3),), "mu -0.3, gamma 1"),
    "robust": ((ROBUST,), "kappa 75, L 1.9: mu 0.70, gamma 0.99, alpha 0.37"),
    "Adam": (ADAM, "Adam in layer 0, step size 0.1 and epsilon 1e-4, heavy-ball after it"),
}
IMAGES = {
    "V-MoE": (scaled(1.0), "plain residual"),
    "V-MoE x 2": (scaled(2.0), "its MoE branches doubled"),
    "V-MoE heavy-ball": (heavy_ball(0.7), "mu 0.7, gamma 1"),
    "V-MoE robust": (ROBUST, "kappa 75, L 1.9"),
}


def text(
    cells: Cells, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """A language model over bytes, evaluated on clean text and on text with some words replaced."""
    tokenizer = workdir.parents[3] / "bytes.json"
    if not tokenizer.exists():
        train_tokenizer([], vocab_size=259).save(tokenizer)
    rows = dict(length=LENGTH, tokenizer=str(tokenizer))
    experts = of(MoE, num_experts=8, k=2, hidden_dim=48, activation="relu", gated=False, router_bias=True)
    held_out = functools.partial(of, TokenDataset, split="test", shuffle=False, **rows)
    final, curve = fit(
        of(LanguageModelling, model=decoder(cells, 48, LAYERS, 4, experts, LENGTH, vocab_size=259)),
        of(TokenDataset, seed=seed, **rows),
        of(
            Stage,
            name="train",
            steps=TEXT_STEPS,
            batch_size=TEXT_BATCH,
            optimizer=of(muon, schedule=of(wsd, peak=2e-2, warmup=20, decay=0.3, floor=0.02)),
        ),
        (
            of(Evaluate, name="clean", data=held_out(), batch_size=64, batches=4),
            of(
                Evaluate,
                name="attacked",
                data=of(TokenSwap, data=held_out(), rate=ATTACK),
                batch_size=64,
                batches=4,
            ),
        ),
        seed,
        workdir,
        progress,
    )
    clean, attacked = (final[f"{name}/bits_per_byte"] for name in ("clean", "attacked"))
    return {
        "clean": clean,
        "attacked": attacked,
        "harm": attacked - clean,
        "output norms": [final[f"clean/layer_{i}/output_norm"] for i in range(LAYERS)],
        "curve": curve,
        "budget": TEXT_STEPS * TEXT_BATCH * LENGTH,
        "bytes": final["bytes"],
    }


def images(
    cell: ConfigDict, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """A V-MoE on digits, evaluated on clean images and under every kind of corruption."""
    experts = of(MoE, num_experts=8, k=2, hidden_dim=32, activation="gelu", gated=False, norm="softmax_topk")
    test = functools.partial(of, ImageDataset, split="test", shuffle=False)
    evaluators = [of(Evaluate, name="clean", data=test(), batch_size=183)]
    for kind in CORRUPTIONS:
        bad = of(CorruptedImages, data=test(), kind=kind, severity=SEVERITY, strengths=STRENGTHS)
        evaluators.append(of(Evaluate, name=kind, data=bad, batch_size=183))
    model = vmoe(cell, 32, IMAGE_LAYERS, 4, experts, 64, num_classes=10, patch=2)
    final, _ = fit(
        of(Classification, model=model, image_shape=(8, 8, 1)),
        of(ImageDataset, seed=seed),
        of(
            Stage,
            name="train",
            steps=IMAGE_STEPS,
            batch_size=IMAGE_BATCH,
            optimizer=of(muon, schedule=of(wsd, peak=2e-2, warmup=20, decay=0.5, floor=0.02)),
        ),
        tuple(evaluators),
        seed,
        workdir,
        progress,
    )
    errors = [1.0 - final[f"{kind}/accuracy"] for kind in CORRUPTIONS]
    return {
        "clean error": 1.0 - final["clean/accuracy"],
        "corrupted error": float(np.mean(errors)),
        "errors by kind": errors,
        "budget": IMAGE_STEPS * IMAGE_BATCH,
        "bytes": final["bytes"],
    }


def fit(
    task: ConfigDict,
    data: ConfigDict,
    stage: ConfigDict,
    evaluators: tuple[ConfigDict, ...],
    seed: int,
    workdir: Path,
    progress: Progress,
) -> tuple[dict[str, float], list[float]]:
    """-> final metrics with the `bytes` of the parameters, and the training loss every ten steps."""
    task.model.scan_layers = True  # short runs spend most of their time on tracing
    if any("learned" in block.get("momentum", {}) for block in task.model.blocks):
        stage.frozen = ("/momentum/",)
    config = of(
        Trainer,
        task=task,
        data=data,
        stages=(stage,),
        evaluators=evaluators,
        seed=seed,
        checkpoint_every=stage.steps,
    )
    progress(0.05, f"{stage.steps} steps")
    trainer = build(config)
    with open_workdir(workdir / "run", config) as run:
        state, final = trainer.train(run, progress=False)
        rows = [row for row in read_rows(run.metrics) if row["kind"] == "train"]
    curve = [row.get("cross_entropy", row["loss"]) for row in rows]
    return final | {"bytes": count_bytes(state.params)}, curve


def stability(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The largest gamma s at which 3000 layers of the cell with the frozen expert u = -s x still converge."""
    boundaries = [boundary(mu) for mu in MUS]
    return {"boundary": boundaries, "budget": 0, "bytes": 0}


def boundary(mu: float) -> float:
    """By running the cell on a grid of gamma s, all at once."""
    cell, steps = HeavyBall(mu), jnp.linspace(0.002, 4.0, 2000)
    start = jnp.ones_like(steps)

    @jax.jit
    def run():
        def layer(carry, _):
            return cell.step(carry[0], -steps * carry[0], carry[1]), None

        return jax.lax.scan(layer, (start, cell.start(start)), None, length=3000)[0][0]

    converges = np.abs(np.asarray(run())) < 1.0
    return float(steps[int(np.argmin(converges)) - 1])


def values(results: Results, arm: str, measure: str) -> np.ndarray:
    """One value a seed."""
    return np.asarray(results[arm][measure], float)


def best(results: Results, arms: tuple[str, ...], measure: str) -> str:
    return min(arms, key=lambda arm: values(results, arm, measure).mean())


def compared(
    results: Results, measure: str, methods: tuple[str, ...], baselines: tuple[str, ...]
) -> tuple[bool, str]:
    """The best of the methods against the best of the baselines: lower with every seed? And a phrase of the numbers."""
    method, baseline = best(results, methods, measure), best(results, baselines, measure)
    gap = values(results, method, measure) - values(results, baseline, measure)
    return bool(
        (gap < 0).all()
    ), f"{method} {gap.mean():+.3f} ({gap.min():+.3f} to {gap.max():+.3f}) from {baseline}"


def judge(results: Results) -> tuple[str, str]:
    """Momentum holds for a measure where its best arm beats the best plain arm, each scaled as suits it, with every
    seed; and in theory where the boundaries of stability are 2 (1 + mu)."""
    text_methods = ("heavy-ball", "heavy-ball x 0.5", "negative", "robust", "Adam")
    text_plain, image_plain = ("SMoE", "SMoE x 0.5", "SMoE x 2"), ("V-MoE", "V-MoE x 2")
    image_methods = ("V-MoE heavy-ball", "V-MoE robust")
    found = {
        "bits per byte of clean text": compared(results, "clean", text_methods, text_plain),
        "of attacked text": compared(results, "attacked", text_methods, text_plain),
        "harm of the attack": compared(results, "harm", text_methods, text_plain),
        "error on clean images": compared(results, "clean error", image_methods, image_plain),
        "on corrupted images": compared(results, "corrupted error", image_methods, image_plain),
    }
    boundaries = np.mean(results["stability"]["boundary"], axis=0)
    stable = bool(np.allclose(boundaries, 2 * (1 + np.asarray(MUS)), atol=0.01))
    held = [better for better, _ in found.values()]
    verdict = "yes" if stable and all(held) else "partly" if stable or any(held) else "no"
    told = "; ".join(f"{name}: {phrase}" for name, (_, phrase) in found.items())
    limits = ", ".join(f"{value:.2f} (mu {mu})" for mu, value in zip(MUS, boundaries, strict=True))
    return (
        verdict,
        f"{told}; the cell is stable up to gamma s = {limits}, as it should be." if stable else told + ".",
    )


def figure(results: Results, path: Path) -> None:
    """Stability, norms through depth, training loss, and what attack and corruption cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    (theory, norms), (curves, bars) = panels
    steps = np.linspace(0.01, 4.0, 400)
    for mu, found in zip(MUS, np.mean(results["stability"]["boundary"], axis=0), strict=True):
        matrices = [[[1 - step, mu], [-step, mu]] for step in steps]
        radius = np.abs(np.linalg.eigvals(np.asarray(matrices))).max(axis=1)
        (line,) = theory.plot(steps, radius, label=f"mu = {mu}")
        theory.plot(found, 1.0, "o", color=line.get_color())
    theory.axhline(1.0, color="0.7", linewidth=0.8)
    theory.set(
        xlabel="gamma s",
        ylabel="spectral radius",
        ylim=(0.4, 2.0),
        title="Frozen experts u = -s x; dots: run",
    )
    theory.legend(fontsize=8)
    for arm in TEXT:
        layers = np.mean(results[arm]["output norms"], axis=0)
        norms.plot(range(1, LAYERS + 1), layers, "o-", label=arm)
        curve = np.mean(results[arm]["curve"], axis=0)
        curves.plot(10 * np.arange(len(curve)), curve, label=arm)
    norms.set(
        xlabel="layer", ylabel="mean norm of its output", title="Text, clean", xticks=range(1, LAYERS + 1)
    )
    norms.legend(fontsize=8)
    curves.set(xlabel="update", ylabel="training loss, nats per byte", title="Text", ylim=(None, 3.5))
    curves.legend(fontsize=8)
    shown = ((TEXT, "clean", "attacked"), (IMAGES, "clean error", "corrupted error"))
    for place, (arms, clean, bad) in enumerate(shown):
        axis = bars if not place else bars.twinx()
        where = np.arange(len(arms)) + place * (len(TEXT) + 1)
        for measure, shift in ((clean, -0.2), (bad, 0.2)):
            data = np.asarray([results[arm][measure] for arm in arms])
            axis.errorbar(
                where + shift,
                data.mean(axis=1),
                np.ptp(data, axis=1) / 2,
                fmt="os"[place],
                capsize=3,
                color="C0" if measure == clean else "C3",
                label=measure,
            )
        axis.set_ylabel("share of images" if place else "bits per byte")
        axis.legend(fontsize=8, loc="center right" if place else "upper left")
    names = [*TEXT, "", *IMAGES]
    bars.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    bars.set_title("Held-out: mean and range over seeds")
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


CLAIM = Claim(
    system="momentum_smoe",
    paper="arXiv 2410.14574, abstract",
    statement="Momentum between the layers makes sparse mixtures of experts more stable and robust than SMoE, with "
    "lower perplexity on clean and attacked WikiText-103 and better accuracy on clean and corrupted ImageNet (V-MoE), "
    "at almost no cost.",
    setting="Text: 4 layers of width 48, top-2 of 8 experts of 48 units, bytes of Python's standard library, 100 "
    "updates of 768 bytes with Muon; attacked: 5 % of the words that the model reads become question marks, targets "
    "stay clean. Images: a V-MoE of 6 layers of width 32, experts in every other one, on scikit-learn's 8x8 digits, "
    "80 updates of 64 images with Muon; corrupted: the mean over 11 kinds of corruption at severity 5 of CIFAR-10-C. "
    "All arms of a family have the same parameters, data and updates. Three seeds.",
    measures={
        "clean": "bits per byte",
        "attacked": "bits per byte",
        "harm": "bits per byte, attacked minus clean",
        "clean error": "share",
        "corrupted error": "share, mean of 11 corruptions",
        "output norms": "layer by layer",
        "curve": "nats per byte every 10 updates",
        "errors by kind": "share, in the order of CORRUPTIONS",
        "boundary": f"largest stable gamma s for mu = {', '.join(map(str, MUS))}",
    },
    budget="training bytes or images",
    arms={
        **{name: Arm(functools.partial(text, cells), what) for name, (cells, what) in TEXT.items()},
        **{name: Arm(functools.partial(images, cell), what) for name, (cell, what) in IMAGES.items()},
        "stability": Arm(stability, "the cell alone around frozen linear experts"),
    },
    judge=judge,
    figure=figure,
)
