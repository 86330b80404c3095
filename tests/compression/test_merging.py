"""DARE and merging, on trees of two leaves; expectations in NumPy or by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression import merging
from research.errors import UserError
from research.nn.weights import LowRank
from research.training.observe import Gram

KEY = jax.random.key(0)


def tree(*values):
    """A tree of one tensor `layer/kernel` [1, n] and one scalar-like `table` [1]."""
    values = np.asarray(values, np.float32)
    return {"layer": {"kernel": jnp.asarray(values[None, :-1])}, "table": jnp.asarray(values[-1:])}


def flat(change):
    """The n + 1 numbers of a tree or a difference."""
    leaves = change if "layer/kernel" in change else {"layer/kernel": change["layer"]["kernel"], **change}
    return np.concatenate([np.ravel(leaves["layer/kernel"]), np.ravel(leaves["table"])])


def changes(*rows):
    return [merging.difference(tree(*row), tree(*np.zeros(len(row)))) for row in rows]


def models(count=3, size=400):
    base, *tuned = np.random.default_rng(0).standard_normal((count + 1, size + 1)).astype(np.float32)
    return tree(*base), [tree(*(base + 0.01 * row)) for row in tuned]


def test_a_rate_of_0_is_the_model_and_dropped_elements_are_the_base_bit_for_bit():
    base, (tuned, *_) = models()
    np.testing.assert_array_equal(flat(merging.dropped(tuned, base, 0.0, KEY)), flat(tuned))
    np.testing.assert_array_equal(flat(merging.dropped(tuned, base, 1.0, KEY)), flat(base))
    sparse = flat(merging.drop(merging.difference(tuned, base), 0.9, KEY))
    same = flat(merging.dropped(tuned, base, 0.9, KEY)) == flat(base)
    np.testing.assert_array_equal(same, sparse == 0)
    # 401 draws of 0.1: 40 kept, standard deviation 6.
    assert abs(np.sum(~same) - 40) < 24


def test_dares_mean_is_the_difference_and_its_variance_is_the_papers():
    (change,) = changes(np.linspace(0.5, 1.5, 11))
    rate, draws = 0.75, 400
    found = np.stack([flat(merging.drop(change, rate, key)) for key in jax.random.split(KEY, draws)])
    expected = flat(change)
    # Of each element: delta^2 p / (1 - p) = 3 delta^2; the mean of 400 is within 5 of its standard errors.
    np.testing.assert_allclose(found.mean(0) / expected, 1, atol=5 * np.sqrt(3 / draws))
    assert abs(np.mean(found.var(0) / expected**2) - 3) < 0.3
    np.testing.assert_allclose(np.unique(found / expected), [0, 4], rtol=1e-6)
    plain = flat(merging.drop(change, rate, KEY, "random_unscaled"))
    np.testing.assert_allclose(4 * plain, flat(merging.drop(change, rate, KEY)), rtol=1e-6)


def test_magnitude_drops_the_smallest_of_each_tensor():
    (change,) = changes([3, -1, 2, -4, 0.5])
    # int(0.5 * 4) = 2 of the kernel's; int(0.5 * 1) = 0 of the table's.
    np.testing.assert_array_equal(flat(merging.drop(change, 0.5, KEY, "magnitude")), [3, 0, 0, -4, 0.5])


def test_averages_and_single_models():
    base, tuned = models()
    own = [merging.difference(model, base) for model in tuned]
    mean, third = merging.average(own), merging.task_arithmetic(own, 1 / 3)
    np.testing.assert_allclose(flat(mean), flat(third), rtol=1e-6)
    np.testing.assert_allclose(
        flat(merging.add(base, mean)), np.mean([flat(model) for model in tuned], axis=0), rtol=1e-5
    )
    for merged in (merging.task_arithmetic(own[:1]), merging.ties(own[:1], trim=0.0)):
        # base + (tuned - base): one rounding of numbers of about 1.
        np.testing.assert_allclose(flat(merging.add(base, merged)), flat(tuned[0]), rtol=0, atol=5e-7)


def test_ties_by_hand():
    own = changes([4, 1, -3, 2, 1], [2, -5, -1, -2, 0])
    # No trim. Sums 6, -4, -4, 0, 1: signs +, -, -, and of the zero that of all signs, 1 - 1 - 1 + 0 + 1 = 0: nobody.
    np.testing.assert_array_equal(flat(merging.ties(own, trim=0.0)), [3, -5, -2, 0, 1])
    # With trim 0.4 the 2nd smallest magnitude is the least that stays: 1 of the first (two have it), 1 of the second.
    np.testing.assert_array_equal(flat(merging.ties(own, trim=0.4)), [3, -5, -2, 0, 1])
    # With 0.8 the 4th: 3 and 2. Left 4, 0, -3, 0, 0 and 2, -5, 0, -2, 0; the table's sign is that of all, -2.
    np.testing.assert_array_equal(flat(merging.ties(own, scale=2.0, trim=0.8)), [6, -10, -6, -4, 0])
    np.testing.assert_array_equal(flat(merging.ties(own[::-1], trim=0.8)), flat(merging.ties(own, trim=0.8)))
    np.testing.assert_array_equal(flat(merging.ties([own[0]] * 3, trim=0.0)), flat(own[0]))


def test_after_dare_a_smaller_trim_does_nothing():
    base, tuned = models()
    own = [
        merging.drop(merging.difference(model, base), 0.9, jax.random.fold_in(KEY, i))
        for i, model in enumerate(tuned)
    ]
    np.testing.assert_array_equal(flat(merging.ties(own, trim=0.8)), flat(merging.ties(own, trim=0.0)))


def test_fisher_and_regmean_by_hand():
    own = changes([1, 2, 4], [3, 6, 0])
    fishers = [{"layer/kernel": np.array([[3.0, 4.0]])}, {"layer/kernel": np.array([[1.0, 0.0]])}]
    # Divided by norms 5 and 1: (0.6 * 1 + 1 * 3) / 1.6, and 2 but for 1e-6 of the other. The table is averaged.
    np.testing.assert_allclose(flat(merging.fisher(own, fishers)), [2.25, 2, 2], rtol=1e-5)
    x = np.random.default_rng(1).standard_normal((2, 20, 4))
    w = np.random.default_rng(2).standard_normal((2, 4, 3))
    grams = [{"k": Gram((a.T @ a).astype(np.float32), np.float32(20))} for a in x]
    found = merging.regmean([{"k": jnp.asarray(v, jnp.float32)} for v in w], grams, off_diagonal=0.999999)[
        "k"
    ]
    expected = np.linalg.lstsq(
        x.reshape(40, 4), np.concatenate([a @ v for a, v in zip(x, w, strict=True)]), rcond=None
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_excluded_parameters_stay_the_bases_and_half_precision_keeps_small_differences():
    base, (tuned, *_) = models()
    merged = merging.dropped(tuned, base, 0.5, KEY, exclude=("^table",))
    np.testing.assert_array_equal(merged["table"], base["table"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (base, tuned))
    change = merging.difference(half[1], half[0])
    assert change["table"].dtype == jnp.float32
    assert merging.add(half[0], change)["table"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda b, t: merging.difference(t | {"table": jnp.zeros(3)}, b),
            r"table is \(3,\) in the model and \(1,\)",
        ),
        (
            lambda b, t: merging.difference({"table": t["table"]}, b),
            r"layer/kernel \(1, 400\) of the base is not in",
        ),
        (
            lambda b, t: merging.difference(t, b, ("classifier",)),
            "'classifier' matches none of the 2 parameters",
        ),
        (
            lambda b, t: merging.difference(
                {"layer": {"kernel": LowRank(jnp.ones((1, 1)), jnp.ones((1, 400)))}}, b
            ),
            "layer/kernel is LowRank in the model: merge first",
        ),
        (lambda b, t: merging.dropped(t, b, 90, KEY), r"drop=90 is not in \[0, 1\]"),
        (lambda b, t: merging.ties([merging.difference(t, b)], trim=1), r"trim=1 is not in \[0, 1\)"),
    ],
)
def test_mistakes_are_told(act, message):
    base, (tuned, *_) = models(1)
    with pytest.raises(UserError, match=message):
        act(base, tuned)
