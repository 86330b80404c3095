"""Configs: what is refused and in which words, exact JSON, overrides, and what data may import."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from research.config import ABSENT, build, diff, from_json, load_config, load_sweep, of, to_json
from research.errors import UserError
from research.nn.mlp import MLP, GatedMLP


class Shape:
    pass


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    radius: float
    color: Literal["red", "green"] = "red"


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    side: int


@dataclasses.dataclass(frozen=True)
class Scene:
    title: str
    shapes: tuple[Shape, ...] = ()
    main: Shape | None = None
    visible: bool = True
    size: tuple[int, int] = (4, 3)
    scale: int | float = 1
    names: Sequence[str] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paint: Callable[..., Any] | None = None
    layers: list[int] = dataclasses.field(default_factory=list)


class Speaks(Protocol):
    def speak(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Owner:
    pet: Speaks
    extra: dict[str, Shape] = dataclasses.field(default_factory=dict)
    anything: Any = None


@dataclasses.dataclass(frozen=True)
class Late:
    inner: "Circle"


@dataclasses.dataclass(frozen=True)
class Dog:
    def speak(self) -> str:
        return "woof"


def make_square(side: int) -> Square:
    return Square(side)


def double(x: float) -> float:
    return 2 * x


class Block(nn.Module):
    features: int
    inner: nn.Module | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.features)(x)
        return x if self.inner is None else self.inner(x)


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- of


def test_of_names_the_class_and_build_makes_the_object():
    config = of(Scene, title="t", shapes=(of(Circle, radius=1), of(Square, side=2)), paint=double)
    assert isinstance(config, ConfigDict)
    assert config.shapes[0].cls == f"{__name__}:Circle"
    assert config.paint == f"{__name__}:double"
    assert build(config) == Scene("t", (Circle(1.0), Square(2)), paint=double)


def test_linen_modules_build_nested_and_run():
    model = build(of(Block, features=3, inner=of(GatedMLP, hidden_dim=5)))
    assert model == Block(3, GatedMLP(hidden_dim=5))
    y, _ = model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    assert y.shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: of(GatedMLP, hiden_dim=8),
            "GatedMLP.hiden_dim: unknown field of GatedMLP; did you mean hidden_dim?",
        ),
        (
            lambda: of(Circle, weight=1),
            "Circle.weight: unknown field of Circle; its fields are radius, color",
        ),
        (lambda: of(Block, features=1, parent=None), "Block.parent: unknown field of Block"),
        (lambda: of(Circle), "Circle needs radius"),
        (lambda: of(Square, side=1.0), "Square.side: expected int, got 1.0 (float)"),
        (lambda: of(Square, side=True), "Square.side: expected int, got True (bool)"),
        (lambda: of(Circle, radius=False), "Circle.radius: expected float, got False (bool)"),
        (lambda: of(Scene, title=None), "Scene.title: expected str, got None (NoneType)"),
        (lambda: of(Scene, title="t", visible=1), "Scene.visible: expected bool, got 1 (int)"),
        (
            lambda: of(Circle, radius=1.0, color="gren"),
            "Circle.color: expected one of 'red', 'green', got 'gren' (str); did you mean green?",
        ),
        (
            lambda: of(Scene, title="t", size=(1, 2, 3)),
            "Scene.size: expected tuple[int, int], got (1, 2, 3) (tuple)",
        ),
        (lambda: of(Scene, title="t", names="abc"), "Scene.names: expected Sequence[str], got 'abc' (str)"),
        (lambda: of(Scene, title="t", limits={"a": "b"}), "Scene.limits: expected Mapping[str, float], got "),
        (lambda: of(Scene, title="t", main=of(Dog)), "Scene.main: expected Shape or None, got of(Dog)"),
        (lambda: of(Scene, title="t", main=3), "Scene.main: expected Shape or None, got 3 (int)"),
        (lambda: of(Owner, pet=3), "Owner.pet: expected Speaks, got 3 (int)"),
        (lambda: of(Owner, pet=of(Dog), extra={"a": of(Dog)}), "Owner.extra: expected dict[str, Shape], "),
        (lambda: of(Scene, title=of(Dog)), "Scene.title: expected str, got of(Dog)"),
        (lambda: of(Scene, title="t", paint="double"), "Scene.paint: expected a function or class ("),
        (
            lambda: of(Scene, title="t", paint="jax.nn:gleu"),
            "Scene.paint: jax.nn has no 'gleu'; did you mean ",
        ),
        (lambda: of(Scene, title="t", paint=lambda x: x), "Scene.paint: <function"),
        (lambda: of(Late, inner=of(Square, side=1)), "Late.inner: expected Circle, got of(Square)"),
        (lambda: of(Circle, cls=1), "Circle.cls: `cls` is reserved"),
        (lambda: of(3), "of(3): the first argument is the class or function to build"),
    ],
)
def test_of_refuses_in_one_line(call: Callable[[], Any], expected: str):
    assert message(call).startswith(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(1), "Owner.anything: "),
        (jnp.float32, "Owner.anything: "),
        (np.zeros(2), "Owner.anything: "),
        (math.nan, "Owner.anything: nan can't be a config value"),
        ({1, 2}, "Owner.anything: {1, 2} (set) is not a plain value; write of(set, ...)"),
        (Circle(1.0), "Owner.anything: Circle(radius=1.0, color='red') (Circle) is not a plain value; write"),
        ({1: 2}, "Owner.anything: dict keys in a config are strings, got 1 (int)"),
        ({"a.b": 2}, "Owner.anything: 'a.b' can't be a key of a config"),
        ([{"a": (b"x",)}], "Owner.anything.0.a.0: b'x' (bytes) is not a plain value"),
    ],
)
def test_values_that_json_can_not_hold_are_refused(value: Any, expected: str):
    assert message(lambda: of(Owner, pet=of(Dog), anything=value)).startswith(expected)


def test_types_are_brought_to_the_annotation():
    config = of(Scene, title="t", size=[1, 2], layers=(1, 2), limits={"a": 1}, scale=2, names=["a"])
    assert (config.size, config.layers, config.names) == ((1, 2), [1, 2], ["a"])
    assert type(config.limits.a) is float
    assert type(config.scale) is int  # int | float keeps the int
    assert type(of(Circle, radius=1).radius) is float
    assert type(build(config).limits) is dict


def test_functions_are_called_and_public_names_are_used():
    assert build(of(Scene, title="t", main=of(make_square, side=2))).main == Square(2)
    config = of(optax.adamw, learning_rate=of(optax.cosine_decay_schedule, init_value=1.0, decay_steps=10))
    assert config.cls == "optax:adamw"
    assert isinstance(build(config), optax.GradientTransformation)
    assert of(Scene, title="t", paint=jax.nn.silu).paint == "jax.nn:silu"
    assert build(of(Scene, title="t", paint="jax.nn:silu")).paint is jax.nn.silu
    assert message(lambda: of(optax.adamw, learning_rat=1.0)).endswith("did you mean learning_rate?")


def test_what_a_function_built_is_checked():
    config = of(Owner, pet=of(Dog), extra={"a": of(double, x=1.0)})
    assert message(lambda: build(config)) == (
        "config.extra: expected dict[str, Shape], but it built {'a': 2.0} (dict)"
    )


def test_a_shared_config_is_copied_not_aliased():
    circle = of(Circle, radius=1.0)
    scene = of(Scene, title="t", shapes=(circle, circle))
    circle.radius = 9.0
    scene.shapes[0].radius = 2.0
    assert build(scene).shapes == (Circle(2.0), Circle(1.0))


def test_build_checks_again_and_names_the_path():
    config = of(Scene, title="t", shapes=(of(Circle, radius=1.0),), limits={})
    config.shapes[0].color = "blue"
    assert message(lambda: build(config)).startswith("config.shapes.0.color: expected one of 'red', 'green'")
    config = of(Scene, title="t", main=of(Circle, radius=1.0))
    config.main.radios = 1.0
    assert (
        message(lambda: build(config)) == "config.main.radios: unknown field of Circle; did you mean radius?"
    )
    del config.main["radios"], config.main["radius"]
    assert message(lambda: build(config)) == "config.main: Circle needs radius"


def test_an_error_of_the_constructor_names_the_path():
    config = of(Scene, title="t", shapes=(of(GatedMLP, hidden_dim=8),)[:0], main=of(refuses, size=3))
    assert message(lambda: build(config)) == "config.main: size 3 is odd"


def refuses(size: int) -> Shape:
    raise UserError(f"size {size} is odd")


# ---------------------------------------------------------------------------------------------- JSON


def everything() -> ConfigDict:
    return of(
        Owner,
        pet=of(Dog),
        anything={
            "tuple": (1, (2.0, [3, (None, True)])),
            "floats": [0.1, 1e-300, -0.0, 1e22, math.inf, -math.inf],
            "int": 2**70,
            "text": 'é \n "quoted" __tuple__',
            "empty": ((), [], {}),
            "configs": [of(Circle, radius=1e-7), {"deep": (of(Square, side=1),)}],
        },
    )


def test_json_is_an_exact_inverse():
    config = everything()
    text = to_json(config)
    again = from_json(text)
    assert again == config
    assert diff(again, config) == []
    assert to_json(again) == text
    assert type(again.anything.tuple) is tuple and type(again.anything.tuple[1][1]) is list
    assert math.copysign(1, again.anything.floats[2]) == -1
    assert json.loads(text)["cls"].endswith(":Owner")  # plain JSON for any other reader
    assert build(again) == build(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "config: not JSON: "),
        ("[1]", "config: a saved config is a JSON object"),
        ('{"a": NaN}', "config: NaN is not JSON"),
        ('{"a": 1, "a": 2}', "config: a appears twice"),
        ('{"a":' * 101 + "1" + "}" * 101, "config: nested deeper than the 100 levels"),
        ('{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "config: nested deeper than the 100 levels"),
        ('{"a": {"__tuple__": 3}}', "config.a: malformed __tuple__"),
        ('{"a": {"__float__": "1"}}', "config.a: malformed __float__"),
    ],
)
def test_malformed_json_is_named(text: str, expected: str):
    assert message(lambda: from_json(text)).startswith(expected)


@pytest.mark.parametrize(
    "reference",
    [
        "os:system",
        "subprocess:run",
        "builtins:eval",
        "jax.nn:functools.reduce",
        "optax:_src",
        "flax.training.checkpoints:save_checkpoint",
        "research.config:load_config",
        "research.config_names:importlib.import_module",
        "research.config_names:sys",
        "research.errors:difflib.get_close_matches",
        "researcher.x:y",
        "research.errors",
        "",
    ],
)
def test_data_imports_nothing_but_our_modules(reference: str, monkeypatch: pytest.MonkeyPatch):
    text = json.dumps({"cls": reference, "command": "true"})
    config = from_json(text)  # nothing happens yet
    with pytest.raises(UserError, match=r"^config: "):
        build(config)


def test_a_missing_module_or_name_names_the_nearest():
    assert message(lambda: build(from_json('{"cls": "research.nn.mpl:GatedMLP"}'))) == (
        "config: no module 'research.nn.mpl'; did you mean research.nn.mlp?"
    )
    assert message(lambda: build(from_json('{"cls": "research.nn.mlp:GatedMpl"}'))) == (
        "config: research.nn.mlp has no 'GatedMpl'; did you mean GatedMLP?"
    )


# ---------------------------------------------------------------------------------------------- diff


def test_diff_lists_leaves_and_counts_defaults():
    left = of(Scene, title="a", shapes=(of(Circle, radius=1.0), of(Square, side=1)))
    right = of(Scene, title="b", shapes=(of(Circle, radius=2.0), of(Square, side=1)), visible=True, scale=1.0)
    assert diff(left, right) == [("scale", 1, 1.0), ("shapes.0.radius", 1.0, 2.0), ("title", "a", "b")]
    assert diff(of(Scene, title="a", size=(4, 3), paint=None), of(Scene, title="a")) == []
    assert diff(of(Scene, title="a", limits={}, layers=[]), of(Scene, title="a")) == []
    assert diff({"a": True}, {"a": 1}) == [("a", True, 1)]
    assert diff({"a": 1}, {"b": 1}) == [("a", 1, ABSENT), ("b", ABSENT, 1)]
    assert diff({"a": (1, 2)}, {"a": (1, 2, 3)}) == [("a", (1, 2), (1, 2, 3))]
    changed = diff(
        of(Scene, title="a", main=of(Square, side=1)), of(Scene, title="a", main=of(Circle, radius=1.0))
    )
    assert changed == [
        ("main.cls", f"{__name__}:Square", f"{__name__}:Circle"),
        ("main.radius", ABSENT, 1.0),
        ("main.side", 1, ABSENT),
    ]


# ---------------------------------------------------------------------------------------------- files

FILE = """
import optax
from research.config import of
from research.nn.mlp import MLP, GatedMLP

