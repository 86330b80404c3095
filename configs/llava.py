"""LLaVA-1.5 (arXiv 2310.03744): CLIP, two layers, a decoder. The systems of research/multimodal change its parts.

    python -m experiments.train --config=configs/llava.py --workdir=runs/llava

`tiny` (the default): pictures of 3 x 3 cells with coloured shapes and questions about them, generated; all parts from
scratch, the tower frozen as it was drawn; a minute on two CPU cores.
`paper`: Vicuna-7B and CLIP ViT-L/14 at 336 pixels, with LLaVA's dialogues in a folder `data`; for accelerators. Begin
with `--config.task.start_from=` a checkpoint read by `python -m experiments.convert`.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.dialogues import LlavaFiles
from research.data.shapes import Scenes, vocabulary
from research.language.decoder import DecoderLM
from research.multimodal.connectors import PatchProjection
from research.multimodal.conversations import Conversations
from research.multimodal.media import CLIP_MEAN, CLIP_STD, Square
from research.multimodal.model import VLM
from research.multimodal.task import VisionLanguage
from research.multimodal.tower import Tower
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP, GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")
WIDTH, TOWER = 64, 32  # of the toy decoder and of the toy tower
CLIP = dict(patch=14, mean=CLIP_MEAN, std=CLIP_STD)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        planner = of(Square, side=336, padded=True, **CLIP)
        model = of(VLM, **paper_parts(planner), connector=of(PatchProjection, width=4096))
        return paper_experiment(model)
    model = of(VLM, **toy_parts(of(Square, patch=8, side=24)), connector=of(PatchProjection, width=WIDTH))
    return toy_experiment(model, of(Scenes))


def decoder(
    width: int,
    layers: int,
    heads: int,
    hidden_dim: int,
    vocab_size: int,
    length: int,
    kv_heads: int | None = None,
    base: float = 10_000.0,
    **fields,
) -> ConfigDict:
    rotary = of(Rotary, base=base)
    attention = of(Attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, rotary=rotary)
    norm = of(RMSNorm, epsilon=1e-5)
    block = of(Block, attention=attention, mlp=of(GatedMLP, hidden_dim=hidden_dim), norm=norm)
    sizes = dict(vocab_size=vocab_size, width=width, max_length=length, num_layers=layers)
    return of(DecoderLM, blocks=(block,), final_norm=norm, tied_head=False, **sizes, **fields)


def toy_decoder(layers: int = 2) -> ConfigDict:
    return decoder(WIDTH, layers, 4, 2 * WIDTH, vocabulary().vocab_size, 512, embedding_multiplier=50.0)


def vicuna_7b() -> ConfigDict:
    return decoder(4096, 32, 32, 11008, 32_000, 4096)


def llama3_8b() -> ConfigDict:
    return decoder(4096, 32, 32, 14336, 128_256, 8192, kv_heads=8, base=500_000.0)


def tower(width: int, layers: int, heads: int, side: int, activation: str = "gelu", **fields) -> ConfigDict:
    attention = of(
        Attention, num_heads=heads, head_dim=width // heads, rule=of(Full), use_bias=True, output_bias=True
    )
    norm = of(LayerNorm, epsilon=1e-5)
    mlp = of(MLP, hidden_dim=4 * width, activation=activation)
    block = of(Block, attention=attention, mlp=mlp, norm=norm)
    return of(Tower, blocks=(block,), num_layers=layers, width=width, side=side, **fields)


def toy_tower(side: int = 3, **fields) -> ConfigDict:
    return tower(TOWER, 2, 2, side, **fields)


def clip(layers: int = 24, **fields) -> ConfigDict:
    """ViT-L/14 at 336 pixels, and its patches before the last layer; with its class token."""
    size = dict(width=1024, layers=layers, heads=16, side=24, activation="gelu_quick")
    own = dict(class_token=True, patch_bias=False, feature=-2, pre_norm=of(LayerNorm, epsilon=1e-5))
    return tower(**size, **(own | fields))


def toy_parts(planner: ConfigDict, **tower_fields) -> dict:
    """Fields of a VLM; `side` of the tower is that of the Scenes by default."""
    return dict(planner=planner, decoder=toy_decoder(), tower=toy_tower(**tower_fields))


def paper_parts(planner: ConfigDict, llm: ConfigDict | None = None, **tower_fields) -> dict:
    return dict(planner=planner, decoder=llm or vicuna_7b(), tower=clip(**tower_fields))


def stage(
    name: str, steps: int, trainable: tuple[str, ...], batch_size: int, peak: float, **fields
) -> ConfigDict:
    """AdamW on a cosine after a warm-up of 3 %; what no pattern of `trainable` names keeps its bits."""
    schedule = of(cosine, peak=peak, warmup=max(round(0.03 * steps), 1), floor=fields.pop("floor", 0.0))
    own = {name: fields.pop(name) for name in ("weight_decay", "rates") if name in fields}
    optimizer = of(adamw, schedule=schedule, **({"weight_decay": 0.0} | own))
    return of(
        Stage,
        name=name,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trainable=trainable,
        **fields,
    )


def conversations(source: ConfigDict, planner: ConfigDict, length: int, **fields) -> ConfigDict:
    return of(Conversations, source=source, planner=planner, length=length, **fields)


# One stage, for the sake of a short run; the tower stays as it was drawn.
TOY_STAGES = (("instruct", 300, ("^connector/", "^decoder/")),)


def toy_experiment(
    model: ConfigDict,
    source: ConfigDict,
    stages: tuple[tuple[str, int, tuple[str, ...]], ...] = TOY_STAGES,
    length: int = 40,
    seed: int = 0,
    **trainer,
) -> ConfigDict:
    """A VLM on a generated world. stages: (name, steps, what is trained)."""
    made = tuple(stage(name, steps, trainable, 32, 3e-3, floor=0.1) for name, steps, trainable in stages)
    data = conversations(source, model.planner, length, seed=seed)
    return of(Trainer, task=of(VisionLanguage, model=model), data=data, stages=made, seed=seed, **trainer)


def paper_experiment(
    model: ConfigDict,
    align: tuple[str, ...] = ("^connector/",),
    instruct: tuple[str, ...] = ("^connector/", "^decoder/"),
    length: int = 2048,
    rates: tuple[float, float] = (1e-3, 2e-5),
    stages: tuple[ConfigDict, ...] | None = None,
    **task,
) -> ConfigDict:
    """LLaVA-1.5's two stages: 558k captions, then 665k dialogues, an epoch each."""

    def dialogues(name: str) -> ConfigDict:
        source = of(LlavaFiles, path=f"data/{name}.json", images="data")
        prompt = dict(before="USER: ", between=" ASSISTANT: ", tokenizer="data/tokenizer.json")
        return conversations(source, model.planner, length, **prompt)

    if stages is None:
        captions = dialogues("blip_laion_cc_sbu_558k")
        stages = (
            stage("align", 2180, align, 256, rates[0], data=captions),
            stage("instruct", 5198, instruct, 128, rates[1]),
        )
    task = of(VisionLanguage, model=model, compute_dtype="bfloat16", **task)
    return of(Trainer, task=task, data=dialogues("llava_v1_5_mix665k"), stages=stages)
