"""capture is the inverse of build, and says what it can't describe."""

import dataclasses
import functools

import pytest
from flax import linen as nn

from research.config import build, from_json, of, to_json
from research.config_capture import capture
from research.elastic.matformer import MatFormer
from research.elastic.slicing import ElasticSpec, slice_model
from research.language.decoder import DecoderLM
from research.nn.attention import Attention
from research.nn.masks import Causal, Window
from research.nn.mlp import GatedMLP
from research.nn.norm import LayerNorm, RMSNorm
from research.nn.rotary import Llama3Scaling, Rotary
from research.nn.transformer import Block
from research.training.task import LanguageModelling


def model(**attention) -> DecoderLM:
    block = Block(
        Attention(num_heads=2, head_dim=4, rotary=Rotary(500.0, Llama3Scaling(4.0)), **attention),
        GatedMLP(16),
    )
    windowed = block.clone(
        attention=block.attention.clone(rule=Window((2, 3), sinks=1)), norm=LayerNorm(1e-5)
    )
    return DecoderLM(blocks=(block, windowed), num_layers=4, vocab_size=9, width=8, max_length=16)


@pytest.mark.parametrize(
    "value",
    [
        Causal(),
        Window((1, 2)),
        RMSNorm(1e-5, unit_offset=True),
        model(query_norm=RMSNorm()),
        MatFormer(LanguageModelling(model()), divisors=(2, 1), loss_weights=(0.5, 1.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_build_gives_an_equal_object_even_through_json(value):
    config = capture(value)
    assert build(config) == value
    assert build(from_json(to_json(config))) == value


def test_defaults_are_left_out_and_the_rest_is_what_of_writes():
    assert capture(GatedMLP(16)) == of(GatedMLP, hidden_dim=16)
    assert capture(GatedMLP(16, "silu", False)) == of(GatedMLP, hidden_dim=16)
    assert capture(GatedMLP(16, "relu")) == of(GatedMLP, hidden_dim=16, activation="relu")
    # The model's own default holds a module, the block's does too.
    assert set(capture(model())) == {"cls", "blocks", "num_layers", "vocab_size", "width", "max_length"}


def test_a_sliced_model_has_a_config():
    small = slice_model(model(), ElasticSpec((0, 2, 3), (4, 8, 16)))
    config = capture(small)
    assert [block.mlp.hidden_dim for block in config.blocks] == [4, 8, 16]
    assert build(config) == small


def test_a_bound_module_is_captured_without_its_parent_and_name():
    assert capture(GatedMLP(16, parent=None, name="mlp")) == of(GatedMLP, hidden_dim=16)


@dataclasses.dataclass(frozen=True)
class Holder:
    value: object
    table: dict = dataclasses.field(default_factory=dict)
    derived: int = dataclasses.field(default=3, init=False)


def test_containers_and_derived_fields():
    holder = Holder((1, [Causal()]), {"a": Window(3)})
    config = capture(holder)
    assert "derived" not in config and "table" not in capture(Holder(1))
    assert build(config) == holder


@pytest.mark.parametrize("value", [3, {"a": 1}, GatedMLP, len], ids=["number", "dict", "class", "function"])
def test_what_has_no_config_is_refused(value):
    with pytest.raises(TypeError, match="is not a module or a dataclass: it has no config"):
        capture(value)


def test_a_partial_is_refused():
    with pytest.raises(TypeError, match="a partial of .*silu.* has no config"):
        capture(Holder(functools.partial(nn.silu)))
