"""The curves of 4-bit codes: which value each place has."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_flash.codecs.curves import CURVES

pytestmark = pytest.mark.usefixtures("strict_types")

SIGNED, UNSIGNED = 7, 16  # the last places


# The table of "dynamic" is one of signed codes.
CASES = [
    (name, top)
    for name in CURVES
    for top in (SIGNED, UNSIGNED)
    if (name, top) != ("dynamic", UNSIGNED)
]
every = pytest.mark.parametrize(("name", "top"), CASES)


def values(name, top, scale=1.0):
    places = jnp.arange(top + 1, dtype=jnp.float32)
    return np.asarray(CURVES[name].value(places, top, scale), np.float64)


@every
def test_a_curve_rises_from_zero_to_one(name, top):
    found = values(name, top)
    assert found[0] == 0 and 1 - 1e-6 < found[-1] <= 1
    assert np.all(np.diff(found) > 0)


@every
def test_values_as_the_formulas_say(name, top):
    k = np.arange(top + 1)
    expected = {
        "linear": k / top,
        "square": (k / top) ** 2,
        "fourth": (k / top) ** 4,
        "softsign": k / (2 * top - k),
        "log": np.where(k > 0, 2.0 ** ((k - top) / 2), 0),
        "float": np.where(
            k > 0, 2.0 ** ((k - top) // 2) * np.where((top - k) % 2, 1.5, 1), 0
        ),
        "dynamic": np.array([0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875])
        / 0.8875,
    }[name]
    np.testing.assert_allclose(values(name, top), expected, rtol=1e-6)


@every
def test_between_two_values_is_the_place_of_the_lower(name, top):
    found = values(name, top)
    for share in (0.01, 0.5, 0.99):
        between = jnp.asarray((1 - share) * found[:-1] + share * found[1:], jnp.float32)
        place = np.floor(np.asarray(CURVES[name].place(between, top)))
        # Below the first value a place may be anything less than one.
        np.testing.assert_array_equal(np.maximum(place, 0), np.arange(top))


@every
@pytest.mark.parametrize("scale", [3.0, 1.015625, 2.0**100])
def test_no_value_is_above_its_scale(name, top, scale):
    assert np.all(values(name, top, np.float32(scale)) <= scale)


@pytest.mark.parametrize(
    ("name", "top"), [case for case in CASES if CURVES[case[0]].lattice]
)
def test_the_values_of_a_lattice_return_under_other_scales(name, top):
    one, two = values(name, top), values(name, top, np.float32(2))
    np.testing.assert_allclose(two[1:-2], one[3:], rtol=1e-6)
