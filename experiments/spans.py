"""Plans attention spans for a trained model: which keys each head keeps, as a function of the input's length (MoA).

    python -m experiments.spans --config=configs/moa.py:text --output=runs/plan.json
    python -m experiments.spans --workdir=runs/moa --config=configs/moa.py:plan --output=runs/plan.json
    python -m experiments.spans --config=configs/moa.py:text --config.density=0.25 --output=runs/quarter.json
    python -m experiments.generate --plan=runs/plan.json --prompt='import '

The model answers the calibration data itself; the gradient of its loss on those answers says what each attention entry
is worth; integer programs then spend the density on the spans that lose least. No weight changes. The plan is a JSON
file that fits this model alone. Without --workdir it plans for the model that ships. What is going on goes to standard
error, the plan in words to standard output.
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from research.sparse.moa.planner import Front

PROGRAM = cli.Program(__doc__)
CONFIG = PROGRAM.config_flag()
WORKDIR = PROGRAM.workdir_flag("A run or a model directory; the model that ships by default.")
OUTPUT = PROGRAM.define(cli.path, "output", None, "The plan, a new file.", required=True)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "The moving average of the parameters.")


def main(arguments: list[str]) -> None:
    from research.config import build
    from research.errors import UserError
    from research.language import BASE
    from research.sparse.moa.planner import Planner
    from research.training.workdir import load_model

    planner = build(CONFIG.load())
    if not isinstance(planner, Planner):
        raise UserError(f"--config={CONFIG.value} builds a {type(planner).__name__}, not a Planner")
    path = WORKDIR.value or BASE
    loaded = load_model(path, STEP.value, EMA.value)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    profiles = planner.profiles(loaded.model, loaded.params, tell)
    front = planner.search(loaded.model, loaded.params, profiles, tell)
    front.plan.save(OUTPUT.value)
    print(describe(front))
    print(f"{OUTPUT.value}: for {path} alone, up to {front.plan.longest} tokens of prompt and output")


def describe(front: "Front") -> str:
    """The front, densities, and the rules of every layer with the spans at the longest length."""
    plan = front.plan
    lines = ["loss that is masked, at each profiled length and at the one for selection:"]
    for number, (losses, unseen) in enumerate(zip(front.losses, front.validation, strict=True)):
        mark = "selected" if number == front.chosen else ""
        lines.append(f"  {' '.join(f'{x:9.3g}' for x in losses)} {unseen:9.3g} {mark}".rstrip())
    shares = (f"{plan.spans(length).mean() / length:.1%} of {length}" for length in plan.lengths)
    lines.append(f"keys and values kept: {', '.join(shares)} tokens")
    for layer, rules, spans in zip(plan.shape.layers, plan.rules, plan.spans(plan.longest), strict=True):
        heads = ", ".join(f"{a:+d} {b:g} N: {span}" for (a, b), span in zip(rules, spans, strict=True))
        lines.append(f"layer {layer}: {heads}")
    return "\n".join(lines)


if __name__ == "__main__":
    PROGRAM.run(main)
