"""Draft models: what they write is what a full forward would, drawn as the target draws; slices of the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding.generator import Generator
from research.decoding.proposers import Prompt, Round, Target
from research.decoding.sampling import Sampling
from research.decoding.speculative.draft_model import DraftModel, Submodel, leading
from research.decoding.speculative.training import Teacher
from research.decoding.tree import chain
from research.decoding.verify import Draft, Sampled
from research.elastic.matformer import MatFormer, extract, parse_widths
from research.elastic.slicing import nested_widths
from research.errors import UserError
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.fuse import fuse_projections
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import LowRank
from research.training.task import LanguageModelling
from tests.programs import call, drawn

from .laws import MIXED, VOCAB, Markov, distance, run

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]


def decoder(width=8, num_layers=2, rules=(Causal(),), vocab_size=32, max_length=48) -> DecoderLM:  # noqa: B008
    layer = dict(num_heads=2, head_dim=4, rotary=Rotary())
    blocks = tuple(Block(Attention(**layer, rule=rule), GatedMLP(2 * width)) for rule in rules)
    return DecoderLM(
        blocks=blocks, num_layers=num_layers, vocab_size=vocab_size, width=width, max_length=max_length
    )


@functools.cache
def init(model, seed=0):
    params = drawn(model, np.zeros((1, 2), np.int32), seed=seed)
    larger = lambda x: jax.device_put(np.float32(3.0) * np.asarray(x)) if x.ndim > 1 else x  # noqa: E731
    return jax.tree.map(larger, params)  # so that outputs are not constant


def noisy(model, scale):
    """Near `init(model)`."""
    near = lambda x, y: jax.device_put(np.asarray(x) + np.float32(scale) * np.asarray(y))  # noqa: E731
    return jax.tree.map(near, init(model), init(model, 1))


class FullForwards:
    """The draft's first choices by a forward over the whole text for each of them; the state is that text."""

    def __init__(self, model, gamma):
        self.model, self.size, self.levels = model, gamma + 1, gamma + 1

    def init(self, params, target, prompt):
        return jnp.pad(prompt.tokens, ((0, 0), (0, self.model.max_length)))

    def propose(self, params, target, text, round):
        rows = jnp.arange(len(text))
        drafted = [round.root]
        for depth in range(self.levels):
            text = text.at[rows, round.length + depth].set(drafted[-1])
            if depth < self.levels - 1:
                logits = self.model.apply({"params": params}, text)[rows, round.length + depth]
                drafted.append(jnp.argmax(logits, -1).astype(jnp.int32))
        return Draft(jnp.stack(drafted, 1), chain(self.size)), text

    def observe(self, params, target, text, outcome):
        return text


@pytest.mark.parametrize("rules", [(Causal(),), (Window(3), Causal())], ids=["dense", "ring"])
def test_drafts_are_those_of_full_forwards(rules):
    """Call for call: after rejections, full acceptance, and in rows that finish at different times."""
    model, small = decoder(num_layers=2), decoder(num_layers=2, rules=rules)
    # The draft is the target but for its attention's rule and a little noise, so some drafts are right.
    params = init(model)
    noise = noisy(model, 0.12)
    results = []
    for proposer in (DraftModel(small, 3), FullForwards(small, 3)):
        generator = Generator(model, params, proposer=proposer, proposer_params=noise)
        results.append(generator.generate(PROMPTS, max_new_tokens=20))
    own, expected = results
    assert own.samples == expected.samples
    assert own.stats.gained == expected.stats.gained
    assert all(own.stats.gained)  # calls that gained 1, 2, 3 and 4 tokens


