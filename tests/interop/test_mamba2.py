"""Mamba-2 in and out: the logits of transformers on the same weights, whole and step by step, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.interop.families import read_config
from research.interop.huggingface import expressible, load, save
from research.interop.members import write_config
from research.interop.names import shapes, stored
from research.language.decoder import DecoderLM
from research.nn.mlp import GatedMLP
from research.nn.norm import RMSNorm
from research.nn.transformer import Block, scan_params

ENTRIES = {
    "model_type": "mamba2",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 12,
    "n_groups": 2,
    "chunk_size": 8,
}
LENGTH, PROMPT = 21, 14  # neither is a multiple of the chunk


def model_of(**options) -> DecoderLM:
    return read_config(ENTRIES | options, "config.json")[1]


def test_the_logits_of_transformers(tmp_path):
    """A grouped norm and a left-padded row; then a prompt of 14 and 7 steps on both sides' own caches; and back."""
    reason = "parity with transformers needs torch and transformers: pip install '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    options = {name: value for name, value in ENTRIES.items() if name != "model_type"}
    config = transformers.Mamba2Config(**options, pad_token_id=None, eos_token_id=None)
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(parameter + noise if "norm" in name or parameter.ndim == 1 else noise)
    theirs.save_pretrained(tmp_path / "in")
    model, variables, tokenizer = load(tmp_path / "in")
    assert tokenizer is None and model == model_of()

    tokens = np.random.default_rng(1).integers(3, 61, (2, LENGTH))
    real = np.arange(LENGTH) >= np.array([[0], [5]])
    with torch.no_grad():
        want = theirs(
            torch.asarray(tokens), attention_mask=torch.asarray(real.astype(np.int64))
        ).logits.numpy()
    got = jax.jit(model.apply)(variables, tokens, segments=real.astype(np.int32))
    assert np.abs(want).max() > 0.5  # the comparison is of numbers of this size
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-4)

    @jax.jit
    def prefill(tokens):
        lengths = jnp.full(2, PROMPT)
        last, _, fresh = model.apply(variables, tokens, lengths, method="prefill")
        return last, model.init_cache(2, LENGTH).commit(fresh, None, lengths)

    @jax.jit
    def step(tokens, cache):
        logits, _, fresh = model.apply(variables, tokens, cache, method="extend")
        return logits[:, 0], cache.commit(fresh, None, jnp.ones(2, jnp.int32))

    with torch.no_grad():
        output = theirs(torch.asarray(tokens[:, :PROMPT]), use_cache=True)
    logits, cache = prefill(tokens[:, :PROMPT])
    for place in range(PROMPT, LENGTH):
        np.testing.assert_allclose(logits, output.logits[:, -1].numpy(), atol=1e-4)
        one = tokens[:, place : place + 1]
        with torch.no_grad():
            output = theirs(torch.asarray(one), cache=output.cache, use_cache=True)
        logits, cache = step(one, cache)
    np.testing.assert_allclose(logits, output.logits[:, -1].numpy(), atol=1e-4)

    report = save(model, variables, tmp_path / "out")
    assert (report.family, report.padded_to, report.ffn_widths) == ("mamba2", None, ())
    assert report.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        expected = theirs(torch.asarray(tokens)).logits
        np.testing.assert_array_equal(again.eval()(torch.asarray(tokens)).logits, expected)
    biased = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options, use_bias=True)).state_dict()
    family, model = read_config(ENTRIES | {"use_bias": True}, "config.json")
    places = {path: (stored(path, shape, family), shape) for path, shape in shapes(model).items()}
    ours = {place.names[0]: place.tensor_shape(shape) for place, shape in places.values()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in biased.items()}


def test_round_trip_without_torch(tmp_path):
    """Tied, scanned; a context and a convolution of its own."""
    model = model_of(
        tie_word_embeddings=True,
        use_bias=True,
        conv_kernel=3,
        use_conv_bias=False,
        max_position_embeddings=64,
    )
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"],
    )
    scanned = model.clone(scan_layers=True), {"params": scan_params(params, 1)}
    for name, (module, variables) in {"plain": (model, {"params": params}), "scanned": scanned}.items():
        save(module, variables, tmp_path / name)
        again, loaded, _ = load(tmp_path / name)
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, loaded["params"], params)
    family, _ = read_config(ENTRIES, "config.json")
    entries = json.loads(json.dumps(write_config(family, model, {})))
    assert read_config(entries, "config.json") == (family, model)


def test_what_is_refused():
    for options, message in (
        ({"expand": 3}, "expand is 3; accepted: 8 x 8 / 32"),
        ({"n_groups": 3}, "n_groups is 3; accepted: a divisor of num_heads, 8"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; accepted: silu, swish'),
        ({"time_step_limit": [0.01, 0.1]}, "time_step_limit is .* accepted: 0 to infinity"),
    ):
        with pytest.raises(UserError, match=message):
            model_of(**options)
    model = model_of()
    block = model.blocks[0]
    assert expressible(model) == "mamba2"
    for changed, message in (
        (Block(block.attention, GatedMLP(8), block.norm), "mamba2 has no FFN"),
        (block.clone(norm=RMSNorm(1e-6)), "plain norms of the mixer's epsilon, 1e-05"),
        (block.clone(attention=block.attention.clone(head_dim=6)), "inner width that is a multiple"),
    ):
        with pytest.raises(UserError, match=message):
            expressible(model.clone(blocks=(changed,)))
