"""What an update does besides its arithmetic: decode, encode, draw random bits.

These are single equations in a traced update, so that the pass sees what they are. On
whole arrays they are plain JAX, which is all that XLA sees; on a tile inside a kernel
they know where the tile lies.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_flash.codecs import arithmetic, groups, hashing
from optax_flash.codecs.base import Codec
from optax_flash.fusion.jaxprs import ClosedJaxpr, Primitive, as_fun
from optax_flash.fusion.unstable import ad, batching, mlir


@dataclasses.dataclass
class Tile:
    """A piece of a leaf inside a kernel: rows of ``lanes`` neighbours.

    Attributes:
      shape: ``(units, lanes)``; or none, of one element.
      global_index: row-major, of each element in the whole leaf. # uint32
      mask: which elements are there at all; None where all are. # bool
      packed: whether codes of 4 bits come two in a byte, as they are stored.
    """

    shape: tuple[int, ...]
    global_index: jax.Array
    mask: jax.Array | None
    packed: bool = True
    _drawn: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict)

    def bits(self, start: Any, salt: Any) -> Any:
        """The leaf's random bits; drawn once, however many ops ask for them."""
        key = (id(start), id(salt))
        if key not in self._drawn:
            bits = hashing.mix(self.global_index ^ hashing.seed(start, salt))
            self._drawn[key] = (bits, start, salt)
        return self._drawn[key][0]

    def groups(self, x: Any, group: int) -> Any:
        """A tile with one group a row."""
        return x if x.shape[-1] == group else x.reshape(-1, group)


@dataclasses.dataclass(frozen=True)
class Op(abc.ABC):
    """An operation that is one equation when it is traced."""

    def __call__(self, *args: jax.typing.ArrayLike) -> list[jax.Array]:
        return op_p.bind(*args, op=self)

    @abc.abstractmethod
    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        """The operation on whole leaves."""

    @abc.abstractmethod
    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        """The operation on tiles; the scales of a tile come as a tuple of planes."""

    @abc.abstractmethod
    def smooth(self, *args: jax.Array) -> tuple[jax.Array | None, ...]:
        """The operation on whole leaves without its rounding.

        Its derivative stands for the operation's, which is zero almost everywhere. A
        result without a derivative is None.
        """


@dataclasses.dataclass(frozen=True)
class Decode(Op):
    """``(*codes, *scales)`` of a leaf's fields to float32 arrays of ``shape``."""

    codecs: tuple[Codec, ...]
    shape: tuple[int, ...]

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        n = len(self.codecs)
        fields = zip(self.codecs, args[:n], args[n:], strict=True)
        return tuple(codec.decode(c, s, self.shape) for codec, c, s in fields)

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        n = len(self.codecs)
        decoded = []
        for codec, codes, planes in zip(self.codecs, args[:n], args[n:], strict=True):
            codes = codec.unpack(codes) if tile.packed else codes
            x = codec.decode_groups(tile.groups(codes, codec.group), planes)
            decoded.append(x.reshape(tile.shape))
        return tuple(decoded)

    def smooth(self, *args: jax.Array) -> tuple[None, ...]:
        del args
        return (None,) * len(self.codecs)


