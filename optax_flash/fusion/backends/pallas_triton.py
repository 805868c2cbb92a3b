"""Programs as Pallas kernels, lowered through Triton: NVIDIA GPUs without jax-triton.

One kernel reads every operand of a leaf once and writes every result once, in place.
Small leaves share a kernel: each block of threads looks up whose tile it has.
jax 0.11 deprecates this way of lowering; ``triton`` does without it.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.backends.base import Target, unsupported_by_kernels
from optax_flash.fusion.jaxprs import flat_equations
from optax_flash.fusion.launch import (
    Addresses,
    Config,
    KernelLeaf,
    Launch,
    addresses,
    computation,
    on_one_unit,
    once_a_family,
)
from optax_flash.fusion.program import Program
from optax_flash.fusion.tiles import MaskedIndices, Shard

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu: Any = None

UNSUPPORTED = frozenset({"erf", "round"})
"""The elementwise primitives that Pallas cannot lower to Triton."""

UNSUPPORTED_IN_16_BITS = frozenset({"div", "logistic"})
"""Those that it cannot lower for bfloat16 and float16."""


def absent() -> str | None:
    """Why it cannot be used here; None if it can. JAX will drop it."""
    if plgpu is None:
        return "this release of JAX does not lower Pallas through Triton"
    return None


def unsupported(program: Program, target: Target | None) -> str | None:
    """Why it cannot run a program; None if it can."""
    if reason := unsupported_by_kernels(program) or absent() or _unlowerable(program):
        return reason
    if target is None or (target.gpu is None and not needs_gpu()):
        return None
    return gpus.unsupported(target.gpu)


def run(shards: list[Shard], target: Target) -> list[list[jax.Array]]:
    """The results of programs of one family, each on a shard of its leaf."""
    return launched(shards, target.gpu)


@once_a_family
def _unlowerable(program: Program) -> str | None:
    """Why Pallas cannot lower a program to Triton; None if it can."""
    function, args = on_one_unit(program)
    for eqn in flat_equations(jax.make_jaxpr(function)(*args).jaxpr):
        name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
        if name in UNSUPPORTED:
            return f"Pallas has no {name!r} on GPUs"
        if name in UNSUPPORTED_IN_16_BITS and dtype.itemsize == 2:
            return f"Pallas has no {name!r} for {dtype} on GPUs"
    return None


def needs_gpu() -> bool:
    """Whether a kernel is lowered for one kind of GPU, as jax 0.11 and later do."""
    return jax.__version_info__ >= (0, 11)


def launched(
    shards: list[Shard],
    gpu: gpus.Gpu | None,
    config: Config | None = None,
    interpret: bool = False,
) -> list[list[jax.Array]]:
    """The results of one kernel.

    Args:
      shards: what to compute on.
      gpu: what to compile for; None where any will do.
      config: the size of tiles and of blocks of threads; None for :meth:`Config.of`.
      interpret: run in XLA on any platform, for tests.
    """
    config = config or Config.of(shards[0].program)
    launch = Launch.of(shards, config)
    leaves, units, starts = launch.leaves, launch.units, launch.starts

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: len(launch.operands)], refs[len(launch.operands) :]
        tile_id = pl.program_id(0)
        if len(leaves) == 1:
            whose: Any = 0
        else:
            whose = sum((tile_id >= x).astype(jnp.int32) for x in starts[1:-1])

        def tile_addresses(i: int) -> Addresses:
            first = (tile_id - starts[i]) * units
            offsets = [inputs[x][0] for x in leaves[i].offsets]
            return addresses(leaves[i], first, units, offsets, len(leaves) > 1)

        def load(i: int) -> Any:
            at = tile_addresses(i)
            return at.global_index, at.mask, _load_all(leaves[i], inputs, at)

        global_index, mask, args = _switch(whose, load, len(leaves))
        program = leaves[0].shard.program
        compute, _ = computation(program, global_index.shape, mask is not None)
        results = compute(global_index, mask, args)

        def store(i: int) -> None:
            rows = zip(
                tile_addresses(i).results, leaves[i].results, results, strict=True
            )
            for at, buffer, x in rows:
                planes = zip(at, x, strict=True) if isinstance(x, tuple) else [(at, x)]
                for plane, values in planes:
                    _write(outputs[buffer], plane, values)

        _switch(whose, store, len(leaves))

    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        kernel,
        grid=(starts[-1],),
        in_specs=[everywhere] * len(launch.operands),
        out_specs=[everywhere] * len(launch.results),
        out_shape=launch.flat_results(),
        input_output_aliases=launch.aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="optax_flash",
    )
    if interpret:
        return launch.by_leaf(call(*launch.operands))
    around = functools.partial(compiling, gpu)
    out = gpus.call(call, launch.operands, launch.flat_results(), around)
    return launch.by_leaf(out)


@contextlib.contextmanager
def compiling(gpu: gpus.Gpu | None) -> Iterator[None]:
    """Tells Pallas the GPU, and keeps from users what it says of its own future.

    They did not choose it: it runs where jax-triton is absent, and ``explain`` says so.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        if gpu and needs_gpu():
            device = AbstractDevice(gpu.kind, None, "gpu")
            mesh = AbstractMesh((), (), abstract_device=device)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield


def _switch(i: Any, branch: Any, n: int) -> Any:
    """``branch(i)`` for a traced ``i``; halving, so few comparisons are made."""

    def between(low: int, high: int) -> Any:
        if high - low == 1:
            return branch(low)
        middle = (low + high) // 2
        return lax.cond(
            i < middle, lambda: between(low, middle), lambda: between(middle, high)
        )

    return between(0, n)


def _load_all(leaf: KernelLeaf, refs: Any, where: Addresses) -> list[Any]:
    """The operands of a tile."""
    args = []
    invars = leaf.shard.program.jaxpr.invars
    for at, i, x in zip(where.operands, leaf.operands, invars, strict=True):
        if at is None:
            value = refs[i][0]
            args.append(value != 0 if x.aval.dtype == jnp.bool_ else value)
        elif isinstance(at, MaskedIndices):
            args.append(_read(refs[i], at))
        else:
            args.append(tuple(_read(refs[i], plane) for plane in at))
    return args


def _read(ref: Any, at: MaskedIndices) -> jax.Array:
    other = None if at.mask is None else jnp.zeros([], ref.dtype)
    return plgpu.load(ref.at[at.indices], mask=at.mask, other=other)


def _write(ref: Any, at: MaskedIndices, x: jax.Array) -> None:
    plgpu.store(ref.at[at.indices], x, mask=at.mask)
