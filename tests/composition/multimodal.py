"""Models that read images, with the other parts."""

import jax
import jax.numpy as jnp
import numpy as np

from research.data.shapes import vocabulary
from research.decoding.generator import Generator
from research.decoding.prepare import prepare
from research.decoding.proposers import Target
from research.moe.layer import MoE
from research.multimodal.arcana import Arcana, LadderProjection, MMLoRA, ModalityLoRA, QLadder, Rung
from research.multimodal.connectors import ShuffledProjection
from research.multimodal.contrastive import TextTower, TowerPair, WithText
from research.multimodal.dragonfly import Zooms, ZoomSelection
from research.multimodal.emma import EarlyFusion
from research.multimodal.ep_alm import EPALM, LateToken, SoftPrompt
from research.multimodal.eve import EVE, AnyAspect, PatchEmbeddingLayer, SequenceProjection
from research.multimodal.heads import ClassHead
from research.multimodal.hovle import HolisticEmbedding, HoVLE, PatchEmbedding, Tiles
from research.multimodal.iaa import IAA, InsertedLayers
from research.multimodal.inf_llava import BlocksAndStrides, DualPerspective
from research.multimodal.llava_uhd import Slices, WindowResampler
from research.multimodal.media import Square
from research.multimodal.meta_transformer import Encoder, MetaTransformer, Modality
from research.multimodal.mousi import ExpertFusion, Experts, Panel
from research.multimodal.mplug_video import Abstractor
from research.multimodal.prompts import Prompts
from research.multimodal.tokenize.grids import GridTokens
from research.multimodal.tokenize.symbols import TableTokens
from research.multimodal.video import Frames
from research.multimodal.zipper import Streams, Zipper
from research.nn.attention import Attention
from research.nn.masks import Full, Window
from research.nn.mlp import MLP
from research.nn.norm import LayerNorm
from research.nn.quantized import quantize, quantize_kernels
from research.nn.rotary import Rotary
from research.nn.transformer import Block
from research.nn.weights import Weight, materialize
from research.ssm.mamba2 import Mamba2
from research.ssm.mmmamba import graft, seed_mixers, student_model
from tests.multimodal.toys import WIDTH, decoder, image, tower, video_tower, vlm
from tests.programs import call, drawn, drawn_like

from .cells import DRAFTERS, KEY, louder, refused, runs

TOKENS = jnp.zeros((1, 2), jnp.int32)


def asked(model):
    """Two prompts of unequal lengths, one with two images."""
    prompts = [
        ("<image> what is <image>", [image(1), image(2)]),
        ("describe the picture <image>", [image(3)]),
    ]
    return Prompts.of(prompts, model.planner, vocabulary())


def drafted_as_plain(name, model, params, prompts=None):
    """The drafter's output is that of plain decoding, for prompts with images."""
    drafter, target = DRAFTERS[name], Target(*reversed(prepare(model, params)))
    own = drawn_like(lambda: drafter.create(KEY, target))
    prompts = asked(model) if prompts is None else prompts
    options = dict(max_new_tokens=10, beside=prompts.beside)
    plain = Generator(model, params).generate(prompts.tokens, **options)
    drafted = Generator(model, params, proposer=drafter, proposer_params=own)
    assert drafted.generate(prompts.tokens, **options).samples == plain.samples


def inner_adaptor():
    model = vlm(IAA, hooks=(InsertedLayers(decoder().blocks[0], (0, 1)),))
    return model, louder(drawn(model, TOKENS))


@runs(
    "IAA",
    "tree decoding (Medusa), prompts with images",
    "inserted layers keep the accepted path in caches of their own: the tokens of plain decoding",
)
def _(_):
    drafted_as_plain("Medusa", *inner_adaptor())


@runs(
    "eP-ALM",
    "tree decoding (Medusa), prompts with images",
    "upper layers have a row more than those below: the tokens of plain decoding",
)
def _(_):
    hook = LateToken(start=1, stop=2, levels=1, num_layers=2)
    parts = dict(tower=tower(class_token=True, norm_all=True), connector=SoftPrompt(2, WIDTH), hooks=(hook,))
    model = vlm(EPALM, Square(patch=4, side=8, count=2), **parts)
    drafted_as_plain("Medusa", model, louder(drawn(model, TOKENS)))


