"""LoRA adapters of the peft library: names, shapes and scaling by hand, what is refused, and parity where it is "
"there."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.adapters.lora import LoRA, PiSSA, flat
from research.adapters.tuning import AdapterTuning
from research.errors import UserError
from research.interop import peft
from research.interop.huggingface import save as save_huggingface
from research.training.model_directory import save_model
from research.training.partial import save_adapter
from research.training.workdir import load_model

TOKENS = np.arange(1, 13, dtype=np.int32).reshape(1, 12)
TARGETS = (r"attention/(query|value)/kernel$",)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, model_of, random_params):
    """-> the model directory of a tiny Llama, and the model."""
    from research.config_capture import capture

    model = model_of("llama", tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("peft") / "base"
    params = jax.tree.map(lambda leaf: leaf * 0.2, random_params(model))
    save_model(folder, capture(model), params)
    return str(folder), model, params


def noisy(saved, seed=0):
    """A trained adapter, say."""
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), saved["adapter"]
    )
    return {**saved, "adapter": moved}


def saved_of(adapter, base):
    task = AdapterTuning(adapter, base)
    params = task.start(jax.random.key(0))
    return task, noisy({name: params[name] for name in ("fixed", "adapter")})


def test_names_factors_and_scaling_are_theirs(llama, tmp_path):
    task, saved = saved_of(LoRA(rank=2, alpha=6.0, targets=TARGETS), llama[0])
    peft.save(task, saved, tmp_path / "theirs", base_name="tiny/llama")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    assert config["base_model_name_or_path"] == "tiny/llama" and not config["rank_pattern"]
    assert (
        "model.layers.1.self_attn.v_proj" in config["target_modules"] and len(config["target_modules"]) == 4
    )
    tensors = safetensors.numpy.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    term = saved["adapter"]["layer_1"]["attention"]["value"]["kernel"]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    np.testing.assert_array_equal(tensors[f"{name}A.weight"], term.down.T)  # [r, in]
    np.testing.assert_array_equal(tensors[f"{name}B.weight"], term.up.T)  # [out, r]
    # And back, as an adapter directory.
    ours, again = peft.load(tmp_path / "theirs", llama[0])
    jax.tree.map(np.testing.assert_array_equal, again["adapter"], saved["adapter"])
    save_adapter(tmp_path / "ours", ours, again)
    wanted = task.unpack(task.recall(saved))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "ours").params, wanted)


def test_a_difference_is_written_where_the_base_has_changed(llama, tmp_path):
    task, saved = saved_of(PiSSA(rank=2, alpha=3.0, targets=TARGETS), llama[0])
    assert "of rank 4" in peft.save(task, saved, tmp_path / "theirs")
    _, again = peft.load(tmp_path / "theirs", llama[0])
    merged = flat(task.merge(task.recall(saved))[1])
    for path, term in flat(again["adapter"]).items():
        np.testing.assert_allclose(flat(llama[2])[path] + term.materialize(), merged[path], atol=2e-6)


def test_what_changes_the_arithmetic_is_refused(llama, tmp_path):
    task, saved = saved_of(LoRA(rank=2, targets=TARGETS), llama[0])

    def altered(number, entries=(), rename=("", ""), drop=""):
        folder = tmp_path / str(number)
        peft.save(task, saved, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | dict(entries)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        tensors = {
            name.replace(*rename): leaf for name, leaf in tensors.items() if not drop or drop not in name
        }
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    cases = {
        "peft_type 'IA3'": dict(entries={"peft_type": "IA3"}),
        "use_dora true": dict(entries={"use_dora": True}),
        "bias 'all'": dict(entries={"bias": "all"}),
        "says rank 3": dict(entries={"r": 3}),
        "no rank and no factor": dict(entries={"r": "2"}),
        "is no factor of a linear layer": dict(rename=("lora_A", "lora_embedding_A")),
        "has only lora_B": dict(drop="0.self_attn.q_proj.lora_A"),
        r"no module model.layers.1.self_attn.w_proj; did they mean": dict(
            rename=("1.self_attn.q_", "1.self_attn.w_")
        ),
    }
    for number, (match, change) in enumerate(cases.items()):
        with pytest.raises(UserError, match=match):
            peft.load(altered(number, **change), llama[0])
    root = peft.load(altered("root", {"use_rslora": True, "lora_alpha": 4}), llama[0])[1]
    assert next(iter(flat(root["adapter"]).values())).scale == pytest.approx(4 / np.sqrt(2))
    pattern = peft.load(altered("pattern", {"alpha_pattern": {"v_proj": 6}}), llama[0])[1]
    scales = {path: term.scale for path, term in flat(pattern["adapter"]).items()}
    assert scales["layer_0/attention/value/kernel"] == 3.0 and scales["layer_0/attention/query/kernel"] == 1.0


def test_logits_are_those_of_peft(llama, tmp_path):
    reason = "parity with peft needs torch, transformers and peft"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    library = pytest.importorskip("peft", reason=reason)
    base, model, params = llama
    save_huggingface(model, {"params": params}, tmp_path / "model")
    task, saved = saved_of(LoRA(rank=2, alpha=6.0), base)
    peft.save(task, saved, tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = library.PeftModel.from_pretrained(theirs, tmp_path / "theirs").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    ours = jax.jit(lambda p: model.apply({"params": p}, TOKENS))(task.unpack(task.recall(saved)))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    _, again = peft.load(tmp_path / "again", base)
    jax.tree.map(np.testing.assert_array_equal, again["adapter"], saved["adapter"])
