"""MorpMamba: windows of a hyperspectral scene, morphology, cross-attention, a state (arXiv 2408.01372).

    python -m experiments.train --config=configs/morpmamba.py --workdir=runs/morpmamba
    python -m experiments.train --config=configs/morpmamba.py:pavia_university --workdir=runs/pavia

`tiny` (the default): the released code's model, 66,239 parameters for 9 classes, on a generated scene of 96 x 96 pixels
and 60 bands with a random split; about half a minute on two CPU cores. Evaluation gives `accuracy` (overall),
`average_accuracy` and `kappa`, and at the end a map of the scene beside the truth (figures/test_map.png).
`blocks`: the same, split by blocks, so that no pixel is in a window of both training and test.
`morphology`: grey-scale erosion and dilation with learned structuring elements, gated by the pixel in the middle.
`selective`: the same with a Mamba-2 layer in place of the linear recurrence.
`indian_pines`, `pavia_university`: real scenes, from the MATLAB files as they are distributed, which are expected in
the folder `scenes`.
`paper`: the University of Houston scene (scenes/HU.mat, scenes/HU_gt.mat, 15 classes) as in the released code: half of
the pixels for the test, a quarter each for training and validation, 50 epochs of Adam. Here components are whitened by
training pixels alone, there by the whole scene.
"""

from ml_collections import ConfigDict

from research.config import of
from research.data.scene_patches import BlockSplit, RandomSplit, ScenePatches
from research.data.scenes import GeneratedScene, MatScene
from research.training.loop import Trainer
from research.training.optimizers import adamw, constant, cosine
from research.training.stages import Stage
from research.vision.hyperspectral.evaluation import EvaluateScene, SceneClassification
from research.vision.hyperspectral.morpmamba import MorpMamba, SelectiveState

PRESETS = ("tiny", "blocks", "morphology", "selective", "indian_pines", "pavia_university", "paper")

SIZE, COMPONENTS = 4, 15
RANDOM = of(RandomSplit, train=0.25, validation=0.25)
MORPHOLOGY = dict(morphology="grey", gate="centre")
FOLDER = "scenes"
# name -> cube file, its array, truth file, its array, classes
SCENES = {
    "indian_pines": (
        "Indian_pines_corrected.mat",
        "indian_pines_corrected",
        "Indian_pines_gt.mat",
        "indian_pines_gt",
        16,
    ),
    "pavia_university": ("PaviaU.mat", "paviaU", "PaviaU_gt.mat", "paviaU_gt", 9),
    "paper": ("HU.mat", "HSI", "HU_gt.mat", "gt", 15),
}


def experiment(
    scene: ConfigDict,
    split: ConfigDict,
    model: ConfigDict,
    stage: ConfigDict,
    num_classes: int,
    every: int | None = None,
    evaluated: tuple[str, ...] = ("validation", "test"),
    seed: int = 0,
    **trainer,
) -> ConfigDict:
    """A window classifier of a scene."""
    windows = dict(scene=scene, split=split, num_classes=num_classes, size=SIZE, components=COMPONENTS)

    def evaluator(part: str) -> ConfigDict:
        data = of(ScenePatches, part=part, shuffle=False, **windows)
        return of(EvaluateScene, name=part, data=data, batch_size=256, every=every)

    return of(
        Trainer,
        task=of(SceneClassification, model=model, image_shape=(SIZE, SIZE, COMPONENTS)),
        data=of(ScenePatches, seed=seed, **windows),
        stages=(stage,),
        evaluators=tuple(map(evaluator, evaluated)),
        seed=seed,
        **trainer,
    )


def mat_scene(name: str) -> ConfigDict:
    cube, cube_key, truth, truth_key, _ = SCENES[name]
    return of(
        MatScene,
        cube=f"{FOLDER}/{cube}",
        truth=f"{FOLDER}/{truth}",
        cube_key=cube_key,
        truth_key=truth_key,
    )


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset not in SCENES:
        fields = MORPHOLOGY if preset in ("morphology", "selective") else {}
        if preset == "selective":
            fields = fields | dict(state=of(SelectiveState))
        optimizer = of(adamw, schedule=of(cosine, peak=2e-3, warmup=20), weight_decay=0.0, b2=0.999)
        return experiment(
            of(GeneratedScene),
            of(BlockSplit) if preset == "blocks" else RANDOM,
            of(MorpMamba, num_classes=9, **fields),
            of(Stage, name="train", steps=200, batch_size=64, optimizer=optimizer),
            num_classes=9,
            every=100,
        )
    # Adam 1e-3, its decay of 1e-6 a step left out: 0.08 % in all. 50 epochs of 3757 pixels in batches of 256.
    classes = SCENES[preset][-1]
    optimizer = of(adamw, schedule=of(constant, peak=1e-3), weight_decay=0.0, b2=0.999, eps=1e-7)
    return experiment(
        mat_scene(preset),
        RANDOM,
        of(MorpMamba, num_classes=classes),
        of(Stage, name="train", steps=750, batch_size=256, optimizer=optimizer),
        num_classes=classes,
        every=150,
    )
