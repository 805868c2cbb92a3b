"""Programs as generated Triton kernels, through jax-triton: the default on NVIDIA GPUs.

One kernel reads every operand of a leaf once and writes every result once, in place.
Small leaves share a kernel: each block of threads looks up whose tile it has. What is
computed is traced for one tile and written out as the text of a kernel.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.backends.base import Target, unsupported_by_kernels
from optax_flash.fusion.backends.triton_source import HEADER, Unsupported, Writer
from optax_flash.fusion.launch import (
    Addresses,
    Config,
    Launch,
    addresses,
    computation,
    on_one_unit,
    once_a_family,
)
from optax_flash.fusion.program import Program
from optax_flash.fusion.tiles import MaskedIndices, Shard


def run(
    shards: list[Shard], target: Target, config: Config | None = None
) -> list[list[jax.Array]]:
    """The results of programs of one family, each on a shard of its leaf.

    Args:
      shards: what to compute on.
      target: what to compile for; its GPU is known.
      config: the size of tiles and of blocks of threads; None for :meth:`Config.of`.
    """
    gpu = target.gpu
    assert gpu
    config = config or Config.of(shards[0].program)
    launch = Launch.of(shards, config)
    results = launch.flat_results()
    call = calling(
        launch.aliases,
        results,
        _ptx_version(gpu),
        kernel=kernel(source(launch, takes_references())),
        grid=(launch.starts[-1],),
        num_warps=config.num_warps,
        num_stages=1,
        compute_capability=gpu.capability,
    )
    return launch.by_leaf(gpus.call(call, launch.operands, results, _compiling))


def absent() -> str | None:
    """Why jax-triton cannot be used here, in words; None if it can."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed"
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):
        return "jax-triton needs the CUDA plugin of JAX, which is not installed"
    try:
        _jax_triton()
    except (ImportError, AttributeError) as error:
        # It uses internals of JAX, which change.
        return f"jax-triton cannot be imported ({error})"
    return None


@functools.cache
def takes_references() -> bool:
    """Whether what a kernel overwrites is passed once, by reference: jax-triton 0.4.

    Before, the operand and the result are two parameters that are declared the same.
    """
    return "out_type" in inspect.signature(_jax_triton().triton_call).parameters


def _jax_triton() -> Any:
    return importlib.import_module("jax_triton")


def calling(
    aliases: dict[int, int], results: list[Any], ptx_version: int, **options: Any
) -> Callable[..., list[jax.Array]]:
    """A kernel as a function of its operands.

    Multiplications and additions are fused, which Triton from 3.10 on has to be told.

    Args:
      aliases: for an operand the result that takes over its buffer.
      results: types.
      ptx_version: ten times the major number of PTX's, and the minor.
      **options: of ``triton_call``.
    """

    def in_two(*operands: jax.Array) -> list[jax.Array]:
        return _jax_triton().triton_call(
            *operands,
            out_shape=results,
            input_output_aliases=aliases,
            enable_fp_fusion=True,
            **options,
        )

    def by_reference(*operands: jax.Array) -> list[jax.Array]:
        references = {i: jax.new_ref(operands[i]) for i in aliases}
        fresh = [x for i, x in enumerate(results) if i not in aliases.values()]
        written = iter(
            _jax_triton().triton_call(
                *(references.get(i, x) for i, x in enumerate(operands)),
                out_type=fresh,
                backend_options={"enable_fp_fusion": True, "ptx_version": ptx_version},
                **options,
            )
        )
        operand_of = {result: operand for operand, result in aliases.items()}
        return [
            jax.freeze(references[operand_of[i]]) if i in operand_of else next(written)
            for i in range(len(results))
        ]

    return by_reference if takes_references() else in_two


