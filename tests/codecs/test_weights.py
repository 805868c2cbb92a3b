"""Weights in two pieces: exhaustive where they can be listed, random elsewhere."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import optax_flash
from optax_flash import ExactResidual, FlashOptimResidual
from optax_flash.codecs import hashing
from optax_flash.codecs import residual as residuals
from optax_flash.codecs.residual import round_to

pytestmark = pytest.mark.usefixtures("strict_types")

DTYPES = [ml_dtypes.bfloat16, np.float16]
SEEDS = [None, np.uint32(7)]
EXACT_24, EXACT_32 = ExactResidual(bits=24), ExactResidual(bits=32)


def finite_params(dtype):
    """Every finite value of a 16-bit dtype, both zeros included."""
    patterns = np.arange(2**16, dtype=np.uint16)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    return patterns[(patterns & 0x7FFF) < infinity].view(dtype)


def all_residuals(codec, dtype):
    """Residuals that a split can make: all of 8 bits, or some of 16."""
    if codec.bits == 24:
        return np.arange(256, dtype=np.uint8)
    end = 2**16 if dtype == ml_dtypes.bfloat16 else 2**13  # 16 or 13 bits are missing.
    some = np.random.default_rng(0).integers(0, end, 25)
    edges = [0, 1, end // 2 - 1, end // 2, end // 2 + 1, end - 2, end - 1]
    return np.concatenate([some, edges]).astype(np.uint16)


def random_floats(n=2**20):
    """Float32 of every bit pattern, and those that tend to go wrong."""
    bits = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    magnitudes = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F7FFFFF, 0x477FE000]
    magnitudes += [0x477FEFFF, 0x477FF000, 0x477FFFFF, 0x47800000]  # Top of float16.
    magnitudes += [0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000]
    magnitudes += [0x7F800001, 0x7FC00000, 0x7FFFFFFF]  # NaNs.
    edges = np.array(magnitudes, np.uint32)
    return np.concatenate([bits, edges, edges | 0x80000000]).view(np.float32)


def random_weights(low, high, n=2**20):
    """Normal weights of both signs with exponents from ``low`` up to ``high``."""
    rng = np.random.default_rng(1)
    x = (1 + rng.random(n)) * 2.0 ** rng.integers(low, high, n) * rng.choice([-1, 1], n)
    return x.astype(np.float32)


def bits_of(x):
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def order_of(x):
    """Integers in the order of the floats."""
    bits = np.asarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def random_bits(seed, shape):
    return None if seed is None else hashing.bits(seed, shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def split(codec, dtype, weight, seed=None):
    return codec.split(weight, dtype, random_bits(seed, weight.shape))


@functools.partial(jax.jit, static_argnums=0)
def join(codec, param, residual):
    return codec.join(param, residual)


@functools.partial(jax.jit, static_argnums=0)
def residual_of(codec, weight, param, seed=None):
    return codec.residual(weight, param, random_bits(seed, weight.shape))


@pytest.mark.parametrize("seed", SEEDS, ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [EXACT_24, EXACT_32], ids=["24", "32"])
def test_every_param_with_every_residual(codec, dtype, seed):
    param = finite_params(dtype)[:, None]
    for chunk in all_residuals(codec, dtype).reshape(-1, 32):
        residual = np.broadcast_to(chunk, (param.size, 32))
        params = np.broadcast_to(param, residual.shape)
        weight = join(codec, params, residual)
        new_param, new_residual = split(codec, dtype, weight, seed)
        # Below zero there is nothing: only a param set from outside comes to that.
        possible = (params != 0) | (residual >= codec.zero(dtype))
        new_param, new_residual, weight, params, residual = (
            np.asarray(x)[possible]
            for x in (new_param, new_residual, weight, params, residual)
        )
        np.testing.assert_array_equal(bits_of(new_param), bits_of(params))
        np.testing.assert_array_equal(new_residual, residual)
        again = join(codec, new_param, new_residual)
        np.testing.assert_array_equal(bits_of(again), bits_of(weight))
        found = residual_of(codec, weight, params, seed)
        np.testing.assert_array_equal(found, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [EXACT_24, EXACT_32], ids=["24", "32"])
def test_weights_are_in_the_order_of_param_and_residual(codec, dtype):
    param = np.sort(finite_params(dtype))
    param = param[param > 0]
    residual = np.unique(all_residuals(codec, dtype))
    pieces = np.broadcast_arrays(param[:, None], residual)
    weight = np.asarray(join(codec, *pieces)).ravel()
    assert weight[0] > 0
    assert np.all(np.diff(order_of(weight)) > 0)
    mirrored = np.asarray(join(codec, -pieces[0], pieces[1])).ravel()
    np.testing.assert_array_equal(mirrored, -weight)


class TestExactness(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_32_bits_keep_every_float(self):
        weight = random_floats()
        pieces = self.variant(lambda w: EXACT_32.split(w, jnp.bfloat16))(
            jnp.asarray(weight)
        )
        joined = np.asarray(self.variant(EXACT_32.join)(*pieces))
        is_nan = np.isnan(weight)
        np.testing.assert_array_equal(np.isnan(joined), is_nan)
        np.testing.assert_array_equal(
            bits_of(joined)[~is_nan], bits_of(weight)[~is_nan]
        )

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SEEDS)
    def test_24_bits_keep_every_float_without_the_low_8(self, seed):
        weight = (bits_of(random_floats()) & np.uint32(0xFFFFFF00)).view(np.float32)
        weight = weight[~np.isnan(weight)]
        bits = random_bits(seed, weight.shape)
        pieces = self.variant(lambda w: EXACT_24.split(w, jnp.bfloat16, bits))(
            jnp.asarray(weight)
        )
        joined = self.variant(EXACT_24.join)(*pieces)
        np.testing.assert_array_equal(bits_of(joined), bits_of(weight))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*DTYPES)
    def test_round_to_is_a_cast_to_nearest_even(self, dtype):
        params = np.sort(finite_params(dtype)).astype(np.float64)
        half_way = ((params[1:] + params[:-1]) / 2).astype(np.float32)
        weight = np.concatenate([random_floats(), random_weights(-28, 17), half_way])
        rounded = np.asarray(self.variant(lambda w: round_to(w, dtype))(weight))
        with np.errstate(over="ignore", invalid="ignore"):
            expected = weight.astype(dtype)
        is_nan = np.isnan(weight)
        np.testing.assert_array_equal(np.isnan(rounded), is_nan)
        np.testing.assert_array_equal(
            bits_of(rounded)[~is_nan], bits_of(expected)[~is_nan]
        )


@pytest.mark.parametrize(("seed", "share"), [(None, 0.5), (np.uint32(3), 1.0)])
@pytest.mark.parametrize(
    ("dtype", "low", "high", "code"),
    [(ml_dtypes.bfloat16, -126, 127, 2.0**-15), (np.float16, -14, 15, 2.0**-18)],
)
def test_error_of_24_bits(dtype, low, high, code, seed, share):
    weight = random_weights(low, high)
    joined = join(EXACT_24, *split(EXACT_24, dtype, weight, seed))
    exact = weight.astype(np.float64)
    error = np.abs(np.asarray(joined, np.float64) - exact) / np.abs(exact)
    assert np.all(error <= share * code)
    # Below float16's normal numbers, codes are 2**-32 apart.
    if dtype == np.float16:
        weight = random_weights(-34, -14)
        joined = join(EXACT_24, *split(EXACT_24, dtype, weight, seed))
        error = np.abs(np.asarray(joined, np.float64) - weight.astype(np.float64))
        assert np.all(error <= share * 2.0**-32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [EXACT_24, EXACT_32], ids=["24", "32"])
@pytest.mark.parametrize("seed", SEEDS, ids=["nearest", "stochastic"])
def test_signs_are_symmetric(codec, dtype, seed):
    weight = random_weights(-30, 15)
    joined = join(codec, *split(codec, dtype, weight, seed))
    mirrored = join(codec, *split(codec, dtype, -weight, seed))
    np.testing.assert_array_equal(mirrored, -np.asarray(joined))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [EXACT_24, EXACT_32], ids=["24", "32"])
def test_half_way_goes_away_from_zero(codec, dtype):
    params = np.sort(finite_params(dtype))
    low, high = params[:-1], params[1:]
    middle = (low.astype(np.float64) + high.astype(np.float64)) / 2
    middle, low, high = (x[middle != 0] for x in (middle, low, high))
    param, residual = split(codec, dtype, middle.astype(np.float32))
    np.testing.assert_array_equal(param, np.where(middle < 0, low, high))
    assert not np.any(residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [EXACT_24, EXACT_32], ids=["24", "32"])
def test_params_set_to_zero_from_outside_are_weights_near_zero(codec, dtype):
    residual = all_residuals(codec, dtype)
    for zero in (0.0, -0.0):
        param = np.full(residual.shape, zero, dtype)
        weight = np.asarray(join(codec, param, residual), np.float64)
        assert np.all(
            np.abs(weight) <= float(ml_dtypes.finfo(dtype).smallest_subnormal)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "codec",
    [
        kind(bits=bits)
        for kind in (ExactResidual, FlashOptimResidual)
        for bits in (24, 32)
    ],
    ids=repr,
)
def test_residual_saturates_when_the_param_is_far(codec, dtype):
    # 3 and -3 are so far apart that their counts' difference overflows an int32.
    param = np.array([1, 3, -3, 3, 0, 1, 2e4], dtype)
    weight = np.array([3, 1, 3, -3, 1, 0, -2e4], np.float32)
    weight = weight.astype(np.float64)
    residual = residual_of(codec, weight.astype(np.float32), param)
    found = np.abs(np.asarray(join(codec, param, residual)) - weight)
    if codec.name == "exact":
        others = all_residuals(codec, dtype)
    else:
        others = np.array([-1, 0, 1], codec.dtype) * np.iinfo(codec.dtype).max
    # No other residual comes closer.
    for other in others:
        joined = np.asarray(join(codec, param, np.full_like(residual, other)))
        assert np.all(found <= np.abs(joined - weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "levels"), [(24, 127), (32, 32767)])
def test_published_residual_is_half_a_code_off_at_most(dtype, bits, levels):
    codec = FlashOptimResidual(bits=bits)
    weight = random_weights(-13, 14)
    param, residual = split(codec, dtype, weight)
    joined = np.asarray(join(codec, param, residual), np.float64)
    half_step = np.spacing(np.abs(np.asarray(param))).astype(np.float64) / 2
    rounding = np.spacing(np.abs(weight)).astype(np.float64)
    assert np.all(np.abs(joined - weight) <= half_step / levels / 2 + rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "codec", [EXACT_24, EXACT_32, FlashOptimResidual()], ids=["24", "32", "published"]
)
def test_half_a_code_is_where_steps_begin_to_count(codec, dtype):
    low, high = (-14, 14) if dtype == np.float16 else (-60, 60)
    pieces = split(codec, dtype, random_weights(low, high, 2**16))
    weight = np.asarray(join(codec, *pieces))
    half = np.asarray(jax.jit(residuals.half_code)(*pieces))
    # Powers of two have neighbours at two distances.
    weight, half = (x[np.frexp(np.abs(weight))[0] != 0.5] for x in (weight, half))
    for share, stays in [(0.9, True), (1.1, False), (-0.9, True), (-1.1, False)]:
        stepped = weight + np.float32(share) * half
        found = join(codec, *split(codec, dtype, stepped))
        right = (found == weight) == stays
        # A published code may leave its param's range, where codes differ in size.
        assert np.all(right) if codec.name == "exact" else np.mean(right) > 0.999
    assert codec.is_stochastic(dtype) == (codec == EXACT_24)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float32])
def test_half_a_code_without_a_residual_is_half_an_ulp(dtype):
    weight = random_weights(-20, 14, 2**16).astype(dtype)
    half = np.asarray(jax.jit(residuals.half_code)(weight), np.float64)
    weight = np.asarray(weight, np.float64)
    is_power = np.frexp(np.abs(weight))[0] == 0.5
    for share, stays in [(0.9, True), (1.1, False), (-0.9, True), (-1.1, False)]:
        found = (weight + share * half).astype(dtype).astype(np.float64)
        assert np.all(((found == weight) == stays) | is_power)


def test_a_residual_tells_its_codec():
    for kind in (ExactResidual, FlashOptimResidual):
        for bits in (24, 32):
            codec = kind(bits=bits)
            _, residual = codec.split(jnp.ones(3), jnp.bfloat16)
            assert residual.dtype == codec.dtype
            assert residuals.codec_of(residual) == codec
            assert residuals.get_residual_codec(kind.name, bits) == codec
    with pytest.raises(ValueError, match="float32"):
        residuals.codec_of(jnp.ones(3))


@pytest.mark.parametrize("kind", [ExactResidual, FlashOptimResidual])
@pytest.mark.parametrize("bits", [16, 8, 25, None])
def test_other_bits_are_refused(kind, bits):
    with pytest.raises(ValueError, match="24.*32"):
        kind(bits=bits)


def test_unknown_residual_codecs_are_told_the_known_ones():
    with pytest.raises(ValueError, match="'exactly'.*exact, flashoptim"):
        residuals.get_residual_codec("exactly", 24)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(jnp.bfloat16, True), (jnp.float16, True), (jnp.float32, False)],
)
def test_which_params_are_split(dtype, expected):
    assert residuals.is_split(jnp.zeros(2, dtype)) == expected


def test_a_codec_passes_through_with_its_bits():
    for codec in (ExactResidual(bits=32), FlashOptimResidual()):
        assert residuals.get_residual_codec(codec) is codec
        assert residuals.get_residual_codec(codec, codec.bits) is codec
    with pytest.raises(ValueError, match=r"bits is 24, but .* ExactResidual\(bits=32"):
        residuals.get_residual_codec(ExactResidual(bits=32), 24)


@pytest.mark.parametrize("codec", [optax_flash.Companded8(), None, ["exact"]])
def test_what_is_no_residual_codec_is_named(codec):
    with pytest.raises(ValueError, match=re.escape(f"codec {codec!r}. Known")):
        optax_flash.master_weights(optax.sgd(0.1), codec=codec)


@pytest.mark.parametrize("codec", [ExactResidual(bits=32), 8, ["companded8"]])
def test_what_is_no_codec_of_states_is_named(codec):
    with pytest.raises(ValueError, match=re.escape(f"codec {codec!r}. Known")):
        optax_flash.compress(optax.sgd(0.1), codec)


def test_master_weights_take_a_codec():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = optax_flash.master_weights(optax.sgd(0.1), codec=ExactResidual(bits=32))
    named = optax_flash.master_weights(optax.sgd(0.1), 32, codec="exact")
    state = tx.init(params)
    chex.assert_trees_all_equal(state, named.init(params))
    assert state.residual["w"].dtype == jnp.uint16
