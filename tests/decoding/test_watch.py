"""Watching decoding: what every call drafted and kept adds up to the output."""

import matplotlib
import pytest

from research.data.tokenizer import Tokenizer
from research.decoding.generator import Generator
from research.decoding.watch import draw, watch

from .speculative.members import member

NEW = 20


@pytest.fixture(scope="module")
def watched():
    found = member("prompt_lookup")
    generator = Generator(
        found.target.model, found.target.params, proposer=found.proposer, proposer_params=found.params
    )
    prompt = list(found.prompts[0])
    expected = generator.generate([prompt], max_new_tokens=NEW)
    return expected, *watch(generator, prompt, max_new_tokens=NEW)


def test_the_result_is_that_of_the_generator(watched):
    expected, result, _ = watched
    assert result.samples == expected.samples
    assert result.stats.gained == expected.stats.gained


def test_calls_make_up_the_output(watched):
    _, result, calls = watched
    assert len(calls) == sum(result.stats.gained) == result.stats.calls - 1
    output = result.samples[0].tokens
    assert [token for call in calls for token in call.gained] == output[1:]
    newest = output[0]
    for call in calls:
        assert call.tokens[0] == newest and call.path[0] == 0 and call.parents[0] == -1
        kept = [call.tokens[node] for node in call.path[1:]]
        assert call.gained[:-1] == kept and all(call.real[node] for node in call.path)
        newest = call.gained[-1]
    assert max(len(call.path) for call in calls) > 1


def test_the_tree_is_drawn(watched):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    call = max(watched[2], key=lambda call: len(call.path))
    drawing, axes = plt.subplots()
    draw(call, Tokenizer.load(), axes)
    real = 1 + sum(call.real[1:])
    assert len(axes.lines) == real - 1
    assert len(axes.texts) == real + 1  # and the target's own token
    plt.close(drawing)