def test_a_round_makes_gamma_forwards():
    seen = []

    class Counting(Markov):
        def apply(self, variables, tokens, *args, method):
            seen.append((method, tokens.shape[1]))
            return super().apply(variables, tokens, *args, method=method)

    proposer, target = DraftModel(Counting(MIXED), 3), Target((), Markov(MIXED))

    def a_round():
        zero = jnp.zeros((1,), jnp.int32)
        prompt = Prompt(zero[:, None], zero + 1, zero[:, None, None], zero, 16)
        state = proposer.init((), target, prompt)
        warp = lambda logits, tokens, tree: logits  # noqa: E731
        keys = jax.random.split(jax.random.key(0), 1)
        return proposer.propose((), target, state, Round(zero, zero + 1, keys, warp))[0].tokens

    with jax.disable_jit():  # loops are unrolled, and every forward is traced
        jax.eval_shape(a_round)
    assert seen == [("prefill", 1), ("extend", 2), ("extend", 1), ("extend", 1)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(0.7, top_k=20, top_p=0.8, repetition_penalty=1.5, banned=(3,)),
    ],
    ids=["greedy", "sampled"],
)
def test_a_draft_that_is_the_target_is_always_kept(sampling):
    """Which holds only if q is warped as p is, at every place of the draft."""
    model = decoder()
    generator = Generator(model, init(model), proposer=DraftModel(model, 3), proposer_params=init(model))
    stats = generator.generate(PROMPTS, max_new_tokens=17, sampling=sampling, seed=1).stats
    # Prefill gives 1 token of 17, each of 4 calls gamma + 1 = 4.
    assert stats.gained == (0, 0, 0, 12) and stats.wasted == 0


def test_sampling_keeps_the_law():
    state = run(DraftModel(Markov(MIXED), 2), (), Sampled())
    assert distance(state) < 0.03
    assert np.all(np.asarray(state.histogram).sum(0) > 0)


def test_disjoint_drafts_are_never_kept():
    """p lives on tokens 0 and 1, q on 2 and 3."""
    low = np.float32([[0.5, 0.5, 0.0, 0.0]] * VOCAB)
    state = run(DraftModel(Markov(low[:, ::-1]), 2), (), Sampled(), target=Markov(low), rows=100)
    assert np.asarray(state.histogram).sum(0).tolist() == [300, 0, 0]  # one token in each of 3 calls


# Submodels


def nested():
    model = decoder()
    return model, init(model), MatFormer(LanguageModelling(model))


def test_a_submodel_is_the_slice():
    model, params, task = nested()
    drafter = Submodel(8, 3)
    cut = drafter.create(jax.random.key(0), Target(params, model))
    expected_model, expected = extract(model, params, parse_widths("S", task))
    assert drafter.drafting(model).model == expected_model
    jax.tree.map(np.testing.assert_array_equal, cut, expected)


def test_a_submodel_shares_what_is_not_cut():
    model, params, _ = nested()
    cut = Submodel(8, 3).create(jax.random.key(0), Target(params, model))
    own = {id(leaf): leaf.size for leaf in jax.tree.leaves(cut)}
    for leaf in jax.tree.leaves(params):
        own.pop(id(leaf), None)
    width, hidden = 8, nested_widths(16)[0]
    assert sum(own.values()) == 2 * 3 * width * hidden  # gate, up and down of two layers
    # And it stays so where decoding has prepared the target: the programs are given the same buffers twice.
    generator = Generator(model, params, proposer=Submodel(8, 3), proposer_params=cut)
    assert generator.proposer_params["embedding"]["table"] is generator.params["embedding"]["table"]


def test_structured_kernels_are_cut_in_factors():
    model, params, _ = nested()
    kernel = LowRank(jnp.ones((8, 2)), jnp.asarray(np.arange(32, dtype=np.float32).reshape(2, 16)))
    params = {
        **params,
        "layer_0": {**params["layer_0"], "mlp": {**params["layer_0"]["mlp"], "up": {"kernel": kernel}}},
    }
    cut = Submodel(8).create(jax.random.key(0), Target(params, model))["layer_0"]["mlp"]["up"]["kernel"]
    assert isinstance(cut, LowRank) and cut.down is kernel.down
    np.testing.assert_array_equal(cut.up, np.asarray(kernel.up)[:, :2])


