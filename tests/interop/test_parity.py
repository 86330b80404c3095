"""The same logits as transformers, on randomly initialised tiny models of every family."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizer import Tokenizer
from research.elastic.slicing import ElasticSpec, slice_model, slice_params
from research.interop import files
from research.interop.huggingface import load, save
from research.nn.fuse import fuse_projections
from research.nn.transformer import scan_params

_REASON = "parity with transformers needs torch and transformers: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

LENGTH = 40
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Every window is shorter than LENGTH, and LENGTH goes beyond every original rotary length.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_plain_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3_rope_biases": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}},
    ),
    "mistral_window": ("mistral", {"sliding_window": 7, "head_dim": 12, "hidden_act": "relu2"}),
    "mistral_full": ("mistral", {"sliding_window": None, "hidden_act": "gelu_new"}),
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_yarn": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3_bias": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "sliding_window": 7,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}
CASES |= {
    "mixtral_window": ("mixtral", {"num_local_experts": 4, "sliding_window": 7, "tie_word_embeddings": True}),
    "mixtral_one_of_three": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "hidden_act": "gelu"},
    ),
    "qwen2_moe_mixed": (  # layer 1 is dense, layers 0 and 2 have windows
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "qwen2_moe_renormalised": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe_yarn": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3_moe_window": (
        "qwen3_moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": None, "eos_token_id": None},
    ),
    "jetmoe": ("jetmoe", {"num_local_experts": 5, "kv_channels": 12, "rms_norm_eps": 1e-4}),
}
# One of each family for the slower tests: the others add no mechanism that a cache or a cut could touch.
SPARSE = ["mixtral_window", "qwen2_moe_renormalised", "qwen3_moe_yarn", "olmoe", "jetmoe"]
FAMILIES = [
    "llama3_rope_biases",
    "mistral_window",
    "qwen2_windows",
    "qwen3_yarn",
    "gemma2",
    "gemma3",
    *SPARSE,
]


@dataclasses.dataclass
class Pair:
    """The same weights in transformers and here."""

    theirs: Any
    directory: Any
    model: Any
    variables: Any


def reference(model_type: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model in which every parameter, biases and norms included, is random."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(parameter + noise if "norm" in name else noise)
    return model


def their_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.asarray(tokens), **inputs).logits.numpy()


def reload(directory: Any, dtype: Any = None) -> Any:
    """What transformers loads, refusing to go on where a tensor is missing, unexpected or misshapen."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, dtype=dtype or torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    model_type, options = CASES[request.param]
    theirs = reference(model_type, options)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    model, variables, tokenizer = load(directory)
    assert tokenizer is None
    return Pair(theirs, directory, model, variables)


def random_tokens(rows: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(3, SIZES["vocab_size"], (rows, length))


def test_whole_sequences(pair):
    tokens = random_tokens(2)
    want = their_logits(pair.theirs, tokens)
    got = jax.jit(pair.model.apply)(pair.variables, tokens)
    assert got.dtype == jnp.float32
    assert np.abs(want).max() > 0.5  # the comparison is of numbers of this size
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_left_padded_batch(pair):
    """Rows of 40, 29 and 5 tokens, padded on the left: positions count from the first token of a row."""
    tokens = random_tokens(3)
    lengths = np.array([LENGTH, 29, 5])
    real = np.arange(LENGTH)[None] >= LENGTH - lengths[:, None]
    tokens = np.where(real, tokens, 0)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    want = their_logits(
        pair.theirs,
        tokens,
        attention_mask=torch.asarray(real.astype(np.int64)),
        position_ids=torch.asarray(positions),
    )
    got = jax.jit(pair.model.apply)(pair.variables, tokens, positions, real.astype(np.int32))
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=TOLERANCE)


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_with_cache(pair):
    """A prompt, then chunks of 5, then tokens one by one, on rows of different lengths."""
    tokens = random_tokens(2)
    prompts = np.array([17, 11])
    want = their_logits(pair.theirs, tokens)
    model, variables = pair.model, pair.variables

    @jax.jit
    def prefill(tokens, lengths):
        cache = model.init_cache(2, LENGTH + 17, margin=4)
        last, _, fresh = model.apply(variables, tokens, lengths, method="prefill")
        return last, cache.commit(fresh, None, lengths)

    @jax.jit
    def extend(tokens, cache):
        logits, _, fresh = model.apply(variables, tokens, cache, method="extend")
        return logits, cache.commit(fresh, None, jnp.full((2,), tokens.shape[1]))

    last, cache = prefill(tokens[:, :17], prompts)
    np.testing.assert_allclose(last, want[np.arange(2), prompts - 1], atol=TOLERANCE)
    for chunk in (5, 5, 1, 1, 1):
        at = np.asarray(cache.length)[:, None] + np.arange(chunk)
        rows = np.arange(2)[:, None]
        logits, cache = extend(tokens[rows, at], cache)
        np.testing.assert_allclose(logits, want[rows, at], atol=TOLERANCE)


