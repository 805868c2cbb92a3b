"""What every codec promises, over generated arrays of many shapes and magnitudes."""

import dataclasses
import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from optax_flash import Affine4, Affine8, Companded4, Companded8, FlashOptim8, get_codec
from optax_flash.codecs import hashing, nibbles
from optax_flash.codecs.curves import CURVES
from optax_flash.codecs.registry import CODECS
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("strict_types")

AFFINE = (Affine4, Affine8)

# In groups of 32, so that small arrays have several; the last test has the defaults.
# Of the curves of 4 bits those that differ most: test_curves.py has all.
ALL = [
    dataclasses.replace(codec, signed=signed, group=32)
    for codec in CODECS.values()
    for signed in (True, False)
    if not isinstance(codec, Companded4)
]
ALL += [Companded4(signed_curve=curve) for curve in ("square", "linear", "dynamic")]
ALL += [
    Companded4(signed=False, unsigned_curve=curve)
    for curve in ("float", "linear", "log")
]
STOCHASTIC = [codec for codec in ALL if not isinstance(codec, FlashOptim8)]
UNSIGNED = [codec for codec in STOCHASTIC if not codec.signed]
DEFAULTS = [
    *(Companded8(), Companded8(signed=False), Companded4(), Companded4(signed=False)),
    Affine8(group=32),
]

SHAPES = [(), (45,), (3, 40), (2, 2, 33)]
EMPTY_SHAPES = [(0,), (0, 4), (3, 0), (2, 0, 5)]

# The positive half of create_dynamic_map(True, 3, 4), see Companded4, without its 1.
DYNAMIC = np.array([0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875])

# 1, 3/4, 1/2, 3/8 and so on, the largest last.
FLOATS = np.outer(2.0 ** np.arange(-9, 1), [0.75, 1]).ravel()

seeds = st.none() | st.integers(0, 2**32 - 1).map(np.uint32)


def settings(max_examples):
    return hypothesis.settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None
    )


@st.composite
def arrays(draw, codec, shapes=SHAPES):
    """Values of many magnitudes within a group and between arrays; zeros and ties."""
    shape = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if isinstance(codec, FlashOptim8):  # Its float16 scales have no greater range.
        exponent, decades = draw(st.integers(-4, 4)), draw(st.sampled_from([0, 1]))
    else:
        exponent = draw(st.integers(-98, 98))
        decades = draw(st.sampled_from([0, 1, 3, 8]))
    x = (1 + rng.random(shape)) * 10.0 ** (-decades * rng.random(shape))
    if draw(st.booleans()):
        x = np.ceil(x * 8) / 8
    x = np.maximum(x * 2.0**exponent, 1e-30)
    x = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.1, 0.9])), 0.0, x)
    if codec.signed:
        x = x * rng.choice([-1, 1], shape)
    return np.asarray(x, np.float32)


def random_bits(seed, shape):
    return None if seed is None else hashing.bits(seed, shape)


def roundtrip(codec, x, seed):
    codes, scales = codec.encode(x, random_bits(seed, x.shape))
    return codes, scales, codec.decode(codes, scales, x.shape)


@functools.partial(jax.jit, static_argnums=0)
def jitted_roundtrip(codec, x, seed=None):
    return roundtrip(codec, x, seed)


def has_zero(codec):
    """Whether zero decodes to zero beside other values."""
    return codec.signed or not isinstance(codec, Companded4 | Companded8)


def octaves(places, shift):
    """Values that rise evenly within octaves, ``2**shift`` of them to one of places."""
    mantissa, exponent = np.frexp(np.asarray(places, np.float64))
    octave, part = np.divmod((2 * mantissa - 1) * 2**shift, 1)
    return 2.0 ** (exponent * 2**shift + octave) * (1 + part)


def has_powers_as_scales(codec):
    """Whether the scales are powers of two."""
    if isinstance(codec, Companded8):
        return not codec.signed
    if not isinstance(codec, Companded4):
        return False
    return CURVES[codec.signed_curve if codec.signed else codec.unsigned_curve].lattice


def unpacked(codec, codes, n):
    """Codes one by one, of rows of ``n`` elements."""
    return np.asarray(codec.unpack(codes))[..., :n]


