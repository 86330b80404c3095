"""mPLUG-video: a video tower and a visual abstractor before a frozen language model (arXiv 2306.04362).

    python -m experiments.train --config=configs/mplug_video.py --workdir=runs/mplug_video
    python -m experiments.generate --workdir=runs/mplug_video --image=a.mp4 --prompt='which way does the circle move '

`tiny` (the default): generated clips of a moving shape, four of their eight frames; the decoder first learns from clips
that are told in words, and is frozen then (`--config.task.parts` and `--config.task.image_tower` name trained parts,
which is the paper's setting); two minutes on two CPU cores.
`paper`: CLIP ViT-L/14 at 224 pixels, four frames, 128 queries and a decoder of the size of the paper's GPT-3 2.7B, with
rotary in place of learned positions; ten epochs of ten million videos in LLaVA's format; a batch of 1536 is ours;
for accelerators. Begin with `--config.task.image_tower` and `--config.task.parts`.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.clips import Clips, vocabulary
from research.data.dialogues import LlavaFiles
from research.language.decoder import DecoderLM
from research.multimodal.model import VLM
from research.multimodal.mplug_video import Abstractor, VideoLanguage
from research.multimodal.video import Frames
from research.multimodal.video_tower import FrameAttention, SpaceTimeBlock, VideoTower
from research.nn.attention import Attention
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage

PRESETS = ("tiny", "paper")
OWN = ("^tower/", "^connector/")
FRAMES, QUERIES, LENGTH = 4, 8, 32


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        return paper_experiment()
    return experiment(of(Clips, side=24, speeds=(1, 2), objects=(1, 1)))


def in_time(image: ConfigDict, frames: int) -> ConfigDict:
    """The video tower that begins as an image tower."""
    fields, block = ({k: v for k, v in part.items() if k != "cls"} for part in (image, image.blocks[0]))
    attention = {name: value for name, value in block["attention"].items() if name != "cls"}
    spatial, time = of(FrameAttention, **attention), of(Attention, **attention)
    blocks = (of(SpaceTimeBlock, **(block | {"attention": spatial, "time": time})),)
    return of(VideoTower, **(fields | {"blocks": blocks}), frames=frames)


def toy_images() -> ConfigDict:
    """The image tower that the toy's may begin as, of 24 x 24 pixels."""
    return llava.toy_tower(class_token=True)


def toy_decoder() -> ConfigDict:
    words = vocabulary().vocab_size
    return llava.decoder(llava.WIDTH, 2, 4, 2 * llava.WIDTH, words, 512, embedding_multiplier=50.0)


def model(tower: ConfigDict | None = None) -> ConfigDict:
    """The toy, by default with its video tower."""
    planner = of(Frames, patch=8, side=24, frames=FRAMES, count=QUERIES)
    tower = in_time(toy_images(), FRAMES) if tower is None else tower
    sizes = dict(queries=QUERIES, num_heads=2, hidden_dim=4 * llava.TOWER)
    connector = of(Abstractor, width=llava.WIDTH, **sizes)
    return of(VLM, planner=planner, decoder=toy_decoder(), tower=tower, connector=connector)


def experiment(source: ConfigDict) -> ConfigDict:
    """The toy: the decoder reads what clips are told in words, then it is frozen and sees them."""
    whole, told = model(), source.copy_and_resolve_references()
    with told.unlocked():
        told.told = True
    read = llava.conversations(told, whole.planner, LENGTH)
    stages = (
        llava.stage("words", 300, ("^decoder/",), 32, 3e-3, floor=0.1, data=read),
        llava.stage("videos", 600, OWN, 32, 3e-3, floor=0.1),
    )
    data = llava.conversations(source, whole.planner, LENGTH)
    return of(Trainer, task=of(VideoLanguage, model=whole), data=data, stages=stages)


def gpt3() -> ConfigDict:
    """2.7 B parameters."""
    attention = of(Attention, num_heads=32, head_dim=80, rotary=of(Rotary), use_bias=True, output_bias=True)
    norm = of(LayerNorm, epsilon=1e-5)
    block = of(Block, attention=attention, mlp=of(MLP, hidden_dim=10_240, activation="gelu"), norm=norm)
    sizes = dict(vocab_size=51_200, width=2560, max_length=2048, num_layers=32)
    return of(DecoderLM, blocks=(block,), final_norm=norm, tied_head=True, **sizes)


def paper_experiment() -> ConfigDict:
    planner = of(Frames, side=224, frames=4, count=128, **llava.CLIP)
    vit = llava.tower(
        1024,
        24,
        16,
        16,
        "gelu_quick",
        class_token=True,
        patch_bias=False,
        pre_norm=of(LayerNorm, epsilon=1e-5),
    )
    connector = of(Abstractor, queries=128, width=2560, num_heads=16, hidden_dim=4096)
    whole = of(VLM, planner=planner, decoder=gpt3(), tower=in_time(vit, 4), connector=connector)
    source = of(LlavaFiles, path="data/youku_mplug.json", images="data")
    # 80 tokens of text behind <bos> and 128 rows.
    data = llava.conversations(source, planner, 209, tokenizer="data/tokenizer.json")
    batch = 1536  # 32 accelerators of 48
    schedule = of(cosine, peak=1e-4, warmup=2000, floor=0.01)
    optimizer = of(adamw, schedule=schedule, weight_decay=0.05, b2=0.999, eps=1e-6)
    steps = 10 * 10_000_000 // batch
    stage = of(Stage, name="captions", steps=steps, batch_size=batch, optimizer=optimizer, trainable=OWN)
    task = of(VideoLanguage, model=whole, compute_dtype="bfloat16")
    return of(Trainer, task=task, data=data, stages=(stage,), clip=3.0)
