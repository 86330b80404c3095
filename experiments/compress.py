r"""Compresses a trained model: methods one after the other, each on what the one before it left.

    python -m experiments.compress --method=finequant --bits=4 --output=runs/int4
    python -m experiments.compress --method=finequant,eora --bits=3 --rank=16 --output=runs/small
    python -m experiments.compress --workdir=runs/matlm --method=decoupleq --bits=2 --group=32 --output=runs/two_bits
    python -m experiments.compress --config=configs/eora.py:tiny --config.methods.1.rank=8 --output=runs/rank8
    python -m experiments.compress --workdir=runs/int4 --original=package:language/base --method=eora --rank=8 \
        --output=runs/again

The result is a model directory that evaluate, generate, train (`start_from`) and convert take like any other; weights
stay packed in it and in memory, and convert multiplies them out for Hugging Face. Methods: round_to_nearest, gptq,
finequant, decoupleq, and, behind one of these, eora, svd, act_s; qmoe, of experts; factors, of low-rank terms. Each
takes those of --bits, --group and --rank that it has; all of its options are fields of a config. Text to observe comes
from the sources that training takes. A table says what each method did to the size and to held-out text, and with
--speed to decoding; compression.png in the new directory draws loss against size. Without --workdir the model that
ships is compressed.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli
from research.paths import expand

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from research.compression.chain import Chain
    from research.training.model_directory import Loaded

PROGRAM = cli.Program(__doc__)
CONFIG = PROGRAM.config_flag(required=False)
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
METHOD = PROGRAM.define(flags.DEFINE_list, "method", [], "Methods, applied from left to right.")
BITS = PROGRAM.define(flags.DEFINE_integer, "bits", None, "Of a weight: 2, 3, 4 or 8.")
GROUP = PROGRAM.define(
    flags.DEFINE_integer, "group", None, "Inputs that share a scale; all inputs of an output by default."
)
RANK = PROGRAM.define(flags.DEFINE_integer, "rank", None, "Of a correction.")
CALIBRATION = PROGRAM.define(
    flags.DEFINE_string, "calibration", "builtin", "The source of text to observe, of its split train."
)
TOKENS = PROGRAM.define(
    flags.DEFINE_integer, "calibration_tokens", 32768, "How many to observe.", lower_bound=1
)
SEED = PROGRAM.define(flags.DEFINE_integer, "seed", 0, "Of the calibration text, and of what is drawn.")
OUTPUT = PROGRAM.define(flags.DEFINE_string, "output", None, "The new model directory.", required=True)
ORIGINAL = PROGRAM.define(
    flags.DEFINE_string, "original", None, "The model to approximate, where --workdir is compressed already."
)
HELD_OUT = PROGRAM.define(
    flags.DEFINE_string,
    "held_out",
    None,
    "The source to measure on, of its split validation; that of the calibration.",
)
BATCHES = PROGRAM.define(
    flags.DEFINE_integer, "batches", 8, "Batches of 8 rows to measure on.", lower_bound=1
)
PER_LAYER = PROGRAM.define(
    flags.DEFINE_boolean, "per_layer", False, "Print a row for every compressed kernel."
)
SPEED = PROGRAM.define(
    flags.DEFINE_boolean, "speed", False, "Measure after each step how fast it decodes; compiles each time."
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "The moving average of the parameters.")
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of what is not compressed.", ["float32", "bfloat16"]
)
ROWS = 8
PROMPT, NEW_TOKENS, TIMES = 8, 64, 3  # of --speed


def main(arguments: list[str]) -> None:
    from research.compression.chain import name_of, unrolled
    from research.config_capture import capture
    from research.training.model_directory import save_model
    from research.training.workdir import load_model

    chain = load_chain()
    check_output(expand(OUTPUT.value))
    path = WORKDIR.value or "package:language/base"
    loaded = load_model(path, STEP.value, EMA.value)
    model, params = unrolled(loaded.model, loaded.params)
    original = params if ORIGINAL.value is None else original_of(ORIGINAL.value, model)
    measure = Measure(model, loaded, chain)
    batches = chain.batches(model, loaded.tokenizer) if chain.needs_data else []
    speed = Speed(model, measure.prompt) if SPEED.value else None
    rows, notes = [("before", 0.0, *measure(params))], []
    speeds = [] if speed is None else [speed(params)]
    for step in chain.run(model, params, batches, original, tell):
        name = name_of(step.method)
        notes += [f"{name}: {note}" for note in step.notes]
        rows.append((name, step.seconds, *measure(step.params)))
        params = step.params
        if speed is not None:
            speeds.append(speed(params))
    bits = bits_per_weight([row[2] for row in rows], params)
    lines = [
        (name, f"{size // 8:,}", f"{of_weight:.3f}", f"{loss:.4f}", f"{byte:.4f}", f"{seconds:.0f}")
        for (name, seconds, size, loss, byte), of_weight in zip(rows, bits, strict=True)
    ]
    heads = ("", "bytes", "bits per weight", "loss", "bits per byte", "seconds")
    if speed is not None:
        heads = (*heads, "tokens/s")
        lines = [(*line, f"{value:.0f}") for line, value in zip(lines, speeds, strict=True)]
        notes.append(speed.note)
    card = describe(path, chain, heads, lines, notes)
    experiment = experiment_of(path)
    save_model(
        OUTPUT.value, capture(model), params, loaded.tokenizer, DTYPE.value, card, loaded.inputs, experiment
    )
    draw(rows, expand(OUTPUT.value) / "compression.png")
    for note in notes:
        print(note)
    print_table(heads, lines)
    if PER_LAYER.value:
        print_table(*per_layer(original, params))
    share = rows[-1][2] / rows[0][2]
    print(f"{OUTPUT.value}: {', '.join(row[0] for row in rows[1:])} of {path}, {share:.1%} of its bytes")


def load_chain() -> "Chain":
    """The chain of --config, or that of --method with the options of the other flags."""
    from research.compression.chain import Chain
    from research.compression.methods import METHODS, make_methods
    from research.config import build
    from research.errors import UserError

    options = {"bits": BITS.value, "group": GROUP.value, "rank": RANK.value}
    options = {name: value for name, value in options.items() if value is not None}
    if CONFIG.value is None:
        if not METHOD.value:
            raise UserError(f"--method or --config is required; methods are {', '.join(METHODS)}")
        methods = make_methods(METHOD.value, options)
        return Chain(methods, CALIBRATION.value, TOKENS.value, seed=SEED.value)
    own = ("method", "bits", "group", "rank", "calibration", "calibration_tokens", "seed")
    if given := [name for name in own if PROGRAM.values[name].present]:
        raise UserError(f"--{given[0]} and --config both say what to do; use --config.FIELD=... instead")
    chain = build(CONFIG.load())
    if not isinstance(chain, Chain):
        raise UserError(f"--config={CONFIG.value} builds a {type(chain).__name__}, not a compression Chain")
    return chain


def check_output(path: Path) -> None:
    """Raises UserError where something is there already; better now than after the work."""
    from research.errors import UserError

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output={path} exists already: choose a new directory")


def original_of(path: str, model: Any) -> Any:
    """The parameters of the model that is to be approximated, which must be the same model."""
    from research.compression.chain import unrolled
    from research.errors import UserError
    from research.training.workdir import load_model

    loaded = load_model(path)
    other, params = unrolled(loaded.model, loaded.params)
    if other != model:
        raise UserError(f"--original={path} is another model than the one that is compressed")
    return params


class Measure:
    """Bits of all parameters, and loss (nats a token) and bits per byte of held-out text. Kernels are multiplied out
    for it, so that one program measures the whole chain."""

    def __init__(self, model: Any, loaded: "Loaded", chain: "Chain"):
        import jax
        import numpy as np

        from research.data.text import TokenDataset
        from research.training.task import LanguageModelling

        length = chain.length or min(getattr(model, "max_length", 2048), 2048)
        data = TokenDataset(
            HELD_OUT.value or chain.sources, "validation", length, loaded.tokenizer, shuffle=False
        )
        rows = min(BATCHES.value * ROWS, len(data) // ROWS * ROWS or len(data))
        starts = range(0, rows, ROWS)
        self._batches = [data.take(np.arange(at, min(at + ROWS, rows))) for at in starts]
        self.prompt = self._batches[0]["tokens"][0, :PROMPT].tolist()
        self._evaluate = jax.jit(LanguageModelling(model).evaluate)

    def __call__(self, params: Any) -> tuple[int, float, float]:
        import numpy as np

        from research.compression.blocks import plain
        from research.nn.weights import stored_bits
        from research.training.evaluators import means

        dense = plain(params)
        found = [self._evaluate(dense, batch) for batch in self._batches]
        totals = {
            name: [np.sum([np.asarray(m[name][i], np.float64) for m in found]) for i in (0, 1)]
            for name in ("loss", "bits_per_byte")
        }
        mean = means(totals, "held-out text")
        return stored_bits(params), mean["loss"], mean["bits_per_byte"]


class Speed:
    """New tokens a second of a short greedy decode of one row, prefill included and compilation not."""

    def __init__(self, model: Any, prompt: list[int]):
        import jax

        self._model, self._prompt = model, prompt
        self._new_tokens = min(NEW_TOKENS, getattr(model, "max_length", NEW_TOKENS + PROMPT) - len(prompt))
        device = jax.devices()[0].device_kind
        self.note = (
            f"tokens/s: median of {TIMES} greedy decodes of {self._new_tokens} tokens after {len(prompt)}, one row, "
            f"float32, on {device}"
        )

    def __call__(self, params: Any) -> float:
        import statistics

        from research.decoding.generator import Generator
        from research.decoding.sampling import Sampling

        generator = Generator(self._model, params, ends=())
        options = dict(max_new_tokens=self._new_tokens, sampling=Sampling(temperature=0.0))
        stats = [generator.generate([self._prompt], **options).stats for _ in range(TIMES)]
        return statistics.median(found.tokens_per_second for found in stats)


def compressed(params: Any) -> dict[str, Any]:
    """The structured kernels of a tree, by path."""
    import jax

    from research.nn.weights import Weight
    from research.training.paths import path_of

    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, Weight))
    return {path_of(keys): leaf for keys, leaf in leaves if isinstance(leaf, Weight)}


def bits_per_weight(sizes: list[int], params: Any) -> list[float]:
    """Of the kernels that are compressed in the end, after each step; sizes: bits of all parameters."""
    import math

    from research.nn.weights import stored_bits

    kernels = compressed(params)
    count = sum(math.prod(kernel.shape) for kernel in kernels.values())
    rest = sizes[-1] - stored_bits(kernels)
    return [(size - rest) / count for size in sizes]


def per_layer(original: Any, params: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the rows of a table of compressed kernels."""
    import math

    import numpy as np

    from research.compression.blocks import plain
    from research.nn.weights import materialize, stored_bits
    from research.training.paths import named_leaves

    before = named_leaves(plain(original))
    rows = []
    for path, kernel in compressed(params).items():
        exact, now = (np.asarray(x, np.float64) for x in (before[path], materialize(kernel)))
        error = np.linalg.norm(now - exact) / max(np.linalg.norm(exact), 1e-300)
        bits = stored_bits(kernel) / math.prod(kernel.shape)
        rows.append((path, " x ".join(map(str, kernel.shape)), form(kernel), f"{bits:.3f}", f"{error:.4f}"))
    return ("kernel", "shape", "stored as", "bits per weight", "relative error"), rows


