"""Turns a dense model into a mixture of experts that computes the same, or a mixture's experts into fewer.

    python -m experiments.upcycle runs/matlm --experts=8 --k=2 --output=runs/upcycled
    python -m experiments.upcycle runs/smoe --experts=4 --output=runs/merged
    python -m experiments.upcycle runs/smoe --experts=1 --output=runs/dense

The argument is a run or a model directory. Of a dense model every expert is a copy of its layer's FFN, with a router
that is drawn. Of a mixture with more experts than asked for, neighbours are averaged, which does change the outputs;
one expert is a dense FFN. Training goes on from the new directory with `--config.task.start_from=runs/upcycled`.
"""

from absl import flags

from experiments import cli

PROGRAM = cli.Program(__doc__, arguments="CHECKPOINT")
EXPERTS = PROGRAM.define(
    flags.DEFINE_integer, "experts", None, "Experts of every layer.", required=True, lower_bound=1
)
K = PROGRAM.define(
    flags.DEFINE_integer, "k", 2, "Experts for a token, where a dense model is upcycled.", lower_bound=1
)
OUTPUT = PROGRAM.define(flags.DEFINE_string, "output", None, "The new model directory.", required=True)
SEED = PROGRAM.define(flags.DEFINE_integer, "seed", 0, "Of the routers that are drawn.")
STEP = PROGRAM.define(
    flags.DEFINE_integer, "step", None, "The checkpoint of the run; the newest by default.", lower_bound=0
)
EMA = PROGRAM.define(flags.DEFINE_boolean, "ema", False, "The moving average of the parameters.")
DTYPE = PROGRAM.define(
    flags.DEFINE_enum, "dtype", "float32", "Precision of the saved parameters.", ["float32", "bfloat16"]
)


def main(arguments: list[str]) -> None:
    import jax

    from research.config_capture import capture
    from research.errors import UserError
    from research.moe.layer import MoE
    from research.moe.upcycle import merge, upcycle
    from research.nn.accounting import count_active_parameters, count_parameters
    from research.training.model_directory import save_model
    from research.training.workdir import load_model

    if len(arguments) != 1:
        raise UserError(f"upcycle takes one run or model directory, not {len(arguments)}; see --help")
    loaded = load_model(arguments[0], STEP.value, EMA.value)
    if not hasattr(loaded.model, "blocks"):
        raise UserError(
            f"{arguments[0]} holds a {type(loaded.model).__name__}, which has no layers to change"
        )
    number = {block.mlp.num_experts for block in loaded.model.blocks if isinstance(block.mlp, MoE)}
    if any(count > EXPERTS.value for count in number):
        model, params = merge(loaded.model, loaded.params, EXPERTS.value)
        what = f"merged from {max(number)}, which changes its outputs"
    else:
        key = jax.random.key(SEED.value)
        model, params = upcycle(loaded.model, loaded.params, EXPERTS.value, K.value, key)
        what = "upcycled, with the outputs of the dense model"
    config = capture(model)
    card = f"# Experts: {EXPERTS.value} a layer\n\nMade with `python -m experiments.upcycle`: {what}.\n"
    save_model(OUTPUT.value, config, params, loaded.tokenizer, DTYPE.value, card, loaded.inputs)
    active = count_active_parameters(model, params)
    print(
        f"{OUTPUT.value}: {EXPERTS.value} experts a layer, {what}; {count_parameters(params):,} parameters, "
        f"{active:,} active for a token"
    )


if __name__ == "__main__":
    PROGRAM.run(main)
