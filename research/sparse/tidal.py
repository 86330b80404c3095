"""TidalDecode: position persistent sparse attention (arXiv 2410.05076).

    model, params = tidal(model, params, Tidal(k=256, select=2, reselect=7))
    Generator(model, params, correction=Correction(dense, every=256)).generate(["def main("])

Within one decoding step neighbouring layers attend to much the same tokens. So only two layers look at all of them and
write down, for every head, where the greatest scores were; the layers between and above read these tokens alone:

    layers below `select`        full attention
    layer `select`, `reselect`   full attention, idx = top_k(q K^T) for every query head, of float32 scores before the
                                 softmax, oneself always among them; the output is that of full attention
    all others                   softmax(q K[idx]^T / sqrt(d)) V[idx], idx from the last selection of the same step

Every layer writes its own keys and values, so the cache is whole: traffic is saved, memory is not. Keys and values of
tokens that were decoded sparsely differ from a dense model's; `research.decoding.correction` recomputes them now and
then. With k at least the number of tokens the logits are the dense ones.

The paper's code has a choice for every query head; per="group" shares one among the query heads of a key head, by their
greatest score, and reads as many times fewer rows.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.nn.transformer import LayerStack, unscan_layers
from research.sparse.gathered import Observer, Per, Role, attends_to_all, gathered
from research.sparse.selectors import EveryLayer, Newest, Quest, check_budget
from research.training.feed import Dataset
from research.training.probes import measure
from research.training.stepwise import Stepwise
from research.training.task import Batch, LanguageModelling, Metrics


@dataclasses.dataclass(frozen=True)
class Tidal:
    """A `Selector`.

    Args:
        k: tokens a head reads in the layers that reuse, the newest among them.
        select: s, the first selection layer.
        reselect: c, the other one, or None. 13 for Llama 3 8B, 7 for Llama 2 7B, 2 being s; see `profile`.
        per: a choice for every query head, or for every key head.
    """

    k: int
    select: int = 2
    reselect: int | None = None
    per: Per = "head"

    def __post_init__(self):
        check_budget("Tidal", self.k)
        if self.select < 0 or (self.reselect is not None and self.reselect <= self.select):
            raise UserError(
                f"Tidal: select={self.select}, reselect={self.reselect}: layers count from 0, and the second selection "
                "lies above the first"
            )

    @property
    def selection(self) -> tuple[int, ...]:
        """The selection layers."""
        return (self.select,) if self.reselect is None else (self.select, self.reselect)

    def role(self, layer: int) -> Role:
        if layer < self.select:
            return "full"
        return "select" if layer in self.selection else "reuse"


def tidal(model: LayerStack, params: Any, selector: Tidal) -> tuple[LayerStack, Any]:
    """A trained decoder that decodes by TidalDecode, with the same parameters. Raises UserError as `gathered` does."""
    return gathered(model, params, selector)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TidalDecoding(LanguageModelling):
    """Language modelling with `decoded_loss` and `decoded_accuracy` in its evaluation: those of the tokens behind the
    first `prompt` of a row, decoded one by one by the selector. Trains as `LanguageModelling`."""

    selector: Tidal
    prompt: int

    def evaluate(self, params: Any, batch: Batch) -> Metrics:
        model, own = gathered(self.model, params, self.selector)
        decoded = Stepwise(model, prompt=self.prompt).evaluate(own, batch)
        named = {f"decoded_{name}": decoded[name] for name in ("loss", "accuracy")}
        return super().evaluate(params, batch) | named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looped(TidalDecoding):
    """The same for a model whose layers from `first` on are one layer of attention, looped, any of which can do the
    work: in every update about half of the loops, drawn anew, write nothing.

    Independently trained layers of a small model attend to different tokens, and the first one does all there is to do;
    then nothing depends on what later layers read. The tree has every layer, so that it is an ordinary model's; they
    begin equal and get the same gradients.
    """

    first: int = 0

    def init(self, key: jax.Array) -> Any:
        params = super().init(key)
        return params | dict.fromkeys(self._names, params[self._names[0]])

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> Metrics:
        layers = [params[name] for name in self._names]
        one = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *layers)
        draw, pick = jax.random.split(key)
        writes = jax.random.bernoulli(draw, shape=(len(layers),))
        writes = writes.at[jax.random.randint(pick, (), 0, len(layers))].set(True)
        looped = {name: muted(one, writes[i]) for i, name in enumerate(self._names)}
        return super().loss(params | looped, batch, key)

    @property
    def _names(self) -> list[str]:
        return [f"layer_{i}" for i in range(self.first, self.model.num_layers)]


def muted(layer: Any, writes: jax.Array | bool = False) -> Any:
    """The parameters of a layer whose attention adds nothing to the stream unless it `writes`."""
    output = jax.tree.map(lambda x: x * writes, layer["attention"]["output"])
    return layer | {"attention": layer["attention"] | {"output": output}}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Accuracy of a needle task by re-selection layer; `dense` is that of full attention."""

    selector: Tidal
    accuracy: dict[int, float]
    dense: float

    @property
    def best(self) -> Tidal:
        """The selector with the re-selection layer that found most; of equals, the lowest."""
        layer = max(self.accuracy, key=lambda c: (self.accuracy[c], -c))
        return dataclasses.replace(self.selector, reselect=layer)

    def save(self, path: str | Path) -> None:
        content = {"selector": "tidal", **dataclasses.asdict(self.best)}
        content["profile"] = {"dense": self.dense, "accuracy": {str(c): x for c, x in self.accuracy.items()}}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def profile(
    model: LayerStack,
    params: Any,
    selector: Tidal,
    data: Dataset,
    prompt: int,
    batch_size: int = 32,
    batches: int | None = None,
) -> Profile:
    """Tries every layer above `selector.select` as the re-selection layer, on rows whose first `prompt` tokens are
    given and whose rest is decoded (see `Stepwise`): one pass, or the first `batches`.

    Raises:
        UserError: no layer above `select` attends to all tokens, or as `gathered`.
    """
    blocks = [model.blocks[i % len(model.blocks)] for i in range(model.num_layers)]
    layers = [
        i
        for i in range(selector.select + 1, model.num_layers)
        if attends_to_all(blocks[i].attention, model.max_length)
    ]
    # With the last layer alone left to reuse, a choice there would be read by nobody.
    layers = layers[:-1]
    if not layers:
        raise UserError(
            f"{selector}: there is no layer between {selector.select} and the last to select again in"
        )

    def found(converted: LayerStack, own: Any) -> float:
        return measure(Stepwise(converted, prompt=prompt), own, data, batch_size, batches)["accuracy"]

    dense = found(*unscan_layers(model, params))
    accuracy = {
        layer: found(*gathered(model, params, dataclasses.replace(selector, reselect=layer)))
        for layer in layers
    }
    return Profile(selector, accuracy, dense)


