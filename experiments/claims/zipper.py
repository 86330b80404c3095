"""Zipper against a single decoder with a larger vocabulary, on generated spoken digits, and what pretraining gives."""

import dataclasses
import functools
import sysconfig
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import llava, zipper
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.seeing import mean, run
from research.config import build, of
from research.data.pipeline import RecordDataset
from research.data.spoken import SpokenDigits, SpokenSource
from research.data.text import TokenDataset
from research.data.utterances import (
    CHARACTERS,
    UNIT_VOCABULARY,
    Modality,
    UnitRows,
    Utterances,
    characters,
    spelled,
)
from research.decoding.generator import Generator
from research.multimodal.zipper import Interleaved, Streams
from research.nn.accounting import count_bytes, count_parameters
from research.training.evaluators import means
from research.training.task import LanguageModelling
from research.training.workdir import load_model

FEW, MANY, HELD = 100, 1000, 96
PRETRAIN, STEPS, BATCH = 200, 300, 16
TEXT, SPEECH = 14, 40  # places of one or two digits
WORLD = dict(digits=(1, 2))
LIBRARY = f"{sysconfig.get_paths()['stdlib']}/*.py"
LETTERS = 100  # of `characters`
ORDERS: dict[str, tuple[Modality, Modality]] = {"text": ("speech", "text"), "speech": ("text", "speech")}


@dataclasses.dataclass(frozen=True)
class Joined(RecordDataset):
    """Language batches of the pairs of `Utterances` for a single decoder: one vocabulary, units behind characters."""

    source: SpokenSource
    order: tuple[Modality, Modality]

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("tokens", "targets", "segments", "positions", "target_bytes")
        spec = {name: jax.ShapeDtypeStruct((TEXT + SPEECH,), np.int32) for name in names}
        return {**spec, "weights": jax.ShapeDtypeStruct((TEXT + SPEECH,), np.float32)}

    def __len__(self) -> int:
        return len(self.source)

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The records with the global numbers `numbers` int64[n]."""
        batch = {k: np.zeros((len(numbers), *s.shape), s.dtype) for k, s in self.element_spec().items()}
        batch["positions"][:] = np.arange(TEXT + SPEECH)
        for row, number in enumerate(map(int, numbers)):
            said = joined(spelled(self.source, number % len(self)))
            first, written = (said[m] for m in self.order)
            whole, start = [*first, *written], len(first)
            count = len(whole) - 1
            batch["tokens"][row, :count], batch["targets"][row, :count] = whole[:-1], whole[1:]
            batch["segments"][row, :count] = batch["target_bytes"][row, :count] = 1
            batch["weights"][row, start:count] = 1
        return batch


def joined(said: dict[Modality, tuple[int, ...]]) -> dict[Modality, tuple[int, ...]]:
    return said | {"speech": tuple(LETTERS + unit for unit in said["speech"])}


def stage(steps: int, trainable: tuple[str, ...]) -> Any:
    return llava.stage("train", steps, trainable, BATCH, 3e-3, floor=0.1)


def pretrain(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """A language model of characters and one of units, each on its own data."""
    text = of(TokenDataset, sources=LIBRARY, length=64, tokenizer=str(CHARACTERS), seed=seed)
    alone = of(UnitRows, source=of(SpokenDigits, size=1024, seed=1000, **WORLD), length=SPEECH)
    for i, (m, data) in enumerate({"text": text, "speech": alone}.items()):
        progress(i / 2, m)
        task = of(LanguageModelling, model=zipper.toy_tower(m))
        params = run(task, data, (stage(PRETRAIN, (".*",)),), seed, workdir / m)
    loaded = load_model(workdir / "text")
    return {
        "text": text_loss(loaded.model, loaded.params),
        "budget": 2 * PRETRAIN * BATCH,
        "bytes": count_bytes(loaded.params) + count_bytes(params),
    }


def zip_up(
    writes: Modality,
    pairs: int,
    pretrained: bool,
    seed: int,
    workdir: Path,
    progress: Progress,
    needs: dict[str, Needed],
) -> dict[str, Any]:
    """The towers joined on so many pairs; the text tower is frozen. pretrained: the speech tower is not drawn."""
    model = zipper.model()
    names = ("text", "speech") if pretrained else ("text",)
    parts = tuple((m, str(needs["pretrained"].workdir / m), "") for m in names)
    begun = build(of(Interleaved, model=model, parts=parts)).start(jax.random.key(seed))
    sizes = dict(orders=(ORDERS[writes],), text_length=TEXT, speech_length=SPEECH)
    data = of(Utterances, source=of(SpokenDigits, size=pairs, seed=seed, **WORLD), **sizes)
    own = (*zipper.NEW, "^speech/")
    params = run(of(Interleaved, model=model), data, (stage(STEPS, own),), seed, workdir / "run", begun)
    progress(0.9, "measuring")
    task = Interleaved(build(model))
    held = Utterances(held_out(), (ORDERS[writes],), TEXT, SPEECH).take(np.arange(HELD))
    found = means(jax.jit(task.evaluate)(params, held), "claim")
    measured = {
        "loss": found["loss"],
        "text": text_loss(task.model.text, params["text"]),
        "trained": count_parameters({name: x for name, x in params.items() if name != "text"}),
        "budget": STEPS * BATCH,
        "bytes": count_bytes(params),
    }
    if writes == "text":
        bos, eos = characters().bos_id, characters().eos_id
        rows = [[("speech", said["speech"]), ("text", [bos])] for said in spelled_held()]
        asked = Streams.of(rows, "text")
        generator = Generator(task.model, params, ends=(eos,))
        result = generator.generate(asked.tokens, beside=asked.beside, max_new_tokens=TEXT)
        measured["CER"] = error_rate([sample.tokens for sample in result.samples])
    return measured


def widen(
    writes: Modality, pairs: int, seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]
) -> dict[str, Any]:
    """The text model with a vocabulary that has units too, all of it trained on the pairs."""
    loaded = load_model(needs["pretrained"].workdir / "text")
    config = zipper.toy_tower("text")
    with config.unlocked():
        config.vocab_size = LETTERS + UNIT_VOCABULARY
    task = of(LanguageModelling, model=config)
    params = jax.jit(build(task).init)(jax.random.key(seed))
    old = loaded.params
    wide = {
        "embedding": {"table": params["embedding"]["table"].at[:LETTERS].set(old["embedding"]["table"])},
        "head": {"kernel": params["head"]["kernel"].at[:, :LETTERS].set(old["head"]["kernel"])},
    }
    source = of(SpokenDigits, size=pairs, seed=seed, **WORLD)
    data = of(Joined, source=source, order=ORDERS[writes])
    params = run(task, data, (stage(STEPS, (".*",)),), seed, workdir / "run", old | wide)
    progress(0.9, "measuring")
    made = build(task)
    held = Joined(held_out(), ORDERS[writes]).take(np.arange(HELD))
    cut = params | {
        "embedding": {"table": params["embedding"]["table"][:LETTERS]},
        "head": {"kernel": params["head"]["kernel"][:, :LETTERS]},
    }
    measured = {
        "loss": means(jax.jit(made.evaluate)(params, held), "claim")["loss"],
        "text": text_loss(loaded.model, cut),
        "trained": count_parameters(params),
        "budget": STEPS * BATCH,
        "bytes": count_bytes(params),
    }
    if writes == "text":
        rows = [[*joined(said)["speech"], characters().bos_id] for said in spelled_held()]
        generator = Generator(made.model, params, ends=(characters().eos_id,))
        result = generator.generate(rows, max_new_tokens=TEXT)
        measured["CER"] = error_rate([sample.tokens for sample in result.samples])
    return measured


def held_out() -> SpokenDigits:
    return SpokenDigits(split="test", size=HELD, **WORLD)


def spelled_held() -> list[dict[Modality, tuple[int, ...]]]:
    return [spelled(held_out(), number) for number in range(HELD)]


@functools.lru_cache(maxsize=1)
def _library() -> dict[str, np.ndarray]:
    data = TokenDataset(LIBRARY, "validation", 64, str(CHARACTERS), shuffle=False)
    return data.take(np.arange(0, len(data), len(data) // 128)[:128])


def text_loss(model: Any, params: Any) -> float:
    """Nats a character of held-out files of Python's library."""
    return means(jax.jit(LanguageModelling(model).evaluate)(params, _library()), "claim")["loss"]


