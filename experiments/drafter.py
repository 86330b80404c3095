"""Writes a trained drafter as a directory of its own, on request with a tree fitted to what its heads get right.

    python -m experiments.drafter --drafter=runs/medusa --output=drafters/medusa
    python -m experiments.drafter --drafter=runs/medusa --nodes=32 --output=drafters/medusa-32

The directory holds the drafter without its target, and remembers which one that was. With --nodes the drafter
must have heads that draft a static tree (Medusa, Hydra, ...): the target continues held-out text, the heads are
asked along it how often the guess of each rank is right, and the tree of so many nodes with the greatest expected
number of tokens a call is found by greedy search (arXiv 2401.10774, section 2.3.3). Nothing is trained.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from research.data.pipeline import Dataset
    from research.decoding.speculative.loading import LoadedDrafter
    from research.training.model_directory import Loaded

PROGRAM = cli.Program(__doc__)
DRAFTER = PROGRAM.define(
    flags.DEFINE_string, "drafter", None, "A run or directory of a drafter.", required=True
)
TARGET = PROGRAM.define(
    flags.DEFINE_string, "target", None, "Its target; by default where it was during training."
)
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
NODES = PROGRAM.define(
    flags.DEFINE_integer, "nodes", None, "Fit a tree of so many nodes, the root included.", lower_bound=2
)
ROWS = PROGRAM.define(
    flags.DEFINE_integer, "rows", 128, "Rows of text that the tree is fitted to.", lower_bound=1
)
LENGTH = PROGRAM.define(flags.DEFINE_integer, "length", 128, "Tokens of such a row.", lower_bound=40)
SOURCES = PROGRAM.define(
    flags.DEFINE_string, "sources", "builtin", "Where its beginnings come from (validation split)."
)
OUTPUT = PROGRAM.define(
    flags.DEFINE_string, "output", None, "The new directory; without it the tree is only shown."
)


def main(arguments: list[str]) -> None:
    from research.decoding.speculative.loading import load_drafter, save_drafter, target_path
    from research.errors import UserError
    from research.training.workdir import load_model

    if NODES.value is None and OUTPUT.value is None:
        raise UserError("nothing to do: give --output=FOLDER, --nodes=N, or both")
    path = TARGET.value or target_path(DRAFTER.value)
    if path is None:
        raise UserError(f"{DRAFTER.value} is no trained drafter: give a run or directory of one")
    target = load_model(path)
    found = load_drafter(DRAFTER.value, target, STEP.value)
    config = found.config
    if NODES.value is not None:
        from research.decoding.speculative.distill import SelfDistilled
        from research.training.progress import data_progress

        text = SelfDistilled(
            path, ROWS.value, LENGTH.value, sources=SOURCES.value, split="validation"
        ).prepare(data_progress)
        config = fitted(found, target, text, NODES.value)
    if OUTPUT.value is not None:
        save_drafter(OUTPUT.value, config, found.params, target, path)
        print(f"drafter: {OUTPUT.value}")


def fitted(found: "LoadedDrafter", target: "Loaded", text: "Dataset", nodes: int) -> "ConfigDict":
    """The drafter's config with the best tree of so many nodes for `text`; tells how good it is."""
    from research.config import from_json, to_json
    from research.decoding.proposers import Target
    from research.decoding.speculative.trees import build_static_tree, calibrate, expected_tokens
    from research.errors import UserError

    if not hasattr(found.proposer, "forced"):
        kind = type(found.proposer).__name__
        raise UserError(f"--nodes: a {kind} has no heads that draft a static tree: there is none to fit")
    params = found.target_params(target)
    batches = text.batches(0, 8, epochs=1)
    top = max(10, found.proposer.tree.top)
    accuracy = calibrate(found.proposer, found.params, Target(params, target.model), batches, top)
    paths = build_static_tree(accuracy, nodes - 1)
    for head, shares in enumerate(accuracy, 1):
        print(f"head {head}: " + " ".join(f"{share:.3f}" for share in shares))
    now = found.proposer.tree.paths
    print(
        f"expected tokens a call: {expected_tokens(accuracy, now):.2f} with the {len(now) + 1} nodes it has, "
        f"{expected_tokens(accuracy, paths):.2f} with these {nodes}"
    )
    config = from_json(to_json(found.config))
    config.tree.paths = paths
    return config


if __name__ == "__main__":
    PROGRAM.run(main)
