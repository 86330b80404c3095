"""What the tests of drafters with virtual rows share: a random target with a windowed layer, a packed batch,
and one call of the engine, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.verify import Greedy
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from tests.programs import drawn

VOCAB, WIDTH, LAYERS = 32, 16, 2
# Programs that order sums differently agree to about 100 roundings of logits of order 1.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def target() -> Target:
    attention = Attention(num_heads=2, head_dim=8, rotary=Rotary())
    blocks = tuple(Block(attention.clone(rule=rule), GatedMLP(24)) for rule in (Window(3), Causal()))
    model = DecoderLM(blocks=blocks, vocab_size=VOCAB, width=WIDTH, max_length=64, num_layers=LAYERS)
    params = drawn(model, np.zeros((1, 2), np.int32))
    larger = lambda x: jax.device_put(np.float32(2.0) * np.asarray(x)) if x.ndim > 1 else x  # noqa: E731
    return Target(jax.tree.map(larger, params), model)


target()  # now: a traced function may be the first to ask


@functools.partial(jax.jit, static_argnums=1)
def _text(seed, shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


def make_batch(length: int = 9) -> dict[str, jax.Array]:
    """Two rows; the second holds two documents, of 4 tokens and of the rest."""
    text = np.asarray(_text(1, (2, length + 1)))
    segments = np.asarray([[1] * length, [1] * 4 + [2] * (length - 4)], np.int32)
    positions = np.asarray([range(length), [*range(4), *range(length - 4)]], np.int32)
    weights = np.ones((2, length), np.float32)
    weights[1, 3] = 0.0
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segments": segments, "positions": positions}
    return jax.device_put(batch | {"weights": weights})


@functools.partial(jax.jit, static_argnums=0)
def _extend(model, params, cache, tokens, tree, depth, virtual):
    return model.apply({"params": params}, tokens, cache, tree, depth, virtual, method="extend")


def extend(cache, tokens, tree=None, depth=None, virtual=None):
    found = target()
    return _extend(found.model, found.params, cache, tokens, tree, depth, virtual)


@functools.cache
def prefix():
    """A cache of a prompt of 6 tokens and what is told after prefill, with its root."""
    found = target()
    tokens, lengths = _text(5, (1, 6)), jnp.asarray([6])

    @jax.jit
    def read(params):
        logits, hidden, fresh = found.model.apply({"params": params}, tokens, lengths, method="prefill")
        cache = found.model.init_cache(1, 32, margin=8).commit(fresh, None, lengths)
        return cache, jnp.argmax(logits, -1), hidden

    cache, root, hidden = read(found.params)
    return cache, Prompt(tokens, lengths, hidden, root, 32)


@functools.cache
def continuation(count: int = 3) -> list[int]:
    """The root and the greedy tokens after it."""
    cache, prompt = prefix()
    found = prompt.root.tolist()
    while len(found) < count + 1:
        padded = np.asarray([found + [0] * (count - len(found))], np.int32)
        found.append(int(np.argmax(np.asarray(extend(cache, padded)[0])[0, len(found) - 1])))
    return found


def call(drafter, params, state=None, verifier=Greedy()):  # noqa: B008
    """One call after the prompt, the first one without a state: -> outcome, the state afterwards."""
    return _call(target().model, drafter, verifier, target().params, params, state, *prefix())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(model, drafter, verifier, target_params, params, state, cache, prompt):
    found = Target(target_params, model)
    if state is None:
        state = drafter.init(params, found, prompt)
    keys = jax.random.split(jax.random.key(0), (1, drafter.levels))
    draft, state = drafter.propose(params, found, state, Round(prompt.root, cache.length, keys[:, 0], None))
    tree = draft.tree
    tokens = draft.tokens[:, : tree.size - draft.virtual.size]
    places = jnp.asarray(tree.mask), jnp.asarray(tree.depth)
    logits, hidden, _ = model.apply(
        {"params": target_params}, tokens, cache, *places, draft.virtual, method="extend"
    )
    outcome = Outcome(draft, verifier(logits, draft, keys), logits, logits, hidden)
    return outcome, drafter.observe(params, found, state, outcome)
