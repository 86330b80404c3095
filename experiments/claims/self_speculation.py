"""Self-speculation: does a nested S draft better for its XL than an S that was trained alone drafts for an XL that
was trained alone?

The models are those of the MatFormer claim: small, on bytes, the same data and updates for every one. Beside them the
shipped base model, whose S drafts as it is, and after a fine-tuning to XL's distributions.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import drafting
from experiments.claims.harness import Arm, Claim, Needed, Progress, Results
from experiments.claims.matformer import DIVISORS, TEXT, byte_tokenizer, fit, held_out, step_flops
from research.config import of
from research.decoding.generator import Generator
from research.decoding.proposers import Target
from research.decoding.speculative.draft_model import DraftModel, Submodel
from research.elastic.matformer import MatFormer
from research.nn.accounting import count_bytes

GAMMA, PROMPT, NEW_TOKENS, PROMPTS = 4, 64, 96, 24
KINDS = ("code", "prose")
TUNED_STEPS, TUNED_BATCH = 40, 16
PREFIXED, PREFIXES = 48, tuple(range(16, 129, 16))  # texts, and how many tokens of each are known


def nested(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """One MatFormer: its S drafts for its XL."""
    task = of(MatFormer, task=TEXT.task(1), divisors=DIVISORS)
    model, params = fit(TEXT, task, TEXT.steps, seed, workdir, progress)
    drafter = Submodel(DIVISORS[0], GAMMA)
    cut = drafter.create(jax.random.key(0), Target(params, model))
    flops = TEXT.steps * sum(step_flops(TEXT, divisor) for divisor in DIVISORS)
    shared = shared_cache(model, params, drafter.drafting(model).model, cut, workdir)
    return decoded(model, params, drafter, cut, workdir) | shared | {"budget": flops / 1e9}


def independent(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """Two ordinary models of the same sizes, with as many updates each."""
    small, small_params = fit(TEXT, TEXT.task(DIVISORS[0]), TEXT.steps, seed, workdir / "S", progress)
    model, params = fit(TEXT, TEXT.task(1), TEXT.steps, seed, workdir / "XL", progress)
    flops = TEXT.steps * (step_flops(TEXT, DIVISORS[0]) + step_flops(TEXT, 1))
    shared = shared_cache(model, params, small, small_params, workdir)
    return (
        decoded(model, params, DraftModel(small, GAMMA), small_params, workdir)
        | shared
        | {"budget": flops / 1e9}
    )


def decoded(model: Any, params: Any, proposer: Any, draft: Any, workdir: Path) -> dict[str, Any]:
    """Greedy, on held-out text. bytes: of all arrays, those that are shared once."""
    batch = held_out(TEXT, byte_tokenizer(workdir))
    texts = batch["tokens"][:PROMPTS, :PROMPT].tolist()
    generator = Generator(model, params, proposer=proposer, proposer_params=draft, ends=())
    result = generator.generate(texts, max_new_tokens=NEW_TOKENS)
    expected = plain(model)(params, texts)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves((params, draft))}
    return {
        "tokens per call": result.stats.tokens_per_call,
        "equal": float(np.mean([s.tokens == e for s, e in zip(result.samples, expected, strict=True)])),
        "bytes": count_bytes(list(arrays.values())),
    }


@functools.cache
def plain(model: Any):
    def run(params: Any, texts: list[list[int]]) -> list[list[int]]:
        result = Generator(model, params, ends=()).generate(texts, max_new_tokens=NEW_TOKENS)
        return [sample.tokens for sample in result.samples]

    return run


def shared_cache(model: Any, params: Any, small: Any, draft: Any, workdir: Path) -> dict[str, float]:
    """How often the draft's first choice is the target's, on held-out text: with the keys and values of its own
    and with the target's for all tokens but the newest."""
    batch = held_out(TEXT, byte_tokenizer(workdir))
    tokens = jnp.asarray(np.repeat(batch["tokens"][:PREFIXED, : max(PREFIXES) + 1], len(PREFIXES), axis=0))
    lengths = jnp.asarray(PREFIXES * PREFIXED)
    choices = agreement(model, small)(params, draft, tokens, lengths)
    return {name: float(value) for name, value in choices.items()}


