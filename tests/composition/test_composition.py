"""Which system works with what: every cell of docs/composition.md is a function here that runs.

The cells are in the files beside this one, a family each. A later system adds its own with `runs` or `refused` and
writes the page again:

    python -m tests.composition.test_composition
"""

from pathlib import Path

import pytest

from research.errors import UserError

from . import (  # noqa: F401  (they fill CELLS)
    adapters,
    chains,
    compressed,
    decoding,
    elastic,
    moe,
    multimodal,
    quantized,
    spans,
    sparse,
    ssm,
    vision,
)
from .cells import CELLS, PAGE, Cell, page, write


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again as the docstring of this file says"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.system}-{cell.part}".replace(" ", "_"))
def test_cell(cell: Cell, tmp_path: Path):
    if cell.because is None:
        cell.check(tmp_path)
        return
    with pytest.raises(UserError) as error:
        cell.check(tmp_path)
    assert cell.because in str(error.value)


if __name__ == "__main__":
    write()
