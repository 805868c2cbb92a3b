"""Programs on CPUs: plain XLA, held to loops that it computes in vectors.

Left to itself, XLA's CPU backend computes a group's maximum together with all that
leads to it, element by element. Here a program is cut into phases that XLA must not
merge: each array that the update returns, all maxima of groups, and the codes of each
field; arrays that depend on what rounding adds come after the maxima, and round by
themselves. A phase computes what it needs from the operands again, in registers, for
that is cheaper than writing a float32 array of a large leaf to memory and reading it
back.

What keeps phases apart is an attribute of a call that this backend honours. An
optimization_barrier does not: it is taken out before loops are merged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_flash.codecs import arithmetic
from optax_flash.codecs.base import Codec
from optax_flash.fusion.backends.base import Target
from optax_flash.fusion.jaxprs import (
    Jaxpr,
    JaxprEqn,
    as_fun,
    jaxpr_of,
    slice_equations,
    variables,
)
from optax_flash.fusion.launch import tile_operands
from optax_flash.fusion.ops import Encode, Tile, op_p
from optax_flash.fusion.program import Program, Role, evaluate
from optax_flash.fusion.tiles import Layout, Origin, Shard, from_tile, to_tile
from optax_flash.fusion.unstable import set_xla_metadata


def absent() -> None:
    """XLA is always there."""


def run(shards: list[Shard], target: Target) -> list[list[jax.Array]]:
    """The results of programs, each on a shard of its leaf.

    XLA runs at the same time what shares no memory. So that this holds for leaves of
    different calls, what a leaf writes on the way stays alive until the next one of its
    own call begins.
    """
    del target
    results = []
    temporaries: list[jax.Array] = []
    for shard in shards:
        last = len(results) == len(shards) - 1
        operands = _held(shard.operands, temporaries)
        of_leaf, temporaries = _run(shard._replace(operands=operands), last)
        results.append(of_leaf)
    return results


def unsupported(program: Program, target: Target | None) -> str | None:
    """Why phases are of no use to a program; None if they are."""
    del target
    if not program.size:
        return "it is empty"
    if not program.shape:
        return "it is a single number"
    encodes = _encodes(program)
    if len(encodes) != 1:
        return "nothing is encoded" if not encodes else "it is encoded in parts"
    stored = 2 * len(encodes[0].params["op"].codecs)
    codes = set(encodes[0].outvars[:stored])
    used = {x for eqn in program.jaxpr.eqns for x in variables(eqn.invars)}
    return "codes are computed on" if codes & used else None


def _encodes(program: Program) -> list[JaxprEqn]:
    return [
        eqn
        for eqn in program.jaxpr.eqns
        if eqn.primitive is op_p and isinstance(eqn.params["op"], Encode)
    ]


def _run(shard: Shard, last: bool) -> tuple[list[jax.Array], list[jax.Array]]:
    """The results, and unless it is the last what was written on the way."""
    program, shape = shard.program, shard.shape
    layout = Layout.of(program, shape, shard.origin)
    offsets = shard.origin.offsets
    run = _steps(program, layout, offsets is not None, last)
    operands = [
        to_tile(layout, role, x)
        for role, x in zip(program.inputs, shard.operands, strict=True)
    ]
    tiles, temporaries = run(
        [jnp.asarray(x, jnp.int32) for x in offsets or ()], operands
    )
    results = [
        from_tile(role, x, like.shape)
        for role, x, like in zip(
            program.outputs, tiles, shard.result_shapes(), strict=True
        )
    ]
    return results, temporaries


class _Traced(NamedTuple):
    """A program on one tile, the whole leaf, before anything is encoded.

    Attributes:
      jaxpr: from offsets, operands and errors of rounding to results that are not
        encoded, values that are, and random bits.
      results: variables; for codes and scales their number among what is encoded.
      values: variables of the fields that are encoded.
      most: variables of what limits them, for those that are limited.
      bits: the variable of the leaf's random bits.
      op: encodes them.
      errors: by the index of a field, the variable of its error.
    """

    jaxpr: Jaxpr
    results: list[Any]
    values: list[Any]
    most: list[Any]
    bits: Any
    op: Encode
    errors: dict[int, Any]


def _trace(program: Program, layout: Layout, offset: bool) -> _Traced:
    (encode,) = _encodes(program)
    op: Encode = encode.params["op"]
    start, salt, *values = encode.invars
    fields = len(op.codecs)
    stored = 2 * len(op.codecs)
    encoded = {x: i for i, x in enumerate(encode.outvars[:stored])}
    plain = [x for x in program.jaxpr.outvars if x not in encoded]
    arithmetic = jaxpr_of(
        [*program.jaxpr.invars, *encode.outvars[stored:]],
        [*plain, *values, start, salt],
        [eqn for eqn in program.jaxpr.eqns if eqn is not encode],
    )

    shape = (layout.units, layout.lanes)

    def run(
        offsets: list[jax.Array], operands: list[Any], errors: list[jax.Array]
    ) -> list[jax.Array]:
        origin = Origin(program.shape, tuple(offsets) or None)
        elements = layout.elements(0, layout.units)
        index = layout.global_index(origin, 0, layout.units)
        tile = Tile(shape, index, elements.mask, packed=False)
        *out, start, salt = evaluate(arithmetic, tile, [*operands, *errors])
        out = [jnp.broadcast_to(x, tile.shape) for x in out]
        results, values = out[: len(plain)], out[len(plain) :]
        values, most = values[:fields], values[fields:]
        if tile.mask is not None:
            # Past the end of a row an optimizer may compute anything from zeros.
            values = [jnp.where(tile.mask, x, 0.0) for x in values]
        values = [x.astype(jnp.float32) for x in values]
        return [*results, *values, *most, tile.bits(start, salt)]

    closed = jax.make_jaxpr(run)(
        [jax.ShapeDtypeStruct((), jnp.int32)] * (len(program.shape) if offset else 0),
        tile_operands(program, shape, packed=False),
        [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(op.errors),
    )
    assert not closed.consts
    *outvars, bits = closed.jaxpr.outvars
    computed = iter(outvars[: len(plain)])
    results = [
        encoded[x] if x in encoded else next(computed) for x in program.jaxpr.outvars
    ]
    values = outvars[len(plain) : len(plain) + fields]
    most = outvars[len(plain) + fields :]
    first_error = len(closed.jaxpr.invars) - len(op.errors)
    errors = dict(zip(op.errors, closed.jaxpr.invars[first_error:], strict=True))
    return _Traced(closed.jaxpr, results, values, most, bits, op, errors)


IN_CACHE = 2**20
"""Leaves of so many elements keep values and random bits from phase to phase."""


@functools.lru_cache(maxsize=4096)
def _steps(
    program: Program, layout: Layout, offset: bool, last: bool
) -> Callable[..., Any]:
    """A program in phases, as a function of offsets and operands in tiles.

    It returns results in tiles and, unless it is the last, all else that phases wrote.
    """
    traced = _trace(program, layout, offset)
    errors = set(traced.errors.values())
    inputs = [x for x in traced.jaxpr.invars if x not in errors]
    fits = layout.units * layout.lanes <= IN_CACHE
    # Values of a large leaf would go through memory, which costs more than computing
    # them again in each phase.
    kept = [
        x
        for x in dict.fromkeys([*traced.values, *traced.most, traced.bits])
        if fits and x not in inputs
    ]
    plain = list(dict.fromkeys(x for x in traced.results if not isinstance(x, int)))
    # The last is written over its operand; for the others XLA copies what is needed.
    plain.sort(key=lambda x: x.aval.dtype.itemsize)
    everything = list(traced.jaxpr.invars)
    # What rounding adds is known after the maxima of all fields, so these come second.
    rounded = [x for x in plain if errors & set(_slice(traced, [x], everything)[1])]
    exact = [x for x in plain if x not in rounded]

    def phase(
        wanted: list[Any],
        known: list[Any],
        then: Callable[..., Any],
        later: list[Any],
    ) -> Callable[..., Any]:
        """Computes variables from known ones, and something from them.

        Arrays that the variables in ``later`` need are returned as they are: phases
        that take them from there come later, when a buffer may be written over.
        """
        equations, needed = _slice(traced, wanted, known)
        passed = [x for x in _slice(traced, later, known)[1] if x.aval.shape]
        # An operand that is not read would still be waited for.
        taken = [x for x in known if x in {*needed, *passed}]
        jaxpr = jaxpr_of(taken, wanted, equations)
        compute = as_fun(jaxpr)

        @_uninlined
        def run(operands: list[Any], *more: Any) -> Any:
            env = dict(zip(taken, operands, strict=True))
            return then(*compute(*operands), *more), [env[x] for x in passed]

        def call(env: dict[Any, Any], *more: Any) -> Any:
            result, handed_on = run([env[x] for x in taken], *more)
            env.update(zip(passed, handed_on, strict=True))
            return result

        return call

    def alone(x: Any) -> Any:
        return x

    encoded = [*traced.values, *traced.most, traced.bits]
    rest = [*exact, *rounded, *encoded]
    known = list(inputs)
    first = []
    for x in kept:
        first.append((x, phase([x], known, alone, rest)))
        known = [*known, x]
    for i, x in enumerate(exact):
        later = [*exact[i + 1 :], *rounded, *encoded]
        first.append((x, phase([x], known, alone, later)))
    find_maxima = phase(
        traced.values, known, functools.partial(_maxima, traced.op.codecs), []
    )
    find_scales = _uninlined(functools.partial(_scales, traced.op.codecs))
    second = []
    for i, x in enumerate(rounded):
        wanted, finish = _after_rounding(traced, x, known)
        later = [*rounded[i + 1 :], *encoded]
        second.append((x, phase(wanted, known, finish, later)))
    find_codes = [
        phase(
            [x, traced.bits, *traced.most],
            known,
            functools.partial(_codes, traced.op, field),
            [],
        )
        for field, x in enumerate(traced.values)
    ]

    @_uninlined
    def run(
        offsets: list[jax.Array], operands: list[Any]
    ) -> tuple[list[Any], list[jax.Array]]:
        unpacked = list(map(_unpacked, program.inputs, operands))
        env = dict(zip(inputs, jax.tree.leaves((offsets, unpacked)), strict=True))
        for x, compute in first:
            env[x] = compute(env)
        maxima = find_maxima(env)
        scales = find_scales(maxima)
        for x, compute in second:
            env[x] = compute(env, scales, maxima)
        codes = [
            find(env, *of_field)
            for find, *of_field in zip(find_codes, scales, maxima, strict=True)
        ]
        stored = [*codes, *scales]
        found = [stored[x] if isinstance(x, int) else env[x] for x in traced.results]
        results = list(map(_repacked, program.outputs, found))
        if last:
            return results, []
        # Else XLA would give their memory to a leaf of another call, which would then
        # wait for this one.
        written = [unpacked, [env[x] for x in kept], maxima, found]
        others = {id(x) for x in jax.tree.leaves((operands, results))}
        return results, [x for x in jax.tree.leaves(written) if id(x) not in others]

    return run


def _after_rounding(
    traced: _Traced, x: Any, known: list[Any]
) -> tuple[list[Any], Callable[..., jax.Array]]:
    """How a result is computed that depends on what rounding adds.

    Returns:
      The variables that it takes, and the function of them, and of the scales and
      maxima of all fields.
    """
    equations, needed = _slice(traced, [x], [*known, *traced.errors.values()])
    fields = [i for i, error in traced.errors.items() if error in needed]
    errors = [traced.errors[i] for i in fields]
    others = [y for y in needed if y not in errors]
    limits = len(traced.most)
    jaxpr = jaxpr_of([*others, *errors], [x], equations)

    compute = as_fun(jaxpr)

    def finish(*args: Any) -> jax.Array:
        *arrays, scales, maxima = args
        n = len(fields)
        values, bits, others = arrays[:n], arrays[n], arrays[n + 1 :]
        most, others = others[:limits], others[limits:]
        errors = [
            _error(traced.op, i, value, bits, *most, scales[i], maxima[i])
            for i, value in zip(fields, values, strict=True)
        ]
        return compute(*others, *errors)[0]

    rounding = [traced.bits, *traced.most]
    return [*(traced.values[i] for i in fields), *rounding, *others], finish


def _slice(
    traced: _Traced, wanted: list[Any], known: list[Any]
) -> tuple[list[JaxprEqn], list[Any]]:
    """Equations that make variables from known ones, and which of these they read."""
    equations = slice_equations(traced.jaxpr.eqns, wanted, set(known))
    read = {x for eqn in equations for x in variables(eqn.invars)} | set(wanted)
    return equations, [x for x in known if x in read]


def _maxima(codecs: tuple[Codec, ...], *values: jax.Array) -> list[tuple[Any, ...]]:
    """The maxima of all keys of all fields, in one loop for a size of groups."""
    keys: list[list[jax.Array]] = [
        list(codec.keys(_groups(x, codec.group)))
        for codec, x in zip(codecs, values, strict=True)
    ]
    maxima: list[list[Any]] = [[] for _ in codecs]
    for group in sorted({codec.group for codec in codecs}):
        fields = [i for i, codec in enumerate(codecs) if codec.group == group]
        flat = [key for i in fields for key in keys[i]]

        def larger(a: Any, b: Any) -> tuple[Any, ...]:
            return tuple(map(jnp.maximum, a, b))

        # The one operation from which this backend writes several arrays in a loop.
        lowest = (jnp.iinfo(jnp.int32).min,) * len(flat)
        reduced = iter(
            lax.reduce(tuple(flat), tuple(map(jnp.int32, lowest)), larger, (1,))
        )
        for i in fields:
            maxima[i] = [next(reduced) for _ in keys[i]]
    return [tuple(x) for x in maxima]


def _scales(codecs: tuple[Codec, ...], maxima: list[tuple[Any, ...]]) -> list[Any]:
    return [codec.scales_from(x) for codec, x in zip(codecs, maxima, strict=True)]


def _codes(
    op: Encode,
    field: int,
    value: jax.Array,
    bits: jax.Array,
    *more: Any,
) -> jax.Array:
    """The codes of a field, from limits of all fields, its scales and its maxima."""
    *most, scales, maxima = more
    codec = op.codecs[field]
    group = functools.partial(_groups, group=codec.group)
    bits_of_field = arithmetic.in_groups(op.bits(field, bits, most), group)
    codes = codec.codes(group(value), scales, maxima, bits_of_field)
    return codes.reshape(value.shape)


def _error(
    op: Encode,
    field: int,
    value: jax.Array,
    bits: jax.Array,
    *more: Any,
) -> jax.Array:
    codec, (*_, scales, _) = op.codecs[field], more
    codes = _codes(op, field, value, bits, *more)
    decoded = codec.decode_groups(_groups(codes, codec.group), scales)
    return decoded.reshape(value.shape) - value


def _uninlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a call that XLA's CPU backend does not inline."""

    def inside(*args: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # Not for the calls inside.
            return function(*args)

    jitted = jax.jit(inside)

    def call(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jitted(*args)

    return call


def _held(operands: list[Any], temporaries: list[jax.Array]) -> list[Any]:
    """Operands as they are; until they are taken, temporaries are not written over."""
    if not temporaries:
        return operands
    return _uninlined(lambda operands, _: operands)(operands, temporaries)


def _unpacked(role: Role, x: Any) -> Any:
    packed = _packed(role)
    return _uninlined(packed.unpack)(x) if packed else x


def _repacked(role: Role, x: Any) -> Any:
    packed = _packed(role)
    return _uninlined(packed.pack)(x) if packed else x


def _packed(role: Role) -> Codec | None:
    """The codec of codes that share bytes; they are unpacked in phases of their own."""
    several = role.kind == "codes" and role.codec and role.codec.codes_per_byte > 1
    return role.codec if several else None


def _groups(x: jax.Array, group: int) -> jax.Array:
    return x.reshape(-1, group)