@dataclasses.dataclass(frozen=True)
class Encode(Op):
    """``(start, salt, *arrays, *most)`` of a leaf to ``(*codes, *scales, *errors)``.

    ``start`` is :func:`hashing.start` of the step, ``salt`` the leaf's. There is an
    array for each field, and one of the largest magnitudes that may be stored for each
    field that is rounded to nearest.

    Attributes:
      codecs: of the fields.
      shape: of each array.
      errors: indices of the fields whose rounding error, decoded minus exact, is
        returned too; float32.
      nearest: indices of the fields that are rounded to nearest, not stochastically,
        and whose magnitudes are limited.
      carried: whether the arrays' derivatives go on beside the codes. Otherwise they
        would end here, and asking for them raises.
    """

    codecs: tuple[Codec, ...]
    shape: tuple[int, ...]
    errors: tuple[int, ...] = ()
    nearest: tuple[int, ...] = ()
    carried: bool = False

    def bits(self, field: int, of_leaf: jax.Array, most: Any) -> arithmetic.Bits:
        """What decides a field's rounding.

        Args:
          field: its index.
          of_leaf: the leaf's random bits.
          most: what :attr:`nearest` fields are limited by.
        """
        if field in self.nearest:
            return arithmetic.Nearest(most[self.nearest.index(field)])
        return hashing.for_field(of_leaf, field)

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        start, salt, *rest = args
        arrays, most = rest[: len(self.codecs)], rest[len(self.codecs) :]
        bits = hashing.bits(hashing.seed(start, salt), self.shape)
        stored = [
            codec.encode(x, self.bits(i, bits, most))
            for i, (codec, x) in enumerate(zip(self.codecs, arrays, strict=True))
        ]
        codes, scales = zip(*stored, strict=True)
        errors = [
            self.codecs[i].decode(codes[i], scales[i], self.shape) - arrays[i]
            for i in self.errors
        ]
        return *codes, *scales, *errors

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        start, salt, *rest = args
        arrays, most = rest[: len(self.codecs)], rest[len(self.codecs) :]
        bits = tile.bits(start, salt)
        stored, errors = [], []
        for i, (codec, x) in enumerate(zip(self.codecs, arrays, strict=True)):
            if tile.mask is not None:
                # Past the end of a row an optimizer may compute anything from zeros.
                x = jnp.where(tile.mask, x, 0.0)
            x = tile.groups(x.astype(jnp.float32), codec.group)
            group = functools.partial(tile.groups, group=codec.group)
            bits_of_field = arithmetic.in_groups(self.bits(i, bits, most), group)
            codes, planes = codec.encode_groups(x, bits_of_field)
            if i in self.errors:
                error = codec.decode_groups(codes, planes) - x
                errors.append(error.reshape(tile.shape))
            codes = codec.pack(codes)
            stored.append((codes.reshape(tile.shape[0], -1), planes))
        codes, scales = zip(*stored, strict=True)
        return *codes, *scales, *errors

    def smooth(self, *args: jax.Array) -> tuple[None, ...]:
        if not self.carried:
            raise ValueError(NOT_CARRIED)
        return (None,) * (2 * len(self.codecs) + len(self.errors))


NOT_CARRIED = (
    "Derivatives through an optimizer update end at its codes, which are integers: "
    "this update was traced, by jax.jit, lax.scan or lax.cond, before it was "
    "differentiated. Either put jax.jit outside of jax.grad, as in "
    "jax.jit(jax.grad(loss)); or start from a state that carries derivatives beside "
    "the codes, state = optax_flash.differentiable(tx, state, params). Where no "
    "derivative is wanted, put jax.lax.stop_gradient around gradients and params."
)


