"""Text and tables: what is looked up, and numbers with a column of their own (arXiv 2307.10802)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.multimodal.tokenize.contract import Tokens
from research.nn.linear import Embedding, parameter


class TextTokens(nn.Module):
    """Ids int32[length] -> embeddings, filled with zeros where they are narrower than D.

    Args:
        width: D.
        length: tokens of a record.
        vocab_size, features: of the embedding table.

    Parameters: embedding/table [vocab_size, features].
    """

    width: int
    length: int
    vocab_size: int
    features: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.features <= self.width:
            raise UserError(
                f"TextTokens: features={self.features}: from 1 to width={self.width} are expected"
            )

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": jax.ShapeDtypeStruct((self.length,), jnp.int32)}

    @property
    def count(self) -> int:
        return self.length

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        x = Embedding(self.vocab_size, self.features, init_stddev=1.0, name="embedding")(record["tokens"])
        return Tokens(jnp.pad(x, ((0, 0), (0, 0), (0, self.width - self.features))))


class TableTokens(nn.Module):
    """A token a column: v_j W_j + b_j of a number, a row of the column's own table of a category.

    Args:
        width: D.
        numbers: columns of numbers, `numbers` f32[numbers].
        categories: how many values each column of categories has, `categories` int32[len(categories)] from 0 on. One
            that its column has not is a UserError, and a token of NaN where values are traced, never a row of another
            column's.

    Parameters: slopes, offsets [numbers, D]; categories_table/table [sum(categories), D].
    """

    width: int
    numbers: int
    categories: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError("TableTokens: numbers=0 and no categories: at least one column is expected")

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {}
        if self.numbers:
            spec["numbers"] = jax.ShapeDtypeStruct((self.numbers,), jnp.float32)
        if self.categories:
            spec["categories"] = jax.ShapeDtypeStruct((len(self.categories),), jnp.int32)
        return spec

    @property
    def count(self) -> int:
        return self.numbers + len(self.categories)

    @nn.compact
    def __call__(self, record: Mapping[str, jax.Array]) -> Tokens:
        columns = []
        if self.numbers:
            init, shape = nn.initializers.normal(1.0), (self.numbers, self.width)
            numbers = record["numbers"][..., None]
            slopes, offsets = (parameter(self, name, init, shape) for name in ("slopes", "offsets"))
            columns.append(numbers * slopes.astype(numbers.dtype) + offsets.astype(numbers.dtype))
        if self.categories:
            starts = np.cumsum((0, *self.categories[:-1]))
            table = Embedding(sum(self.categories), self.width, init_stddev=1.0, name="categories_table")
            value = record["categories"]
            known = (value >= 0) & (value < np.asarray(self.categories))
            if not isinstance(known, jax.core.Tracer) and not known.all():
                row, column = np.argwhere(~np.asarray(known))[0]
                raise UserError(
                    f"TableTokens: category {value[row, column]} in column {column}, which has 0 to "
                    f"{self.categories[column] - 1}"
                )
            columns.append(jnp.where(known[..., None], table(value + starts), jnp.nan))
        return Tokens(jnp.concatenate(columns, axis=1))