@functools.cache
def agreement(model: Any, small: Any):
    def measure(params: Any, draft: Any, tokens: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        newest = jnp.take_along_axis(tokens, lengths[:, None], axis=1)

        def cache_of(model: Any, params: Any) -> Any:
            _, _, fresh = model.apply({"params": params}, tokens, lengths, method="prefill")
            return model.init_cache(*tokens.shape).commit(fresh, None, lengths)

        def choice(model: Any, params: Any, cache: Any) -> jax.Array:
            return model.apply({"params": params}, newest, cache, method="extend")[0].argmax(-1)

        own, its = cache_of(small, draft), cache_of(model, params)
        expected = choice(model, params, its)
        return {
            "agreement": jnp.mean(choice(small, draft, own) == expected),
            "agreement shared": jnp.mean(choice(small, draft, its) == expected),
        }

    return jax.jit(measure)


def base(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """S of the shipped base model, as it is."""
    loaded = drafting.target()
    drafter = Submodel(8, GAMMA)
    cut = drafter.create(jax.random.key(0), Target(loaded.params, loaded.model))
    measured = drafting.decode(drafter, cut, KINDS, count=8, new_tokens=NEW_TOKENS)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves((loaded.params, cut))}
    return {
        **drafting.selected(measured, "tokens_per_call", "equal", "speed"),
        "budget": 0,
        "bytes": count_bytes(list(arrays.values())),
    }


def tuned(seed: int, workdir: Path, progress: Progress, needs: dict[str, Needed]) -> dict[str, Any]:
    """The same after a fine-tuning of a copy."""
    config = of(Submodel, divisor=8, gamma=GAMMA)
    cut = drafting.fit(config, seed, workdir, progress, steps=TUNED_STEPS, batch_size=TUNED_BATCH, peak=3e-4)
    measured = drafting.decode(Submodel(8, GAMMA), cut, KINDS, count=8, new_tokens=NEW_TOKENS)
    loaded = drafting.target()
    task_flops = TUNED_STEPS * TUNED_BATCH * 128 * 2 * count_bytes(loaded.params) / 4  # the target's forward
    return {
        **drafting.selected(measured, "tokens_per_call", "equal", "speed"),
        "budget": task_flops / 1e9,
        "bytes": count_bytes((loaded.params, cut)),
    }


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(results[arm][measure])


def judge(results: Results) -> tuple[str, str]:
    """Holds if the nested pair agrees more often and gains more tokens a call, in the mean over seeds, and every
    output is the target's own; partly if one of the two."""
    pairs = {name: [mean(results, arm, name) for arm in ("nested", "independent")] for name in PAIRED}
    better = [own > other for own, other in (pairs["tokens per call"], pairs["agreement"])]
    arms = (("nested", "equal"), ("independent", "equal"), ("base", "code equal"), ("base", "prose equal"))
    equal = min(min(results[arm][name]) for arm, name in arms)
    verdict = "yes" if all(better) and equal == 1.0 else "partly" if any(better) else "no"
    own, other = pairs["tokens per call"]
    agree, agree_other = (100 * x for x in pairs["agreement"])
    shared, shared_other = (100 * x for x in pairs["agreement shared"])
    by_kind = ", ".join(
        f"{mean(results, 'base', f'{kind} tokens_per_call'):.2f} on {kind} (fine-tuned "
        f"{mean(results, 'tuned', f'{kind} tokens_per_call'):.2f}, "
        f"{mean(results, 'base', f'{kind} speed'):.2f} times plain decoding's speed)"
        for kind in KINDS
    )
    sentence = (
        f"a nested S and XL gain {own:.2f} tokens a call and agree on {agree:.0f}% of the tokens, models trained alone "
        f"{other:.2f} and {agree_other:.0f}%; reading XL's keys and values in place of its own, S agrees on "
        f"{shared:.0f}%, the S trained alone on {shared_other:.0f}%; S of the shipped model gains {by_kind}; "
        f"{equal:.0%} of the outputs are plain decoding's."
    )
    return verdict, sentence


def figure(results: Results, path: Path) -> None:
    """Agreement with own and with shared caches, and tokens a call."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    places = np.arange(2)
    for shift, arm in ((-0.2, "nested"), (0.2, "independent")):
        heights = [100 * mean(results, arm, name) for name in ("agreement", "agreement shared")]
        panels[0].bar(places + shift, heights, 0.4, label=f"S and XL {NAMES[arm]}")
        panels[1].bar(
            shift,
            mean(results, arm, "tokens per call"),
            0.4,
            yerr=np.std(results[arm]["tokens per call"]),
            capsize=3,
        )
    panels[0].set_xticks(places, ["caches of their own", "XL's keys and values"])
    panels[0].set(ylabel="% of tokens where S chooses like XL", title="agreement")
    panels[0].legend(fontsize=8)
    for place, arm in enumerate(("base", "tuned")):
        heights = [mean(results, arm, f"{kind} tokens_per_call") for kind in KINDS]
        panels[1].bar(1 + place + np.asarray([-0.2, 0.2]), heights, 0.4, color=["C2", "C4"])
    panels[1].set_xticks([0, 1, 2], ["small models", "shipped S\ncode, prose", "fine-tuned S\ncode, prose"])
    panels[1].axhline(1, color="grey", linewidth=0.8)
    panels[1].set(title=f"tokens a call, {GAMMA} drafted")
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


PAIRED = ("tokens per call", "agreement", "agreement shared")
NAMES = {"nested": "of one nested model", "independent": "trained alone"}

CLAIM = Claim(
    system="self_speculation",
    paper="arXiv 2310.07707, section 4.1.1",
    statement="The submodels of a MatFormer are more consistent with its largest model than independently "
    "trained ones, which makes S a better draft for speculative decoding of XL.",
    setting="MatLM of 4 layers, width 96, FFN 384 and 48, on bytes of Python's standard library, "
    f"{TEXT.steps} updates of 2048 bytes, against an S and an XL trained alone with as many updates "
    f"each; {PROMPTS} held-out texts, {GAMMA} tokens drafted, greedy. Agreement at {len(PREFIXES)} "
    f"places of {PREFIXED} held-out texts. The shipped base model (7.3M parameters) with its S as it "
    f"is, and with a copy distilled from XL in {TUNED_STEPS} updates.",
    measures={
        "tokens per call": "the target's own included",
        "equal": "share of outputs that are plain decoding's",
        "agreement": "share of equal first choices",
        "agreement shared": "the same, S reading XL's cache",
        **{
            f"{kind} {name}": unit
            for kind in KINDS
            for name, unit in (
                ("tokens_per_call", "the target's own included"),
                ("equal", "share of outputs"),
                ("speed", "times plain decoding"),
            )
        },
    },
    budget="training GFLOP",
    arms={
        "nested": Arm(nested, "S and XL of one nested model"),
        "independent": Arm(independent, "S and XL trained alone"),
        "base": Arm(base, "S and XL of the shipped model"),
        "tuned": Arm(tuned, "a copy of that S, fine-tuned"),
    },
    judge=judge,
    figure=figure,
)