def by_group(codec, x):
    """``x`` in float64 as ``(..., groups, group)``, the last group padded."""
    x = np.atleast_1d(np.asarray(x, np.float64))
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % codec.group)]
    x = np.pad(x, padding)
    return x.reshape(*x.shape[:-1], -1, codec.group)


def grid(codec, scales):
    """All values a group can take in increasing order, from the formulas in float64."""
    scales = np.asarray(scales, np.float64)
    if isinstance(codec, AFFINE):
        step, zero = scales[..., ::2, None], scales[..., 1::2, None]
        return step * (np.arange(2**codec.bits) - zero)
    if isinstance(codec, Companded4):
        top = 7 if codec.signed else 16
        places = np.arange(top + 1)
        y = {
            "linear": places / top,
            "square": (places / top) ** 2,
            "fourth": (places / top) ** 4,
            "softsign": places / (2 * top - places),
            "log": np.where(places > 0, 2.0 ** ((places - top) / 2), 0.0),
            "float": np.append(0, FLOATS[-top:]),
            "dynamic": np.resize(DYNAMIC, top + 1) / DYNAMIC[-1],
        }[codec.signed_curve if codec.signed else codec.unsigned_curve]
        # Zero is no value of unsigned codes, but what is below the first becomes it.
        y = np.concatenate([-y[:0:-1], y]) if codec.signed else y
        return scales[..., None] * y
    if codec.signed:
        k = np.arange(-127, 128)
        if isinstance(codec, FlashOptim8):
            return scales[..., None] * k / (254 - np.abs(k))
        y = octaves(np.arange(2, 130), 1)
        y = (y - y[0]) / (y[-1] - y[0])
        return scales[..., None] * np.concatenate([-y[:0:-1], y])
    if isinstance(codec, FlashOptim8):
        return np.square(scales[..., None] * np.arange(256) / 255)
    # Zero is no value, but what is below the first becomes it.
    y = octaves(np.arange(4, 260), 2)
    return scales[..., None] * np.concatenate([[0], y / y[-1]])


def gaps(codec, x, scales):
    """The distance between the two values of the grid around each element of ``x``."""
    values = grid(codec, scales)
    above = np.sum(values[..., None, :] <= x[..., None], axis=-1)
    below = np.clip(above - 1, 0, values.shape[-1] - 2)
    return np.take_along_axis(np.diff(values), below, axis=-1)


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
@pytest.mark.parametrize("jitted", quick([True], [True, False]))
def test_error_and_sign(codec, jitted):
    run = jitted_roundtrip if jitted else roundtrip

    # Eagerly it takes long, and is the same but for what XLA fuses.
    @settings(max_examples=40 if jitted else 6)
    @hypothesis.given(arrays(codec), seeds)
    def check(x, seed):
        codes, scales, decoded = run(codec, jnp.asarray(x), seed)
        chex.assert_shape(codes, codec.codes_shape(x.shape))
        chex.assert_shape(scales, codec.scales_shape(x.shape))
        chex.assert_shape(decoded, x.shape)
        chex.assert_type([codes, scales], [jnp.uint8, codec.scale_dtype])
        chex.assert_type(decoded, jnp.float32)
        assert np.all(decoded * x >= 0)
        if has_zero(codec):
            np.testing.assert_array_equal(np.asarray(decoded)[x == 0], 0)
        # Nearest is half a gap away, but one gap from a value under code 1, which
        # may not become zero. FlashOptim8 is nearest before it is companded, and
        # its scale has 11 bits, so it is somewhat worse.
        share = 1.0 if seed is not None else 0.5
        share = 0.75 if isinstance(codec, FlashOptim8) else share
        x, decoded = by_group(codec, x), by_group(codec, decoded)
        gap = gaps(codec, x, scales)
        if not codec.signed and not isinstance(codec, FlashOptim8):
            share = np.where(x < gap, 1.0, share)
        assert np.all(np.abs(decoded - x) <= gap * (share + 1e-4))

    check()


# All that is far below the first code, and what is not.
BESIDE_AN_OUTLIER = np.float32(np.tile(np.logspace(0, -25, 40), (3, 1)))


