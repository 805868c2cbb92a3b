"""Programs on leaves as one primitive, which each platform lowers to its backend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core

from optax_flash.fusion import backends, ops, partition
from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.backends import xla
from optax_flash.fusion.jaxprs import Jaxpr, Primitive
from optax_flash.fusion.program import Program, whole
from optax_flash.fusion.unstable import mlir

Programs = tuple[Program, ...]


def update(
    programs: Programs,
    implementation: str | None,
    operands: list[list[jax.Array]],
    index: jax.Array | None = None,
) -> list[list[jax.Array]]:
    """The results of programs on their leaves.

    Args:
      programs: of one family, see :attr:`Program.family`.
      implementation: a name, or None for the best.
      operands: of each program.
      index: where arrays are slices of the leaves, ``x[index : index + 1]``, instead of
        the leaves themselves. # shape=(), dtype=int32
    """
    flat = update_p.bind(
        *([] if index is None else [index]),
        *(x for of_leaf in operands for x in of_leaf),
        programs=programs,
        implementation=implementation,
        devices=partition.asks_for_devices(),
        sliced=index is not None,
    )
    remaining = iter(flat)
    return [[next(remaining) for _ in program.outputs] for program in programs]


def one_by_one(eqn: Any) -> list[Any]:
    """An equation of ``update_p`` as one for each of its programs."""
    programs = eqn.params["programs"]
    if len(programs) == 1 or eqn.params["sliced"]:
        return [eqn]
    operands, results = iter(eqn.invars), iter(eqn.outvars)
    return [
        eqn.replace(
            invars=[next(operands) for _ in program.inputs],
            outvars=[next(results) for _ in program.outputs],
            params=eqn.params | {"programs": (program,)},
        )
        for program in programs
    ]


def _in_xla(
    programs: Programs,
    implementation: str | None = None,
    devices: Any = None,
    sliced: bool = False,
) -> Callable[..., list[jax.Array]]:
    """Programs as a function of whole arrays: the reference."""
    del implementation, devices
    if sliced:
        return functools.partial(_sliced_in_xla, programs)

    def run(*operands: jax.Array) -> list[jax.Array]:
        rows = zip(programs, partition.by_leaf(programs, operands), strict=True)
        return [x for program, of_leaf in rows for x in _one_in_xla(program)(*of_leaf)]

    return run


def _sliced_in_xla(programs: Programs, *operands: jax.Array) -> list[jax.Array]:
    """The same on slices, of which the first operand is the index."""
    avals = [jax.typeof(x) for x in operands]
    run = functools.partial(xla.run, target=ANYWHERE)
    if partition.explicit_mesh(avals):
        return partition.mapped(programs, run, avals, None, True)(*operands)
    return partition.whole(programs, run, True)(*operands)


ANYWHERE = backends.Target("any")
"""XLA asks for nothing."""


@functools.lru_cache(maxsize=4096)
def _one_in_xla(program: Program) -> Callable[..., list[jax.Array]]:
    """One program, traced and lowered once however many leaves it runs on."""
    return jax.jit(whole(program))


update_p = Primitive("optax_flash_update")
ops.define(update_p, _in_xla, _in_xla)


def _lowering(platform: str | None = None) -> Callable[..., Any]:
    def lower(
        ctx: mlir.LoweringRuleContext,
        *operands: Any,
        programs: Programs,
        implementation: str | None,
        devices: Jaxpr,
        sliced: bool,
    ) -> Any:
        del devices
        context = ctx.module_context.axis_context
        gpu = gpus.of_lowering(context) if platform == "cuda" else None
        target = backends.Target(platform or ctx.module_context.platforms[0], gpu)
        # Of one family, programs may still differ in whether a kernel takes them.
        chosen = {
            backends.choose(program, implementation, target)[0] for program in programs
        }
        backend = backends.XLA if backends.XLA in chosen else chosen.pop()
        explicit = partition.explicit_mesh(ctx.avals_in)
        if platform == "tpu" and not explicit and not _is_local(context):
            # XLA's partitioner for TPUs takes no custom partitioning.
            if implementation not in (None, "xla"):
                raise ValueError(
                    f"implementation={implementation!r} on several TPUs needs a mesh "
                    "of explicit axes (jax.sharding.AxisType.Explicit) or jax.shard_map"
                    " around the update. implementation=None runs it in XLA."
                )
            function = _in_xla(programs, sliced=sliced)
        elif backend == backends.XLA and not sliced:
            # Of whole arrays, which XLA partitions by itself.
            function = _in_xla(programs)
        else:
            kernel = functools.partial(backend.functions.run, target=target)
            if _is_local(context):
                function = partition.whole(programs, kernel, sliced)
                # A kernel sees memory; over which axes it varies does not matter there.
                ctx = ctx.replace(
                    avals_in=[_unvarying(x) for x in ctx.avals_in],
                    avals_out=[_unvarying(x) for x in ctx.avals_out],
                )
            elif explicit:
                function = partition.mapped(
                    programs, kernel, ctx.avals_in, ctx.avals_out, sliced
                )
            elif rest := _not_manual(context):
                function = partition.gathered(programs, kernel, rest, sliced)
            else:
                function = partition.partitioned(programs, kernel, sliced)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)

    return lower


def _unvarying(x: Any) -> jax.core.ShapedArray:
    """The type of a local array, without the mesh axes over which it varies."""
    return jax.core.ShapedArray(x.shape, x.dtype, x.weak_type, sharding=x.sharding)


def _is_local(context: Any) -> bool:
    """Whether leaves are whole where they are: on one device, or one's own shards."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    if isinstance(context, mlir.SPMDAxisContext):
        return context.manual_axes == frozenset(context.mesh.axis_names)
    return False


def _not_manual(context: Any) -> frozenset[Any]:
    """The axes that a jax.shard_map over others leaves to XLA's partitioner."""
    if isinstance(context, mlir.SPMDAxisContext) and context.manual_axes:
        return frozenset(context.mesh.axis_names) - context.manual_axes
    return frozenset()


mlir.register_lowering(update_p, _lowering(), inline=False)
mlir.register_lowering(update_p, _lowering("cpu"), platform="cpu", inline=False)
mlir.register_lowering(update_p, _lowering("cuda"), platform="cuda", inline=False)
mlir.register_lowering(update_p, _lowering("tpu"), platform="tpu", inline=False)
