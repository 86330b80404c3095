"""The program that merges: a model directory comes out, and mistakes are told in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.matlm import decoder
from experiments import merge
from research.config import build, of
from research.nn.mlp import MLP
from research.training.model_directory import load_model_directory, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, two models with other numbers, one of another width and one of another activation."""
    folder = tmp_path_factory.mktemp("merge")
    shapes = {"base": {}, "one": {}, "two": {}, "wide": dict(width=16), "plain": {}}
    for number, (name, other) in enumerate(shapes.items()):
        config = decoder(
            **dict(width=8, num_layers=1, num_heads=2, hidden_dim=16, length=16, vocab_size=32) | other
        )
        if name == "plain":
            config.blocks[0].mlp = of(MLP, hidden_dim=16)
        tree = jax.eval_shape(build(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        rng = np.random.default_rng(number)
        save_model(
            folder / name, config, jax.tree.map(lambda x, r=rng: r.standard_normal(x.shape, np.float32), tree)
        )
    return folder


def run(made, *arguments):
    return merge.PROGRAM.call(
        merge.main, [f"--base={made / 'base'}", f"--output={made / 'merged'}", *arguments]
    )


def test_the_average_of_two_is_written(made):
    assert run(made, f"--models={made / 'one'},{made / 'two'}") == 0
    found, one, two = (load_model_directory(made / name).params for name in ("merged", "one", "two"))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models={one},{wide}"], "wide was not fine-tuned from the base: blocks, width"),
        (["--models={one},{plain}"], "plain was not fine-tuned from the base: blocks differ"),
        (["--models={one},{one}"], "names one twice"),
        (["--models={one}", "--method=fisher"], "--method=fisher observes each model on data of its own"),
        (["--models={one}", "--scale=2"], "--scale has no effect with --method=average"),
        (["--models={one},{two}", "--data=builtin"], "--data names 1 sources for 2 models"),
        (["--models={one}", "--drop=90"], "drop=90.0 is not in [0, 1]"),
    ],
)
def test_mistakes_are_told(made, arguments, message, capsys):
    paths = {name: made / name for name in ("one", "two", "wide", "plain")}
    assert run(made, *(argument.format(**paths) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
