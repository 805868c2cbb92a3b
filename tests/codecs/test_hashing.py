"""The hash behind stochastic rounding: uniform, independent, and by position alone."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_flash.codecs import hashing

N = 2**18
SEEDS = [0, 1, 0xDEADBEEF]


def bits(seed, shape=(N,)):
    return np.asarray(hashing.bits(jnp.uint32(seed), shape))


def uniform(seed, shape=(N,)):
    return np.asarray(hashing.uniform(hashing.bits(jnp.uint32(seed), shape)))


def assert_uncorrelated(a, b):
    """Within four standard errors of zero."""
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def unmix(x):
    """The inverse of ``mix``, which it has because each of its five lines has one."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(pow(0x846CA68B, -1, 2**32))
    x = x ^ (x >> np.uint32(15)) ^ (x >> np.uint32(30))
    x = x * np.uint32(pow(0x7FEB352D, -1, 2**32))
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("start", [0, 2**32 - 2**20, 0x12345678])
def test_mix_is_a_bijection(start):
    x = np.arange(2**20, dtype=np.uint32) + np.uint32(start)
    mixed = np.asarray(hashing.mix(jnp.asarray(x)))
    assert np.unique(mixed).size == x.size
    np.testing.assert_array_equal(unmix(mixed), x)


def test_every_input_bit_flips_every_output_bit_half_the_time():
    x = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    for bit in range(32):
        flipped = hashing.mix(jnp.asarray(x)) ^ hashing.mix(
            jnp.asarray(x ^ np.uint32(1 << bit))
        )
        share = np.unpackbits(np.asarray(flipped).view(np.uint8)).reshape(-1, 32)
        np.testing.assert_allclose(share.mean(axis=0), 0.5, atol=0.02)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(seed, shift):
    byte = (bits(seed) >> np.uint32(shift)) & np.uint32(0xFF)
    counts = np.bincount(byte, minlength=256)
    chi_square = np.sum((counts - N / 256) ** 2) / (N / 256)
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_bit_is_balanced(seed):
    ones = np.unpackbits(bits(seed).view(np.uint8)).reshape(N, 32).sum(axis=0)
    assert np.abs(ones - N / 2).max() < 4 * np.sqrt(N) / 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lag", [1, 2, 32, 512, 2**16])
def test_neighbours_are_independent(seed, lag):
    u = uniform(seed)
    assert_uncorrelated(u[:-lag], u[lag:])


@pytest.mark.parametrize("lag", [1, 2, 1000])
def test_steps_are_independent(lag):
    salt = hashing.salt("dense/kernel")
    step = 5
    a = uniform(hashing.fold(step, salt))
    b = uniform(hashing.fold(step + lag, salt))
    assert_uncorrelated(a, b)
    assert np.sum(a == b) < 4  # Of 2**18 pairs, each equal once in 2**24.


def test_one_element_is_independent_over_the_steps():
    steps = jnp.arange(N, dtype=jnp.uint32)
    seeds = jax.vmap(hashing.fold, (0, None))(steps, hashing.salt("dense/kernel"))
    u = np.asarray(jax.vmap(lambda s: hashing.uniform(hashing.bits(s, (2,))))(seeds))
    assert_uncorrelated(u[:-1, 0], u[1:, 0])
    assert_uncorrelated(u[:, 0], u[:, 1])
    counts, _ = np.histogram(u[:, 0], bins=256, range=(0, 1))
    chi_square = np.sum((counts - N / 256) ** 2) / (N / 256)
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)


def test_leaves_are_independent():
    names = ["layer_0/kernel", "layer_1/kernel", "layer_0/bias", ""]
    leaves = [uniform(hashing.fold(3, hashing.salt(name))) for name in names]
    for i, a in enumerate(leaves):
        for b in leaves[:i]:
            assert_uncorrelated(a, b)


def test_fields_of_a_leaf_and_its_weights_differ():
    """Two fields that are rounded alike would err together."""
    drawn = bits(3)
    seen = [low(hashing.for_field(drawn, field), 16) for field in range(4)]
    seen.append(low(drawn, 8))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert_uncorrelated(a, b)


def low(x, places):
    """The lowest bits, which decide a rounding."""
    return np.asarray(x) % np.uint32(2**places)


def test_uniform_is_a_multiple_of_2_to_the_minus_24_below_one():
    u = uniform(0).astype(np.float64)
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(u * 2**24, np.floor(u * 2**24))
    np.testing.assert_array_equal(u * 2**24, bits(0) >> np.uint32(8))


@pytest.mark.parametrize("shape", [(4, 8), (2, 2, 8), (1, 32), (32, 1)])
def test_position_alone_decides(shape):
    flat = bits(7, (32,))
    np.testing.assert_array_equal(bits(7, shape).ravel(), flat)
    index = jnp.arange(32, dtype=jnp.uint32)
    np.testing.assert_array_equal(flat, hashing.mix(index ^ jnp.uint32(7)))


def test_scalars_and_empty_arrays():
    assert bits(7, ()) == bits(7, (1,))[0]
    assert bits(7, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize("shape", [(2**17, 2**17), (3, 2**20, 2**13), (2, 2**31 - 1)])
def test_more_elements_than_the_index_can_count(shape):
    out = jax.eval_shape(lambda seed: hashing.bits(seed, shape), jnp.uint32(0))
    assert out.shape == shape


def test_fold_takes_integers_of_any_kind():
    expected = hashing.fold(3, 4)
    assert expected.dtype == jnp.uint32 and expected.shape == ()
    assert hashing.fold(jnp.int32(3), np.uint32(4)) == expected
    assert jax.jit(hashing.fold)(jnp.uint32(3), jnp.uint32(4)) == expected


def test_numbers_are_pinned():
    # A run resumed under another version repeats bit for bit only if these stay.
    assert hashing.salt("dense/kernel") == zlib.crc32(b"dense/kernel")
    assert int(hashing.fold(0, 0)) == 2926543089
    expected = [1753845952, 0, 1408362973, 3507691905]
    np.testing.assert_array_equal(bits(1, (4,)), expected)
