"""Generated records and tables: what is promised of every one, and what makes their labels true."""

import numpy as np
import pytest

from research.data.generated import Gaits, Motions, Seasons, Solids
from research.data.graphs import FAMILIES, Graphs, laplacian_identifiers
from research.data.packages import PACKAGES, PackageWindows
from research.data.tables import Table
from research.data.together import InMemory, SideBySide
from research.errors import UserError

KINDS = [Solids, Seasons, Gaits, Motions, Graphs]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_records_are_functions_of_their_numbers(kind):
    data = kind(size=8)
    one, again = data.take(np.array([3, 5])), data.take(np.array([5, 11]))
    assert all(np.array_equal(one[k][1], again[k][0]) for k in one)
    assert all(np.array_equal(one[k][0], again[k][1]) for k in one)  # the next epoch's record 3
    spec = data.element_spec()
    assert {k: (x.shape[1:], x.dtype) for k, x in one.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    other = kind(size=8, split="test").take(np.arange(2))
    assert not all(np.array_equal(other[k], data.take(np.arange(2))[k]) for k in one)
    with pytest.raises(UserError, match="the splits are train, validation, test, not 'tests'"):
        kind(split="tests")


def test_solids_lie_on_their_surfaces():
    from research.data.generated import SOLIDS

    random = np.random.RandomState(0)
    points = {name: make(random, 200) for name, make in SOLIDS.items()}
    assert {len(x) for x in points.values()} == {200}
    np.testing.assert_allclose(np.linalg.norm(points["sphere"], axis=1), 1.0)
    np.testing.assert_allclose(np.abs(points["cube"]).max(axis=1), 0.8)
    x, y, z = points["torus"].T
    np.testing.assert_allclose((np.hypot(x, y) - 0.75) ** 2 + z**2, 0.09)


def test_a_graph_has_as_many_edges_as_its_family_says():
    batch = Graphs(size=64).take(np.arange(64))
    nodes, edges = batch["node_mask"].sum(axis=1), batch["edge_mask"].sum(axis=1)
    rings = batch["labels"] < 2
    assert np.array_equal(edges, np.where(rings, nodes, nodes - 1)) and set(batch["labels"]) == {0, 1, 2, 3}
    for label, count, mask, pairs in zip(
        batch["labels"], nodes, batch["edge_mask"], batch["edges"], strict=True
    ):
        degrees = np.bincount(pairs[mask].reshape(-1), minlength=count)
        # Connected parts: repeat the smallest number of a node among its neighbours.
        parts = np.arange(count)
        for _ in range(count):
            for u, v in pairs[mask]:
                parts[u] = parts[v] = min(parts[u], parts[v])
        assert len(set(parts)) == (2 if FAMILIES[label] == "two rings" else 1)
        if label < 2:
            assert set(degrees) == {2}
        if FAMILIES[label] == "star":
            assert sorted(degrees) == [1] * (count - 1) + [count - 1]


def test_identifiers_by_hand():
    # Two nodes and an edge: eigenvalues 0 of (1, 1) and 2 of (1, -1).
    found = laplacian_identifiers(2, np.array([[0, 1]]), 3)
    np.testing.assert_allclose(np.abs(found), [[0.5**0.5, 0.5**0.5, 0]] * 2, atol=1e-6)
    assert found[0, 0] * found[1, 0] > 0 > found[0, 1] * found[1, 1]


def test_what_is_forecast_comes_next():
    data = Seasons(size=4, noise=0.0, length=24, horizon=24)
    batch = data.take(np.arange(4))
    hour = np.rint((batch["calendar"][..., 0] + 0.5) * 23)
    assert np.array_equal((hour[:, 1:] - hour[:, :-1]) % 24, np.ones((4, 23)))
    # Without noise, and but for a weekend, a day is the next one up to the yearly wave.
    weekday = np.rint((batch["calendar"][..., 1] + 0.5) * 6)
    for values, targets, days in zip(batch["values"], batch["targets"], weekday, strict=True):
        if days.max() < 4 and days.min() >= 0 and days[0] <= days[-1]:
            np.testing.assert_allclose(values, targets, atol=0.1)


@pytest.mark.parametrize(("source", "rows", "columns"), [("wine", 178, 13), ("breast_cancer", 569, 30)])
def test_tables_are_divided_once(source, rows, columns):
    parts = [Table(source, split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == rows
    training = parts[0].take(np.arange(len(parts[0])))
    np.testing.assert_allclose(training["numbers"].mean(axis=0), np.zeros(columns), atol=1e-5)
    np.testing.assert_allclose(training["numbers"].std(axis=0), np.ones(columns), atol=1e-5)
    order = (
        Table(source).take(np.arange(5))["numbers"],
        Table(source).take(np.arange(5) + len(parts[0]))["numbers"],
    )
    assert not np.array_equal(*order)
    with pytest.raises(UserError, match="no source 'wines'; did you mean wine"):
        Table("wines")


def test_a_table_with_a_category_and_a_number_to_be_told():
    batch = Table("diabetes").take(np.arange(32))
    assert batch["numbers"].shape == (32, 9) and set(batch["categories"][:, 0]) == {0, 1}
    assert batch["targets"].shape == (32, 1) and "labels" not in batch


def test_windows_of_packages():
    batch = PackageWindows(length=16, size=32).take(np.arange(32))
    assert batch["tokens"].shape == (32, 16) and set(batch["labels"]) <= set(range(len(PACKAGES)))
    with pytest.raises(UserError, match="length=300"):
        PackageWindows(length=300)


def test_side_by_side_and_in_memory():
    short, long = Solids(size=2), Gaits(size=3)
    both = SideBySide({"points": short, "inertial": InMemory(long)})
    assert len(both) == 3 and set(both.element_spec()) == {
        "points/points", "points/labels", "points/weights", "inertial/values", "inertial/labels", "inertial/weights"
    }  # fmt: skip
    batch = both.take(np.array([2, 4]))
    for name, data in (("points", short), ("inertial", long)):
        for key, value in data.take(np.array([2, 4])).items():
            assert np.array_equal(batch[f"{name}/{key}"], value)
    with pytest.raises(UserError, match="its name without a slash"):
        SideBySide({"a/b": short})
