"""State-space layers with the other parts."""

from research.moe.layer import MoE
from research.nn.attention import Attention
from research.nn.mlp import GatedMLP
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.ssm.mamba2 import Mamba2
from research.ssm.mmmamba import graft, seed_mixers, student_model

from .cells import HIDDEN, KEY, NESTED, decoder, drafted_as_plain, init, louder, nested, runs


def hybrid(experts=False):
    """Mamba-2, then attention; the FFN above the state is dense or a mixture."""
    mamba = Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=4)
    sparse = MoE(num_experts=4, k=2, hidden_dim=HIDDEN, dispatch="dense") if experts else GatedMLP(HIDDEN)
    attention = Attention(num_heads=2, head_dim=4, rotary=Rotary())
    return decoder(blocks=(Block(mamba, sparse), Block(attention, GatedMLP(HIDDEN))))


for _name in ("Medusa", "Hidden Transfer"):  # nodes of a tree; rows that join between the layers

    @runs(
        "Mamba-2 hybrid",
        f"tree decoding ({_name})",
        "the state advances along the accepted path alone: the tokens of plain decoding",
    )
    def _(_, name=_name):
        drafted_as_plain(name, hybrid(), louder(init(hybrid())))


@runs("Mamba-2 hybrid", "mixture of experts, MatFormer", NESTED)
def _(_):
    nested(hybrid(experts=True))


@runs(
    "mmMamba",
    "tree decoding (Medusa), mixture of experts",
    "a hybrid student of a teacher with experts: the tokens of plain decoding, and its FFNs are the teacher's arrays",
)
def _(_):
    sparse = MoE(num_experts=4, k=2, hidden_dim=HIDDEN, dispatch="dense")
    attention = Attention(num_heads=2, head_dim=4, num_kv_heads=1, rotary=Rotary())
    teacher = decoder(blocks=(Block(attention, sparse),), num_layers=2)
    params = louder(init(teacher))
    student = student_model(teacher, "tail", 2)
    made = graft(params, seed_mixers(student, teacher, params, KEY))
    assert made["layer_0"]["mlp"] is params["layer_0"]["mlp"] and made["layer_1"] is params["layer_1"]
    drafted_as_plain("Medusa", student, made)