def error_rate(outputs: list[list[int]]) -> float:
    """Edits that make the outputs of what was said, over its characters (CER)."""
    wanted = [said["text"][1:-1] for said in spelled_held()]
    return sum(map(edits, outputs, wanted)) / sum(map(len, wanted))


def edits(one: list[int], other: tuple[int, ...]) -> int:
    """Insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def judge(results: Results) -> tuple[str, str]:
    """Yes, if the text tower's loss on text is the same number before and after in every seed while each single decoder
    of recognition loses 0.1 nats, recognition from few pairs has a lower CER than the single decoder's and from many at
    most 0.05 more, and synthesis has at least 0.02 nats a unit less with a pretrained speech tower than with a drawn
    one, and no more than the single decoder; partly, if the first and that about the drawn tower hold."""
    before = results["pretrained"]["text"]
    kept = all(results[arm]["text"] == before for arm in results if arm.startswith("zipper"))
    lost = [mean(results, f"single {n}", "text") - float(np.mean(before)) for n in ("few", "many")]
    cer = {
        arm: mean(results, arm, "CER") for arm in ("zipper few", "zipper many", "single few", "single many")
    }
    units = {arm: mean(results, f"{arm} synthesis", "loss") for arm in ("zipper", "zipper drawn", "single")}
    pretrained = units["zipper drawn"] - units["zipper"] >= 0.02
    recognised = cer["zipper few"] < cer["single few"] and cer["zipper many"] <= cer["single many"] + 0.05
    holds = kept and min(lost) >= 0.1 and recognised and pretrained and units["zipper"] <= units["single"]
    verdict = "yes" if holds else "partly" if kept and min(lost) >= 0.1 and pretrained else "no"
    return verdict, (
        f"Nats a character of text: {np.mean(before):.3f} before, {'the same number' if kept else 'NOT the same'} in "
        f"every Zipper, {lost[0]:.2f} and {lost[1]:.2f} more in single decoders after recognition from {FEW} and "
        f"{MANY} pairs; character errors from {FEW} pairs {cer['zipper few']:.0%} (single decoder "
        f"{cer['single few']:.0%}), from {MANY} {cer['zipper many']:.0%} ({cer['single many']:.0%}); synthesis, nats a "
        f"unit: pretrained speech tower {units['zipper']:.3f}, drawn {units['zipper drawn']:.3f}, single decoder "
        f"{units['single']:.3f}."
    )


def figure(results: Results, path: Path) -> None:
    """Character errors by pairs, text afterwards, and synthesis; a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for kind, colour in (("zipper", "C0"), ("single", "C1")):
        for measure, panel in (("CER", panels[0]), ("text", panels[1])):
            values = [results[f"{kind} {n}"][measure] for n in ("few", "many")]
            label = "Zipper, text frozen" if kind == "zipper" else "single decoder"
            panel.plot((FEW, MANY), np.mean(values, axis=1), "-", color=colour, label=label)
            for x, seeds in zip((FEW, MANY), values, strict=True):
                panel.plot([x] * len(seeds), seeds, "o", color=colour)
    panels[0].set(xscale="log", xlabel="pairs", ylabel="character error rate", title="recognition")
    panels[1].axhline(mean(results, "pretrained", "text"), color="grey", linestyle=":", label="before")
    panels[1].set(
        xscale="log", xlabel="pairs", ylabel="nats a character of text", title="text, after recognition"
    )
    names = {
        "zipper synthesis": "pretrained",
        "zipper drawn synthesis": "drawn",
        "single synthesis": "single",
    }
    for i, arm in enumerate(names):
        panels[2].bar(i, mean(results, arm, "loss"), color="0.8")
        panels[2].plot([i] * len(results[arm]["loss"]), results[arm]["loss"], "o", color="C2")
    panels[2].set_xticks(range(3), names.values())
    panels[2].set(ylabel="nats a unit", title="synthesis, by speech tower")
    panels[0].legend(fontsize=8)
    panels[1].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def arms() -> dict[str, Arm]:
    made = {"pretrained": Arm(pretrain, "a model of characters and a model of units, apart")}
    needs = ("pretrained",)
    for name, pairs in (("few", FEW), ("many", MANY)):
        what = f"recognition from {pairs} pairs"
        own = functools.partial(zip_up, "text", pairs, True)
        made[f"zipper {name}"] = Arm(own, f"{what}: Zipper, text tower frozen", needs)
        single = functools.partial(widen, "text", pairs)
        made[f"single {name}"] = Arm(single, f"{what}: the text model with units in its vocabulary", needs)
    for name, pretrained in (("zipper", True), ("zipper drawn", False)):
        tower = "pretrained" if pretrained else "drawn"
        own = functools.partial(zip_up, "speech", MANY, pretrained)
        what = f"synthesis from {MANY} pairs: Zipper, {tower} speech tower, trained"
        made[f"{name} synthesis"] = Arm(own, what, needs)
    single = functools.partial(widen, "speech", MANY)
    what = f"synthesis from {MANY} pairs: the text model with units in its vocabulary"
    return made | {"single synthesis": Arm(single, what, needs)}


CLAIM = Claim(
    system="zipper",
    paper="arXiv 2405.18669, abstract",
    statement="Joined by cross-attention, a frozen text tower keeps its text ability and recognises speech with a "
    "negligible loss against a single decoder with a larger vocabulary, from little paired data; with a pretrained "
    "speech tower synthesis is better than the single decoder's.",
    setting="Generated utterances of one or two digits: harmonics under moving formants, no one spoke them; 64 units "
    "for 30 ms each. Text tower of width 48, speech tower of width 32, two layers each, that begin with "
    f"{PRETRAIN} updates of {BATCH} rows of characters of Python's standard library, and of units alone. Then {STEPS} "
    f"updates of {BATCH} pairs at a peak rate of 3e-3 in every arm; the speech tower learns, too. {HELD} held-out "
    "utterances, three seeds. Text afterwards is that of held-out library files; of a single decoder its characters "
    "alone are compared.",
    measures={
        "CER": "edits a character, held out",
        "loss": "nats a token of what is written",
        "text": "nats a character of text, without speech",
        "trained": "parameters",
    },
    budget="pairs seen",
    arms=arms(),
    judge=judge,
    figure=figure,
)
