"""The generated Triton kernels, compiled for H100s and run by Triton's interpreter.

Needs jax-triton and the CUDA plugin, which the extra ``cuda13`` brings, but no GPU.
"""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_flash
from optax_flash.fusion import fuse
from optax_flash.fusion.backends import gpu as gpus
from optax_flash.fusion.backends import jax_triton as backend
from optax_flash.fusion.backends.base import Target
from optax_flash.fusion.backends.triton_source import HEADER, Writer
from optax_flash.fusion.launch import Config, Launch
from optax_flash.fusion.program import ELEMENTWISE, whole
from optax_flash.fusion.tiles import Origin, Shard
from tests.fusion.equality import OPTIMIZERS
from tests.fusion.test_backends import DROPPED, OF_TWO, UNLIKE_THEIR_NAME

pytestmark = pytest.mark.cuda
jax_triton = pytest.importorskip("jax_triton")

NAMES = (
    "adamw nadamw amsgrad adabelief yogi adan lion sgd rmsprop ademamix adopt".split()
)
CODECS = (
    *("companded8", "companded4", "flashoptim", "affine8", "affine4"),
    *({"mu": "affine8"}, {"mu": "companded4"}),
    optax_flash.Companded4(signed_curve="log", unsigned_curve="log"),
    optax_flash.Companded4(signed_curve="dynamic", unsigned_curve="linear"),
)


H100 = gpus.Gpu("NVIDIA H100", 90)


def compress(inner, codecs=None):
    return optax_flash.compress(inner, codecs, min_size=1)


CASES = {
    **{name: (compress(OPTIMIZERS[name]()), jnp.float32) for name in NAMES},
    **{
        f"adamw_{codecs}": (compress(optax.adamw(1e-2), codecs), jnp.float32)
        for codecs in CODECS
    },
    **{
        f"master_weights_{bits}_{codec}_{jnp.dtype(dtype).name}": (
            optax_flash.master_weights(compress(optax.adamw(1e-2)), bits, codec=codec),
            dtype,
        )
        for bits in (24, 32)
        for codec in ("exact", "flashoptim")
        for dtype in (jnp.bfloat16, jnp.float16)
    },
    "bfloat16": (compress(optax.adamw(1e-2)), jnp.bfloat16),
    "plain_master_weights": (
        optax_flash.master_weights(optax.sgd(1e-2)),
        jnp.bfloat16,
    ),
}


def programs(tx, params):
    """The programs of an optimizer, one for each leaf."""
    state = jax.eval_shape(tx.init, params)
    with fuse.watch() as leaves:
        jax.eval_shape(lambda *args: tx.update(*args)[1], params, state, params)
    return [leaf.program for leaf, _ in leaves if leaf.program]


def operands_of(program, seed=0):
    """Operands such as an update has."""
    rng = np.random.default_rng(seed)
    values = []
    stored = {}
    for role, x in zip(program.inputs, program.jaxpr.invars, strict=True):
        shape, dtype = x.aval.shape, x.aval.dtype
        if role.codec:
            if role.kind == "codes":
                array = rng.normal(size=program.shape).astype(np.float32) * 1e-2
                array = array if role.codec.signed else array**2
                codes, scales = role.codec.encode(jnp.asarray(array))
                stored.setdefault(role.codec, []).append(scales)
                values.append(codes)
            else:
                values.append(stored[role.codec].pop(0))
        elif dtype == np.bool_:
            values.append(jnp.asarray(True))
        elif dtype == np.int32 and not shape:
            # The zero by which error feedback keeps products apart.
            values.append(jnp.int32(0))
        elif not jnp.issubdtype(dtype, jnp.floating):
            info = jnp.iinfo(dtype)
            values.append(
                jnp.asarray(rng.integers(info.min, info.max, shape, dtype, True))
            )
        elif shape:
            values.append(jnp.asarray(rng.normal(size=shape) * 1e-2, dtype))
        else:
            values.append(jnp.asarray(rng.uniform(0.1, 0.9), dtype))
    return values


def whole_leaf(program, operands):
    return Shard(program, Origin(program.shape), program.shape, operands)


