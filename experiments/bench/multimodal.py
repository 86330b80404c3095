"""A model that reads images against LLaVA of `transformers` on the same weights; planners on a photograph.

- planner: 12 megapixels into the patches of a paper's planner, against the same planner with the bicubic filter alone
  (`exact`), which is what an image processor does.
- prefill: a prompt with an image into logits and cache, compiled, against a forward with `use_cache` of
  `transformers`.
- decode: `Generator.generate` from that prompt, greedy, against `generate`; both sides must emit the same tokens.

Float32, random weights. Ratios above 1 mean that this project is faster.
"""

import dataclasses
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.decode import peer_generate
from experiments.bench.turns import Row, take_turns
from research.config import build
from research.decoding.generator import Generator
from research.errors import UserError
from research.interop.llava import load_llava
from research.multimodal.media import Planner
from research.multimodal.model import VLM
from research.multimodal.prompts import Written, pictures

PLANNERS = ("llava", "eve", "llava_uhd", "dragonfly", "inf_llava", "mousi")
PHOTO = (3000, 4000)  # height, width
VOCAB, PLACE = 512, 511
TEXT = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
VISION = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
SIDE, PATCH = 168, 14  # pixels: 144 patches, and as many rows of the prompt
WORDS, NEW_TOKENS = 16, 64


def run(
    planners: Sequence[str] = PLANNERS,
    photo: tuple[int, int] = PHOTO,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 5,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measure and report a line for each number. Without `transformers` planners alone are measured, aloud."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    report(f"images, {TEXT['num_hidden_layers']} layers of width {TEXT['hidden_size']}, float32; {load}")
    image = np.random.default_rng(0).integers(0, 256, (*photo, 3), np.uint8)
    rows = []
    for name in planners:
        task = importlib.import_module(f"configs.{name}").get_config("paper").task
        rows.append(_planner(name, build(task.model.planner), image, rounds))
        report(rows[-1].line("bicubic alone"))
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        report(f"transformers: not compared, {error}; install .[parity]")
        return rows
    peer, model, params = both_models()
    rows.append(_prefill(peer, model, params, rounds))
    report(rows[-1].line("transformers"))
    rows.append(_decode(peer, model, params, new_tokens, rounds))
    report(f"{rows[-1].line('transformers')}, tokens equal")
    return rows


def both_models() -> tuple[Any, VLM, Any]:
    """LLaVA of `transformers` without training, and what this project reads of its files."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=dict(model_type="llama", vocab_size=VOCAB, max_position_embeddings=4096, **TEXT),
        vision_config=dict(model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, **VISION),
        image_token_index=PLACE,
    )
    peer = LlavaForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model, variables, _ = load_llava(directory)
    return peer, model, variables["params"]


def prompt(model: VLM) -> tuple[Written, np.ndarray, np.ndarray]:
    """An image between words: what is written, and `transformers`' tokens [1, T] and pixels [1, 3, h, w]."""
    random = np.random.default_rng(0)
    words = random.integers(3, VOCAB - 1, WORDS).tolist()
    written = Written()
    written.say(words[:2])
    media, spelled = model.planner.read(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    written.media.append(media)
    for row in spelled:
        written.positions.append(len(written.tokens))
        written.tokens.append(0)
        written.slots.append(row)
    written.say(words[2:])
    tokens = np.where(np.asarray(written.slots) >= 0, PLACE, written.tokens)[None]
    side = SIDE // PATCH
    pixels = media.patches.reshape(side, side, PATCH, PATCH, 3).transpose(4, 0, 2, 1, 3)
    return written, tokens, pixels.reshape(1, 3, SIDE, SIDE)


def _planner(name: str, planner: Planner, image: np.ndarray, rounds: int) -> Row:
    exact = dataclasses.replace(planner, exact=True)
    calls = {"ours": lambda: planner.read(image), "exact": lambda: exact.read(image)}
    seconds = take_turns(calls, rounds)
    return Row(f"planner {name}", image.size // 3_000_000, seconds["ours"], seconds["exact"])


def _prefill(peer: Any, model: VLM, params: Any, rounds: int) -> Row:
    import torch

    written, tokens, pixels = prompt(model)
    length = len(written.tokens)

    def read(params: Any, tokens: jax.Array, seen: Any) -> tuple[jax.Array, Any]:
        lengths = jnp.full(1, length)
        logits, _, fresh = model.apply({"params": params}, tokens, lengths, seen, method="prefill")
        return logits, model.init_cache(1, length).commit(fresh, jnp.arange(length)[None], lengths)

    seen = jax.tree.map(jnp.asarray, pictures([written], model.planner, 1, length))
    given = params, jnp.asarray([written.tokens]), seen
    program = jax.jit(read).lower(*given).compile()
    inputs = dict(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(pixels))

    def theirs() -> Any:
        with torch.inference_mode():
            return peer(**inputs, use_cache=True, logits_to_keep=1)

    gap = np.abs(program(*given)[0] - theirs().logits[:, -1].numpy()).max()
    if gap > 1e-3:
        raise UserError(f"a prompt with an image: the logits differ from those of transformers by {gap:.1e}")
    calls = {"ours": lambda: jax.block_until_ready(program(*given)), "theirs": theirs}
    seconds = take_turns(calls, rounds)
    return Row("prefill", length, seconds["ours"], seconds["theirs"])


def _decode(peer: Any, model: VLM, params: Any, new_tokens: int, rounds: int) -> Row:
    import torch

    written, tokens, pixels = prompt(model)
    generator = Generator(model, params, ends=())
    options = dict(eos_token_id=None, pad_token_id=0, pixel_values=torch.from_numpy(pixels))

    def beside(length: int) -> tuple[Any]:
        return (jax.tree.map(jnp.asarray, pictures([written], model.planner, 1, length)),)

    def ours() -> list[list[int]]:
        result = generator.generate([written.tokens], beside=beside, max_new_tokens=new_tokens)
        return [sample.tokens for sample in result.samples]

    def theirs() -> np.ndarray:
        return peer_generate(peer, tokens, new_tokens, **options)

    if ours() != theirs().tolist():
        raise UserError(f"decoding {new_tokens} tokens: transformers emits others with the same weights")
    seconds = take_turns({"ours": ours, "theirs": theirs}, rounds)
    return Row("decode", new_tokens, seconds["ours"], seconds["theirs"])
