import pytest

from research.errors import UserError, nearest


def test_message_is_one_line():
    assert str(UserError("first\n  second\tthird ")) == "first second third"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("num_layres", ["num_heads", "num_layers", "width"], "num_layers"),
        ("Train", ["train", "test"], "train"),
        ("zzz", ["train", "test"], None),
        ("ab", ["ax", "ay"], None),  # ratio 2 * 1 / 4 = 0.5 is below the cutoff of 0.6
        ("abc", ["abz", "aby"], "aby"),  # equal ratios 2 * 2 / 6: alphabetical order decides
        ("x", [], None),
    ],
)
def test_nearest(name, options, expected):
    assert nearest(name, options) == expected
    assert nearest(name, reversed(options)) == expected