PRESETS = ("tiny", "paper")


def get_config(preset="tiny"):
    width = {"tiny": 8, "paper": 1024}[preset]
    return of(
        optax.chain_of if preset == "broken" else optax.adamw,
        learning_rate=of(optax.piecewise_constant_schedule, init_value=1.0, boundaries_and_scales=None),
        weight_decay=0.1,
        mask=None,
        b1=0.9,
        mu_dtype={"stages": ({"steps": 10, "name": "warm"}, {"steps": width, "name": "main"}),
                  "mlp": of(GatedMLP, hidden_dim=width), "ratio": 0.5, "widths": (1, 2), "label": "x"},
    )
"""


@pytest.fixture
def file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "matlm.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return "configs/matlm.py"


def test_load_config_takes_presets(file: str):
    assert load_config(file).mu_dtype.mlp.hidden_dim == 8
    assert load_config(f"{file}:paper").mu_dtype.mlp.hidden_dim == 1024


def test_a_saved_config_loads_like_a_file(file: str, tmp_path):
    config = load_config(file, ["b1=0.5"])
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("b1=0.5", "b1", 0.5),
        ("b2=1", "b2", 1),  # a field that the file left at its default; ArrayLike takes the int
        ("nesterov=true", "nesterov", True),
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("learning_rate.init_value=2", "learning_rate.init_value", 2),
        ("mu_dtype.mlp.hidden_dim=16", "mu_dtype.mlp.hidden_dim", 16),
        ("mu_dtype.mlp.activation=relu", "mu_dtype.mlp.activation", "relu"),
        ("mu_dtype.stages.0.steps=3", "mu_dtype.stages.0.steps", 3),
        ("mu_dtype.stages.1.name=3", "mu_dtype.stages.1.name", "3"),
        ("mu_dtype.ratio=1", "mu_dtype.ratio", 1.0),
        ("mu_dtype.widths=4", "mu_dtype.widths", (4,)),
        ("mu_dtype.widths=4,5,6", "mu_dtype.widths", (4, 5, 6)),
        ("mu_dtype.label=a=b", "mu_dtype.label", "a=b"),
        ("mu_dtype=none", "mu_dtype", None),
    ],
)
def test_overrides_set_every_leaf(file: str, override: str, path: str, value: Any):
    before, after = load_config(file), load_config(file, [override])
    node: Any = after
    for part in path.split("."):
        node = node[int(part) if part.isdecimal() else part]
    assert node == value and type(node) is type(value)
    assert [changed.split(".")[: path.count(".") + 1] for changed, _, _ in diff(before, after)] != []
    assert all(changed.startswith(path) for changed, _, _ in diff(before, after))


def test_an_annotated_dict_takes_new_keys(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(to_json(of(Scene, title="t", limits={"a": 1.0})))
    monkeypatch.setattr("research.config.check_importable", lambda *_: None)  # `Scene` is a test's
    config = load_config(tmp_path / "config.json", ["limits.b=2"])
    assert config.limits == ConfigDict({"a": 1.0, "b": 2.0})
    (tmp_path / "config.json").write_text(to_json(of(Scene, title="t")))
    assert load_config(tmp_path / "config.json", ["limits.b=2"]).limits == ConfigDict({"b": 2.0})
    assert message(lambda: load_config(tmp_path / "config.json", ["limits.b=x"])) == (
        "config.limits.b: expected float, got 'x' (str)"
    )


def test_overrides_of_a_dict_are_python_values(file: str):
    config = load_config(file, {"mu_dtype.mlp": of(MLP, hidden_dim=3), "mu_dtype.widths": [7]})
    assert build(config.mu_dtype.mlp) == MLP(hidden_dim=3)
    assert config.mu_dtype.widths == (7,)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("b11=0.5", "config.b11: unknown field of adamw; did you mean b1?"),
        (
            "hiden_dim=3",
            "config.hiden_dim: unknown field of adamw; did you mean config.mu_dtype.mlp.hidden_dim?",
        ),
        (
            "mu_dtype.mlp.hiden_dim=3",
            "config.mu_dtype.mlp.hiden_dim: unknown field of GatedMLP; did you mean hidden",
        ),
        ("mu_dtype.mpl.hidden_dim=3", "config.mu_dtype.mpl: no such entry; did you mean mlp?"),
        ("mu_dtype.mlp.hidden_dim=wide", "config.mu_dtype.mlp.hidden_dim: expected int, got 'wide' (str)"),
        ("mu_dtype.stages.0.steps=ten", "config.mu_dtype.stages.0.steps: expected int, got 'ten' (str)"),
        (
            "mu_dtype.stages.2.steps=1",
            "config.mu_dtype.stages.2: no such entry; config.mu_dtype.stages has 2",
        ),
        ("mu_dtype.stages.main=1", "config.mu_dtype.stages.main: no such entry"),
        ("nesterov=maybe", "config.nesterov: expected bool, got 'maybe' (str)"),
        ("b1.x=1", "config.b1: is 0.9 (float), so there is no config.b1.x to override"),
        ("eps.x=1", "config.eps: is not set in this config, so there is no config.eps.x"),
        ("b1", "override 'b1': expected path=value"),
    ],
)
def test_a_wrong_override_is_named(file: str, override: str, expected: str):
    assert message(lambda: load_config(file, [override])).startswith(expected)


def test_a_wrong_file_or_preset_is_named(file: str, tmp_path):
    assert message(lambda: load_config("configs/mtlm.py:tiny")) == (
        "configs/mtlm.py: no such config file; did you mean configs/matlm.py?"
    )
    assert message(lambda: load_config("matlm")).endswith("did you mean configs/matlm.py?")
    assert message(lambda: load_config(f"{file}:papr")) == (
        "configs/matlm.py: no preset 'papr'; did you mean paper? (presets: tiny, paper)"
    )
    assert (
        message(lambda: load_config(f"{file}:x")) == "configs/matlm.py: no preset 'x' (presets: tiny, paper)"
    )
    (tmp_path / "folder.py").mkdir()
    for load in (load_config, load_sweep):
        assert message(lambda load=load: load("folder.py")).startswith(
            "folder.py: a folder; a config is a .py"
        )
    assert message(lambda: load_config("foldr.py")) == "foldr.py: no such config file"
    (tmp_path / "bad.json").write_bytes(b'"\xff"')
    assert message(lambda: load_config("bad.json")).startswith("bad.json: 'utf-8' codec can't decode")
    (tmp_path / "bad.json").write_text("{")
    assert message(lambda: load_config("bad.json")).startswith("bad.json: config: not JSON: ")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("PRESETS = (", "bad.py:1: '(' was never closed"),
        ("PRESETS = ('a',)\n", "bad.py: a config file defines PRESETS and get_config(preset)"),
        ("PRESETS = ()\ndef get_config():\n    return 3\n", "bad.py: get_config returned 3 (int), expected"),
        ("PRESETS = ()\ndef get_config():\n    return {}['x']\n", "bad.py:3: KeyError: 'x'"),
        ("import sys\nsys.exit(0)\n", "bad.py:2: SystemExit: 0"),
        (
            "from research.config import of\nfrom research.nn.mlp import MLP\nPRESETS = ()\n"
            "def get_config():\n    return of(MLP, hiden_dim=3)\n",
            "bad.py:5: MLP.hiden_dim: unknown field of MLP; did you mean hidden_dim?",
        ),
        (
            "from research.config import of\nPRESETS = ()\ndef model(a: int = 1):\n    return a\n"
            "def get_config():\n    return of(model)\n",
            "config: a config may not import '_config_file_bad:model': move that code to one of research.*",
        ),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path, monkeypatch, source: str, expected: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(source)
    assert message(lambda: load_config("bad.py")).startswith(expected)


def test_the_guides_examples_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "configs.md").read_text()
    first, file = [block.split("```")[0] for block in guide.split("```python\n")[1:]]
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["mlp"] == GatedMLP(hidden_dim=1024)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(file)
    assert load_config("example.py") == of(GatedMLP, hidden_dim=64)
    assert load_config("example.py:paper", ["hidden_dim=128"]) == of(GatedMLP, hidden_dim=128)