@pytest.mark.parametrize("codec", quick(DEFAULTS, UNSIGNED), ids=repr)
def test_positive_second_moments_stay_positive(codec):
    @settings(max_examples=40)
    @hypothesis.given(arrays(codec, [(3, 40)]), seeds)
    @hypothesis.example(BESIDE_AN_OUTLIER, None)
    @hypothesis.example(BESIDE_AN_OUTLIER, np.uint32(0))
    def check(x, seed):
        codes, _, decoded = jitted_roundtrip(codec, x, seed)
        if has_zero(codec):
            assert np.all(unpacked(codec, codes, 40)[x > 0] > 0)
        assert np.all(np.asarray(decoded)[x > 0] > 0)

    check()


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_nearest_keeps_the_order(codec):
    @settings(max_examples=40)
    @hypothesis.given(arrays(codec, [(3, 64)]))
    def check(x):
        _, _, decoded = jitted_roundtrip(codec, x)
        x, decoded = by_group(codec, x), by_group(codec, decoded)
        order = np.argsort(x, axis=-1)
        assert np.all(np.diff(np.take_along_axis(decoded, order, axis=-1)) >= 0)

    check()


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_powers_of_two_only_move_the_scales(codec):
    # Published second moments are companded by their root, whose scale moves less.
    is_root = not codec.signed and isinstance(codec, FlashOptim8)

    @settings(max_examples=30)
    @hypothesis.given(arrays(codec, [(3, 40)]), st.integers(-4, 4), seeds)
    def check(x, power, seed):
        factor = np.float32(4.0**power)
        codes, scales, decoded = jitted_roundtrip(codec, x, seed)
        moved = jitted_roundtrip(codec, x * factor, seed)
        np.testing.assert_array_equal(moved[0], codes)
        np.testing.assert_array_equal(moved[2], decoded * factor)
        if not isinstance(codec, AFFINE):
            expected = scales.astype(jnp.float32) * (2.0**power if is_root else factor)
            is_zero = np.max(by_group(codec, np.abs(x)), axis=-1) == 0
            np.testing.assert_array_equal(moved[1][~is_zero], expected[~is_zero])

    check()


@pytest.mark.parametrize(
    "codec",
    quick(DEFAULTS, [x for x in STOCHASTIC if not isinstance(x, AFFINE)]),
    ids=repr,
)
def test_companded_values_never_exceed_the_scale(codec):
    @settings(max_examples=40)
    @hypothesis.given(arrays(codec, [(3, 40)]), seeds)
    def check(x, seed):
        _, scales, decoded = jitted_roundtrip(codec, x, seed)
        largest = np.max(by_group(codec, np.abs(decoded)), axis=-1)
        scales = np.asarray(scales, np.float64)
        assert np.all(largest <= scales)
        # Nothing clips: the scale is the group's largest magnitude or just above.
        needed = np.max(by_group(codec, np.abs(x)), axis=-1)
        room = 2 * (1 + 2**-7) if has_powers_as_scales(codec) else 1 + 2**-6
        assert np.all((needed <= scales) & (scales <= needed * room))

    check()


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_a_group_does_not_depend_on_its_neighbours(codec):
    @settings(max_examples=20)
    @hypothesis.given(arrays(codec, [(3, 40)]))
    def check(x):
        codes, scales, decoded = jitted_roundtrip(codec, x)
        scales = np.asarray(scales).reshape(3, 2, codec.scales_per_group)
        codes = unpacked(codec, codes, 40)
        for row in range(3):
            for i, columns in enumerate([slice(0, 32), slice(32, 40)]):
                # In an array of the same shape, as two programs may differ in where
                # they fuse a multiplication with an addition.
                alone = np.zeros_like(x)
                alone[row, columns] = x[row, columns]
                new_codes, new_scales, new_decoded = jitted_roundtrip(codec, alone)
                new_scales = np.asarray(new_scales).reshape(scales.shape)
                np.testing.assert_array_equal(
                    unpacked(codec, new_codes, 40)[row, columns], codes[row, columns]
                )
                np.testing.assert_array_equal(new_scales[row, i], scales[row, i])
                np.testing.assert_array_equal(
                    new_decoded[row, columns], decoded[row, columns]
                )

    check()


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_poison_stays_in_its_group(codec):
    for poison in (np.nan, np.inf, -np.inf):
        for seed in (None, np.uint32(1)):
            check_poison(codec, poison, seed)


