"""Programs as generated Triton kernels, through jax-triton: NVIDIA GPUs only.

The computation of ``pallas`` without jax's own lowering to Triton: it is traced for one
tile and written out as the text of a kernel.
"""

import functools
import hashlib
import importlib.util
import linecache
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.fusion.plan import (
    Addresses,
    Plan,
    addresses,
    computation,
    on_one_unit,
    once_a_family,
    plan,
)
from optax_flash.fusion.program import Program
from optax_flash.fusion.tiles import Shard, Where
from optax_flash.fusion.triton_source import HEADER, Unsupported, Writer
from optax_flash.fusion.tuning import Config


def update(shards: list[Shard], config: Config) -> list[list[jax.Array]]:
    """The results of programs of one family, each on a shard of its leaf.

    Args:
      shards: what to compute on.
      config: the size of tiles and of blocks of threads.
    """
    import jax_triton  # pyright: ignore[reportMissingImports]

    planned = plan(shards, config)
    out = jax_triton.triton_call(
        *planned.operands,
        kernel=kernel(source(planned)),
        out_shape=planned.flat_results(),
        grid=(planned.starts[-1],),
        num_warps=config.num_warps,
        num_stages=1,
        input_output_aliases=planned.aliases,
    )
    return planned.by_leaf(out)


def reason(program: Program) -> str | None:
    """Why a program cannot run in a kernel of this kind; None if it can."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; the extra optax_flash[triton] brings it"
    return _unwritable(program)


@once_a_family
def _unwritable(program: Program) -> str | None:
    function, args = on_one_unit(program)
    try:
        Writer().call(function, args, jax.tree.map(str, args))
    except Unsupported as error:
        return str(error)
    return None


@functools.cache
def kernel(text: str) -> Any:
    """The kernel of a source. Equal sources share one, and its compilation.

    Triton reads a function's text through ``inspect``, which asks ``linecache``: with
    the text in there no file is needed, none has to be written, and none that somebody
    else can write is run. Its name tells only what is in it, so that compilation caches
    hold good on other machines.
    """
    name = f"<optax_flash {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace = {"__name__": "optax_flash.fusion.generated"}
    exec(compile(text, name, "exec"), namespace)
    return namespace["optax_flash"]


def source(planned: Plan) -> str:
    """The text of a module with the kernel of a plan, named ``optax_flash``."""
    writer = Writer()
    writer.line("tile = tl.program_id(0)")
    leaves, many = planned.leaves, len(planned.leaves) > 1
    known: dict[int, Addresses] = {}

    def load(i: int) -> Any:
        known[i] = _addresses(writer, planned, i)
        return known[i].places, known[i].mask, _load_all(writer, planned, i, known[i])

    tile = _switch(writer, planned.starts, load)
    shape = planned.units, leaves[0].layout.lanes
    masked = many or known[0].mask is not None
    function, args = computation(leaves[0].shard.program, shape, masked)
    results = writer.call(function, args, tile)

    def store(i: int) -> None:
        # Names from within a branch are gone after it.
        where = _addresses(writer, planned, i) if many else known[i]
        for buffer, at, x in zip(
            leaves[i].results, where.results, results, strict=True
        ):
            planes = zip(at, x, strict=True) if isinstance(x, tuple) else [(at, x)]
            for place, value in planes:
                _store(writer, f"out{buffer}", place, value)

    _switch(writer, planned.starts, store)
    parameters = [f"in{i}" for i in range(len(planned.operands))]
    parameters += [f"out{i}" for i in range(len(planned.results))]
    head = f"@triton.jit\ndef optax_flash({', '.join(parameters)}):"
    return "\n".join([HEADER + head, *writer.lines, ""])


def _switch(writer: Writer, starts: list[int], branch: Callable[[int], Any]) -> Any:
    """Writes ``branch(i)`` for the leaf ``i`` whose tile it is; gives its names."""
    if len(starts) == 2:
        return branch(0)
    trees = []

    def between(low: int, high: int) -> None:
        if high - low == 1:
            names, tree = jax.tree.flatten(branch(low))
            trees.append(tree)
            for i, name in enumerate(names):
                writer.line(f"t{i} = {name}")
            return
        middle = (low + high) // 2
        with writer.block(f"if tile < {starts[middle]}:"):
            between(low, middle)
        with writer.block("else:"):
            between(middle, high)

    between(0, len(starts) - 1)
    return jax.tree.unflatten(trees[0], [f"t{i}" for i in range(trees[0].num_leaves)])


def _addresses(writer: Writer, planned: Plan, i: int) -> Addresses:
    """Writes where a tile of leaf ``i`` lies."""
    leaf, units, many = planned.leaves[i], planned.units, len(planned.leaves) > 1
    tile = f"(tile - {planned.starts[i]})" if i else "tile"
    first = writer.assign(f"{tile} * {units}")
    offsets = [writer.assign(f"tl.load(in{x})") for x in leaf.offsets]
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    return writer.call(
        lambda first, offsets: addresses(leaf, first, units, offsets, many),
        (integer, [integer] * len(offsets)),
        (first, offsets),
    )


def _load_all(writer: Writer, planned: Plan, i: int, where: Addresses) -> list[Any]:
    """Writes the loads of a tile of leaf ``i``."""
    leaf, args = planned.leaves[i], []
    invars = leaf.shard.program.jaxpr.invars
    for buffer, at, x in zip(leaf.operands, where.operands, invars, strict=True):
        name = f"in{buffer}"
        if at is None:
            is_bool = x.aval.dtype == jnp.bool_
            args.append(writer.assign(f"tl.load({name}){' != 0' if is_bool else ''}"))
        elif isinstance(at, Where):
            args.append(_load(writer, name, at))
        else:
            args.append(tuple(_load(writer, name, plane) for plane in at))
    return args


def _load(writer: Writer, name: str, at: Where) -> str:
    mask = "" if at.mask is None else f", mask={at.mask}, other=0"
    return writer.assign(f"tl.load({name} + {at.indices}{mask})")


def _store(writer: Writer, name: str, at: Where, x: str) -> None:
    mask = "" if at.mask is None else f", mask={at.mask}"
    writer.line(f"tl.store({name} + {at.indices}, {x}{mask})")