def test_round_trip(pair, tmp_path):
    """save -> transformers: the same logits; save -> load: the same model and the same bits."""
    report = save(pair.model, pair.variables, tmp_path / "out")
    config = pair.theirs.config
    plain = config.model_type == "mistral" and config.sliding_window is None  # that is Llama
    assert report.family == ("llama" if plain else config.model_type)
    assert report.padded_to is None
    stored = {id(parameter): parameter.numel() for parameter in pair.theirs.parameters()}
    assert report.parameters == sum(stored.values())
    tokens = random_tokens(2)
    again = reload(tmp_path / "out")
    # gelu_new is written as gelu_pytorch_tanh: one formula, two roundings.
    atol = 5e-6 if getattr(config, "hidden_act", None) == "gelu_new" else 0.0
    np.testing.assert_allclose(
        their_logits(again, tokens), their_logits(pair.theirs, tokens), rtol=0, atol=atol
    )
    model, variables, _ = load(tmp_path / "out")
    assert model == pair.model
    jax.tree.map(np.testing.assert_array_equal, variables, pair.variables)


@pytest.mark.parametrize("case", ["llama3_rope_biases", "gemma3"])
def test_bfloat16_shards(case, tmp_path):
    """bf16 in many shards: the logits of transformers that reads the same files into float32."""
    model_type, options = CASES[case]
    reference(model_type, options).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    theirs = reload(tmp_path)
    tokens = random_tokens(1)
    model, variables, _ = load(tmp_path)
    got = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(got, their_logits(theirs, tokens), atol=TOLERANCE)
    _, kept, _ = load(tmp_path, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), kept, variables)
    save(model, variables, tmp_path / "out", dtype="bfloat16")  # exact: the values come from bfloat16
    np.testing.assert_array_equal(
        their_logits(reload(tmp_path / "out"), tokens), their_logits(theirs, tokens)
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_unequal_widths_are_padded(pair, tmp_path):
    """A cut model with another FFN width in every layer: zero-padded, with the logits of the cut model."""
    layers = pair.model.num_layers
    widths = tuple((16, 48, 24, 8)[:layers])
    spec = ElasticSpec(tuple(range(layers)), widths)
    model, params = slice_model(pair.model, spec), slice_params(pair.variables["params"], spec)
    report = save(model, {"params": params}, tmp_path / "out")
    assert (report.ffn_widths, report.padded_to) == (widths, 48)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lathe"] == {
        "unequal_ffn": "zero-padded",
        "ffn_widths": list(widths),
    }
    assert f"{', '.join(map(str, widths))}" in (tmp_path / "out" / "README.md").read_text()
    tokens = random_tokens(1)
    want = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(their_logits(reload(tmp_path / "out"), tokens), want, atol=TOLERANCE)


def test_fused_and_scanned_parameters(tmp_path, monkeypatch):
    """The fused, the scanned and the plain form export to the same bytes; transformers loads our shards."""
    model_type, options = CASES["llama3_rope_biases"]
    theirs = reference(model_type, options)
    theirs.save_pretrained(tmp_path / "in")
    model, variables, _ = load(tmp_path / "in")
    forms = {
        "plain": (model, variables["params"]),
        "fused": (model, fuse_projections(variables["params"])),
        "scanned": (model.clone(scan_layers=True), scan_params(variables["params"], 1)),
    }
    assert "qkv" in forms["fused"][1]["layer_0"]["attention"] and "layers" in forms["scanned"][1]
    for name, (module, params) in forms.items():
        save(module, {"params": params}, tmp_path / name)
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == plain
    assert (tmp_path / "scanned" / "model.safetensors").read_bytes() == plain
    monkeypatch.setattr(files, "_SHARD_BYTES", 8000)
    save(model, variables, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    tokens = random_tokens(1)
    want = their_logits(theirs, tokens)
    np.testing.assert_array_equal(their_logits(reload(tmp_path / "shards"), tokens), want)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "shards")[1], variables)


def test_tokenizer(tmp_path):
    """AutoTokenizer gives the ids of ours and knows the special tokens."""
    tokenizer = Tokenizer.load()
    model_type, options = CASES["llama_plain_tied"]
    theirs = reference(model_type, {**options, "vocab_size": tokenizer.vocab_size})
    theirs.save_pretrained(tmp_path / "in")
    model, variables, _ = load(tmp_path / "in")
    save(model, variables, tmp_path / "out", tokenizer=tokenizer)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return x + 1  # naïve \u4f60\u597d\n\n\tclass A: pass\n"
    assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text)) == text
    ids = (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id)
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) and None not in ids
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    loaded = load(tmp_path / "out")[2]
    assert loaded.fingerprint == tokenizer.fingerprint
