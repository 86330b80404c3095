"""Meta-Transformer: one frozen encoder, a tokenizer and a head for every modality (arXiv 2307.10802).

    python -m experiments.train --config=configs/meta_transformer.py --workdir=runs/meta
    python -m experiments.train --config=configs/meta_transformer.py:pretrain --workdir=runs/tower
    python -m experiments.train --config=configs/meta_transformer.py:all --config.task.encoder=runs/tower

`tiny` (the default): scikit-learn's digits and generated clouds of points through an encoder that stays as it was
drawn; about 90 % of the digits right after half a minute on two CPU cores.
`pretrain`: a tower of the same shape learns to name the cells of generated pictures; the others may begin with its
blocks.
`all`: eleven tasks of ten modalities, frozen; `tuned`: the same, and the encoder learns too. Real are the digits, the
two tables and the text, Python's standard library; all else is generated: spectrograms, clips, a hyperspectral scene,
points, series to be forecast, inertial sensors, graphs.
`paper`: ViT-B/16, for accelerators, with ImageNet, Indian Pines (MATLAB files in a folder `scenes`) and recordings of
digits in a folder `recordings`. Begin with the blocks of CLIP: `python -m experiments.convert --from=CLIP-ViT-B-16
--to=clip --format=lathe` and `--config.task.encoder=clip`. The paper's other data sets are not read here.
"""

from ml_collections import ConfigDict

from configs import llava
from research.config import of
from research.data.generated import Gaits, Motions, Seasons, Solids
from research.data.graphs import Graphs
from research.data.images import ImageDataset
from research.data.packages import PackageWindows
from research.data.scene_patches import BlockSplit, RandomSplit, ScenePatches
from research.data.scenes import GeneratedScene, MatScene
from research.data.shapes import Cells, Scenes
from research.data.spoken import Spectrograms, SpokenDigits, SpokenFiles
from research.data.tables import Table
from research.data.together import InMemory, SideBySide
from research.multimodal.heads import ClassHead, ForecastHead, NumberHead
from research.multimodal.meta_transformer import Encoder, MetaTransformer, Modality, Transfer
from research.multimodal.naming import Namer, Naming
from research.multimodal.tokenize.graphs import GraphTokens
from research.multimodal.tokenize.grids import BandTokens, GridTokens
from research.multimodal.tokenize.points import PointTokens
from research.multimodal.tokenize.series import SeriesTokens
from research.multimodal.tokenize.symbols import TableTokens, TextTokens
from research.training.evaluators import Evaluate
from research.training.loop import Trainer

PRESETS = ("tiny", "tuned", "all", "pretrain", "paper")
FROZEN = ("^encoder/",)
WIDTH, LAYERS, HEADS = 48, 2, 4
MADE = 2048  # records of a generated training set


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "paper":
        return paper()
    if preset == "pretrain":
        return pretraining()
    names = ("image", "points") if preset == "tiny" else tuple(MODALITIES)
    return experiment(names, frozen=() if preset == "tuned" else FROZEN)


