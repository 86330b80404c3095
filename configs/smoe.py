"""SMoE: a decoder whose FFNs are sparse mixtures of experts, top-2 of 8 (arXiv 2401.04088).

    python -m experiments.train --config=configs/smoe.py:tiny --workdir=runs/smoe

`tiny` (the default): 3.9M parameters, 1.6M of them active for a token, on Python's standard library. On two cores that
were busy with other work, 200 of its 600 steps took about four minutes and reached 4.93 nats on held-out text; how far
all of them get was not measured.
`paper`: the architecture of Mixtral 8x7B, for accelerators; its training recipe is not published, so the optimizer is
that of `matlm.py`. Experts lie on the `expert` axis of the mesh.

Any other model becomes a mixture the same way: its FFN is `of(MoE, num_experts=8, k=2, hidden_dim=...)`, see
docs/moe.md.
"""

from functools import partial

from ml_collections import ConfigDict

from configs.matlm import decoder, experiment
from research.config import of
from research.moe.layer import MoE
from research.nn.rotary import Rotary
from research.training.optimizers import adamw, cosine, muon, wsd
from research.training.stages import Stage
from research.training.task import LanguageModelling

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset == "tiny":
        experts = partial(of, MoE, num_experts=8, k=2, balance_weight=0.01, z_weight=1e-3)
        optimizer = of(muon, schedule=of(wsd, peak=1e-2, warmup=50, decay=0.3, floor=0.02))
        return experiment(
            of(LanguageModelling, model=decoder(128, 4, 4, 256, 256, mlp=experts)),
            of(Stage, name="pretrain", steps=600, batch_size=16, optimizer=optimizer),
            dict(every=200, batches=8),
            checkpoint_every=200,
        )
    # Mixtral's coefficient of 0.02 is of a loss that is k in balance; this one is 1.
    experts = partial(of, MoE, num_experts=8, k=2, balance_weight=0.04)
    heads = dict(num_kv_heads=8, rotary=of(Rotary, base=1e6))
    model = decoder(4096, 32, 32, 14336, 32768, vocab_size=32000, mlp=experts, **heads)
    optimizer = of(adamw, schedule=of(cosine, peak=1e-3, warmup=4000, floor=0.1), weight_decay=0.01)
    return experiment(
        of(LanguageModelling, model=model, compute_dtype="bfloat16"),
        of(Stage, name="pretrain", steps=75_000, batch_size=128, optimizer=optimizer),
        dict(every=1000),
        mesh=dict(data=-1, expert=8),
        checkpoint_every=1000,
    )
