"""Loading: what is read, and one line for tensors that don't belong. test_parity compares the logits."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.interop.huggingface import is_huggingface, load, save

HEAD, TABLE, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def rewrite(directory, **changes):
    """Changes tensors of a directory; None removes one."""
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(model_of, random_params, tmp_path, dtype):
    """Stored in one dtype, loaded as float32 or as stored; the second trip changes no bit."""
    model = model_of("qwen3", head_dim=8)
    save(model, {"params": random_params(model)}, tmp_path / "a", dtype=dtype)
    again, variables, tokenizer = load(tmp_path / "a")
    assert again == model and tokenizer is None
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}
    kept = load(tmp_path / "a", dtype=None)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} == {dtype}
    assert load(tmp_path / "a", dtype="bfloat16")[1]["params"]["head"]["kernel"].dtype == jax.numpy.bfloat16
    save(again, variables, tmp_path / "b", dtype=dtype)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_logits_are_float32_of_the_right_shape(checkpoint):
    model, variables, _ = load(checkpoint)
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 5), "int32"))
    assert (logits.shape, str(logits.dtype)) == ((2, 5, 19), "float32")


def test_tokenizer_where_there_is_one(checkpoint):
    Tokenizer.load().save(checkpoint / "tokenizer.json")
    assert load(checkpoint)[2].fingerprint == Tokenizer.load().fingerprint
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer.json"):
        load(checkpoint)


def test_head_beside_a_tied_table(checkpoint):
    """Some files hold the head twice; that is the same model only if it is the same matrix."""
    table = load_file(checkpoint / "model.safetensors")[TABLE]
    rewrite(
        checkpoint, **{HEAD: table, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    )
    _, variables, _ = load(checkpoint)
    assert "head" not in variables["params"]
    rewrite(checkpoint, **{HEAD: table + 1})
    with pytest.raises(UserError, match=f"{HEAD} differs from {TABLE}, but tie_word_embeddings is true"):
        load(checkpoint)


def test_tensors_that_do_not_belong(checkpoint, edit):
    tensors = load_file(checkpoint / "model.safetensors")
    rewrite(checkpoint, **{NORM: None, "model.norm.wieght": tensors[NORM]})
    with pytest.raises(
        UserError, match="missing tensors model.norm.weight; there are model.norm.wieght instead"
    ):
        load(checkpoint)
    rewrite(checkpoint, **{NORM: tensors[NORM]})
    with pytest.raises(UserError, match="tensors that llama doesn't have: model.norm.wieght"):
        load(checkpoint)
    rewrite(checkpoint, **{"model.norm.wieght": None, NORM: np.ones(15, np.float32)})
    with pytest.raises(UserError, match=r"model.norm.weight is \[15\] and config.json asks for \[16\]"):
        load(checkpoint)
    rewrite(checkpoint, **{NORM: tensors[NORM]})
    edit(checkpoint / "config.json", intermediate_size=13)
    with pytest.raises(UserError) as error:
        load(checkpoint)
    assert "gate_proj.weight is [12, 16] and config.json asks for [13, 16]" in str(error.value)
    assert "down_proj.weight is [16, 12] and config.json asks for [16, 13]" in str(error.value)
    assert str(error.value).endswith("; and 2 more")  # 3 matrices in each of 2 layers, 4 of them shown


def test_depth_is_checked_before_anything_is_built(checkpoint, edit):
    edit(checkpoint / "config.json", num_hidden_layers=2_000_000_000)
    with pytest.raises(UserError, match="num_hidden_layers is 2000000000, but the tensors are of 2 layers"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "holds a JSON list, not an object"),
        ('{"model_type": "gpt2"}', "model_type gpt2 is not supported.*supported: llama, mistral"),
        ('{"model_type": "llama"}', "num_hidden_layers is missing"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_config_that_is_none(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


def test_directory_that_is_none(tmp_path, checkpoint):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match="dtype 'float64' is not supported; one of float32, float16, bfloat16, None"
    ):
        load(checkpoint, dtype="float64")
    assert is_huggingface(checkpoint) and not is_huggingface(tmp_path)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        load(checkpoint)
