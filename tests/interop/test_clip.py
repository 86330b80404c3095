"""The image blocks of CLIP checkpoints: where every tensor goes, and the states of transformers, with torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from research.errors import UserError
from research.interop.clip import load_clip
from tests.programs import call

VISION = {
    "hidden_act": "gelu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def written(directory, whole=True, **changed):
    vision = VISION | changed
    entries = (
        {"model_type": "clip", "vision_config": vision}
        if whole
        else {"model_type": "clip_vision_model"} | vision
    )
    (directory / "config.json").write_text(json.dumps(entries))
    shapes = {"vision_model.pre_layrnorm.weight": (8,), "vision_model.embeddings.class_embedding": (8,)}
    if whole:
        shapes["text_model.final_layer_norm.weight"] = (8,)
    for i in range(2):
        linears = {f"self_attn.{name}_proj": (8, 8) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (12, 8), "mlp.fc2": (8, 12), "layer_norm1": (8,), "layer_norm2": (8,)}
        for name, shape in linears.items():
            layer = f"vision_model.encoder.layers.{i}.{name}"
            shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(made, directory / "model.safetensors")
    return made


@pytest.mark.parametrize("whole", [True, False], ids=["clip", "clip_vision_model"])
def test_every_block_is_read_and_nothing_else(tmp_path, whole):
    made = written(tmp_path, whole)
    encoder, variables = load_clip(tmp_path)
    params = variables["params"]
    assert sorted(params) == ["layer_0", "layer_1"] and encoder.num_layers == 2
    assert encoder.blocks[0].mlp.activation == "gelu" and encoder.blocks[0].norm.epsilon == 1e-5
    layer, theirs = params["layer_1"], "vision_model.encoder.layers.1."
    assert np.array_equal(layer["attention"]["query"]["kernel"], made[f"{theirs}self_attn.q_proj.weight"].T)
    assert np.array_equal(layer["attention"]["output"]["bias"], made[f"{theirs}self_attn.out_proj.bias"])
    assert np.array_equal(layer["mlp"]["down"]["kernel"], made[f"{theirs}mlp.fc2.weight"].T)
    assert np.array_equal(layer["mlp_norm"]["scale"], made[f"{theirs}layer_norm2.weight"])


def test_the_states_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written(tmp_path)
    encoder, variables = load_clip(tmp_path)
    vision = transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    whole = transformers.CLIPVisionModel(vision)
    theirs = getattr(whole, "vision_model", whole).encoder  # of transformers 4, and of 5
    made = written(tmp_path)
    prefix = "vision_model.encoder."
    theirs.load_state_dict(
        {n.removeprefix(prefix): torch.tensor(x) for n, x in made.items() if n.startswith(prefix)}
    )
    x = np.random.default_rng(1).standard_normal((2, 5, 8), np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(x)).last_hidden_state.numpy()
    found = call(encoder, variables["params"], jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_told(tmp_path):
    written(tmp_path, hidden_size=16)
    with pytest.raises(UserError, match=r"is \[8\] and config.json asks for \[16\]"):
        load_clip(tmp_path)
    written(tmp_path, num_hidden_layers=3)
    with pytest.raises(UserError, match="missing tensor vision_model.encoder.layers.2"):
        load_clip(tmp_path)
    written(tmp_path, num_hidden_layers=1)
    with pytest.raises(
        UserError, match="num_hidden_layers is 1, but there are tensors vision_model.encoder.layers.1"
    ):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": 3}')
    with pytest.raises(UserError, match="vision_config is 3"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'; clip or clip_vision_model is expected"):
        load_clip(tmp_path)
