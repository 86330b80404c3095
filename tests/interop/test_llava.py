"""LLaVA-1.5-shaped checkpoints: where every tensor goes, and the logits of transformers where torch is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from research.data.shapes import vocabulary
from research.decoding.generator import Generator
from research.errors import UserError
from research.interop.llava import load_llava
from research.interop.names import flatten
from research.multimodal.media import Media
from research.multimodal.model import Pictures
from research.multimodal.padded import Padded
from tests.programs import call

IMAGE = 17
CONFIG = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    },
}


def tensors(five: bool) -> dict[str, np.ndarray]:
    """Random tensors under the names of transformers 4, or 5."""
    text, vision, projector = (
        ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector.")
        if five
        else ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.")
    )
    shapes = {
        f"{text}embed_tokens.weight": (19, 16),
        f"{text}norm.weight": (16,),
        "lm_head.weight" if five else "language_model.lm_head.weight": (19, 16),
        f"{vision}embeddings.class_embedding": (8,),
        f"{vision}embeddings.patch_embedding.weight": (8, 3, 4, 4),
        f"{vision}embeddings.position_embedding.weight": (5, 8),
        f"{projector}linear_1.weight": (16, 8),
        f"{projector}linear_1.bias": (16,),
        f"{projector}linear_2.weight": (16, 16),
        f"{projector}linear_2.bias": (16,),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{vision}{name}.{leaf}": (8,) for leaf in ("weight", "bias")}
    layer = f"{text}layers.0."
    shapes |= {f"{layer}{name}.weight": (16,) for name in ("input_layernorm", "post_attention_layernorm")}
    outputs = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": shape for name, shape in outputs.items()}
    ffn = {"gate": (12, 16), "up": (12, 16), "down": (16, 12)}
    shapes |= {f"{layer}mlp.{name}_proj.weight": shape for name, shape in ffn.items()}
    for i in range(2):
        layer = f"{vision}encoder.layers.{i}."
        linears = {f"self_attn.{name}_proj": (8, 8) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (12, 8), "mlp.fc2": (8, 12), "layer_norm1": (8,), "layer_norm2": (8,)}
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def written(directory, five=False, config=None, **changed):
    (directory / "config.json").write_text(json.dumps((config or CONFIG) | changed))
    made = tensors(five)
    save_file(made, directory / "model.safetensors")
    return made


@pytest.mark.parametrize("five", [False, True], ids=["transformers4", "transformers5"])
def test_every_tensor_is_read(tmp_path, five):
    made = written(tmp_path, five)
    model, variables, tokenizer = load_llava(tmp_path)
    params = variables["params"]
    assert tokenizer is None and model.tower.feature == -2 and model.planner.rows == 4
    wanted = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(wanted)}
    assert {path: leaf.shape for path, leaf in flatten(params)} == shapes
    of = {name.rsplit("vision_model.")[-1]: array for name, array in made.items()}
    np.testing.assert_array_equal(
        params["tower"]["layer_1"]["mlp"]["up"]["kernel"], of["encoder.layers.1.mlp.fc1.weight"].T
    )
    # The patch embedding is their convolution.
    pixels = np.random.default_rng(1).standard_normal((8, 8, 3)).astype(np.float32)
    kernel = of["embeddings.patch_embedding.weight"]  # [out, channel, y, x]
    convolved = np.einsum("ocyx,yxc->o", kernel, pixels[:4, 4:])  # patch (0, 1)
    ours = pixels[:4, 4:].reshape(-1) @ params["tower"]["projection"]["kernel"]
    np.testing.assert_allclose(ours, convolved, rtol=1e-4, atol=1e-4)


def test_what_is_not_llava_is_told(tmp_path):
    written(tmp_path, vision_feature_select_strategy="full")
    with pytest.raises(UserError, match="vision_feature_select_strategy='full'"):
        load_llava(tmp_path)
    made = written(tmp_path)
    del made["multi_modal_projector.linear_2.bias"]
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing tensor linear_2.bias"):
        load_llava(tmp_path)
    written(tmp_path, model_type="llava_next")
    with pytest.raises(UserError, match="'llava_next'; llava is expected"):
        load_llava(tmp_path)


def test_the_logits_are_those_of_transformers(tmp_path):
    reason = "parity with transformers needs torch and transformers: pip install '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    settings = {name: value for name, value in CONFIG.items() if name != "model_type"}
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    model, variables, _ = load_llava(tmp_path)
    random = np.random.default_rng(2)
    pixels = random.standard_normal((1, 8, 8, 3)).astype(np.float32)
    tokens = np.asarray([[1, 5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 3]])
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.asarray(tokens), pixel_values=torch.asarray(pixels.transpose(0, 3, 1, 2))
        ).logits.numpy()
    patches = pixels.reshape(2, 4, 2, 4, 3).swapaxes(1, 2).reshape(1, 1, 1, 4, 48)
    media = Media(patches, np.full((1, 1, 1, 2), 2), np.zeros((1, 1, 1), int))
    slot = np.asarray([[-1, -1, 0, 1, 2, 3, -1, -1]])
    seen = Pictures(media, slot, np.arange(8)[None])
    np.testing.assert_allclose(call(model, variables["params"], tokens, seen), wanted, atol=1e-4)


def test_a_batch_padded_on_the_left_is_that_of_transformers(tmp_path):
    """Rows with two images, none and one, as a processor with padding_side="left" hands them over: logits of one call,
    and what both decode with their caches."""
    reason = "parity with transformers needs torch and transformers: pip install '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    settings = {name: value for name, value in CONFIG.items() if name != "model_type"}
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**settings)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    theirs.save_pretrained(tmp_path)
    model, variables, _ = load_llava(tmp_path)
    places = [IMAGE] * 4
    rows = [[1, *places, 7, 3, *places, 5], [1, 9, 4], [1, 2, *places]]
    length = max(map(len, rows))
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    tokens = np.array([[0] * (length - len(row)) + row for row in rows])
    images = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8) for i in range(3)]
    batch = Padded.of(tokens, mask, images, model.planner, vocabulary(), placeholder=IMAGE)
    read = np.stack([model.planner.read(image)[0].patches for image in images])
    pixels = read.reshape(3, 2, 2, 4, 4, 3).transpose(0, 5, 1, 3, 2, 4).reshape(3, 3, 8, 8)
    asked = dict(
        input_ids=torch.asarray(tokens),
        attention_mask=torch.asarray(mask),
        pixel_values=torch.asarray(pixels),
    )
    with torch.no_grad():
        wanted = theirs(**asked).logits.numpy()
        said = theirs.generate(**asked, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    params = variables["params"]
    logits = batch.back(call(model, params, batch.tokens, batch.pictures, segments=batch.segments))
    np.testing.assert_allclose(np.asarray(logits)[mask > 0], wanted[mask > 0], atol=1e-4)
    assert np.abs(wanted).max() > 1
    decoded = Generator(model, params, ends=()).generate(
        batch.asked.tokens, beside=batch.asked.beside, max_new_tokens=8
    )
    outputs = [sample.tokens for sample in decoded.samples]
    assert outputs == said[:, length:].tolist() and len(set(map(tuple, outputs))) == 3
