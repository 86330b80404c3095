"""SCMoE: self-contrast of a mixture of experts (arXiv 2405.14507).

    model, params = self_contrast(model, params, weak=(1,), beta=0.5, alpha=0.1)
    Generator(model, params).generate(["def main("])

The model reads every token twice. The strong pass routes as it was trained (top-k, gates renormalised). The weak pass
sends each token, in every layer, to an expert it would not have chosen: the one of rank j alone with weight 1
("rank-j", the second by default), or one at random ("random-1"). What the strong pass likes more than the weak one is
what the right experts contribute, and is amplified (equations 3 to 5, `research.decoding.guidance.contrast`):

    z = (1 + beta) z_strong - beta z_weak   on {i: z_strong[i] >= max z_strong + log alpha}

Shared experts work in both passes. The two passes are at odds about keys and values from the second layer on, so each
has its own cache. The weak pass never drops a token, whatever the capacity in training: routing by rank is far from
balanced. The released code forbids the end token by default; here it ends a sequence as in plain decoding.
"""

from typing import Any, Literal

import jax

from research.decoding.guidance.contrast import Contrasted, contrasted
from research.errors import UserError
from research.moe.layer import MoE
from research.moe.routing import Ranks
from research.nn.transformer import LayerStack


def with_ranks(model: LayerStack, ranks: Ranks) -> LayerStack:
    """The same model, whose every MoE layer sends a token to the experts of these ranks (0 is the best).

    Raises `UserError` if the model has no MoE layer, or one with fewer experts than a rank needs.
    """
    blocks = getattr(model, "blocks", ())
    layers = [block.mlp for block in blocks if isinstance(getattr(block, "mlp", None), MoE)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no MoE layer: there are no experts to contrast")
    fewest = min(layer.num_experts for layer in layers)
    if ranks != "random" and not (ranks and all(0 <= rank < fewest for rank in ranks)):
        raise UserError(f"ranks {ranks}: with {fewest} experts, ranks from 0 to {fewest - 1} are expected")
    return model.clone(
        blocks=tuple(
            block.clone(mlp=block.mlp.clone(ranks=ranks, capacity_factor=None))
            if isinstance(block.mlp, MoE)
            else block
            for block in model.blocks
        )
    )


def self_contrast(
    model: LayerStack,
    params: Any,
    *,
    weak: tuple[int, ...] | Literal["random"] = (1,),
    strong: tuple[int, ...] | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    seed: int = 0,
) -> tuple[Contrasted, dict[str, Any]]:
    """A trained MoE and its parameters that decode by self-contrast.

    Args:
        weak: ranks of the weak pass, from 0: (1,) is the paper's rank-2. "random" is its random-1, drawn by `seed`,
            layer and place.
        strong: ranks of the strong pass; None: those the model was trained with. (0, 1, 2) is a top-3 strong pass.
        beta, alpha: see `research.decoding.guidance.contrast.contrasted`.

    Raises:
        UserError: as `with_ranks` and `contrasted`.
    """
    return contrasted(
        model if strong is None else with_ranks(model, strong),
        with_ranks(model, weak),
        params,
        beta=beta,
        alpha=alpha,
        rngs={"routing": jax.random.key(seed)} if weak == "random" else None,
    )