class Buffer:
    """An array with what Triton's interpreter asks of a tensor."""

    def __init__(self, array):
        self.array = array
        self.dtype = jax_triton.triton_lib._JAX_TO_TRITON_TYPE_MAP[array.dtype]
        for name in ("untyped_storage", "cpu", "new_empty"):
            setattr(self, name, lambda *_, **__: self)
        for name in ("storage_offset", "size", "stride", "set_", "copy_"):
            setattr(self, name, lambda *_: None)

    def data_ptr(self):
        return self.array.ctypes.data


EXACT = {
    "divide": lambda x, y: x / y,
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x: x.rsqrt(),
}
"""In place of approximations, which the interpreter has none of."""


def interpret(text, grid, arrays, **replaced):
    """Runs a kernel in numpy; writes into the arrays."""
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        kernel = backend.kernel.__wrapped__(text)
        kernel.fn.__globals__.update(EXACT | replaced)
        with np.errstate(all="ignore"):
            kernel[(grid,)](*map(Buffer, arrays))


@pytest.fixture
def fast_reductions(monkeypatch):
    """The interpreter reduces element by element with a function that it knows not."""
    from triton.runtime.interpreter import ReduceOps

    functions = {"maximum": np.max, "minimum": np.min, "add": np.sum}

    def reduce(self, args):
        function = functions[self.combine_fn.__name__]
        return [
            self.to_tensor(function(x.handle.data, axis=self.axis), x.dtype)
            for x in args
        ]

    monkeypatch.setattr(ReduceOps, "generic_reduce", reduce)


def update(shards, config=None):
    """What ``backend.run`` computes, by the interpreter."""
    planned = Launch.of(shards, config or Config.of(shards[0].program))
    arrays = [np.array(x) for x in planned.operands]
    operand_of = {result: operand for operand, result in planned.aliases.items()}
    results = [
        arrays[operand_of[i]] if i in operand_of else np.zeros(x.size, x.dtype)
        for i, x in enumerate(planned.results)
    ]
    # What is overwritten is one parameter, or two of the same memory.
    once = backend.takes_references()
    passed = [x for i, x in enumerate(results) if not (once and i in operand_of)]
    interpret(backend.source(planned, once), planned.starts[-1], arrays + passed)
    return planned.by_leaf(results)


def check(found, expected, roundings=0):
    """Equal in every bit; floats up to a number of roundings."""
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if roundings and jnp.issubdtype(a.dtype, jnp.floating):
            near = roundings * float(jnp.finfo(a.dtype).eps)
            a, b = a.astype(np.float32), b.astype(np.float32)
            np.testing.assert_allclose(a, b, near, 0)
        else:
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.usefixtures("fast_reductions")
@pytest.mark.parametrize("name", [name for name in CASES if "log" not in name])
@pytest.mark.parametrize("shape", [(40, 128), (22, 100)], ids=["whole", "ragged"])
def test_the_interpreted_kernel_computes_what_xla_does(name, shape):
    tx, dtype = CASES[name]
    (program,) = programs(tx, jax.ShapeDtypeStruct(shape, dtype))
    operands = operands_of(program)
    (found,) = update([whole_leaf(program, operands)])
    # XLA runs equation by equation, so that it fuses no multiplication with an
    # addition. It has an rsqrt of its own, and the interpreter cuts bfloat16 off and
    # has no logarithm.
    roundings = {"rmsprop": 3, "bfloat16": 1}.get(name, 0)
    check(found, whole(program)(*operands), roundings)


@pytest.mark.usefixtures("fast_reductions")
@pytest.mark.parametrize(
    "name", ["sgd", "adamw_affine8", "adamw_companded4", "plain_master_weights"]
)
def test_shards_compute_their_piece_of_the_leaf(name):
    tx, dtype = CASES[name]
    (program,) = programs(tx, jnp.ones((6, 512), dtype))
    operands = operands_of(program)
    ((*expected,),) = update([whole_leaf(program, operands)])

    def piece(x, rows, half):
        columns = x.shape[1] // 2
        return x[rows, half * columns : (half + 1) * columns]

    for rows in (slice(0, 2), slice(2, 6)):
        for half in (0, 1):
            shape = (rows.stop - rows.start, 256)
            offsets = (jnp.int32(rows.start), jnp.int32(half * 256))
            shard = Shard(
                program,
                Origin(program.shape, offsets),
                shape,
                [piece(x, rows, half) if x.ndim else x for x in operands],
            )
            (found,) = update([shard])
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, piece(b, rows, half))


