"""What each format costs in accuracy, pinned: a net under every change to a codec.

The error of a row is the mean square of (decoded - x) over the mean square of x, and
the table has its mean over the rows, rounded to nearest and stochastically. A change
that means to move it pastes in what ``python tests/codecs/test_golden_error.py``
prints.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_flash import Affine8, Companded4, Companded8, FlashOptim8
from optax_flash.codecs import hashing
from tests.tiers import quick

RNG = np.random.default_rng(20240229)
NORMAL = RNG.standard_normal((256, 256))
HEAVY = NORMAL * np.exp(RNG.standard_normal((256, 256)))
SAMPLES = {
    "normal": NORMAL,
    "heavy tails": HEAVY,
    "rows of many sizes": NORMAL * np.logspace(-3, 3, 256)[:, None],
    "squares": np.square(NORMAL),
    "heavy squares": np.square(HEAVY),
}

TABLE = [
    (Companded8(signed=True, group=32), "normal", 4.1587e-05, 8.4834e-05),
    (Companded8(signed=True, group=32), "heavy tails", 4.0474e-05, 8.5511e-05),
    (Companded8(signed=True, group=32), "rows of many sizes", 4.1343e-05, 8.5325e-05),
    (Companded8(signed=True, group=64), "normal", 4.5434e-05, 9.2165e-05),
    (Companded8(signed=True, group=64), "heavy tails", 5.2532e-05, 0.00010761),
    (Companded8(signed=True, group=64), "rows of many sizes", 4.5453e-05, 9.299e-05),
    (Companded8(signed=True, group=128), "normal", 4.8773e-05, 9.8979e-05),
    (Companded8(signed=True, group=128), "heavy tails", 6.6857e-05, 0.00013499),
    (Companded8(signed=True, group=128), "rows of many sizes", 4.8932e-05, 9.8901e-05),
    (
        Companded4(
            signed=True, group=32, signed_curve="square", unsigned_curve="float"
        ),
        "normal",
        0.011643,
        0.023535,
    ),
    (
        Companded4(
            signed=True, group=32, signed_curve="square", unsigned_curve="float"
        ),
        "heavy tails",
        0.010145,
        0.021215,
    ),
    (
        Companded4(
            signed=True, group=32, signed_curve="square", unsigned_curve="float"
        ),
        "rows of many sizes",
        0.011642,
        0.023548,
    ),
    (FlashOptim8(signed=True, group=32), "normal", 2.5223e-05, 2.5223e-05),
    (FlashOptim8(signed=True, group=32), "heavy tails", 3.4724e-05, 3.4724e-05),
    (FlashOptim8(signed=True, group=32), "rows of many sizes", 2.5204e-05, 2.5204e-05),
    (Affine8(signed=True, group=32), "normal", 2.2904e-05, 4.613e-05),
    (Affine8(signed=True, group=32), "heavy tails", 4.5581e-05, 9.1452e-05),
    (Affine8(signed=True, group=32), "rows of many sizes", 2.2802e-05, 4.5897e-05),
    (Affine8(signed=True, group=128), "normal", 3.4817e-05, 6.982e-05),
    (Affine8(signed=True, group=128), "heavy tails", 0.00013039, 0.0002613),
    (Affine8(signed=True, group=128), "rows of many sizes", 3.4783e-05, 6.9739e-05),
    (Companded8(signed=False, group=32), "squares", 4.3791e-05, 8.6696e-05),
    (Companded8(signed=False, group=32), "heavy squares", 4.159e-05, 8.0561e-05),
    (Companded8(signed=False, group=64), "squares", 4.4829e-05, 8.8475e-05),
    (Companded8(signed=False, group=64), "heavy squares", 4.2509e-05, 8.2022e-05),
    (Companded8(signed=False, group=128), "squares", 4.5627e-05, 9.0614e-05),
    (Companded8(signed=False, group=128), "heavy squares", 4.3572e-05, 8.4358e-05),
    (
        Companded4(
            signed=False, group=32, signed_curve="square", unsigned_curve="float"
        ),
        "squares",
        0.010669,
        0.022056,
    ),
    (
        Companded4(
            signed=False, group=32, signed_curve="square", unsigned_curve="float"
        ),
        "heavy squares",
        0.012283,
        0.024006,
    ),
    (FlashOptim8(signed=False, group=32), "squares", 8.5506e-06, 8.5506e-06),
    (FlashOptim8(signed=False, group=32), "heavy squares", 2.7765e-06, 2.7765e-06),
    (Affine8(signed=False, group=32), "squares", 2.6629e-05, 4.0483e-05),
    (Affine8(signed=False, group=32), "heavy squares", 0.00021084, 0.00022313),
    (Affine8(signed=False, group=128), "squares", 5.2077e-05, 7.702e-05),
    (Affine8(signed=False, group=128), "heavy squares", 0.00071577, 0.0007498),
]


DEFAULTS = [
    make(signed=signed) for make in (Companded8, Companded4) for signed in (True, False)
]


def errors(codec, sample):
    """The ``(nearest, stochastic)`` errors of a codec on a sample."""
    x = jnp.asarray(SAMPLES[sample], jnp.float32)
    bits = hashing.bits(hashing.fold(1, hashing.salt("layer/kernel")), x.shape)
    decoded = [
        codec.decode(*codec.encode(x, rounding), x.shape) for rounding in (None, bits)
    ]
    exact = np.asarray(x, np.float64)
    square = np.mean(np.square(exact), axis=-1)
    return tuple(
        np.mean(np.mean(np.square(np.asarray(d) - exact), axis=-1) / square)
        for d in decoded
    )


@pytest.mark.parametrize(
    "codec, sample, nearest, stochastic",
    # With the defaults of both sizes.
    quick([row for row in TABLE if row[0] in DEFAULTS], TABLE),
)
def test_error_is_as_pinned(codec, sample, nearest, stochastic):
    np.testing.assert_allclose(errors(codec, sample), (nearest, stochastic), rtol=1e-3)


if __name__ == "__main__":
    for signed in (True, False):
        for codec in [
            *(Companded8(signed=signed, group=group) for group in (32, 64, 128)),
            Companded4(signed=signed),
            FlashOptim8(signed=signed),
            *(Affine8(signed=signed, group=group) for group in (32, 128)),
        ]:
            for sample in SAMPLES:
                if signed != sample.endswith("squares"):
                    nearest, stochastic = errors(codec, sample)
                    print(
                        f'    ({codec}, "{sample}", {nearest:.5g}, {stochastic:.5g}),'
                    )