def check_poison(codec, poison, seed):
    case = f"{poison} with seed {seed}"
    x = np.random.default_rng(0).random((4, 72)).astype(np.float32)
    poisoned = x.copy()
    poisoned[1, 40] = poison  # The second group of the second row.
    healthy = np.ones(x.shape, bool)
    healthy[1, 32:64] = False
    codes, _, decoded = jitted_roundtrip(codec, x, seed)
    new_codes, _, new_decoded = jitted_roundtrip(codec, poisoned, seed)
    assert not np.any(np.isfinite(new_decoded[~healthy])), case
    codes, new_codes = (unpacked(codec, x, 72) for x in (codes, new_codes))
    np.testing.assert_array_equal(new_codes[healthy], codes[healthy], case)
    np.testing.assert_array_equal(new_decoded[healthy], decoded[healthy], case)


@st.composite
def stored(draw, codec):
    """Codes and scales whose groups use the whole range, so that they fix the scale."""
    shape = (16, 4, codec.group)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = 2.0 ** draw(st.integers(-12, 12)) * (1 + rng.random(shape[:-1]))
    if has_powers_as_scales(codec):
        scales = 2.0 ** np.floor(np.log2(scales))
    scales = scales.astype(codec.scale_dtype)
    if isinstance(codec, AFFINE):
        top = 2**codec.bits - 1
        zero = rng.integers(0, top, scales.shape) * codec.signed
        scales = np.stack([scales, zero.astype(ml_dtypes.bfloat16)], axis=-1)
        codes = rng.integers(0, top, shape)
        codes[..., 0], codes[..., 1] = 0, top - 1
    elif isinstance(codec, Companded4):
        codes = rng.integers(0, 16, shape)
        if codec.signed:
            codes = np.where(codes == 8, 0, codes)  # There is one zero.
        codes[..., 0] = 15
    elif isinstance(codec, Companded8) and codec.signed:
        codes = rng.integers(0, 256, shape)
        codes[..., 0] = rng.choice([127, 255], shape[:-1])
    elif codec.signed:
        codes = rng.integers(-127, 128, shape)
        codes[..., 0] = rng.choice([-127, 127], shape[:-1])
    else:
        codes = rng.integers(0, 256, shape)
        codes[..., 0] = 255
    codes = codec.pack(jnp.asarray((codes % 256).astype(np.uint8)))
    return np.asarray(codes).reshape(16, -1), scales.reshape(16, -1)


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_what_was_decoded_encodes_to_the_same_codes(codec):
    @jax.jit
    def run(codes, scales, seed):
        shape = (*codes.shape[:-1], codes.shape[-1] * codec.codes_per_byte)
        bits = random_bits(seed, shape)
        return codec.encode(codec.decode(codes, scales, shape), bits)

    @settings(max_examples=20)
    @hypothesis.given(stored(codec), seeds)
    def check(codes_and_scales, seed):
        codes, scales = codes_and_scales
        again, scales_again = run(codes, scales, seed)
        np.testing.assert_array_equal(scales_again, scales)
        # A quotient's last bit can make a stochastic code one of its neighbours.
        wrong = np.mean(again != codes)
        assert wrong == 0 if seed is None else wrong < 1e-3

    check()


@pytest.mark.parametrize("codec", quick(DEFAULTS, STOCHASTIC), ids=repr)
def test_the_largest_floats_stay_finite(codec):
    # Rounding up to the next of Affine8's even steps may leave float32's last 1 %.
    top = 3.3e38 if isinstance(codec, AFFINE) else np.finfo(np.float32).max
    x = np.full((8, 32), 1e38, np.float32)
    x[:, 0] = top
    if codec.signed:
        x[::2, 1] = -top
    # Companded8's signed scales end at 2**126, and larger values saturate there. Two
    # codes of 4 bits may be far apart.
    least = 2.0**126 * (1 - 2**-6) if codec.bits == 8 else 5e37
    for seed in (None, *map(np.uint32, range(4))):
        _, _, decoded = jitted_roundtrip(codec, x, seed)
        assert np.all(np.isfinite(decoded)), f"seed {seed}"
        assert np.all(np.abs(decoded) >= least), f"seed {seed}"


