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

    @abc.abstractmethod
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

    @abc.abstractmethod
    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        """The inverse of :meth:`encode_groups`, float32."""

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

    def encode_groups(
        self, x: jax.Array, bits: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        noise = _noise(bits)
        magnitude = jnp.abs(x) if self.signed else jnp.sqrt(x)
        scales = _round_up_bf16(_group_max(magnitude))
        s = scales.astype(jnp.float32)[..., None]
        y = magnitude / jnp.maximum(s, _TINY)
        if self.signed:
            k = jnp.floor(254.0 * y / (1.0 + y))
            # (y - value(k)) / (value(k + 1) - value(k)), with value(k) = k / (254 - k).
            upper = (y * (254.0 - k) - k) * (253.0 - k) * np.float32(1 / 254)
            k = jnp.minimum(k + (noise < upper), 127.0)
            codes = _signed_bytes(k * jnp.sign(x))
        else:
            y = 255.0 * y
            k = jnp.floor(y)
            # The same with value(k) = k**2.
            upper = (y - k) * (y + k) / (2.0 * k + 1.0)
            k = jnp.minimum(k + (noise < upper), 255.0)
            k = jnp.maximum(k, (x > 0).astype(jnp.float32))
            codes = _unsigned_bytes(k)
        return codes, (scales,)

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

    def encode_groups(
        self, x: jax.Array, bits: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        del bits  # The published rounding is deterministic.
        magnitude = jnp.abs(x) if self.signed else jnp.sqrt(x)
        s = _group_max(magnitude, at_least=1e-12)
        # XLA would divide by a bare broadcast through its reciprocal, which is another
        # last bit for a quarter of the values and another code for one in a million.
        divisor = jnp.where(magnitude == 0, 1.0, s[..., None])
        if self.signed:
            y = x / divisor
            z = 2.0 * y / (1.0 + jnp.abs(y))
            codes = _signed_bytes(jnp.floor(127.0 * z + 0.5))
        else:
            codes = _unsigned_bytes(jnp.floor(255.0 * (magnitude / divisor) + 0.5))
        return codes, (s.astype(jnp.float16),)

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

    def encode_groups(
        self, x: jax.Array, bits: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        low = jnp.minimum(jnp.min(x, axis=-1), 0.0)
        high = jnp.maximum(jnp.max(x, axis=-1), 0.0)
        step = high * np.float32(1 / 254) - low * np.float32(1 / 254)
        # Adds nothing, but a NaN where the group is not finite.
        step16 = _round_up_bf16(step + 0.0 * _group_max(x))
        divisor = jnp.maximum(step16.astype(jnp.float32), _TINY)
        zero = jnp.ceil(-low / divisor)
        y = x / divisor[..., None] + zero[..., None]
        k = jnp.floor(y)
        k = jnp.clip(k + (_noise(bits) < y - k), 0.0, 255.0)
        if not self.signed:
            k = jnp.maximum(k, (x > 0).astype(jnp.float32))
        return _unsigned_bytes(k), (step16, zero.astype(jnp.bfloat16))

    def decode_groups(
        self, codes: jax.Array, scales: tuple[jax.Array, ...]
    ) -> jax.Array:
        step, zero = (s.astype(jnp.float32)[..., None] for s in scales)
        return step * (_from_unsigned_bytes(codes) - zero)


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


_TINY = np.finfo(np.float32).tiny
"""Divided by in place of the scale of a group of zeros."""

_BELOW_1_255TH = np.nextafter(np.float32(1 / 255), np.float32(0))
"""Rounded down, so that no code exceeds the scale: encoding again keeps the scale."""


def _noise(bits: jax.Array | None) -> jax.Array | np.float32:
    """What a fractional code must exceed to be rounded up, for each element."""
    return np.float32(0.5) if bits is None else hashing.uniform(bits)


def _group_max(x: jax.Array, at_least: float = 0.0) -> jax.Array:
    """The largest magnitude of each group; NaN if one is.

    Magnitudes are in the order of their bits. A maximum of integers never loses a NaN,
    as XLA's CPU backend does with floats, and is computed in vectors.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
    bits = jnp.maximum(jnp.max(bits, axis=-1), np.float32(at_least).view(np.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


@jax.jit
def _round_up_bf16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is no less than ``x >= 0``; NaN and inf stay."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + np.uint32(0xFFFF)) >> np.uint32(16)
    # At most 2**126, larger values saturate: XLA divides by a group's scale through its
    # reciprocal, and that would be subnormal, which is flushed to zero.
    up = jnp.minimum(up, np.uint32(0x7E80)).astype(jnp.uint16)
    finite = lax.bitcast_convert_type(up, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), finite, x.astype(jnp.bfloat16))


def _signed_bytes(k: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(k.astype(jnp.int8), jnp.uint8)


def _from_signed_bytes(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _unsigned_bytes(k: jax.Array) -> jax.Array:
    # Through int32, as in hashing: CPUs have no vector conversion to uint8.
    return k.astype(jnp.int32).astype(jnp.uint8)


def _from_unsigned_bytes(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.int32).astype(jnp.float32)