def overlap(
    model: LayerStack, params: Any, tokens: jax.Array, prompt: int, k: int, per: Per = "head"
) -> np.ndarray:
    """How positions persist: float64 [layers, layers], the mean share of a layer's k best tokens among another's.

    tokens int32[B, T]: those behind the first `prompt` are asked, in the dense model. Rows and columns are the layers
    that attend to all tokens, ascending. Of random choices it is k / T.
    """
    batch, length = tokens.shape
    observed, own = gathered(model, params, Observer(k, per))
    variables, given = {"params": own}, jnp.full((batch,), prompt, jnp.int32)

    @jax.jit
    def choices(tokens: jax.Array) -> list[jax.Array]:
        _, _, fresh = observed.apply(variables, tokens[:, :prompt], given, method="prefill")
        cache = observed.init_cache(batch, length).commit(fresh, None, given)
        rest = tokens[:, prompt:]
        _, sown = observed.apply(variables, rest, cache, method="extend", mutable=["intermediates"])
        layers = (sown["intermediates"].get(f"layer_{i}", {}) for i in range(observed.num_layers))
        return [layer["choice"][0] for layer in layers if layer]

    found = [np.asarray(choice) for choice in choices(tokens)]
    shares = [[np.mean(_common(a, b) / (a >= 0).sum(-1)) for b in found] for a in found]
    return np.array(shares)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many of the chosen [..., K] of a are chosen in b, too."""
    return ((a[..., None] == b[..., None, :]) & (a[..., None] >= 0)).any(-1).sum(-1)


SELECTORS = {"tidal": Tidal, "every_layer": EveryLayer, "quest": Quest, "newest": Newest}


def parse_selector(text: str) -> Tidal | EveryLayer | Quest | Newest:
    """`tidal:k=256,select=2,reselect=7`, and so for the other `SELECTORS`; or the JSON file that `Profile.save` wrote.

    Raises UserError for an unknown name or field, or a value that is no number where one is expected.
    """
    if text.endswith(".json"):
        return _read(Path(text))
    name, _, rest = text.partition(":")
    fields = {}
    for part in filter(None, rest.split(",")):
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{text}: {part!r} is not of the form field=value")
        fields[field] = int(value) if value.removeprefix("-").isdecimal() else value
    return _make(text, name, fields)


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not a saved selector ({error})") from error
    if not isinstance(content, dict) or "selector" not in content:
        raise UserError(f"{path}: not a saved selector (no entry `selector`)")
    fields = {key: value for key, value in content.items() if key not in ("selector", "profile")}
    return _make(str(path), content["selector"], fields)


def _make(where: str, name: str, fields: dict[str, Any]) -> Any:
    if name not in SELECTORS:
        found = nearest(name, SELECTORS)
        hint = f"did you mean {found}?" if found else f"there are {', '.join(SELECTORS)}"
        raise UserError(f"{where}: no selector {name!r}; {hint}")
    known = {field.name: field for field in dataclasses.fields(SELECTORS[name])}
    for field, value in fields.items():
        if field not in known:
            found = nearest(field, known)
            hint = f"did you mean {found}?" if found else f"it has {', '.join(known)}"
            raise UserError(f"{where}: {name} has no {field!r}; {hint}")
        if field == "per" and value not in ("head", "group"):
            raise UserError(f"{where}: per={value}: head or group is expected")
        if field != "per" and not isinstance(value, int) and not (field == "reselect" and value is None):
            raise UserError(f"{where}: {field}={value}: a whole number is expected")
    if "k" not in fields:
        raise UserError(f"{where}: {name} needs k, the tokens that a head reads")
    return SELECTORS[name](**fields)
