"""Images from a language model: a decoder over discrete codes (VQGAN's second stage, arXiv 2012.09841; LlamaGen,
arXiv 2406.06525).

    loaded = load_model("runs/sjd")
    artist = Artist(loaded.model, loaded.params, Codebook.load(), rows=16, columns=16, guidance=2.0)
    artist.draw([0, 1, 2], sampling=Sampling(temperature=1.0)).images

The vocabulary is that of `research.data.codes.CodeDataset`: codes, then classes, then the token of no class. A prompt
is one class token, and the output the codes of one image in raster order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.codes import Codebook
from research.decoding.generator import Generator, Stats
from research.decoding.guidance.classifier_free import guided
from research.decoding.proposers import Proposer
from research.decoding.sampling import Sampling
from research.errors import UserError
from research.nn.transformer import LayerStack


@dataclasses.dataclass(frozen=True)
class Drawing:
    """images f32[n, rows * patch, columns * patch, c] in [-1, 1]; codes int32[n, rows, columns]; what it took."""

    images: np.ndarray
    codes: np.ndarray
    stats: Stats


class Artist:
    """Draws images of given classes.

    Args:
        model, params: a decoder trained on a `CodeDataset`.
        codebook: of that dataset.
        rows, columns: of an image in codes.
        guidance: scale of classifier-free guidance, or None for the conditional model as it is. It needs a model
            that was trained with `CodeDataset.drop` above 0.
        proposer: what drafts, such as `SJD`; plain decoding by default.

    Raises:
        UserError: a vocabulary without room for a class and the token of no class, or a context too short.
    """

    def __init__(
        self,
        model: LayerStack,
        params: Any,
        codebook: Codebook,
        *,
        rows: int,
        columns: int,
        guidance: float | None = None,
        proposer: Proposer | None = None,
    ):
        if model.vocab_size < codebook.size + 2:
            raise UserError(
                f"a vocabulary of {model.vocab_size} holds no classes beside the {codebook.size} codes of the codebook"
            )
        if model.max_length < rows * columns + 1:
            raise UserError(
                f"{rows} x {columns} codes and a class need a context of {rows * columns + 1}, not {model.max_length}"
            )
        self.codebook, self.rows, self.columns = codebook, rows, columns
        none = model.vocab_size - 1
        self.num_classes = none - codebook.size
        if guidance is not None:
            model, params = guided(
                model, params, guidance, conditions=(codebook.size, none), unconditional=none
            )
        self._generator = Generator(model, params, proposer=proposer)

    def draw(self, labels: Sequence[int], *, sampling: Sampling, seed: int = 0) -> Drawing:
        """One image for every label; tokens of classes are never sampled. Image i depends on the seed and on i.

        Raises:
            UserError: an unknown class.
        """
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise UserError(f"class {label}: the model knows 0 to {self.num_classes - 1}")
        first = self.codebook.size
        classes = range(first, first + self.num_classes + 1)
        result = self._generator.generate(
            [[first + label] for label in labels],
            max_new_tokens=self.rows * self.columns,
            sampling=dataclasses.replace(sampling, banned=(*sampling.banned, *classes)),
            seed=seed,
        )
        codes = np.asarray([sample.tokens for sample in result.samples], np.int32)
        codes = codes.reshape(-1, self.rows, self.columns)
        return Drawing(self.codebook.decode(codes), codes, result.stats)