@runs(
    "Arcana",
    "int4 weights, tree decoding (Medusa), prompts with images",
    "modality LoRA on a frozen decoder in int4: the tokens of plain decoding",
)
def _(_):
    ladder = QLadder(Rung(2, MLP(16)), rungs=1, queries=2)
    model = vlm(Arcana, Square(patch=4, side=8, count=6), connector=LadderProjection(ladder, WIDTH))
    params = louder(drawn(model, TOKENS))
    installed = MMLoRA(vision_rank=2, language_rank=2).install(params["decoder"], KEY)

    def coded(node):
        if not isinstance(node, ModalityLoRA):
            return node
        filled = jax.tree.map(lambda x: x + 0.2 * (x == 0).all(), node)
        return filled.replace(base=quantize(node.base, 4, 4))

    decoder_ = jax.tree.map(coded, installed, is_leaf=lambda node: isinstance(node, ModalityLoRA))
    drafted_as_plain("Medusa", model, params | {"decoder": decoder_})


@runs(
    "HoVLE",
    "tree decoding (Medusa), prompts with images",
    "behind a module that reads more patches than the decoder has rows: the tokens of plain decoding",
)
def _(_):
    model = monolith("post")
    drafted_as_plain("Medusa", model, louder(drawn(model, TOKENS)))


@runs(
    "HoVLE",
    "mmMamba, tree decoding (Medusa)",
    "module and decoder as states but for one layer of attention: the tokens of plain decoding",
)
def _(_):
    teacher = monolith("pre")
    params = louder(drawn(teacher, TOKENS))
    student = student_model(teacher, "tail", 3)
    drafted_as_plain("Medusa", student, graft(params, seed_mixers(student, teacher, params, KEY)))


def monolith(shuffle):
    """A HoVLE with a module of one layer."""
    holistic = HolisticEmbedding(blocks=decoder().blocks, num_layers=1)
    parts = dict(tower=PatchEmbedding(WIDTH, 4), connector=ShuffledProjection(WIDTH), holistic=holistic)
    return vlm(HoVLE, Tiles(patch=2, side=8, most=2), **parts, shuffle=shuffle)


@runs(
    "Zipper",
    "tree decoding (Medusa), text beside speech",
    "the accepted path joins the tower's cache and what the other tower reads of it: the tokens of plain decoding",
)
def _(_):
    model = Zipper(decoder(), decoder(), every=(2, 2), num_heads=2, head_dim=4)
    spoken = [
        [("speech", [1, 5, 9, 2]), ("text", [1])],
        [("text", [1, 3, 2]), ("speech", [1, 2]), ("text", [1, 4])],
    ]
    drafted_as_plain("Medusa", model, louder(drawn(model, TOKENS)), Streams.of(spoken, "text"))


@refused("MouSi", "shared positions in windowed layers", "a window counts tokens by their positions")
def _(_):
    planner = Experts(patch=4, side=8, counts=(4,), share="image")
    parts = dict(tower=Panel((tower(),)), connector=ExpertFusion(WIDTH, (1,)))
    vlm(planner=planner, rule=Window(4), **parts).init_cache(1, 16)


def multiplied_out(params):
    """Arrays in place of structured kernels."""
    return jax.tree.map(
        lambda x: materialize(x) if isinstance(x, Weight) else x,
        params,
        is_leaf=lambda x: isinstance(x, Weight),
    )


def quantized_like_multiplied_out(model):
    """With every kernel in int4, the image's rows are those of the kernels multiplied out."""
    params = quantize_kernels(drawn(model, TOKENS), lambda kernel: quantize(kernel, 4, 4))
    whole = multiplied_out(params)
    assert jax.tree.structure(whole) != jax.tree.structure(params)
    (seen,) = asked(model).beside(32)
    (_, one), (_, other) = (call(model, p, seen.media, method="see") for p in (params, whole))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # sums of at most 64 terms of order 1


@runs(
    "INF-LLaVA",
    "int4 weights",
    "in tower and connector: the image's rows are those of the kernels multiplied out",
)
def _(_):
    planner = BlocksAndStrides(patch=2, side=4, parts=2)
    connector = DualPerspective(WIDTH, 2, 2)
    quantized_like_multiplied_out(vlm(planner=planner, tower=tower(width=64), connector=connector))


