"""Codecs: how an array is stored in 8-bit codes and a scale for each group.

``encode`` turns a float array into ``(codes, scales)`` and ``decode`` turns them back.
Both are pure, elementwise but for the group's scale, and work along the last axis, so
codes keep the shape of the array and scales its rank.
"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard
from jax.typing import DTypeLike

from optax_flash.numerics import groups, hashing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(abc.ABC):
    """A storage format for one array: uint8 codes and a scale for each group.

    Invariants, for an array ``x`` of shape ``(*rows, n)``:

    - ``codes`` is uint8 of ``codes_shape(x.shape)``, equal to ``x.shape`` for 8 bits;
    - ``scales`` has shape ``(*rows, ceil(n / group) * scales_per_group)``;
    - a 0-d array is stored like an array of shape ``(1,)``, with 0-d codes;
    - zero decodes to exactly zero, and the sign of what decodes is the sign of ``x``;
    - a group that holds a NaN or an infinity decodes to nothing finite.

    Codecs are frozen and not callable, so that ``optax.inject_hyperparams`` passes
    them through and equal codecs share one compiled function.

    Attributes:
      signed: whether values may be negative. Momenta are signed, second moments are
        not; :func:`optax_flash.compress` sets this by the state field.
      group: how many neighbours along the last axis share a scale.
    """

    signed: bool = True
    group: int = 32

    name: ClassVar[str]
    scale_dtype: ClassVar[DTypeLike]
    scales_per_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(
                f"{type(self).__name__}: group must be a positive int, got "
                f"{self.group!r}. Pass for example group=32."
            )

    def encode(
        self, x: jax.Array, bits: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Stores an array.

        Args:
          x: float array of any shape; computed on in float32.
          bits: uint32 array of the same shape that decides the stochastic rounding,
            see :func:`optax_flash.numerics.hashing.bits`; None rounds to nearest.

        Returns:
          ``(codes, scales)``.
        """
        whole = groups.with_whole_groups(x, self.group)
        x32 = groups.split(whole.astype(jnp.float32), self.group)
        if bits is not None:
            bits = groups.split(bits, self.group)
        codes, planes = self.encode_groups(x32, bits)
        scales = jnp.stack(planes, axis=-1).reshape(self.scales_shape(x.shape))
        codes = groups.merge(codes, x.shape)
        if whole is not x:
            codes = reshard(codes, jax.typeof(x).sharding)
        return codes, scales

    def decode(
        self, codes: jax.Array, scales: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """The float32 array of ``shape`` that ``(codes, scales)`` stand for."""
        whole = groups.with_whole_groups(codes, self.group)
        pairs = groups.split(scales, self.scales_per_group)
        planes = tuple(pairs[..., i] for i in range(self.scales_per_group))
        x = self.decode_groups(groups.split(whole, self.group), planes)
        x = groups.merge(x, shape)
        return x if whole is codes else reshard(x, jax.typeof(codes).sharding)

    def encode_groups(
        self, x: jax.Array, bits: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Stores groups: what :meth:`encode` and every kernel do with a tile.

        Args:
          x: float32 of shape ``(..., group)``.
          bits: uint32 of the same shape, or None.

        Returns:
          Codes, uint8 of the shape of ``x``, and ``scales_per_group`` arrays of shape
          ``(...,)``.
        """
        maxima = tuple(jnp.max(key, axis=-1) for key in self.keys(x))
        scales = self.scales_from(maxima)
        return self.codes(x, scales, maxima, bits), scales

    @abc.abstractmethod
    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """int32 arrays like ``x`` whose maxima over a group make its scales.

        Integers, as XLA's CPU backend loses NaN in a maximum of floats, and computes
        one of integers in vectors.
        """

    @abc.abstractmethod
    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The scales of groups from the maxima of their :meth:`keys`."""

    @abc.abstractmethod
    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        """The codes of groups whose scales and maxima are known."""

    @abc.abstractmethod
    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        """The inverse of :meth:`encode_groups`, float32."""

    def saturated(self, codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Which elements have an outermost code, the largest of either sign.

        Args:
          codes: of an array of ``shape``.
          shape: the array's.

        Returns:
          bool of ``shape``.
        """
        del shape
        if self.signed:
            return jnp.abs(_from_signed_bytes(codes)) == 127
        return codes == 255

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of an array of ``shape``."""
        return shape

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of an array of ``shape``."""
        *rows, n = shape or (1,)
        return *rows, groups.num_groups(n, self.group) * self.scales_per_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companded8(Codec):
    r"""The default: companded 8-bit codes, rounded without bias.

    With ``s`` the group's largest magnitude, rounded **up** to bfloat16, and ``k`` an
    integer code:

    .. math::
      \text{signed:}\quad |x| = s \frac{k}{254 - k},\; k \in 0..127
      \qquad
      \text{unsigned:}\quad x = \left(s \frac{k}{255}\right)^2,\; k \in 0..255

    (unsigned, ``s`` is the largest square root). The value lies between two codes and
    takes the upper one with the probability that makes the *decoded* value right in
    the mean. Rounding the scale up and dividing by what is stored means that nothing
    clips and the scale adds no error. A positive unsigned value never takes code 0,
    so that ``1 / sqrt(v)`` stays bounded beside an outlier.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Companded8
      >>> codec = Companded8(signed=False)
      >>> codes, scales = codec.encode(jnp.array([1.0, 0.25, 1e-9, 0.0]))
      >>> codes
      Array([255, 127,   1,   0], dtype=uint8)
      >>> scales
      Array([1], dtype=bfloat16)

    References:
      The curves are FlashOptim's (arXiv 2602.23349); rounding, scales and the guarded
      zero differ.
    """

    name: ClassVar[str] = "companded8"
    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (_magnitude_bits(x),)

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest = lax.bitcast_convert_type(maxima[0], jnp.float32)
        return (_round_up_bf16(largest if self.signed else jnp.sqrt(largest)),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        del maxima
        inverse = _reciprocal(scales[0])[..., None]
        noise = _noise(bits)
        if self.signed:
            # y has the real-valued code t = 254 y / (1 + y) = 254 - 254 / w. With noise
            # n, the value lies in the last n-th of the way between two values where
            # t + n, less what the curve bends in between, reaches the upper code. The
            # code is its floor, and that the nearest whole number to a half less.
            w = 1.0 + jnp.abs(x) * inverse
            bend = noise * (np.float32(1 / 254) - np.float32(1 / 254) * noise)
            k = (253.5 - 254.0 / w) + (noise - bend * w)
            return _bytes(jnp.copysign(jnp.minimum(k, 127.25), x))
        y = jnp.minimum(jnp.sqrt(x) * (255.0 * inverse), 255.0)
        k = jnp.floor(y)
        # (y**2 - k**2) / ((k + 1)**2 - k**2), the way from one value to the next.
        upper = (1.0 - noise) * (2.0 * k + 1.0) < (y - k) * (y + k)
        k = jnp.where(upper, k + 1.0, k)
        return _bytes(jnp.where(x > 0, jnp.maximum(k, 1.0), k))

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        s = scales[0].astype(jnp.float32)[..., None]
        if self.signed:
            k = _from_signed_bytes(codes)
            return s * (k / (254.0 - jnp.abs(k)))
        return jnp.square(_from_unsigned_bytes(codes) * (s * _BELOW_1_255TH))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptim8(Codec):
    r"""The published FlashOptim format, bit for bit.

    With ``s`` the group's largest magnitude (at least 1e-12), ``n = |x| / s`` and
    float16 scales:

    .. math::
      \text{signed:}\quad k = \lfloor 127 \tfrac{2 n}{1 + n} + \tfrac12 \rfloor
      \qquad
      \text{unsigned:}\quad k = \lfloor 255 \sqrt{x} / s + \tfrac12 \rfloor

    For comparison with published results; the default, :class:`Companded8`, costs the
    same bytes. Rounding to nearest freezes slow averages and float16 scales lose
    gradients below 1e-7 and above 6e4.

    The publication groups the flattened array; here groups follow the last axis. Both
    agree where rows are multiples of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import FlashOptim8
      >>> codes, scales = FlashOptim8().encode(jnp.array([1.0, -1.0, 0.5]))
      >>> codes.view(jnp.int8)
      Array([ 127, -127,   85], dtype=int8)

    References:
      FlashOptim, arXiv 2602.23349, section 3.2.
    """

    name: ClassVar[str] = "flashoptim"
    scale_dtype: ClassVar[DTypeLike] = jnp.float16

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (_magnitude_bits(x),)

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (self._divisor(maxima).astype(jnp.float16),)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        del scales, bits  # Divides before the scale is rounded; is deterministic.
        magnitude = jnp.abs(x) if self.signed else jnp.sqrt(x)
        # XLA would divide by a bare broadcast through its reciprocal, which is another
        # last bit for a quarter of the values and another code for one in a million.
        divisor = self._divisor(maxima)[..., None]
        divisor = jnp.where(magnitude == 0, 1.0, divisor)
        if self.signed:
            y = x / divisor
            z = 2.0 * y / (1.0 + jnp.abs(y))
            return _bytes(jnp.floor(127.0 * z + 0.5))
        return _bytes(jnp.floor(255.0 * (magnitude / divisor) + 0.5))

    def _divisor(self, maxima: tuple[jax.Array, ...]) -> jax.Array:
        largest = lax.bitcast_convert_type(maxima[0], jnp.float32)
        largest = largest if self.signed else jnp.sqrt(largest)
        # Not a maximum of floats, which could lose a NaN.
        return jnp.where(largest < 1e-12, np.float32(1e-12), largest)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        s = scales[0].astype(jnp.float32)[..., None]
        # XLA multiplies by the reciprocal where it is asked to divide by 127 or 255.
        # These forms round less often, and stay within 3 ulp of the published order.
        if self.signed:
            k = _from_signed_bytes(codes)
            return k / (254.0 - jnp.abs(k)) * s
        k = _from_unsigned_bytes(codes)
        return jnp.square(k) * (jnp.square(s) * np.float32(1 / 255**2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine8(Codec):
    r"""Uniform codes between the group's minimum and maximum.

    .. math:: x = s (k - z),\; k \in 0..255

    The range is widened to hold zero, ``s`` is a 254th of it rounded up to bfloat16
    and the zero point ``z`` is a whole code, so zero is exact and nothing clips.
    Rounding is stochastic. A positive unsigned value never takes code 0. ``scales``
    holds ``s`` and ``z`` of each group side by side.

    Uniform codes spend few levels on small values: prefer :class:`Companded8`,
    above all for second moments.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flash import Affine8
      >>> codec = Affine8()
      >>> codes, scales = codec.encode(jnp.array([-1.0, 0.0, 1.0, 0.5]))
      >>> codes
      Array([  1, 127, 253, 190], dtype=uint8)
      >>> scales
      Array([0.00793457, 127], dtype=bfloat16)
    """

    group: int = 128

    name: ClassVar[str] = "affine8"
    scale_dtype: ClassVar[DTypeLike] = jnp.bfloat16
    scales_per_group: ClassVar[int] = 2

    def keys(self, x: jax.Array) -> tuple[jax.Array, ...]:
        # The third tells of a NaN, which has no place in the order of the others.
        return _ordered_bits(x), _ordered_bits(-x), _magnitude_bits(x)

    def scales_from(self, maxima: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        high, negated_low = (
            lax.bitcast_convert_type(jnp.maximum(key, 0), jnp.float32)
            for key in maxima[:2]
        )
        step = high * np.float32(1 / 254) + negated_low * np.float32(1 / 254)
        # Adds nothing, but a NaN where the group is not finite.
        largest = lax.bitcast_convert_type(maxima[2], jnp.float32)
        step = _round_up_bf16(step + 0.0 * largest)
        # A true division: what was decoded must find its zero point again.
        divisor = jnp.where(step == 0, 1.0, step.astype(jnp.float32))
        zero = jnp.ceil(negated_low / divisor)
        return step, zero.astype(jnp.bfloat16)

    def codes(
        self,
        x: jax.Array,
        scales: tuple[jax.Array, ...],
        maxima: tuple[jax.Array, ...],
        bits: jax.Array | None,
    ) -> jax.Array:
        del maxima
        step, zero = scales
        inverse = _reciprocal(step)[..., None]
        y = x * inverse + zero.astype(jnp.float32)[..., None]
        k = jnp.floor(y)
        k = jnp.where(1.0 - _noise(bits) < y - k, k + 1.0, k)
        k = jnp.minimum(jnp.maximum(k, 0.0), 255.0)
        if not self.signed:
            k = jnp.where(x > 0, jnp.maximum(k, 1.0), k)
        return _bytes(k)

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        step, zero = (s.astype(jnp.float32)[..., None] for s in scales)
        return step * (_from_unsigned_bytes(codes) - zero)

    def saturated(self, codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        del shape
        return (codes == 255) | (codes == 0) if self.signed else codes == 255


CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec() for codec in (Companded8, FlashOptim8, Affine8)}
)
"""Every codec by its name, with its default group."""


def get_codec(codec: str | Codec) -> Codec:
    """The codec of a name; a codec passes through.

    Raises:
      ValueError: nothing is known by that name.
    """
    if isinstance(codec, Codec):
        return codec
    if codec in CODECS:
        return CODECS[codec]
    raise ValueError(
        f"Unknown codec {codec!r}. Known names: {', '.join(CODECS)}. None leaves an "
        "array as it is; a Codec object sets the group too, as in "
        "optax_flash.Companded8(group=64)."
    )


_BELOW_1_255TH = np.nextafter(np.float32(1 / 255), np.float32(0))
"""Rounded down, so that no code exceeds the scale: encoding again keeps the scale."""


def _noise(bits: jax.Array | None) -> jax.Array | np.float32:
    """How much of the way to the upper code rounding forgives, in (0, 1)."""
    if bits is None:
        return np.float32(0.5)
    return hashing.uniform(bits) + np.float32(2**-25)


def _magnitude_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of magnitudes, NaN last."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of the values; those of positive ones are their bits."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@jax.jit
def _round_up_bf16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is no less than ``x >= 0``; NaN if not finite."""
    up = lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(0xFFFF)
    # At most 2**126, larger values saturate: reciprocals would be subnormal, which
    # are flushed to zero.
    finite = jnp.minimum(up >> np.uint32(16), np.uint32(0x7E80))
    up = jnp.where(up > np.uint32(0x7F80FFFE), np.uint32(0x7FC0), finite)
    return lax.bitcast_convert_type(up.astype(jnp.uint16), jnp.bfloat16)


@jax.jit
def _reciprocal(scale: jax.Array) -> jax.Array:
    """``1 / scale`` in float32, for bfloat16 scales: 0 or 2**-126 to 2**126.

    Finite for 0. Integers and three steps of Newton's instead of a division, for which
    XLA's CPU backend would make a loop of its own.
    """
    bits = lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
    exponent = np.int32(254 << 23) - (bits & np.int32(0x7F800000))
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    mantissa = (bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000)
    m = lax.bitcast_convert_type(mantissa, jnp.float32)
    r = np.float32(24 / 17) - np.float32(8 / 17) * m
    for _ in range(3):
        r = r * (2.0 - m * r)
    return power * r


def _bytes(k: jax.Array) -> jax.Array:
    """The nearest whole numbers of -128 to 255 as bytes; two's complement below 0."""
    # In a float of this size the last bit counts ones, so the sum rounds. A conversion
    # would first have to see to NaN and to what is out of range.
    shifted = lax.bitcast_convert_type(k + np.float32(1.5 * 2**23), jnp.int32)
    return shifted.astype(jnp.uint8)


def _from_signed_bytes(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _from_unsigned_bytes(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.int32).astype(jnp.float32)
