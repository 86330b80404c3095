r"""Decodes prompts with a trained language model and streams the text.

    python -m experiments.generate --prompt='def main('
    python -m experiments.generate --workdir=runs/matlm --prompt='import ' --temperature=0.8 --top_p=0.95
    python -m experiments.generate --prompt='class ' --temperature=1 --samples=4 --seed=7 --stop=$'\nclass'
    python -m experiments.generate --prompt='class ' --widths=S
    python -m experiments.generate --prompt='def ' --drafter=prompt_lookup
    python -m experiments.generate --prompt='def ' --drafter=runs/medusa
    python -m experiments.generate --prompt='def ' --drafter=auto
    python -m experiments.generate --prompt='def ' --plan=runs/plan.json
    python -m experiments.generate --prompt='def ' --cache=gear:bits=2,rank=2,outliers=0.02
    python -m experiments.generate --workdir=runs/scmoe --prompt='If we add 17 and 25 we get ' --contrast=2
    python -m experiments.generate --prompt='def ' --sparse=tidal:k=64,select=1,reselect=3 --sparse_correct=64
    python -m experiments.generate --workdir=runs/eve --image=a.png --prompt='<image> what colour is the circle'
    python -m experiments.generate --workdir=runs/hearing --audio=a.wav --prompt='<audio> which digits were said'
    cat start.py | python -m experiments.generate --prompt=- --max_new_tokens=200

Without --workdir it uses the model that ships, or the one that --drafter was trained for. With a drafter several
tokens come in a call, and the same ones (docs/decoding.md). Only new text goes to standard output; a line of statistics
goes to standard error. With several prompts or samples the first streams and the others follow, each below a
line that says which it is. Everything is decoded in one batch, and a prompt is read once for all its samples.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from research.training.model_directory import Loaded

PROGRAM = cli.Program(__doc__)
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
WIDTHS = PROGRAM.define(
    flags.DEFINE_string,
    "widths",
    None,
    "Decode with a submodel of a nested model, as in extract: M, or S,S,L,XL.",
)
PROMPT = PROGRAM.define(
    flags.DEFINE_multi_string, "prompt", [], "Text to continue; - reads standard input. Repeatable."
)
PROMPT_FILE = PROGRAM.define(cli.paths, "prompt_file", [], "A file whose whole text is a prompt. Repeatable.")
IMAGE = PROGRAM.define(
    cli.paths,
    "image",
    [],
    "An image file, or a video for a model of videos, that every prompt shows: the first at its first <image>, and so "
    "on; a prompt without any <image> begins with them. Repeatable.",
)
AUDIO = PROGRAM.define(
    cli.paths,
    "audio",
    [],
    "A WAV file, for a model of sounds: as --image, at <audio>. Repeatable.",
)
MAX_NEW_TOKENS = PROGRAM.define(
    flags.DEFINE_integer, "max_new_tokens", 128, "The most tokens to add; fewer where the context is full."
)
TEMPERATURE = PROGRAM.define(
    flags.DEFINE_float, "temperature", 0.0, "0 takes the most probable token; 1 samples as trained."
)
TOP_K = PROGRAM.define(flags.DEFINE_integer, "top_k", None, "Sample among the k most probable tokens.")
TOP_P = PROGRAM.define(
    flags.DEFINE_float, "top_p", None, "Sample among the fewest tokens that hold this much probability."
)
MIN_P = PROGRAM.define(
    flags.DEFINE_float, "min_p", None, "Sample among tokens at least this times as probable as the best."
)
PENALTY = PROGRAM.define(
    flags.DEFINE_float,
    "repetition_penalty",
    None,
    "Above 1 makes tokens of the prompt and the output less likely to come again.",
)
STOP = PROGRAM.define(flags.DEFINE_multi_string, "stop", [], "Ends the output before this text. Repeatable.")
SEED = PROGRAM.define(
    flags.DEFINE_integer, "seed", 0, "Of all draws.", lower_bound=0, upper_bound=(1 << 32) - 1
)
SAMPLES = PROGRAM.define(flags.DEFINE_integer, "samples", 1, "Outputs for each prompt.")
DRAFTER = PROGRAM.define(
    cli.path,
    "drafter",
    None,
    "What drafts: prompt_lookup, iad, aded, submodel (of a nested model), a config of one of these "
    "(configs/aded.py:paper), a run or folder of a drafter, a smaller model, or auto: the fastest by the call times "
    "that `python -m experiments.bench costs` measured.",
)
ACCEPTANCE = PROGRAM.define(
    flags.DEFINE_enum,
    "acceptance",
    "exact",
    "Which drafts are kept: exact changes nothing in the output; typical keeps more of them above temperature 0.",
    ["exact", "typical"],
)
PLAN = PROGRAM.define(
    cli.path,
    "plan",
    None,
    "A plan of attention spans for this model, as `python -m experiments.spans` writes it: less cache, other outputs.",
)
CACHE = PROGRAM.define(
    flags.DEFINE_string,
    "cache",
    None,
    "Compress the cache: gear:bits=2,rank=2,outliers=0.02,group=64,buffer=64 (GEAR), kivi:bits=4 (quantization alone), "
    "tokens:bits=4 (keys by token as well): less cache, other outputs.",
)
CONTRAST = PROGRAM.define(
    flags.DEFINE_string,
    "contrast",
    None,
    "Of a mixture of experts: contrast its routing with a weak one that takes a token's 2nd (or n-th) best expert "
    "alone, or a `random` one (SCMoE).",
)
CONTRAST_BETA = PROGRAM.define(
    flags.DEFINE_float, "contrast_beta", 0.5, "How far to go away from the weak routing; 0 is not at all."
)
CONTRAST_ALPHA = PROGRAM.define(
    flags.DEFINE_float,
    "contrast_alpha",
    0.1,
    "Only tokens at least this times as probable as the best one are taken.",
)
SPARSE = PROGRAM.define(
    cli.path,
    "sparse",
    None,
    "Read a few chosen tokens of the cache in most layers: tidal:k=64,select=1,reselect=3 (TidalDecode), quest:k=64, "
    "newest:k=64, every_layer:k=64, or the file that reselect wrote.",
)
SPARSE_CORRECT = PROGRAM.define(
    flags.DEFINE_integer,
    "sparse_correct",
    None,
    "Calls after which the cache that --sparse wrote is computed anew by the whole model; never by default.",
    lower_bound=1,
)
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of parameters and cache.", ["float32", "bfloat16"]
)


def main(arguments: list[str]) -> None:
    from research.decoding.sampling import Sampling

    # Flags are checked before the model is read.
    sampling = Sampling(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        repetition_penalty=PENALTY.value,
    )
    prompts = read_prompts(PROMPT.value, PROMPT_FILE.value)

    from research.decoding.generator import Generator
    from research.decoding.verify import Typical
    from research.errors import UserError
    from research.language import BASE
    from research.training.workdir import load_model

    if DRAFTER.value is None and ACCEPTANCE.value != "exact":
        raise UserError(f"--acceptance={ACCEPTANCE.value} judges drafts: it needs a --drafter")
    if ACCEPTANCE.value != "exact" and sampling.greedy:
        raise UserError(f"--acceptance={ACCEPTANCE.value} is for sampling: give a --temperature above 0")
    if CONTRAST.value is None and (CONTRAST_BETA.present or CONTRAST_ALPHA.present):
        raise UserError("--contrast_beta and --contrast_alpha are of --contrast, which is not there")
    if SPARSE.value is None and SPARSE_CORRECT.present:
        raise UserError("--sparse_correct is of --sparse, which is not there")
    if CONTRAST.value is not None and DRAFTER.value not in (None, "prompt_lookup", "iad"):
        raise UserError(
            f"--drafter={DRAFTER.value} drafts for one routing, not for the contrast of two; prompt_lookup and iad do"
        )
    workdir = WORKDIR.value
    if workdir is None and DRAFTER.value is not None:
        from research.decoding.speculative.loading import target_path

        workdir = target_path(DRAFTER.value)
    workdir = workdir or BASE
    if WIDTHS.value is None:
        loaded = load_model(workdir, STEP.value)
    else:
        from research.elastic.loading import load_submodel

        loaded, _ = load_submodel(workdir, WIDTHS.value, STEP.value)
    if not hasattr(loaded.model, "extend"):
        raise UserError(f"{workdir} holds a {type(loaded.model).__name__}, which does not decode text")
    if loaded.tokenizer is None:
        raise UserError(f"{workdir} has no tokenizer.json, so its model can't read a prompt")
    params, drafting = loaded.params, {}
    name = choose_drafter(loaded) if DRAFTER.value == "auto" else DRAFTER.value
    if name is not None:
        from research.decoding.speculative.loading import find_drafter

        drafter = find_drafter(name, loaded)
        params = drafter.target_params(loaded)
        drafting = dict(proposer=drafter.proposer, proposer_params=drafter.params)
        if ACCEPTANCE.value == "typical":
            drafting["verifier"] = Typical()
    model, beside = loaded.model, None
    if IMAGE.value or AUDIO.value or hasattr(model, "planner"):
        prompts, beside = show(prompts, IMAGE.value, loaded, workdir, AUDIO.value)
    if PLAN.value is not None:
        from research.sparse.moa.plan import Plan, apply_plan

        plan = Plan.load(PLAN.value)
        plan.check(model, loaded.params)
        encoded = Generator(model, params, loaded.tokenizer).encode(prompts)
        needed = min(max(map(len, encoded)) + MAX_NEW_TOKENS.value, model.max_length)
        model, params = apply_plan(model, params, plan, needed)
    if CACHE.value is not None:
        from research.compression.gear import parse_cache, with_cache

        model, params = with_cache(model, params, parse_cache(CACHE.value))
    if CONTRAST.value is not None:
        from research.moe.scmoe import self_contrast

        weak = parse_rank(CONTRAST.value)
        model, params = self_contrast(
            model,
            params,
            weak=weak,
            beta=CONTRAST_BETA.value,
            alpha=CONTRAST_ALPHA.value,
            seed=SEED.value,
        )
    if SPARSE.value is not None:
        from research.decoding.correction import Correction
        from research.nn.transformer import unscan_layers
        from research.sparse.gathered import gathered
        from research.sparse.tidal import parse_selector

        whole, params = unscan_layers(model, params)
        model, params = gathered(whole, params, parse_selector(SPARSE.value))
        if SPARSE_CORRECT.value is not None:
            drafting["correction"] = Correction(whole, SPARSE_CORRECT.value)
    generator = Generator(model, params, loaded.tokenizer, dtype=DTYPE.value, **drafting)
    stream = generator.stream(
        prompts,
        beside=beside,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=sampling,
        stop=STOP.value,
        seed=SEED.value,
        samples=SAMPLES.value,
    )
    several = len(prompts) * SAMPLES.value > 1
    if several:
        print(heading(0, 0))
    for piece in stream:
        if piece.row == 0:
            print(piece.text, end="", flush=True)
    print()
    for sample in stream.result.samples[1:]:
        print(heading(sample.prompt, sample.sample))
        print(sample.text)
    stats = stream.result.stats
    ends = ", ".join(dict.fromkeys(sample.finish for sample in stream.result.samples))
    speed = f"{stats.tokens_per_second:.0f} tokens/s"
    seconds = f"prefill {stats.prefill_seconds:.3f} s, decoding {stats.decode_seconds:.3f} s"
    print(
        f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new in {stats.calls} calls, "
        f"ended by {ends}; {speed} ({seconds}), compilation {stats.compile_seconds:.1f} s",
        file=sys.stderr,
    )
    if name is not None:
        print(
            f"{name}: {stats.tokens_per_call:.2f} tokens a call, {stats.drafted} drafted, "
            f"{stats.wasted} of them wasted",
            file=sys.stderr,
        )


def show(
    prompts: list[str], images: list[str], loaded: "Loaded", workdir: str, sounds: Sequence[str] = ()
) -> tuple[list[list[int]], "Callable[[int], tuple[Any, ...]]"]:
    """Prompts with images or sounds for a model that reads some: token ids, and what its prefill takes beside them."""
    from research.errors import UserError
    from research.multimodal.prompts import Prompts

    planner = getattr(loaded.model, "planner", None)
    for mark, called, files in (("<image>", "images", images), ("<audio>", "sounds", sounds)):
        if files and (planner is None or planner.mark != mark):
            reads = f"no {called}" if planner is None else f"{planner.called}, not {called}"
            raise UserError(
                f"--{mark[1:-1]}={files[0]}: {workdir} holds a {type(loaded.model).__name__}, which reads {reads}"
            )
    shown = [planner.load(path) for path in (*images, *sounds)]
    texts = [text if planner.mark in text else planner.mark * len(shown) + text for text in prompts]
    asked = Prompts.of([(text, shown) for text in texts], planner, loaded.tokenizer)
    return asked.tokens, asked.beside


def parse_rank(text: str) -> tuple[int, ...] | Literal["random"]:
    """--contrast: a rank from 1 as the paper counts, as `with_ranks` takes it."""
    from research.errors import UserError

    if text == "random":
        return "random"
    if not text.isdecimal() or not int(text):
        raise UserError(f"--contrast={text}: a rank from 1, such as 2, or random is expected")
    return (int(text) - 1,)


def choose_drafter(loaded: "Loaded") -> str | None:
    """The drafter that measured call times predict to be fastest, None for plain decoding; says why.

    Raises:
        UserError: nothing was measured for this model.
    """
    from research.decoding.cost import Costs, choose, default_path
    from research.training.model_directory import fingerprint

    choice = choose(Costs.load(default_path(fingerprint(loaded.params))))
    for reason in choice.reasons:
        print(reason, file=sys.stderr)
    print(f"drafter: {choice.name or 'none, plain decoding is the fastest'}", file=sys.stderr)
    return choice.name


def heading(prompt: int, sample: int) -> str:
    """The line above an output where there are several."""
    return f"=== prompt {prompt + 1}, sample {sample + 1} ==="


def read_prompts(texts: list[str], files: list[str]) -> list[str]:
    """The prompts of the command line: texts first (- is standard input), then files. Raises UserError."""
    from pathlib import Path

    from research.errors import UserError

    if texts.count("-") > 1:
        raise UserError("--prompt=- is given twice, and standard input can be read once")
    prompts = []
    for source in [*texts, *(Path(name) for name in files)]:
        try:
            if source == "-":
                prompts.append(sys.stdin.buffer.read().decode())
            else:
                prompts.append(source if isinstance(source, str) else source.read_bytes().decode())
        except OSError as error:
            raise UserError(f"--prompt_file={source}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt {source} is not UTF-8 text: {error}") from error
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one character")
    if not prompts:
        raise UserError("no prompt: give --prompt=TEXT, --prompt=- for standard input, or --prompt_file=FILE")
    return prompts


if __name__ == "__main__":
    PROGRAM.run(main)