def form(kernel: Any) -> str:
    """What a kernel is stored as: 4 bits in groups of 64 + rank 16."""
    from research.nn.weights import LowRank, Permuted, Sum, Weight

    if isinstance(kernel, Sum):
        return " + ".join(map(form, kernel.terms))
    if isinstance(kernel, LowRank):
        rank = f"rank {kernel.down.shape[-1]}"
        return f"{rank} of {form(kernel.down)}" if isinstance(kernel.down, Weight) else rank
    if isinstance(kernel, Permuted):
        return f"{form(kernel.kernel)}, reordered"
    if hasattr(kernel, "bits") and hasattr(kernel, "group"):
        return f"{kernel.bits} bits in groups of {kernel.group}"
    return type(kernel).__name__ if isinstance(kernel, Weight) else str(kernel.dtype)


def describe(path: str, chain: "Chain", heads: tuple, lines: list[tuple], notes: list[str]) -> str:
    """The model card."""
    table = [heads, ("---",) * len(heads), *lines]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table)
    methods = "\n".join(f"- `{method}`" for method in chain.methods)
    text = f"{chain.tokens} tokens of {chain.sources}" if chain.needs_data else "no data"
    said = "".join(f"\n- {note}" for note in notes)
    return (
        f"# A compressed model\n\nMade of {path} with `python -m experiments.compress`, calibrated on {text}, seed "
        f"{chain.seed}:\n\n{methods}\n\n{rows}\n\n![loss against size](compression.png)\n{said}\n"
    )


def experiment_of(path: str) -> "ConfigDict | None":
    """The config of the run that trained the model, where it is known: evaluate measures on its data."""
    from research.training.model_directory import EXPERIMENT, WEIGHTS, read_config
    from research.training.workdir import directory_of

    folder = directory_of(path)
    if not (folder / WEIGHTS).exists():
        return read_config(folder / "config.json")
    return read_config(folder / EXPERIMENT) if (folder / EXPERIMENT).exists() else None


def draw(rows: list[tuple], path: Path) -> None:
    """Loss against size over the chain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes, losses = [row[2] / 8e6 for row in rows], [row[3] for row in rows]
    axes.plot(sizes, losses, color="0.7", zorder=1)
    axes.scatter(sizes, losses, color="C3", zorder=2)
    for (name, *_), size, loss in zip(rows, sizes, losses, strict=True):
        axes.annotate(name, (size, loss), textcoords="offset points", xytext=(6, 5))
    axes.margins(x=0.2, y=0.15)
    axes.set(xlabel="size (MB)", ylabel="loss on held-out text (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and a table folded to 80 columns can't be read
    console.print(table)


def tell(line: str) -> None:
    """What is going on."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    PROGRAM.run(main)
