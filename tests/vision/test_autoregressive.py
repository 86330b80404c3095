import functools

import jax.numpy as jnp
import numpy as np
import pytest

from configs.matlm import decoder
from research.config import build
from research.data.codes import Codebook
from research.decoding.sampling import Sampling
from research.decoding.speculative.sjd import SJD
from research.errors import UserError
from research.vision.autoregressive import Artist
from tests.programs import drawn

CODES, CLASSES = 6, 2


@functools.cache
def model():
    module = build(decoder(16, 1, 2, 24, 13, vocab_size=CODES + CLASSES + 1))
    params = drawn(module, jnp.zeros((1, 2), jnp.int32))
    # The head prefers the tokens of classes, so that only the ban keeps them out.
    params["embedding"]["table"] = params["embedding"]["table"].at[CODES:].mul(4.0)
    return module, params


def artist(**options):
    grey = np.linspace(-1, 1, CODES, dtype=np.float32)
    codebook = Codebook(np.broadcast_to(grey[:, None, None, None], (CODES, 2, 2, 1)))
    return Artist(*model(), codebook, rows=3, columns=4, **options)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_drawing_is_the_decoded_codes(guidance):
    drawing = artist(guidance=guidance).draw([0, 1, 1], sampling=Sampling(temperature=1.0), seed=3)
    assert drawing.codes.shape == (3, 3, 4) and drawing.images.shape == (3, 6, 8, 1)
    assert drawing.codes.min() >= 0 and drawing.codes.max() < CODES
    np.testing.assert_allclose(drawing.images[:, ::2, ::2, 0], 2 * drawing.codes / (CODES - 1) - 1, atol=1e-6)
    assert not np.array_equal(drawing.codes[1], drawing.codes[2])  # one class, two draws
    assert drawing.stats.calls == 12


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("rule", ["repeat_vertical", "sample_horizontal"])
def test_greedy_drafting_draws_the_same_image_in_no_more_calls(guidance, rule):
    proposer = SJD(codes=CODES, rows=3, columns=4, window=4, init_rule=rule)
    plain, drafted = (
        artist(guidance=guidance, proposer=p).draw([0, 1], sampling=Sampling()) for p in (None, proposer)
    )
    np.testing.assert_array_equal(drafted.codes, plain.codes)
    assert drafted.stats.calls <= plain.stats.calls and drafted.stats.drafted > 0


def test_mistakes_are_told():
    with pytest.raises(UserError, match="class 2: the model knows 0 to 1"):
        artist().draw([2], sampling=Sampling())
    with pytest.raises(UserError, match="a vocabulary of 9 holds no classes beside the 256 codes"):
        Artist(*model(), Codebook.load(), rows=3, columns=4)
    with pytest.raises(UserError, match="3 x 5 codes and a class need a context of 16, not 13"):
        Artist(*model(), artist().codebook, rows=3, columns=5)