def _ptx_version(gpu: gpus.Gpu) -> int:
    """An early version of PTX that knows the GPU.

    Triton would take the newest that the assembler in its own wheel knows. XLA has
    another, such as the first on the PATH, which may be older.
    """
    if gpu.capability <= 90:
        return 80
    return 87 if gpu.capability in (100, 120) else 90


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Has Triton write PTX for XLA's assembler, the first on the PATH.

    For a ``triton_call`` that has no option for PTX's version.
    """
    assembler = shutil.which("ptxas")
    if takes_references() or not assembler:
        yield
        return
    knobs = importlib.import_module("triton.knobs")
    with knobs.nvidia.scope():
        for name in ("ptxas", "ptxas_blackwell"):
            if hasattr(knobs.nvidia, name):
                setattr(knobs.nvidia, name, assembler)
        yield


def unsupported(program: Program, target: Target | None) -> str | None:
    """Why it cannot run a program; None if it can."""
    if reason := unsupported_by_kernels(program):
        return reason
    if reason := absent():
        return f"{reason}; the extra optax_flash[cuda13] brings what it needs"
    if reason := _unwritable(program):
        return reason
    return gpus.unsupported(target.gpu) if target else None


@once_a_family
def _unwritable(program: Program) -> str | None:
    """Why a program cannot be written as a kernel; None if it can."""
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


def source(launch: Launch, references: bool) -> str:
    """The text of a module with the kernel of a launch, named ``optax_flash``.

    Args:
      launch: what it is given.
      references: what is overwritten is one parameter, not two.
    """
    operand_of = {result: operand for operand, result in launch.aliases.items()}
    writer = Writer()
    writer.line("tile = tl.program_id(0)")
    leaves, many = launch.leaves, len(launch.leaves) > 1
    known: dict[int, Addresses] = {}

    def load(i: int) -> Any:
        known[i] = _addresses(writer, launch, i)
        return (
            known[i].global_index,
            known[i].mask,
            _load_all(writer, launch, i, known[i]),
        )

    tile = _switch(writer, launch.starts, load)
    shape = launch.units, leaves[0].layout.lanes
    masked = many or known[0].mask is not None
    function, args = computation(leaves[0].shard.program, shape, masked)
    results = writer.call(function, args, tile)

    def store(i: int) -> None:
        # Names from within a branch are gone after it.
        where = _addresses(writer, launch, i) if many else known[i]
        for buffer, at, x in zip(
            leaves[i].results, where.results, results, strict=True
        ):
            name = f"in{operand_of[buffer]}" if buffer in operand_of else f"out{buffer}"
            planes = zip(at, x, strict=True) if isinstance(x, tuple) else [(at, x)]
            for indices, value in planes:
                _store(writer, name, indices, value)

    _switch(writer, launch.starts, store)
    parameters = [f"in{i}" for i in range(len(launch.operands))]
    parameters += [
        f"out{i}"
        for i in range(len(launch.results))
        if not (references and i in operand_of)
    ]
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


def _addresses(writer: Writer, launch: Launch, i: int) -> Addresses:
    """Writes where a tile of leaf ``i`` lies."""
    leaf, units, many = launch.leaves[i], launch.units, len(launch.leaves) > 1
    tile = f"(tile - {launch.starts[i]})" if i else "tile"
    first = writer.assign(f"{tile} * {units}")
    offsets = [writer.assign(f"tl.load(in{x})") for x in leaf.offsets]
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    return writer.call(
        lambda first, offsets: addresses(leaf, first, units, offsets, many),
        (integer, [integer] * len(offsets)),
        (first, offsets),
    )


def _load_all(writer: Writer, launch: Launch, i: int, where: Addresses) -> list[Any]:
    """Writes the loads of a tile of leaf ``i``."""
    leaf, args = launch.leaves[i], []
    invars = leaf.shard.program.jaxpr.invars
    for buffer, at, x in zip(leaf.operands, where.operands, invars, strict=True):
        name = f"in{buffer}"
        if at is None:
            is_bool = x.aval.dtype == jnp.bool_
            args.append(writer.assign(f"tl.load({name}){' != 0' if is_bool else ''}"))
        elif isinstance(at, MaskedIndices):
            args.append(_load(writer, name, at))
        else:
            args.append(tuple(_load(writer, name, plane) for plane in at))
    return args


def _load(writer: Writer, name: str, at: MaskedIndices) -> str:
    mask = "" if at.mask is None else f", mask={at.mask}, other=0"
    return writer.assign(f"tl.load({name} + {at.indices}{mask})")


def _store(writer: Writer, name: str, at: MaskedIndices, x: str) -> None:
    mask = "" if at.mask is None else f", mask={at.mask}"
    writer.line(f"tl.store({name} + {at.indices}, {x}{mask})")