def encoder(width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> ConfigDict:
    tower = llava.tower(width, layers, heads, 1)
    return of(Encoder, blocks=tower.blocks, num_layers=layers)


def _spectra(split: str, seed: int) -> ConfigDict:
    size = MADE if split == "train" else 512
    return of(InMemory, data=of(Spectrograms, source=of(SpokenDigits, split=split, size=size, seed=seed)))


def _scene(split: str, seed: int) -> ConfigDict:
    scene = of(GeneratedScene, classes=6, endmembers=8, noise=0.1)
    return of(
        ScenePatches,
        scene=scene,
        split=of(BlockSplit, block=12, train=0.4, validation=0.2),
        num_classes=6,
        part=split,
        components=60,
        bands=True,
        size=3,
        seed=seed,
        shuffle=split == "train",
    )


def _made(cls: type, **fields):
    def data(split: str, seed: int) -> ConfigDict:
        size = MADE if split == "train" else 512
        return of(InMemory, data=of(cls, split=split, size=size, seed=seed, **fields))

    return data


def _table(source: str):
    return lambda split, seed: of(Table, source=source, split=split, seed=seed)


# name -> (data of a split, with a seed of what is drawn or of the order; tokenizer but for its width; head)
MODALITIES = {
    "image": (
        lambda split, seed: of(ImageDataset, split=split, seed=seed, shuffle=split == "train"),
        dict(cls=GridTokens, shape=(8, 8, 1), size=(2, 2), stride=(2, 2)),
        of(ClassHead, num_classes=10),
    ),
    "points": (
        _made(Solids),
        dict(cls=PointTokens, points=128, centres=16, neighbours=16, hidden_dim=32),
        of(ClassHead, num_classes=3, pool="class_max"),
    ),
    "audio": (
        _spectra,
        dict(cls=GridTokens, shape=(48, 64, 1), size=(16, 16), stride=(10, 10)),
        of(ClassHead, num_classes=10),
    ),
    "video": (
        _made(Motions),
        dict(cls=GridTokens, shape=(4, 16, 16, 3), size=(2, 4, 4), stride=(2, 4, 4)),
        of(ClassHead, num_classes=4),
    ),
    "hyperspectral": (
        _scene,
        dict(cls=BandTokens, shape=(3, 3, 60), group=4, stride=4),
        of(ClassHead, num_classes=6),
    ),
    "text": (
        _made(PackageWindows),
        dict(cls=TextTokens, length=32, vocab_size=4096, features=8),
        of(ClassHead, num_classes=7),
    ),
    "series": (
        _made(Seasons),
        dict(cls=SeriesTokens, length=24, channels=3, calendar=4),
        of(ForecastHead, horizon=8, channels=3),
    ),
    "table": (_table("wine"), dict(cls=TableTokens, numbers=13), of(ClassHead, num_classes=3)),
    "diabetes": (_table("diabetes"), dict(cls=TableTokens, numbers=9, categories=(2,)), of(NumberHead)),
    "graph": (
        _made(Graphs),
        dict(cls=GraphTokens, nodes=12, edges=12, node_features=1, edge_features=1, identifiers=6),
        of(ClassHead, num_classes=4),
    ),
    "inertial": (_made(Gaits), dict(cls=SeriesTokens, length=32, channels=6), of(ClassHead, num_classes=5)),
}
# Where tokens say themselves where they are, or are no sequence.
UNPLACED = ("points", "series", "table", "diabetes", "graph", "inertial")


def modality(name: str, width: int = WIDTH, **head) -> ConfigDict:
    _, fields, own = MODALITIES[name]
    fields = fields | dict(width=width)
    own = own.copy_and_resolve_references()
    own.update(head)
    positions = "none" if name in UNPLACED else "learned"
    return of(Modality, tokenizer=of(fields.pop("cls"), **fields), head=own, positions=positions)


def model(names: tuple[str, ...], width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> ConfigDict:
    parts = {name: modality(name, width) for name in names}
    return of(MetaTransformer, encoder=encoder(width, layers, heads), modalities=parts)


def data(names: tuple[str, ...], split: str, seed: int = 0) -> ConfigDict:
    return of(SideBySide, datasets={name: MODALITIES[name][0](split, seed) for name in names})


def experiment(
    names: tuple[str, ...],
    frozen: tuple[str, ...] = FROZEN,
    made: ConfigDict | None = None,
    steps: int = 300,
    seed: int = 0,
    **task,
) -> ConfigDict:
    """All modalities in every step, the loss the sum of theirs; each is tested apart."""
    weights = {f"{name}/loss": 1.0 for name in names}
    peak = 1e-2 if frozen else 3e-3
    stage = llava.stage("transfer", steps, (".*",), 32, peak, floor=0.1, frozen=frozen, loss_weights=weights)
    return of(
        Trainer,
        task=of(Transfer, model=model(names) if made is None else made, **task),
        data=data(names, "train", seed),
        stages=(stage,),
        evaluators=tuple(
            of(Evaluate, name=f"test_{name}", data=data((name,), "test", seed), batch_size=64)
            for name in names
        ),
        seed=seed,
    )


def pretraining(steps: int = 400, seed: int = 0) -> ConfigDict:
    """A tower names the cells of generated pictures, 3 x 3 of 8 x 8 pixels."""
    cells = of(Cells, world=of(Scenes, seed=seed))
    tower = llava.tower(WIDTH, LAYERS, HEADS, side=3)
    task = of(Naming, model=of(Namer, tower=tower, num_classes=85, patch=8), image_shape=(24, 24, 3))
    stage = llava.stage("name", steps, (".*",), 32, 3e-3, floor=0.1)
    return of(Trainer, task=task, data=cells, stages=(stage,), seed=seed)


def paper() -> ConfigDict:
    """ViT-B/16. The rates are ours: the paper has some for every data set."""
    images = dict(source="tfds:imagenet2012", size=224)
    windows = dict(split=of(RandomSplit), num_classes=16, size=3, components=200, bands=True)
    scene = of(
        MatScene,
        cube="scenes/Indian_pines_corrected.mat",
        truth="scenes/Indian_pines_gt.mat",
        cube_key="indian_pines_corrected",
        truth_key="indian_pines_gt",
    )
    parts = {
        "image": (
            of(GridTokens, width=768, shape=(224, 224, 3), size=(16, 16), stride=(16, 16)),
            of(ClassHead, num_classes=1000, pool="class"),
        ),
        "audio": (
            of(GridTokens, width=768, shape=(128, 64, 1), size=(16, 16), stride=(10, 10)),
            of(ClassHead, num_classes=10),
        ),
        "hyperspectral": (
            of(BandTokens, width=768, shape=(3, 3, 200), group=3, stride=1),
            of(ClassHead, num_classes=16, pool="class"),
        ),
    }

    def sets(images_of: str, part: str) -> dict[str, ConfigDict]:
        return {
            "image": of(ImageDataset, split=images_of, **images),
            "audio": of(Spectrograms, source=of(SpokenFiles, path="recordings", split=part), frames=128),
            "hyperspectral": of(ScenePatches, scene=scene, part=part, **windows),
        }

    made = of(
        MetaTransformer,
        encoder=encoder(768, 12, 12),
        modalities={
            name: of(Modality, tokenizer=tokens, head=head) for name, (tokens, head) in parts.items()
        },
    )
    weights = {f"{name}/loss": 1.0 for name in parts}
    fields = dict(frozen=FROZEN, loss_weights=weights, weight_decay=0.05)
    return of(
        Trainer,
        task=of(Transfer, model=made, inside="", compute_dtype="bfloat16"),
        data=of(SideBySide, datasets=sets("train", "train")),
        stages=(llava.stage("transfer", 125_000, (".*",), 1024, 1e-3, **fields),),
        evaluators=tuple(
            of(Evaluate, name=f"test_{name}", data=of(SideBySide, datasets={name: test}), batch_size=256)
            for name, test in sets("validation", "test").items()
        ),
    )