@pytest.mark.parametrize("codec", quick(DEFAULTS, ALL), ids=repr)
def test_other_floats_are_computed_on_in_float32(codec):
    for dtype in (jnp.bfloat16, jnp.float16):
        x = np.random.default_rng(0).random((3, 40)).astype(dtype)
        wide = x.astype(np.float32)
        found, expected = (codec.encode(jnp.asarray(x)) for x in (x, wide))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, str(dtype))
            assert a.dtype == b.dtype, str(dtype)


@pytest.mark.parametrize("codec", quick(DEFAULTS[:1], ALL), ids=repr)
def test_empty_arrays(codec):
    for shape in EMPTY_SHAPES:
        for seed in (None, np.uint32(0)):
            codes, scales, decoded = roundtrip(codec, jnp.zeros(shape), seed)
            case = f"{shape} with seed {seed}"
            assert codes.shape == codec.codes_shape(shape), case
            assert decoded.shape == shape, case
            assert scales.shape == codec.scales_shape(shape), case


@pytest.mark.full
@pytest.mark.parametrize("codec", CODECS.values(), ids=repr)
def test_zeros_are_stored_as_zeros(codec):
    _, _, decoded = roundtrip(codec, jnp.zeros((2, 300)), np.uint32(5))
    np.testing.assert_array_equal(decoded, 0)


@pytest.mark.parametrize(
    ("codec", "shape", "codes_shape", "scales_shape"),
    [
        (Companded8(), (), (), (1,)),
        (Companded8(), (4, 32), (4, 32), (4, 1)),
        (Companded8(), (4, 33), (4, 33), (4, 2)),
        (Companded8(group=64), (2, 3, 65), (2, 3, 65), (2, 3, 2)),
        (FlashOptim8(), (33,), (33,), (2,)),
        (Affine8(), (4, 129), (4, 129), (4, 4)),
        (Affine8(group=32), (), (), (2,)),
        (Companded4(), (), (), (1,)),
        (Companded4(), (4, 32), (4, 16), (4, 1)),
        (Companded4(), (4, 33), (4, 17), (4, 2)),
        (Companded4(group=64), (2, 3, 65), (2, 3, 33), (2, 3, 2)),
        (Affine4(), (4, 129), (4, 65), (4, 4)),
    ],
)
def test_shapes(codec, shape, codes_shape, scales_shape):
    codes, scales, decoded = jax.eval_shape(
        lambda x: roundtrip(codec, x, None), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert codec.scales_shape(shape) == scales.shape == scales_shape
    assert codec.codes_shape(shape) == codes.shape == codes_shape
    assert decoded.shape == shape


@pytest.mark.parametrize("name", CODECS)
def test_codecs_are_values(name):
    codec = get_codec(name)
    assert codec.name == name
    assert codec == type(codec)() and hash(codec) == hash(type(codec)())
    assert codec != dataclasses.replace(codec, signed=False)
    assert codec != dataclasses.replace(codec, group=16)
    assert not callable(codec)
    assert get_codec(codec) is codec
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.group = 16


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(
        ValueError, match="'int8'.*companded8, companded4, flashoptim, affine8"
    ):
        get_codec("int8")


@pytest.mark.parametrize("group", [0, -32, 32.0, "32", None])
def test_bad_groups_are_told_a_good_one(group):
    with pytest.raises(ValueError, match="positive int.*group=32"):
        Companded8(group=group)


def test_odd_groups_are_told_that_two_codes_share_a_byte():
    with pytest.raises(ValueError, match="share a byte.*even, got 33"):
        Companded4(group=33)


@pytest.mark.parametrize(
    ("field", "curve"), [("signed_curve", "cubic"), ("unsigned_curve", "dynamic")]
)
def test_unknown_curves_are_told_the_known_ones(field, curve):
    with pytest.raises(ValueError, match=f"{field} '{curve}'.*linear, square, fourth"):
        Companded4(**{field: curve})


def test_neighbours_share_a_byte():
    codes = np.arange(256).reshape(2, 128) % 16
    stored = nibbles.pack(jnp.asarray(codes, jnp.uint8))
    np.testing.assert_array_equal(stored, codes[:, ::2] + 16 * codes[:, 1::2])
    np.testing.assert_array_equal(nibbles.unpack(stored), codes)
