r"""Splitting a float32 weight into a 16-bit param and an 8- or 16-bit residual.

The bits of a float are its sign and a count of the magnitudes below its own. Let
:math:`E(w)` be that count for float32 (for a float16 param: for the format with
float16's exponent and 23 bits of mantissa). A param is the count divided by
:math:`2^m`, rounded half up, with ``m`` the mantissa bits that it lacks (16 for
bfloat16, 13 for float16). The residual is what is left, and a half so that it is never
negative, in units of half a step of the param over 128 (8 bits) or in single counts
(16 bits):

.. math:: E(w) + 2^{m - 1} = 2^m E(p) + r, \qquad 0 \le r < 2^m

So param and residual are the upper bits of a sum and those below, and a kernel puts
them together by moving bytes. All of it is integer arithmetic: exact for every float,
subnormals and powers of two included, and untouched by a compiler's freedom to keep
excess precision.
"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

SPLIT_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
"""The dtypes that take a residual."""

_MISSING_BITS = {SPLIT_DTYPES[0]: 16, SPLIT_DTYPES[1]: 13}


def is_split(x: Any) -> bool:
    """Whether a param of this dtype has a residual: bfloat16 and float16 have."""
    return hasattr(x, "dtype") and x.dtype in SPLIT_DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualCodec(abc.ABC):
    """How the difference between a float32 weight and its 16-bit param is stored.

    Attributes:
      bits: 24 (an 8-bit residual) or 32 (a 16-bit one): what param and residual
        occupy together.
    """

    bits: int = 24

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.bits not in (24, 32):
            raise ValueError(
                f"{type(self).__name__}: bits must be 24 (8-bit residual) or 32 "
                f"(16-bit residual), got {self.bits!r}."
            )

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The residual's dtype. Each codec has its own, so an array tells which."""

    @abc.abstractmethod
    def zero(self, dtype: DTypeLike) -> int:
        """The residual of weights that are their params of ``dtype``."""

    @abc.abstractmethod
    def split(
        self, weight: jax.Array, dtype: DTypeLike, bits: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """``(param, residual)`` of a float32 weight; both of its shape.

        Args:
          weight: float32, any shape.
          dtype: the param's dtype, bfloat16 or float16.
          bits: uint32 of the weight's shape, whose lowest decide the stochastic
            rounding; None rounds to nearest.
        """

    @abc.abstractmethod
    def residual(
        self, weight: jax.Array, param: jax.Array, bits: jax.Array | None = None
    ) -> jax.Array:
        """The residual of a float32 weight against a param that is already fixed.

        Saturates where the param is further than half a step from the weight.
        """

    @abc.abstractmethod
    def join(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        """The float32 weight that param and residual stand for."""

    @abc.abstractmethod
    def half_code(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        """Half the distance between neighbouring weights, see :func:`half_code`."""

    @abc.abstractmethod
    def is_stochastic(self, dtype: DTypeLike) -> bool:
        """Whether weights with params of ``dtype`` are rounded stochastically."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactResidual(ResidualCodec):
    """The default: param and residual are pieces of the float's own bits.

    With bfloat16 params and 32 bits every float32 is kept exactly, with 24 bits every
    float32 whose low 8 bits are zero. Other weights are rounded stochastically to 24
    bits, so a step far below one code still moves the weight in the mean.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import ExactResidual
      >>> codec = ExactResidual(bits=32)
      >>> param, residual = codec.split(jnp.float32([3.14159265]), jnp.bfloat16)
      >>> param
      Array([3.14062], dtype=bfloat16)
      >>> codec.join(param, residual)
      Array([3.1415927], dtype=float32)
    """

    name: ClassVar[str] = "exact"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bits == 24 else np.uint16)

    def zero(self, dtype: DTypeLike) -> int:
        missing = _MISSING_BITS[np.dtype(dtype)]
        return 1 << (missing - 1 - self._dropped(missing))

    def split(
        self, weight: jax.Array, dtype: DTypeLike, bits: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        missing = _MISSING_BITS[np.dtype(dtype)]
        dropped = self._dropped(missing)
        pieces = _to_count(weight, dtype) + self._half_and_noise(missing, bits)
        param = lax.bitcast_convert_type(
            (pieces >> missing).astype(jnp.int16), np.dtype(dtype)
        )
        residual = (pieces >> dropped) & np.int32((1 << (missing - dropped)) - 1)
        return param, residual.astype(self.dtype)

    def residual(
        self, weight: jax.Array, param: jax.Array, bits: jax.Array | None = None
    ) -> jax.Array:
        missing = _MISSING_BITS[param.dtype]
        count, param_count = _to_count(weight, param.dtype), _param_to_count(param)
        rest = count + self._half_and_noise(missing, bits) - param_count
        rest = jnp.minimum(jnp.maximum(rest, 0), np.int32((1 << missing) - 1))
        # Of the other sign, the weight is below all that a residual can reach.
        same_sign = (count ^ param_count) & _sign_bit(missing) == 0
        rest = jnp.where(same_sign, rest, 0)
        return (rest >> self._dropped(missing)).astype(self.dtype)

    def join(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        missing = _MISSING_BITS[param.dtype]
        rest = residual.astype(jnp.int32) << self._dropped(missing)
        count, half = _param_to_count(param) + rest, np.int32(1 << (missing - 1))
        # Less than half is there only if the param was set to zero from outside.
        magnitude = count & ~_sign_bit(missing)
        count = jnp.where(magnitude >= half, count - half, count)
        return _from_count(count, param.dtype)

    def half_code(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        # Half a unit in the last place of a float32 is 2**-24 of its power of two.
        dropped = self._dropped(_MISSING_BITS[param.dtype])
        power = _power_of_two(self.join(param, residual), param.dtype)
        return power * np.float32(2.0 ** (dropped - 24))

    def is_stochastic(self, dtype: DTypeLike) -> bool:
        return self._dropped(_MISSING_BITS[np.dtype(dtype)]) > 0

    def _dropped(self, missing: int) -> int:
        """How many of the missing mantissa bits the residual has no room for."""
        return max(0, missing - (8 if self.bits == 24 else 16))

    def _half_and_noise(self, missing: int, bits: jax.Array | None) -> Any:
        """What is added to a count before bits are cut off."""
        half, dropped = np.int32(1 << (missing - 1)), self._dropped(missing)
        if not dropped:
            return half
        if bits is None:
            return half + np.int32(1 << (dropped - 1))
        return half + (bits & np.uint32((1 << dropped) - 1)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptimResidual(ResidualCodec):
    r"""The published FlashOptim residual, bit for bit.

    .. math:: r = \mathrm{round}\left(N \frac{w - p}{\mathrm{ulp}(p) / 2}\right)

    with :math:`N` = 127 (24 bits) or 32767 (32 bits), ties away from zero. It is
    deterministic: a step below half a code does not move the weight, ever.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import FlashOptimResidual
      >>> codec = FlashOptimResidual()
      >>> param, residual = codec.split(jnp.float32([3.14159265]), jnp.bfloat16)
      >>> residual
      Array([16], dtype=int8)

    References:
      FlashOptim, arXiv 2602.23349, section 3.1.
    """

    name: ClassVar[str] = "flashoptim"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.bits == 24 else np.int16)

    @property
    def _levels(self) -> np.float32:
        return np.float32(127 if self.bits == 24 else 32767)

    def zero(self, dtype: DTypeLike) -> int:
        del dtype
        return 0

    def split(
        self, weight: jax.Array, dtype: DTypeLike, bits: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        param = round_to(weight, dtype)
        return param, self.residual(weight, param, bits)

    def residual(
        self, weight: jax.Array, param: jax.Array, bits: jax.Array | None = None
    ) -> jax.Array:
        del bits  # The published rounding is deterministic.
        # 1 / half_ulp(param) in two factors: one alone would leave float32's range.
        log2 = -_log2_half_ulp(param)
        half = log2 >> 1
        distance = weight - param.astype(jnp.float32)
        scaled = distance * _exp2(half) * _exp2(log2 - half)
        scaled = jnp.clip(scaled, -1.0, 1.0) * self._levels
        # Add a half and truncate, in that order: what rounding half away means here.
        away = jnp.floor(jnp.abs(scaled) + 0.5)
        return jnp.where(scaled < 0, -away, away).astype(self.dtype)

    def join(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        log2 = _log2_half_ulp(param)
        half = log2 >> 1
        fraction = residual.astype(jnp.float32) / self._levels
        distance = fraction * _exp2(half) * _exp2(log2 - half)
        return param.astype(jnp.float32) + distance

    def half_code(self, param: jax.Array, residual: jax.Array) -> jax.Array:
        del residual
        return half_code(param) / (2 * self._levels)

    def is_stochastic(self, dtype: DTypeLike) -> bool:
        del dtype
        return False


RESIDUAL_CODECS: Mapping[str, type[ResidualCodec]] = MappingProxyType(
    {codec.name: codec for codec in (ExactResidual, FlashOptimResidual)}
)
"""Every residual codec by its name."""


def get_residual_codec(
    codec: str | ResidualCodec, bits: int | None = None
) -> ResidualCodec:
    """The residual codec of a name; a codec passes through.

    Args:
      codec: a codec or its name.
      bits: 24 or 32; None for those of the codec, and 24 for a name.

    Raises:
      ValueError: nothing is known by that name, bits other than 24 and 32, or bits that
        are not the codec's.
    """
    known = type(codec) in RESIDUAL_CODECS.values()
    if isinstance(codec, ResidualCodec) and known:
        if bits in (None, codec.bits):
            return codec
        raise ValueError(
            f"bits is {bits!r}, but the residual's codec is {codec!r}. Give bits to "
            "one of them."
        )
    if isinstance(codec, str) and codec in RESIDUAL_CODECS:
        return RESIDUAL_CODECS[codec](bits=24 if bits is None else bits)
    raise ValueError(
        f"Unknown residual codec {codec!r}. Known names: {', '.join(RESIDUAL_CODECS)}. "
        "Codecs of optimizer states are for optax_flash.compress."
    )


def codec_of(residual: jax.Array) -> ResidualCodec:
    """The codec that made a residual, which its dtype tells."""
    for codec in RESIDUAL_CODECS.values():
        for bits in (24, 32):
            if codec(bits=bits).dtype == residual.dtype:
                return codec(bits=bits)
    raise ValueError(
        f"No residual codec stores {residual.dtype}. Pass the state of master_weights "
        "as it came from init or update."
    )


def half_code(param: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    """Half the distance between neighbouring weights as they are stored.

    Where weights are rounded to nearest, a smaller step does not change the weight.
    (From a power of two towards zero, half of that is enough.)

    Args:
      param: floating, any shape.
      residual: the param's; None where it has none, which makes this half a unit in
        its last place.

    Returns:
      float32 of the param's shape.
    """
    if residual is not None:
        return codec_of(residual).half_code(param, residual)
    eps = jnp.finfo(param.dtype).eps
    return _power_of_two(param, param.dtype) * np.float32(eps / 2)


def round_to(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``weight.astype(dtype)`` to nearest even, in integers.

    XLA may keep excess precision across a pair of casts, so that a value cast to
    bfloat16 and back is not rounded at all. This is rounded always.
    """
    missing = _MISSING_BITS[np.dtype(dtype)]
    count = _round_to_even(weight, dtype) >> missing
    return lax.bitcast_convert_type(count.astype(jnp.int16), np.dtype(dtype))


def widened(param: jax.Array) -> jax.Array:
    """``param.astype(float32)``, of which a compiler sees that it undoes a rounding."""
    if param.dtype != jnp.bfloat16:
        return param.astype(jnp.float32)
    return _from_count(_param_to_count(param), param.dtype)


def rounded(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The same values in float32."""
    missing = _MISSING_BITS[np.dtype(dtype)]
    count = _round_to_even(weight, dtype) & np.int32(-(1 << missing))
    return _from_count(count, dtype)


def _round_to_even(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The rounded count in the upper bits, and anything in those to cut off."""
    missing = _MISSING_BITS[np.dtype(dtype)]
    count = _to_count(weight, dtype)
    odd = (count >> missing) & 1
    return count + np.int32((1 << (missing - 1)) - 1) + odd


# A float16 is read as its own 15 bits and 13 more of mantissa. Its exponent bias is 112
# less than float32's, and below 2**-14 its values are evenly spaced.
_FP16_REBIAS = np.int32(112 << 23)
_FP16_SMALLEST_NORMAL = np.float32(2**-14)
_FP16_INF = np.int32(31 << 23)
_FP16_NAN = np.int32(31 << 23 | 1 << 22)
_FP32_INF = np.int32(255 << 23)
_FP32_NAN = np.int32(255 << 23 | 1 << 22)


def _sign_bit(missing: int) -> np.int32:
    """Where a count's sign is: above the 15 bits of a param and those it lacks."""
    return np.uint32(1 << (15 + missing)).astype(np.int32)


def _to_count(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The signed count of a float32, read with the exponent range of ``dtype``; int32.

    All NaN become one quiet NaN: rounding up could carry a payload into the sign.
    """
    bits = lax.bitcast_convert_type(weight, jnp.int32)
    if np.dtype(dtype) == jnp.bfloat16:
        return jnp.where(weight == weight, bits, _FP32_NAN)
    magnitude = bits & np.int32(0x7FFFFFFF)
    exact = jnp.minimum(jnp.abs(weight), _FP16_SMALLEST_NORMAL) * np.float32(2**37)
    fixed = exact.astype(jnp.int32)
    # What is cut off sets the last bit, so that a later rounding sees no false tie.
    fixed = fixed | (fixed.astype(jnp.float32) < exact).astype(jnp.int32)
    count = jnp.where(
        jnp.abs(weight) < _FP16_SMALLEST_NORMAL,
        fixed,
        jnp.minimum(magnitude - _FP16_REBIAS, _FP16_INF),
    )
    count = jnp.where(magnitude > _FP32_INF, _FP16_NAN, count)
    return count | jnp.where(bits < 0, _sign_bit(_MISSING_BITS[np.dtype(dtype)]), 0)


def _from_count(count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The inverse of :func:`_to_count`."""
    if np.dtype(dtype) == jnp.bfloat16:
        return lax.bitcast_convert_type(count, jnp.float32)
    sign = _sign_bit(_MISSING_BITS[np.dtype(dtype)])
    magnitude = count & ~sign
    fixed = magnitude.astype(jnp.float32) * np.float32(2**-37)
    normal = jnp.where(
        magnitude >= _FP16_INF,
        (magnitude - _FP16_INF) | _FP32_INF,
        magnitude + _FP16_REBIAS,
    )
    subnormal = magnitude < np.int32(1 << 23)
    normal = jnp.where(subnormal, lax.bitcast_convert_type(fixed, jnp.int32), normal)
    negative = jnp.where(count & sign == 0, 0, np.int32(-(2**31)))
    return lax.bitcast_convert_type(normal | negative, jnp.float32)


def _param_to_count(param: jax.Array) -> jax.Array:
    """The signed count of a param; int32."""
    bits = lax.bitcast_convert_type(param, jnp.uint16).astype(jnp.int32)
    return bits << _MISSING_BITS[param.dtype]


def _power_of_two(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The largest power of two up to ``|x|``, or the smallest normal of ``dtype``."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    power = lax.bitcast_convert_type(bits & np.int32(0x7F800000), jnp.float32)
    return jnp.maximum(power, np.float32(jnp.finfo(dtype).smallest_normal))


def _log2_half_ulp(param: jax.Array) -> jax.Array:
    """``log2(ulp(param)) - 1`` as int32; subnormals share the smallest normal's."""
    mantissa, bias = (7, 127) if param.dtype == jnp.bfloat16 else (10, 15)
    count = lax.bitcast_convert_type(param, jnp.int16).astype(jnp.int32) & 0x7FFF
    exponent = jnp.maximum(count >> mantissa, 1) - bias
    return exponent - mantissa - 1


def _exp2(exponent: jax.Array) -> jax.Array:
    """``2.0 ** exponent`` exactly, for exponents of normal floats."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