def test_submodel_and_target_share_the_first_layers_keys_alone():
    """Why the draft has a cache of its own."""
    model, params, _ = nested()
    drafter = Submodel(8)
    cut = drafter.create(jax.random.key(0), Target(params, model))
    tokens = np.asarray([[5, 9, 2, 4]])
    _, full = call(model, params, tokens, method="features")
    _, small = call(drafter.drafting(model).model, cut, tokens, method="features")
    np.testing.assert_array_equal(full[0], small[0])
    assert np.abs(np.asarray(full[1][0]) - np.asarray(small[1][0])).max() > 0.1


def test_a_submodel_drafts_like_the_extracted_model():
    model, params, task = nested()
    small, cut = extract(model, params, parse_widths("S", task))
    results = []
    for proposer in (Submodel(8, 3), DraftModel(small, 3)):
        generator = Generator(model, params, proposer=proposer, proposer_params=cut)
        results.append(generator.generate(PROMPTS, max_new_tokens=16, sampling=Sampling(1.0), seed=2))
    assert results[0].samples == results[1].samples and results[0].stats.gained == results[1].stats.gained
    plain = Generator(model, params).generate(PROMPTS, max_new_tokens=16)
    greedy = Generator(model, params, proposer=Submodel(8, 3), proposer_params=cut)
    result = greedy.generate(PROMPTS, max_new_tokens=16)
    assert [s.tokens for s in result.samples] == [s.tokens for s in plain.samples]
    assert 1 < result.stats.tokens_per_call < 4


# Training


def test_metrics_by_hand():
    """p = (.5, .5, 0, 0) and q = (.25, .25, .25, .25) everywhere: KL(p || q) = ln 2, sum min = .5; both prefer
    token 0. Two of three places count."""
    p = jnp.asarray([[0.5, 0.5, 0.0, 0.0]] * VOCAB)

    class Chain(Markov):
        def apply(self, variables, tokens, *args, method=None):
            logits = jnp.log(jnp.maximum(self.table, 1e-30))[tokens]
            return logits if method is None else (logits, ())

        def logits(self, hidden):
            return hidden

    class Lent(Target):
        def logits(self, hidden):
            return hidden

    tokens = np.zeros((1, 3), np.int32)
    batch = {"tokens": tokens, "targets": tokens, "segments": tokens + 1, "positions": np.arange(3)[None]}
    batch["weights"] = np.float32([[1.0, 1.0, 0.0]])
    drafter = DraftModel(Chain(jnp.full((VOCAB, VOCAB), 0.25)))
    metrics = jax.jit(lambda batch: drafter.loss((), Teacher(Lent((), Chain(p)), batch), batch, None))(batch)
    assert {name: float(weight) for name, (_, weight) in metrics.items()} == dict.fromkeys(metrics, 2.0)
    means = {name: float(total / 2) for name, (total, _) in metrics.items()}
    assert means == pytest.approx({"loss": np.log(2), "acceptance": 0.5, "agreement": 1.0}, rel=1e-6)


# Mistakes


@pytest.mark.parametrize(
    "make, because",
    [
        (lambda: DraftModel(decoder(), 0), "gamma must be at least 1, not 0"),
        (lambda: Submodel(8, 0), "gamma must be at least 1, not 0"),
        (lambda: Submodel(0), "divisor must be at least 1, not 0"),
        (lambda: draft(DraftModel(decoder(vocab_size=31))), "a vocabulary of 31 and the target of 32"),
        (lambda: draft(DraftModel(decoder(max_length=40))), "a context of 40 and the target of 48"),
        (lambda: draft(DraftModel(decoder().clone(scan_layers=True))), "convert it with `unscan_layers`"),
        (lambda: draft(Submodel(3)), "GatedMLP with hidden_dim=16 has no first 1/3"),
        (
            lambda: leading(decoder(), fuse_projections(init(decoder()))),
            "is not in the target: cut it before",
        ),
        (lambda: leading(decoder(width=16), init(decoder())), "and of the target only"),
    ],
)
def test_mistakes_are_told(make, because):
    with pytest.raises(UserError) as error:
        make()
    assert because in str(error.value) and "\n" not in str(error.value)


def draft(proposer):
    model = decoder()
    params = proposer.create(jax.random.key(0), Target(init(model), model))
    return Generator(model, init(model), proposer=proposer, proposer_params=params).generate(PROMPTS)