@runs("EMMA", "int4 weights", "token mixing too: the image's rows are those of the kernels multiplied out")
def _(_):
    block = Block(Attention(2, 4, use_bias=True, output_bias=True), MLP(16), LayerNorm())
    size = dict(vocab_size=vocabulary().vocab_size, width=8, context=12, end=vocabulary().eos_id)
    towers = TowerPair(tower(), TextTower(blocks=(block,), num_layers=1, **size))
    planner = WithText(patch=4, side=8, context=12)
    quantized_like_multiplied_out(vlm(planner=planner, tower=towers, connector=EarlyFusion(WIDTH)))


@runs(
    "Meta-Transformer",
    "int4 weights",
    "of the encoder that all share: what every head says is that of the kernels multiplied out, and tokenizers learn",
)
def _(_):
    attention = Attention(2, 4, rule=Full(), use_bias=True, output_bias=True)
    encoder = Encoder(blocks=(Block(attention, MLP(16), LayerNorm()),), num_layers=1)
    tokens = {"image": GridTokens(8, (4, 4, 1), (2, 2), (2, 2)), "table": TableTokens(8, 3)}
    model = MetaTransformer(encoder, {name: Modality(t, ClassHead(2)) for name, t in tokens.items()})
    params = drawn(model, TOKENS)
    params |= {"encoder": quantize_kernels(params["encoder"], lambda kernel: quantize(kernel, 4, 4))}
    random = np.random.default_rng(0)
    records = {
        "image": {"images": random.standard_normal((2, 4, 4, 1), np.float32)},
        "table": {"numbers": random.standard_normal((2, 3), np.float32)},
    }
    one, other = (call(model, p, records) for p in (params, multiplied_out(params)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), one, other)
    own = {name: params[name] for name in tokens}

    def said(own):
        return sum(jnp.sum(x**2) for x in model.apply({"params": params | own}, records).values())

    gradients = jax.jit(jax.grad(said))(own)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@runs(
    "mPLUG-video",
    "int4 weights",
    "in attention over time, in frames and in the abstractor: the rows are those of the kernels multiplied out",
)
def _(_):
    planner = Frames(patch=4, side=8, frames=2, count=3)
    parts = dict(tower=video_tower(frames=2), connector=Abstractor(3, WIDTH, 2, 16))
    quantized_like_multiplied_out(vlm(planner=planner, **parts))


def with_experts():
    """A decoder whose FFNs are mixtures of experts."""
    attention = Attention(2, 4, rotary=Rotary())
    mixture = MoE(num_experts=2, k=1, hidden_dim=8)
    return decoder().clone(blocks=(Block(attention, mixture),), num_layers=1)


def gradients_reach(model, *parts):
    """All of these parts get a gradient from the logits."""
    params, prompts = drawn(model, TOKENS), asked(model)
    (seen,) = prompts.beside(max(map(len, prompts.tokens)))
    tokens = jnp.zeros(seen.slot.shape, jnp.int32)
    gradients = jax.jit(
        jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, tokens, seen)))),
    )(params)
    for part in parts:
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[part]))


@runs("LLaVA-UHD", "mixture of experts", "tower and connector learn through a decoder of experts")
def _(_):
    planner = Slices(patch=4, side=8, most=3, queries=1)
    connector = WindowResampler(1, WIDTH, 2)
    model = vlm(planner=planner, tower=tower(flexible=True), connector=connector)
    gradients_reach(model.clone(decoder=with_experts()), "connector")


@runs("EVE", "mixture of experts", "the patch layers learn through a decoder of experts")
def _(_):
    layer = PatchEmbeddingLayer(8, num_heads=2)
    model = vlm(EVE, AnyAspect(patch=2, side=8), tower=layer, connector=SequenceProjection(WIDTH))
    gradients_reach(model.clone(decoder=with_experts()), "tower", "connector")


@runs("Dragonfly", "Mamba-2 layers", "its tokens and line breaks are read by a decoder without attention")
def _(_):
    block = Block(Mamba2(num_heads=2, head_dim=4, state_dim=4, chunk=8), None)
    model = vlm(planner=Zooms(patch=2, side=4, keep=1), tower=tower(class_token=True))
    model = model.clone(
        decoder=decoder().clone(blocks=(block,), num_layers=1, max_length=256),
        connector=ZoomSelection(WIDTH, 1),
    )
    gradients_reach(model, "connector")