@dataclasses.dataclass(frozen=True)
class Within(Op):
    """``(x, y)`` to ``x``, at most some times as large as the group's largest ``|y|``.

    Attributes:
      times: how many times.
      group: how many neighbours along the last axis are a group.
    """

    times: float
    group: int

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        whole = [groups.with_whole_groups(x, self.group) for x in args]
        bounded = self.of_groups(*(groups.split(x, self.group) for x in whole))
        bounded = groups.merge(bounded, args[0].shape)
        if whole[0] is not args[0]:
            bounded = groups.sharded_like(bounded, args[0])
        return (bounded,)

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        x, y = args
        if tile.mask is not None:
            # Past the end of a row an optimizer may compute anything from zeros.
            y = jnp.where(tile.mask, y, 0.0)
        bounded = self.of_groups(*(tile.groups(w, self.group) for w in (x, y)))
        return (bounded.reshape(tile.shape),)

    def smooth(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        return args[:1]

    def of_groups(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The operation on arrays of shape ``(..., group)``."""
        largest = jnp.max(arithmetic.magnitude_bits(y), axis=-1)
        most = lax.bitcast_convert_type(largest, jnp.float32) * np.float32(self.times)
        most = most[..., None]
        return jnp.minimum(jnp.maximum(x, -most), most)


@dataclasses.dataclass(frozen=True)
class Round(Op):
    """``(start, salt, *arrays)`` to arrays, elementwise, by the leaf's random bits.

    Attributes:
      function: module-level, called with ``static``, the bits and the arrays; returns a
        tuple of arrays.
      static: hashable.
      shape: of the leaf.
      unrounded: see :meth:`Op.smooth`; called with ``static`` and the arrays.
    """

    function: Callable[..., tuple[jax.Array, ...]]
    static: Hashable
    shape: tuple[int, ...]
    unrounded: Callable[..., tuple[jax.Array | None, ...]]

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        start, salt, *arrays = args
        bits = hashing.bits(hashing.seed(start, salt), self.shape)
        return self.function(self.static, bits, *arrays)

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        start, salt, *arrays = args
        return self.function(self.static, tile.bits(start, salt), *arrays)

    def smooth(self, *args: jax.Array) -> tuple[jax.Array | None, ...]:
        return self.unrounded(self.static, *args[2:])


@dataclasses.dataclass(frozen=True)
class Elementwise(Op):
    """A pure elementwise function of arrays of one shape, traced once for a shape.

    Attributes:
      function: a module-level function that returns a tuple of arrays.
      static: its first argument.
      unrounded: see :meth:`Op.smooth`; called with the same arguments.
    """

    function: Callable[..., tuple[jax.Array, ...]]
    static: Hashable
    unrounded: Callable[..., tuple[jax.Array | None, ...]]

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        return self.function(self.static, *args)

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        del tile
        return self.function(self.static, *args)

    def smooth(self, *args: jax.Array) -> tuple[jax.Array | None, ...]:
        return self.unrounded(self.static, *args)


@dataclasses.dataclass(frozen=True)
class Batched(Op):
    """An operation under ``jax.vmap``; still one equation, or its derivative were lost.

    Attributes:
      op: the operation.
      axes: for each operand the axis that is mapped, or None.
    """

    op: Op
    axes: tuple[int | None, ...]

    def __call__(self, *args: jax.typing.ArrayLike) -> list[jax.Array]:
        return batched_op_p.bind(*args, op=self)

    def whole(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vmap(self.op.whole, self.axes)(*args)

    def tile(self, tile: Tile, *args: Any) -> tuple[Any, ...]:
        raise NotImplementedError("A batched operation is no part of a program.")

    def smooth(self, *args: jax.Array) -> tuple[jax.Array | None, ...]:
        return jax.vmap(self.op.smooth, self.axes)(*args)


def define(
    primitive: Primitive,
    function: Callable[..., Callable[..., Any]],
    smooth: Callable[..., Callable[..., Any]],
) -> None:
    """Gives a primitive all its rules, from the plain function that it stands for.

    Args:
      primitive: with several results.
      function: from the primitive's parameters to a function of its operands.
      smooth: likewise, to a function whose derivative is the primitive's. A result
        without a derivative is None.
    """
    primitive.multiple_results = True

    @functools.lru_cache(maxsize=4096)
    def traced(avals: tuple[Any, ...], params: tuple[Any, ...]) -> ClosedJaxpr:
        return jax.make_jaxpr(function(**dict(params)))(*avals)

    @functools.lru_cache(maxsize=4096)
    def compiled(params: tuple[Any, ...]) -> Callable[..., Any]:
        return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))

    def lowering(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        jaxpr = traced(tuple(ctx.avals_in), tuple(params.items()))
        plain = mlir.lower_fun(as_fun(jaxpr.jaxpr, jaxpr.consts), multiple_results=True)
        return plain(ctx, *args)

    def batch(args: Any, dims: Any, **params: Any) -> tuple[Any, list[int]]:
        outs = jax.vmap(function(**params), in_axes=tuple(dims))(*args)
        return outs, [0] * len(outs)

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        outs = primitive.bind(*primals, **params)
        # Only by what moves: a derivative that is zero may be one that is not there.
        moved = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
        moved = [i for i in moved if jnp.issubdtype(primals[i].dtype, jnp.floating)]

        def moving(*changed: jax.Array) -> tuple[Any, ...]:
            operands = list(primals)
            for i, x in zip(moved, changed, strict=True):
                operands[i] = x
            return tuple(smooth(**params)(*operands))

        _, found = jax.jvp(
            moving, [primals[i] for i in moved], [tangents[i] for i in moved]
        )
        return outs, [
            ad.Zero(jax.typeof(x).to_tangent_aval())
            if t is None or t.dtype == jax.dtypes.float0
            else t
            for x, t in zip(outs, found, strict=True)
        ]

    def eager(*args: Any, **params: Any) -> Any:
        # jax.config makes its attributes as it runs.
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return function(**params)(*args)
        return compiled(tuple(params.items()))(*args)

    primitive.def_impl(eager)
    primitive.def_abstract_eval(
        lambda *avals, **params: traced(avals, tuple(params.items())).out_avals
    )
    mlir.register_lowering(primitive, lowering, inline=False)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp


op_p = Primitive("optax_flash_op")
define(op_p, lambda op: op.whole, lambda op: op.smooth)
batched_op_p = Primitive("optax_flash_batched_op")
define(batched_op_p, lambda op: op.whole, lambda op: op.smooth)


def _batch(args: Any, dims: Any, *, op: Op) -> tuple[Any, list[int]]:
    outs = Batched(op, tuple(dims))(*args)
    return outs, [0] * len(outs)


batching.primitive_batchers[op_p] = _batch
batching.primitive_batchers[batched_op_p] = _batch
