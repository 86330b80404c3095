"""Sparse attention with the other parts."""

from research.nn.masks import Window
from research.sparse.tidal import Tidal, tidal

from .cells import decoder, drafted_as_plain, init, louder, refused, runs
from .moe import momentum

# Tokens chosen by one layer for the layers above.


@runs(
    "TidalDecode",
    "MomentumSMoE, tree decoding with virtual rows (Hidden Transfer)",
    "every node chooses for itself, among slots and ancestors: the tokens of plain sparse decoding",
)
def _(_):
    drafted_as_plain("Hidden Transfer", *tidal(momentum(), louder(init(momentum())), Tidal(3, select=0)))


@refused("TidalDecode", "windows in all layers", "none attend to all tokens")
def _(_):
    model = decoder((Window(4),))
    tidal(model, init(model), Tidal(3, select=0))
