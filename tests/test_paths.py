import pytest

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.paths import expand
from research.training.checkpoint_files import local_directory


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x" and str(expand("a/~")) == "a/~"


@pytest.mark.parametrize("read", [expand, local_directory, Tokenizer.load])
def test_a_home_that_nobody_knows_is_told(read):
    with pytest.raises(UserError, match="no home folder of ~nobody-here is known"):
        read("~nobody-here/x")