@pytest.mark.usefixtures("fast_reductions")
def test_leaves_share_a_kernel():
    shapes = [(22, 100), (300,), (2, 3, 64)]
    params = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    tx = optax_flash.master_weights(compress(optax.adamw(1e-2)))
    family = programs(tx, params)
    shards = [whole_leaf(p, operands_of(p, i)) for i, p in enumerate(family)]
    for shard in shards[1:]:
        scalars = len(shard.operands) - sum(x.ndim > 0 for x in shard.operands)
        shard.operands[-scalars:] = shards[0].operands[-scalars:]
    together = update(shards)
    for shard, found in zip(shards, together, strict=True):
        for a, b in zip(found, update([shard])[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_tile_may_be_one_group():
    (program,) = programs(compress(optax.sgd(0.1, momentum=0.9)), jnp.ones((2, 64)))
    operands = operands_of(program)
    (found,) = update([whole_leaf(program, operands)], Config(16, 4))
    check(found, whole(program)(*operands))


def text_of(function, avals):
    """A kernel that computes a function of vectors."""
    writer = Writer()
    (n,) = avals[0].shape
    at = writer.assign(f"tl.arange(0, {n})")
    names = [writer.assign(f"tl.load(in{i} + {at})") for i in range(len(avals))]
    results = writer.call(function, avals, names)
    for i, name in enumerate(results):
        writer.line(f"tl.store(out{i} + {at}, {name})")
    names = [f"in{i}" for i in range(len(avals))]
    names += [f"out{i}" for i in range(len(results))]
    head = f"@triton.jit\ndef optax_flash({', '.join(names)}):"
    return "\n".join([HEADER + head, *writer.lines, ""])


class Libdevice:
    """NVIDIA's functions, in numpy: the interpreter has none."""

    functions = {
        "atan2": np.arctan2,
        "erf": np.vectorize(math.erf, otypes=[np.float32]),
        "fmod": np.fmod,
        "pow": np.power,
        "round": lambda x: np.copysign(np.floor(np.abs(x) + np.float32(0.5)), x),
    }

    def __getattr__(self, name):
        from triton.language import tensor
        from triton.runtime.interpreter import TensorHandle

        def call(*args):
            data = (x.handle.data for x in args)
            out = (self.functions.get(name) or getattr(np, name))(*data)
            return tensor(TensorHandle(out, args[0].handle.dtype), args[0].type)

        return call


def everything(x, y, names):
    """Each elementwise primitive that takes such arrays."""
    results = []
    for name in sorted(ELEMENTWISE - DROPPED):
        function = UNLIKE_THEIR_NAME.get(name) or getattr(lax, name)
        try:
            out = function(x, y) if name in OF_TWO else function(x)
        except TypeError:
            continue
        names.append(name)
        results.append(out.astype(jnp.int32) if out.dtype == np.bool_ else out)
    return results


def vectors(dtype):
    rng = np.random.default_rng(0)
    if jnp.issubdtype(dtype, jnp.floating):
        special = [0.0, -0.0, 0.5, -0.5, 1.5, -2.5, np.inf, -np.inf, np.nan, 1.0, -1.0]
        x = np.concatenate([special, rng.normal(size=53) * 3]).astype(dtype)
        return x, np.roll(x, 5)
    info = jnp.iinfo(dtype)
    x = rng.integers(info.min, info.max, 64, dtype, True)
    # Shifts take small numbers, divisions none that is zero.
    return x, rng.integers(1, 40, 64, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint32", "int8"])
def test_every_primitive_means_what_it_does_in_xla(dtype):
    x, y = vectors(dtype)
    names = []
    expected = [np.array(z) for z in everything(jnp.asarray(x), jnp.asarray(y), names)]
    assert dtype[0] != "f" or set(names) == ELEMENTWISE - DROPPED
    avals = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (x, y)]
    found = [np.zeros_like(z) for z in expected]
    text = text_of(lambda x, y: everything(x, y, []), avals)
    interpret(text, 1, [x, y, *found], libdevice=Libdevice())
    for name, a, b in zip(names, found, expected, strict=True):
        close = {"rtol": 0, "err_msg": name}
        if a.dtype.kind == "f":
            close["rtol"] = 16 * np.finfo(a.dtype).eps
            close["atol"] = np.finfo(a.dtype).eps
        if name == "convert_element_type" or (
            name in UNLIKE_THEIR_NAME and dtype[0] == "f"
        ):
            # Only what an integer can hold.
            held = np.abs(x.astype(np.float32)) < 1e3
            held &= np.abs(y.astype(np.float32)) < 1e3
            a, b = a[held], b[held]
        np.testing.assert_allclose(a, b, **close)


@pytest.fixture
def compiled(monkeypatch):
    """A list that gets the PTX of every kernel that is compiled, for H100s."""
    library = jax_triton.triton_lib
    backend.kernel.cache_clear()
    found = []
    compile_ = library.compile_ttir_inplace

    def spy(*args):
        result = compile_(*args)
        found.append(result.binary)
        return result

    monkeypatch.setattr(library, "compile_ttir_inplace", spy)
    return found


def lower_for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def compile_for_cuda(tx, shape, dtype):
    (program,) = programs(tx, jax.ShapeDtypeStruct(shape, dtype))
    operands = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in program.jaxpr.invars
    ]

    def run_kernel(*operands):
        (results,) = backend.run([whole_leaf(program, operands)], Target("cuda", H100))
        return results

    return program, lower_for_cuda(run_kernel, *operands).as_text()


@pytest.mark.parametrize("name", CASES)
def test_ptx_reads_and_writes_in_vectors(compiled, name):
    """All that a thread has of an array at once, or 16 bytes of it at a time."""
    tx, dtype = CASES[name]
    program, text = compile_for_cuda(tx, (4096, 4096), dtype)
    (ptx,) = compiled
    assert ".target sm_90" in ptx
    assert ".local" not in ptx
    config = Config.of(program)
    elements = config.elements // (32 * config.num_warps)
    for kind, roles, variables in (
        ("ld", program.inputs, program.jaxpr.invars),
        ("st", program.outputs, program.jaxpr.outvars),
    ):
        sizes = [
            elements
            * x.aval.dtype.itemsize
            // (role.codec.codes_per_byte if role.codec else 1)
            for role, x in zip(roles, variables, strict=True)
            if role.kind in ("full", "codes")
        ]
        for width, vector in ((16, "v4"), (8, "v2")):
            found = len(re.findall(rf"{kind}\.global\.{vector}\.b32", ptx))
            expected = sum(x // 16 if width == 16 else x == 8 for x in sizes)
            assert found == expected, (kind, width)
    assert "triton_kernel_call" in text
    donated = sum(alias is not None for alias in program.aliases)
    assert text.count("output_operand_alias<") == donated > 0


@pytest.mark.parametrize("shape", [(70, 100), (4096, 1000), (66, 96), (5000,)])
def test_ptx_of_other_shapes_has_no_local_memory(compiled, shape):
    compile_for_cuda(compress(optax.adamw(1e-2)), shape, jnp.bfloat16)
    assert ".local" not in compiled[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_primitive_compiles(compiled, dtype):
    x = jax.ShapeDtypeStruct((64,), dtype)
    kernel = backend.kernel(text_of(lambda x, y: everything(x, y, []), [x, x]))
    shapes = jax.eval_shape(lambda x, y: everything(x, y, []), x, x)

    def call(x, y):
        options = {"kernel": kernel, "grid": 1, "compute_capability": 90}
        run_kernel = backend.calling({}, shapes, 80, **options)
        types = [jax.core.ShapedArray(z.shape, z.dtype) for z in shapes]
        return gpus.call(run_kernel, [x, y], types, contextlib.nullcontext)

    lower_for_cuda(call, x, x)
    assert len(compiled) == 1


def test_equal_leaves_share_a_compilation():
    tx = compress(optax.adamw(1e-2))
    params = [jnp.ones((64, 128)), jnp.ones((128, 64))]
    sources = {
        backend.source(Launch.of([whole_leaf(p, operands_of(p))], Config.of(p)), True)
        for p in programs(tx, params)
    }
    (text,) = sources
    assert backend.kernel(text) is backend.kernel("".join(text))
