"""Running a program on a leaf by the implementation that suits the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import mlir

from optax_flash.fusion import ops
from optax_flash.fusion.choose import choose
from optax_flash.fusion.partition import partitioned
from optax_flash.fusion.program import Program, whole
from optax_flash.fusion.tiles import Place
from optax_flash.fusion.tuning import config_for

update_p = core.Primitive("optax_flash_update")
ops.define(update_p, lambda program, implementation, devices: whole(program))


def update(
    program: Program, implementation: str | None, operands: list[jax.Array]
) -> list[jax.Array]:
    """The results of a program on one leaf."""
    return update_p.bind(
        *operands,
        program=program,
        implementation=implementation,
        devices=_asks_for_devices(),
    )


@functools.cache
def _asks_for_devices() -> core.Jaxpr:
    """What makes jax tell the lowering below its devices.

    It does so only where it sees an equation that is known to need them, such as a
    custom_partitioning, also inside of an equation's parameters.
    """
    function = custom_partitioning(lambda x: x)
    function.def_partition(None, sharding_rule="i -> i")
    return jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1,), "float32")).jaxpr


def _lowering(platform: str) -> Callable[..., Any]:
    def lower(
        ctx: mlir.LoweringRuleContext,
        *operands: Any,
        program: Program,
        implementation: str | None,
        devices: core.Jaxpr,
    ) -> Any:
        del devices
        name, _ = choose(program, implementation, platform)
        if name == "xla":
            function = whole(program)
        else:
            function = _whole_leaf(program, _kernel(program, name), ctx)
            # Inside, sharding is the partitioner's affair and in no array's type.
            ctx = ctx.replace(avals_in=[_plain(x) for x in ctx.avals_in])
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)

    return lower


def _whole_leaf(
    program: Program, kernel: Any, ctx: mlir.LoweringRuleContext
) -> Callable[..., list[jax.Array]]:
    """A kernel as a function of whole leaves, sharded or not."""
    devices = ctx.module_context.axis_context
    if isinstance(devices, mlir.ShardingContext) and devices.num_devices == 1:
        return lambda *operands: kernel(Place(program.shape), program.shape, operands)
    return partitioned(program, kernel)


def _kernel(program: Program, name: str) -> Callable[..., list[jax.Array]]:
    def run(
        place: Place, shape: tuple[int, ...], operands: list[jax.Array]
    ) -> list[jax.Array]:
        device = jax.local_devices()[0]
        config = config_for(device.device_kind if device.platform == "gpu" else "")
        # Backends import compilers, for which nobody else should wait.
        if name == "triton":
            from optax_flash.fusion import triton

            return triton.update(program, place, shape, operands, config)
        from optax_flash.fusion import pallas

        interpret = name == "interpret"
        return pallas.update(program, place, shape, operands, config, interpret)

    return run


def _plain(x: Any) -> ShapedArray:
    return ShapedArray(x.shape, x.dtype)


mlir.register_lowering(update_p, _lowering("other"), inline=False)
mlir.register_lowering(update_p, _lowering("cuda"), platform="cuda", inline=False)
