"""Stochastic rounding is right in the mean, not only close.

Every value is rounded 4,096 times, as in as many steps of training, and the mean of
what decodes is within four standard errors of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_flash import Affine4, Affine8, Companded4, Companded8, ExactResidual
from optax_flash.codecs import hashing
from optax_flash.codecs.curves import CURVES

pytestmark = pytest.mark.usefixtures("strict_types")

STEPS = 4096


def between_codes(codec, codes):
    """Values of codes that are no whole numbers: on the line between two of them."""
    below = np.floor(codes)
    values = [
        np.asarray(codec.decode_groups(jnp.uint8(k), (jnp.ones(k.shape[:-1]),)))
        for k in (below, below + 1)
    ]
    return values[0] + (codes - below) * (values[1] - values[0])


# Codes that are no whole numbers, from the bottom of the range to the top.
CODES = np.linspace(1.3, 126.6, 31)
VALUES = {
    Companded8(signed=True): between_codes(Companded8(), CODES - 1)
    * np.resize([1, -1], 31),
    Companded8(signed=False): between_codes(Companded8(signed=False), 2 * CODES - 2),
    Affine8(signed=True): (CODES - 64) / 64,
    Affine8(signed=False): 2 * CODES / 254,
    Affine4(signed=True): (CODES - 64) / 64,
    # Nothing lies below the first code but the one that is zero.
    Affine4(signed=False): np.linspace(1.1 / 14, 0.99, 31),
    **{
        Companded4(signed=True, signed_curve=curve): (CODES - 64) / 64
        for curve in CURVES
    },
    **{
        Companded4(signed=False, unsigned_curve=curve): np.linspace(0.07, 0.99, 31)
        for curve in CURVES
        if curve != "dynamic"
    },
}


@functools.partial(jax.jit, static_argnums=0)
def z_scores(rounded, x):
    """How many standard errors the mean of ``rounded(x, seed)`` is from ``x``."""
    steps = jnp.arange(STEPS, dtype=jnp.uint32)
    seeds = jax.vmap(hashing.fold, (0, None))(steps, hashing.salt("layer/kernel"))
    errors = jax.vmap(lambda seed: rounded(x, seed) - x)(seeds)
    return jnp.mean(errors, axis=0) / (jnp.std(errors, axis=0) / np.sqrt(STEPS))


def stored(codec, x, seed):
    bits = hashing.bits(seed, x.shape)
    return codec.decode(*codec.encode(x, bits), x.shape)


def stored_with_bias(codec, x, seed):
    """What no codec must do: round a value on a bent curve up by its fraction."""
    noise = hashing.uniform(hashing.bits(seed, x.shape))
    s = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    k = jnp.floor(codec.top * (jnp.abs(x) / s) ** (1 / codec.power) + noise)
    return jnp.sign(x) * s * (k / codec.top) ** codec.power


class Bent(NamedTuple):
    """Codes of a power curve."""

    top: int
    power: int


def with_top(x):
    """``x`` with a one before it, which sets the scale of its group to one."""
    ones = np.ones((*x.shape[:-1], 1))
    return jnp.asarray(np.concatenate([ones, x], axis=-1), jnp.float32)


@pytest.mark.parametrize("codec", VALUES, ids=repr)
def test_each_value(codec):
    z = z_scores(functools.partial(stored, codec), with_top(VALUES[codec]))[1:]
    assert np.all(np.abs(z) < 4)


def test_biased_rounding_is_noticed():
    # The curve bends most at the small codes, and from code to code by a constant.
    x = with_top((np.array([1.5, 2.5]) / 255) ** 4)
    biased = functools.partial(stored_with_bias, Bent(255, 4))
    assert np.all(z_scores(biased, x)[1:] > 4)


@pytest.mark.parametrize("codec", [Companded8(), Companded8(signed=False)], ids=repr)
def test_many_values_together(codec):
    rng = np.random.default_rng(0)
    bent = Bent(127, 2) if codec.signed else Bent(255, 4)
    codes = rng.integers(1, bent.top, (128, 31)) + rng.uniform(0.2, 0.8, (128, 31))
    for rounding, values in [
        (functools.partial(stored, codec), between_codes(codec, codes - 1)),
        (functools.partial(stored_with_bias, bent), (codes / bent.top) ** bent.power),
    ]:
        z = z_scores(rounding, with_top(values))[:, 1:]
        pooled = np.sum(z) / np.sqrt(z.size)
        assert abs(pooled) < 4 if rounding.func is stored else pooled > 4


def weights(dtype):
    """Odd multiples of a fraction of a code, in several binades and of both signs."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**23, 48) | 0x3F800000 | 1
    x = bits.astype(np.int32).view(np.float32)
    x = x * 2.0 ** rng.integers(-12, 12, 48) * rng.choice([-1, 1], 48)
    if dtype == jnp.float16:
        # Below its smallest normal, a float16 weight is kept to multiples of 2**-37.
        subnormal = (2 * rng.integers(0, 2**21, 16) + 1) * 2.0**-37
        x = np.concatenate([x, subnormal])
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights(dtype):
    codec = ExactResidual(bits=24)
    z = z_scores(
        lambda w, seed: codec.join(*codec.split(w, dtype, hashing.bits(seed, w.shape))),
        weights(dtype),
    )
    assert np.all(np.abs(z) < 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_residuals_against_a_fixed_param(dtype):
    codec = ExactResidual(bits=24)
    param = codec.split(weights(dtype), dtype)[0]
    z = z_scores(
        lambda w, seed: codec.join(
            param, codec.residual(w, param, hashing.bits(seed, w.shape))
        ),
        weights(dtype),
    )
    assert np.all(np.abs(z) < 4)
