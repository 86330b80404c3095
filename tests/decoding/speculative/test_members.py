"""What every drafter owes, whatever it drafts: exact output, ends and limits, rows that do not see each other,
one program for a shape, a target that training leaves alone."""

import jax
import numpy as np
import pytest

from experiments.bench.drafters import RootOnly
from research.decoding import engine as engines
from research.decoding.generator import Generator
from research.decoding.sampling import Sampling

from .members import MEMBERS, VOCAB, Member, member

NEW = 24
SAMPLED = Sampling(0.8, top_p=0.95)


@pytest.fixture(params=MEMBERS, scope="module")  # all tests of a member, then those of the next
def drafter(request) -> Member:
    return member(request.param)


def drafted(found: Member, **fields) -> Generator:
    """With an end token that nothing says, so that its programs are those of a generator with another."""
    fields = dict(proposer=found.proposer, proposer_params=found.params, ends=(VOCAB,)) | fields
    return Generator(found.target.model, found.target.params, **fields)


def plain(found: Member, **fields) -> Generator:
    return Generator(found.target.model, found.target.params, **fields)


def tokens(generator: Generator, prompts, **options) -> list[list[int]]:
    return [s.tokens for s in generator.generate(prompts, **{"max_new_tokens": NEW, **options}).samples]


def needs(found: Member, *flags: str) -> None:
    for flag in flags:
        if not getattr(found, flag):
            pytest.skip(f"not {flag}, by design")


def test_greedy_output_is_that_of_plain_decoding(drafter):
    needs(drafter, "lossless")
    expected = tokens(plain(drafter), drafter.prompts)
    assert len({token for row in expected for token in row}) > 8  # a constant output would prove little
    together = drafted(drafter).generate(drafter.prompts, max_new_tokens=NEW)
    assert [s.tokens for s in together.samples] == expected


def test_drafts_are_accepted(drafter):
    """Or else the other tests would see paths of the root alone."""
    stats = drafted(drafter).generate(drafter.prompts, max_new_tokens=NEW).stats
    assert stats.tokens_per_call > 1.2
    assert stats.drafted > stats.wasted > 0  # and some are not
    assert sum((k + 1) * n for k, n in enumerate(stats.gained)) == len(drafter.prompts) * (NEW - 1)


def test_sampled_output_is_that_of_plain_sampling_with_the_same_seed(drafter):
    needs(drafter, "lossless", "deterministic")
    options = dict(sampling=SAMPLED, seed=5)
    assert tokens(drafted(drafter), drafter.prompts, **options) == tokens(
        plain(drafter), drafter.prompts, **options
    )


def test_rows_do_not_depend_on_the_batch(drafter):
    options = dict(sampling=SAMPLED, seed=3)
    prompts = drafter.prompts
    together = tokens(drafted(drafter), prompts, ids=range(len(prompts)), **options)
    # The same batch shape, so that nothing new is compiled: one row stays, the others change.
    for kept in range(len(prompts)):
        others = [prompts[kept] if i == kept else prompts[i - 1][::-1] for i in range(len(prompts))]
        ids = [kept if i == kept else 100 + i for i in range(len(prompts))]
        assert tokens(drafted(drafter), others, ids=ids, **options)[kept] == together[kept]
    # And another place in the batch.
    order = [*range(1, len(prompts)), 0]
    moved = tokens(drafted(drafter), [prompts[i] for i in order], ids=order, **options)
    assert moved == [together[i] for i in order]


def test_an_end_inside_an_accepted_path(drafter):
    prompts = drafter.prompts  # all of them, so that nothing new is compiled; the first is looked at
    # Blocks of one call show which tokens came together.
    pieces = drafted(drafter).stream(prompts, max_new_tokens=NEW, block=1)
    calls = [piece.tokens for piece in pieces if piece.row == 0]
    output = [token for call in calls for token in call]
    assert output == tokens(drafted(drafter), prompts)[0]
    found = 0
    for number, call in enumerate(calls):
        for place, token in enumerate(call[:-1]):  # tokens that were accepted with more behind them
            before = sum(calls[:number], []) + call[:place]
            if token in before:
                continue
            sample = drafted(drafter, ends=(token,)).generate(prompts, max_new_tokens=NEW).samples[0]
            assert (sample.tokens, sample.finish) == (before, "eos")
            found += 1
    assert found


def test_limits_cut_an_accepted_path(drafter):
    prompts = drafter.prompts
    full = tokens(drafted(drafter), prompts)
    for limit in range(1, 8):
        result = drafted(drafter).generate(prompts, max_new_tokens=limit)
        assert [s.tokens for s in result.samples] == [row[:limit] for row in full]
        assert result.stats.new_tokens == limit * len(prompts)
    # The model's context ends a row too, that of the longer prompt first.
    context = drafter.target.model.max_length
    result = drafted(drafter).generate(prompts, max_new_tokens=10_000)
    assert [len(s.tokens) for s in result.samples] == [context - len(prompt) for prompt in prompts]
    assert {s.finish for s in result.samples} == {"context"}


def test_one_compilation_for_a_shape(drafter):
    generator = drafted(drafter)
    prompts = drafter.prompts
    tokens(generator, prompts, sampling=SAMPLED)
    before = engines.programs()
    for seed, temperature in ((1, 0.5), (2, 1.3)):
        others = [prompt[: max(1, len(prompt) - seed)] for prompt in prompts]
        tokens(
            generator, others, sampling=Sampling(temperature, top_p=0.6), seed=seed, max_new_tokens=20 + seed
        )
    assert engines.programs() == before


# Kinds of draft: a tree chosen in the call, virtual rows, a block written ahead.
@pytest.mark.parametrize("name", ["eagle", "ppd", "pearl"])
def test_bfloat16_output_is_that_of_one_token_a_call_at_the_same_size(name):
    """In bfloat16, products of N rows and of 1 round differently, so plain decoding may part from it at a near
    tie. With N rows in both, nothing does."""
    found = member(name)
    fast = drafted(found, dtype="bfloat16").generate(found.prompts, max_new_tokens=NEW)
    slow = drafted(found, dtype="bfloat16", verifier=RootOnly()).generate(found.prompts, max_new_tokens=NEW)
    assert [s.tokens for s in fast.samples] == [s.tokens for s in slow.samples]
    assert slow.stats.tokens_per_call == 1.0 < fast.stats.tokens_per_call


def test_training_moves_the_drafter_and_nothing_else(drafter):
    if drafter.run is None:
        pytest.skip("not trained")
    run = drafter.run
    assert np.isfinite(run.loss)
    jax.tree.map(np.testing.assert_array_equal, run.after["target"], drafter.target.params)
    before, after = jax.device_get((run.before["drafter"], run.after["drafter"]))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert any(jax.tree.leaves(moved))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
