"""MatViT: a nested vision transformer (MatFormer, arXiv 2310.07707, section 4.2).

    python -m experiments.train --config=configs/matvit.py:tiny --workdir=runs/matvit

`tiny` (the default): 0.2M parameters on scikit-learn's 8 x 8 digits, about half a minute on two CPU cores,
97 % of the test images right. `paper`: ViT-B/16 on ImageNet with the widths {384, 768, 1536, 3072}; the
paper's augmentation (mixup 0.5, RandAugment) is not part of it.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.images import ImageDataset
from research.elastic.matformer import MatFormer
from research.nn.attention import Attention
from research.nn.masks import Full
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.transformer import Block
from research.training.evaluators import Evaluate
from research.training.loop import Trainer
from research.training.optimizers import adamw, cosine
from research.training.stages import Stage
from research.training.task import Classification
from research.vision.vit import ViT

PRESETS = ("tiny", "paper")


def vit(
    width: int, num_layers: int, num_heads: int, hidden_dim: int, patch: int, num_classes: int, **vit
) -> ConfigDict:
    attention = of(
        Attention,
        num_heads=num_heads,
        head_dim=width // num_heads,
        rule=of(Full),
        use_bias=True,
        output_bias=True,
    )
    block = of(Block, attention=attention, mlp=of(MLP, hidden_dim=hidden_dim), norm=of(LayerNorm))
    return of(
        ViT, num_classes=num_classes, width=width, patch=patch, num_layers=num_layers, blocks=(block,), **vit
    )


def experiment(
    task: ConfigDict,
    stage: ConfigDict,
    evaluator: dict,
    source: str,
    held_out: str,
    size: int | None = None,
    **trainer,
) -> ConfigDict:
    """An image experiment on `source`, evaluated on its split `held_out`."""
    data = dict(source=source, size=size)
    test = of(ImageDataset, split=held_out, shuffle=False, **data)
    return of(
        Trainer,
        task=task,
        data=of(ImageDataset, split="train", **data),
        stages=(stage,),
        evaluators=(of(Evaluate, name=held_out, data=test, **evaluator),),
        **trainer,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        model = vit(width=64, num_layers=4, num_heads=4, hidden_dim=256, patch=2, num_classes=10)
        optimizer = of(adamw, schedule=of(cosine, peak=2e-3, warmup=30))
        return experiment(
            of(MatFormer, task=of(Classification, model=model, image_shape=(8, 8, 1)), training="joint"),
            of(Stage, name="train", steps=300, batch_size=128, optimizer=optimizer),
            dict(batch_size=61, every=100),
            source="digits",
            held_out="test",
        )
    # Adam 1e-3, decay 0.1, batch 2048, 300 epochs of 1.28M images.
    model = vit(
        width=768, num_layers=12, num_heads=12, hidden_dim=3072, patch=16, num_classes=1000, pool="class"
    )
    task = of(Classification, model=model, image_shape=(224, 224, 3), compute_dtype="bfloat16")
    optimizer = of(adamw, schedule=of(cosine, peak=1e-3, warmup=10_000), b2=0.999)
    return experiment(
        of(MatFormer, task=task, training="joint"),
        of(Stage, name="train", steps=187_500, batch_size=2048, optimizer=optimizer),
        dict(batch_size=512, every=5000),
        source="tfds:imagenet2012",
        held_out="validation",
        size=224,
        checkpoint_every=5000,
    )
