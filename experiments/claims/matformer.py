"""MatFormer: one nested model against models trained alone, on text (MatLM) and images (MatViT).

All arms of a family see the same data, and each arm the same number of updates, except "sampled", which draws one
granularity a step and spends the joint arm's compute on more steps. Joint training runs four granularities a step, so
its budget (training FLOPs) is that of training all four models alone.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import matlm, matvit
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from research.config import build, of
from research.data.images import ImageDataset
from research.data.text import TokenDataset
from research.data.tokenizer import train as train_tokenizer
from research.elastic.matformer import MatFormer, mix_n_match
from research.elastic.slicing import ElasticSpec, mlp_widths, nested_widths, slice_model, slice_params
from research.nn.accounting import count_bytes, count_flops, count_parameters
from research.nn.transformer import LayerStack
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import Classification, LanguageModelling
from research.training.workdir import load_model, open_workdir

LENGTH = 128  # bytes of a text record
SIZES = ("S", "M", "L", "XL")
DIVISORS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between MatLM and MatViT."""

    name: str
    steps: int
    batch_size: int
    hidden_dim: int
    held_out_records: int

    def model(self, divisor: int):
        if self.name == "text":
            return matlm.decoder(96, 4, 4, self.hidden_dim // divisor, LENGTH, vocab_size=259)
        return matvit.vit(64, 4, 4, self.hidden_dim // divisor, 2, 10)

    def task(self, divisor: int):
        if self.name == "text":
            return of(LanguageModelling, model=self.model(divisor))
        return of(Classification, model=self.model(divisor), image_shape=(8, 8, 1))

    def data(self, split: str, seed: int, tokenizer: str):
        if self.name == "text":
            return of(
                TokenDataset,
                split=split,
                length=LENGTH,
                tokenizer=tokenizer,
                seed=seed,
                shuffle=split == "train",
            )
        return of(ImageDataset, split=split, seed=seed, shuffle=split == "train")


TEXT = Family("text", steps=160, batch_size=8, hidden_dim=384, held_out_records=192)
IMAGE = Family("image", steps=120, batch_size=64, hidden_dim=256, held_out_records=183)


def nested(
    family: Family, training: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
):
    """One MatFormer, measured at every granularity and at the recommended mixes between them."""
    costs = [step_flops(family, divisor) for divisor in DIVISORS]
    steps, step_cost = family.steps, sum(costs)
    if training == "sampled":
        steps, step_cost = family.steps * len(costs), sum(costs) / len(costs)
    task = of(MatFormer, task=family.task(1), divisors=DIVISORS, training=training)
    model, params = fit(family, task, steps, seed, workdir, progress)
    widths = nested_widths(family.hidden_dim, DIVISORS)
    mixes = mix_n_match(model.num_layers, widths)
    scores = [score(family, model, params, mix, workdir) for mix in mixes]
    uniform = [scores[mixes.index((width,) * model.num_layers)] for width in widths]
    return {
        **{f"loss {size}": found.loss for size, found in zip(SIZES, uniform, strict=True)},
        **{f"accuracy {size}": found.accuracy for size, found in zip(SIZES, uniform, strict=True)},
        "agreement": float(np.mean(uniform[0].choices == uniform[-1].choices)),
        "mix losses": [found.loss for found in scores],
        "mix parameters": [found.parameters for found in scores],
        "budget": steps * step_cost / 1e9,
        "bytes": count_bytes(params),
    }


def alone(family: Family, size: str, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]):
    """One ordinary model. XL is also cut to S without training, and compared with the S that was trained alone."""
    divisor = DIVISORS[SIZES.index(size)]
    model, params = fit(family, family.task(divisor), family.steps, seed, workdir, progress)
    own = score(family, model, params, mlp_widths(model), workdir)
    measured = {
        f"loss {size}": own.loss,
        f"accuracy {size}": own.accuracy,
        "budget": family.steps * step_flops(family, divisor) / 1e9,
        "bytes": count_bytes(params),
    }
    if needs:
        (small,) = needs.values()
        other = load_model(small.workdir / "run")
        choices = score(family, other.model, other.params, mlp_widths(other.model), workdir).choices
        measured["agreement"] = float(np.mean(choices == own.choices))
        cut = nested_widths(family.hidden_dim, DIVISORS)[0]
        measured["loss cut to S"] = score(family, model, params, (cut,) * model.num_layers, workdir).loss
    return measured


def fit(family: Family, task, steps: int, seed: int, workdir: Path, progress: Progress):
    """-> model and parameters after `steps` updates."""
    optimizer = of(adamw, schedule=of(cosine, peak=4e-3, warmup=30, floor=0.05))
    config = of(
        Trainer,
        task=task,
        data=family.data("train", seed, byte_tokenizer(workdir)),
        stages=(of(Stage, name="train", steps=steps, batch_size=family.batch_size, optimizer=optimizer),),
        seed=seed,
        checkpoint_every=steps,
    )
    progress(0.05, f"{steps} steps")
    trainer = build(config)
    with open_workdir(workdir / "run", config) as run:
        state, _ = trainer.train(run, progress=False)
    progress(0.8, "measuring")
    return trainer.task.model, state.params


def byte_tokenizer(workdir: Path) -> str:
    """Path of a tokenizer without merges: 256 bytes and three special tokens, so that FFNs hold most parameters."""
    path = workdir.parents[3] / "bytes.json"
    if not path.exists():
        train_tokenizer([], vocab_size=259).save(path)
    return str(path)


@dataclasses.dataclass(frozen=True)
class Score:
    loss: float  # nats
    accuracy: float
    choices: np.ndarray  # the most probable class at every held-out place
    parameters: int


def score(family: Family, model: LayerStack, params: dict, widths: tuple[int, ...], workdir: Path) -> Score:
    """A submodel, really sliced, on the held-out records."""
    spec = ElasticSpec(tuple(range(model.num_layers)), widths)
    params = slice_params(params, spec)
    batch = held_out(family, byte_tokenizer(workdir))
    loss, accuracy, choices = measure(family, slice_model(model, spec))(params, batch)
    return Score(
        float(loss), float(accuracy), np.asarray(choices)[batch["weights"] > 0], count_parameters(params)
    )


@functools.cache
def held_out(family: Family, tokenizer: str) -> dict[str, np.ndarray]:
    data = build(family.data("test", 0, tokenizer))
    return data.take(np.arange(min(family.held_out_records, len(data))))


@functools.cache
def measure(family: Family, model: LayerStack):
    """Compiled once per shape of submodel, whatever the seed."""
    kind = LanguageModelling(model) if family.name == "text" else Classification(model, (8, 8, 1))

    def run(params, batch):
        metrics = kind.evaluate(params, batch)
        if family.name == "text":
            logits = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
        else:
            logits = model.apply({"params": params}, batch["images"])
        loss, accuracy = (metrics[name][0] / metrics[name][1] for name in ("loss", "accuracy"))
        return loss, accuracy, logits.argmax(-1)

    return jax.jit(run)


@functools.cache
def step_flops(family: Family, divisor: int) -> float:
    """FLOPs of one update: forward and backward of one batch through one granularity."""
    task = build(family.task(divisor))
    key = jax.random.key(0)
    params = jax.eval_shape(task.init, key)
    if family.name == "text":
        shape = (family.batch_size, LENGTH)
        names = ("tokens", "targets", "segments", "positions", "target_bytes")
        batch: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
        batch["weights"] = jax.ShapeDtypeStruct(shape, np.float32)
    else:
        count = family.batch_size
        batch = {
            "images": jax.ShapeDtypeStruct((count, 8, 8, 1), np.float32),
            "labels": jax.ShapeDtypeStruct((count,), np.int32),
            "weights": jax.ShapeDtypeStruct((count,), np.float32),
        }
    return count_flops(jax.grad(lambda p, b: task.loss(p, b, key)["loss"][0]), params, batch)


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """A family holds when S and XL are within 0.1 nat of the models alone, at least three in four steps from a
    mix to the next larger one lower the loss, and S agrees with XL more often than the models alone do."""
    verdicts, sentences = [], []
    for family in ("text", "image"):
        gaps = {
            size: mean(results, f"{family} nested", f"loss {size}")
            - mean(results, f"{family} {size} alone", f"loss {size}")
            for size in ("S", "XL")
        }
        losses = np.mean(results[f"{family} nested"]["mix losses"], axis=0)
        falling = float(np.mean(np.diff(losses) < 0))
        agreement = mean(results, f"{family} nested", "agreement") - mean(
            results, f"{family} XL alone", "agreement"
        )
        cut = mean(results, f"{family} XL alone", "loss cut to S") - mean(
            results, f"{family} XL alone", "loss XL"
        )
        verdicts += [max(gaps.values()) <= 0.1, falling >= 0.75, agreement > 0]
        sentences.append(
            f"{family}: nested minus alone {gaps['S']:+.3f} (S) and {gaps['XL']:+.3f} (XL) nats, "
            f"an ordinary XL cut to S loses {cut:.2f}, "
            f"{falling:.0%} of the steps from mix to larger mix lower the loss, "
            f"agreement of S with XL {100 * agreement:+.1f} points"
        )
    verdict = "yes" if all(verdicts) else "partly" if any(verdicts) else "no"
    return verdict, "; ".join(sentences) + "."


def figure(results: Results, path: Path) -> None:
    """Loss against parameters: mixes and granularities of the nested models, and the models trained alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for panel, family, unit in zip(
        panels, ("text", "image"), ("nats per byte", "nats per image"), strict=True
    ):
        for training, colour in (("nested", "C0"), ("sampled", "C2")):
            arm = results[f"{family} {training}"]
            sizes = np.asarray(arm["mix parameters"][0]) / 1e3
            losses = np.mean(arm["mix losses"], axis=0)
            layers = (len(sizes) - 1) // (len(SIZES) - 1)
            name = "jointly" if training == "nested" else "by sampling"
            panel.plot(sizes, losses, "-", color=colour, alpha=0.6, label=f"Mix'n'Match, trained {name}")
            panel.plot(
                sizes[::layers], losses[::layers], "o", color=colour, label=f"granularities, trained {name}"
            )
        places = dict(zip(SIZES, sizes[::layers], strict=True))
        for size in ("S", "XL"):
            found = results[f"{family} {size} alone"][f"loss {size}"]
            panel.errorbar(
                places[size],
                np.mean(found),
                np.std(found),
                fmt="s",
                color="C3",
                capsize=3,
                label="trained alone" if size == "S" else None,
            )
        panel.plot(
            places["S"],
            mean(results, f"{family} XL alone", "loss cut to S"),
            "x",
            color="C7",
            label="XL alone, cut to S",
        )
        panel.set(
            xlabel="thousand parameters",
            ylabel=f"held-out loss, {unit}",
            title=f"Mat{'LM' if family == 'text' else 'ViT'}",
        )
        panel.legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def arms(family: Family) -> dict[str, Arm]:
    name = family.name
    return {
        f"{name} nested": Arm(
            functools.partial(nested, family, "joint"), "one MatFormer, four granularities a step"
        ),
        f"{name} sampled": Arm(
            functools.partial(nested, family, "sampled"),
            "one MatFormer, one granularity a step, equal compute",
        ),
        f"{name} S alone": Arm(
            functools.partial(alone, family, "S"), "an ordinary model of the smallest width"
        ),
        f"{name} XL alone": Arm(
            functools.partial(alone, family, "XL"),
            "an ordinary model of the full width",
            needs=(f"{name} S alone",),
        ),
    }


CLAIM = Claim(
    system="matformer",
    paper="arXiv 2310.07707, abstract and sections 4.1 to 4.3",
    statement="One universal model gives submodels, several of them never trained, whose loss is comparable to that of "
    "independently trained ones, and whose behaviour is more consistent with the largest model.",
    setting="MatLM: 4 layers of width 96, FFN 384, 0.6M parameters, bytes of Python's standard library, 160 updates of "
    "1024 bytes. MatViT: 4 layers of width 64, FFN 256, 0.2M parameters, scikit-learn's 8x8 digits, 120 updates of "
    "64 images. AdamW, the same data and updates for all arms but `sampled`, which spends the nested arm's compute in "
    "four times the updates. Held-out files and images; three seeds.",
    measures={
        **{f"loss {size}": "nats" for size in SIZES},
        "loss cut to S": "nats",
        "agreement": "share of equal choices, S and XL",
        **{f"accuracy {size}": "share" for size in SIZES},
        "mix losses": "nats, smallest mix first",
        "mix parameters": "count",
    },
    budget="training GFLOP",
    arms={**arms(TEXT), **arms(IMAGE)},
    judge=judge,
    figure=figure,
)
