"""What becomes of an update on H100s and B200s: kernels, memory, collectives, PTX.

Compiled, not run: needs ``jax[cuda13]`` but no GPU, see ``make test-cuda``.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType

import optax_flash
import optax_flash.flax
from benchmarks.h100 import (
    BACKENDS,
    TARGETS,
    access_widths,
    adamw_step,
    assemble,
    compile_step,
    inspect,
    mesh_of,
    sharded_like,
)
from examples.common.optimizers import make_optimizer
from examples.lm.model import GPT, GPTConfig
from optax_flash.fusion import fuse

pytestmark = pytest.mark.cuda

ROOT = pathlib.Path(__file__).parents[2]
MEGABYTE = 2**20
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "schedule": lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
    "amsgrad": lambda: optax.amsgrad(1e-3),
    "adan": lambda: optax.adan(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9, nesterov=True),
    "yogi": lambda: optax.yogi(1e-3),
}


def matrix(shape=(4096, 4096), dtype=jnp.bfloat16):
    return {"kernel": jax.ShapeDtypeStruct(shape, dtype)}


def finished(inner, bits=24, codecs=None, implementation=None):
    return optax_flash.master_weights(
        optax_flash.compress(inner, codecs), bits, implementation=implementation
    )


def state_bytes(tx, params):
    """Bytes of params and state that are not scalars."""
    leaves = jax.tree.leaves((params, jax.eval_shape(tx.init, params)))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim)


CODECS = ("companded8", "companded4")
KINDS = (AxisType.Auto, AxisType.Explicit)


def test_triton_is_the_default():
    (path,) = optax_flash.explain(
        finished(optax.adamw(1e-3)), matrix(), platform="cuda"
    ).paths
    assert (path.implementation, path.reason) == ("triton", "elementwise")
    compiled = compile_step(finished(optax.adamw(1e-3)), matrix())
    assert compiled == adamw_step("triton", "h100", "companded8")
    assert len(compiled.ptx) == 1


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_have_one_kernel_in_place(backend, target, codecs):
    compiled = adamw_step(backend, target, codecs)
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE
    tx = finished(optax.adamw(1e-3), codecs=codecs)
    assert 0 <= compiled.aliased - state_bytes(tx, matrix()) < 100


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("target", TARGETS)
def test_triton_reads_and_writes_in_vectors_and_spills_nothing(target, codecs):
    (ptx,) = adamw_step("triton", target, codecs).ptx
    assert ".local" not in ptx
    assert assemble(ptx, target).spilled == 0
    check_widths(ptx, "adamw(1e-3)", codecs)


@pytest.mark.parametrize("codecs", CODECS)
def test_triton_keeps_ragged_rows_in_registers(codecs):
    compiled = compile_step(
        finished(optax.adamw(1e-3), codecs=codecs), matrix((4096, 1000))
    )
    (ptx,) = compiled.ptx
    assert ".local" not in ptx
    assert assemble(ptx, "h100").spilled == 0


@pytest.mark.parametrize(
    "name, bits", [*((name, 24) for name in OPTIMIZERS), ("adamw", 32), ("sgd", 32)]
)
def test_one_kernel_in_place(name, bits):
    tx = finished(OPTIMIZERS[name](), bits)
    compiled = compile_step(tx, matrix())
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE
    assert 0 <= compiled.aliased - state_bytes(tx, matrix()) < 100


EVERY_CODEC = [
    *("flashoptim", "affine8", "companded4", "affine4"),
    *({"mu": "affine8"}, {"mu": "companded4"}),
    *(optax_flash.Companded4(unsigned_curve=x) for x in ("linear", "square", "log")),
    *(optax_flash.Companded4(signed_curve=x) for x in ("linear", "log", "dynamic")),
]


@pytest.mark.parametrize("codecs", EVERY_CODEC, ids=str)
def test_every_codec(codecs):
    tx = finished(optax.adamw(1e-3), codecs=codecs)
    compiled = compile_step(tx, matrix())
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE
    assert 0 <= compiled.aliased - state_bytes(tx, matrix()) < 100


def test_float32_params_need_no_residual():
    params = matrix(dtype=jnp.float32)
    tx = finished(optax.adamw(1e-3))
    compiled = compile_step(tx, params)
    residual = jax.eval_shape(tx.init, params).residual["kernel"]
    assert residual == optax.MaskedNode()
    assert compiled.kernels["optax_flash"] == 1
    assert compiled.kernels.total() == 1
    assert compiled.temporaries < MEGABYTE


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_additive_updates_take_the_place_of_the_gradients(dtype):
    params = matrix(dtype=dtype)
    tx = optax_flash.adamw8(1e-3)
    state = jax.eval_shape(tx.init, params)
    arguments = sharded_like((params, state, params), mesh_of())
    compiled = inspect(jax.jit(tx.update, donate_argnums=(0, 1)), *arguments)
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE
    assert 0 <= compiled.aliased - state_bytes(tx, params) < 100


def test_a_global_norm_inside_costs_one_pass_over_the_gradients():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax_flash.adamw8(1e-3))
    tx = optax_flash.master_weights(inner)
    compiled = compile_step(tx, matrix())
    assert compiled.kernels["optax_flash"] == 1
    # No clipped gradients and no float32 copy of them: only partial sums.
    assert compiled.temporaries < MEGABYTE


def test_a_chain_around_it():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax_flash.adamw8(1e-3))
    compiled = compile_step(tx, matrix())
    assert compiled.kernels["optax_flash"] == 1


def test_ragged_rows():
    compiled = compile_step(finished(optax.adamw(1e-3)), matrix((4096, 1000)))
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE


# Pairs: every spec with both kinds of mesh and with both codecs, and those together.
@pytest.mark.parametrize(
    "devices, spec, kinds",
    [
        ((8, 1), ("fsdp",), KINDS),
        ((8, 1), (None, "fsdp"), KINDS[::-1]),
        ((4, 2), ("fsdp", "tp"), KINDS),
        ((4, 2), (("fsdp", "tp"), None), KINDS[::-1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("codecs", CODECS)
def test_eight_gpus_exchange_nothing(devices, spec, kinds, codecs):
    kind = kinds[CODECS.index(codecs)]
    check_eight_gpus(devices, spec, kind, codecs)


@pytest.mark.parametrize(
    "backend, target, kind",
    [
        ("triton", "b200", AxisType.Explicit),
        ("pallas", "h100", AxisType.Auto),
        ("pallas", "h100", AxisType.Explicit),
        ("pallas", "b200", AxisType.Auto),
    ],
    ids=str,
)
def test_eight_of_each_gpu_exchange_nothing(backend, target, kind):
    check_eight_gpus((4, 2), ("fsdp", "tp"), kind, "companded8", backend, target)


def check_eight_gpus(devices, spec, kind, codecs, backend=None, target="h100"):
    mesh = mesh_of(devices, ("fsdp", "tp"), kind, target)
    tx = finished(optax.adamw(1e-3), codecs=codecs, implementation=backend)
    with jax.set_mesh(mesh):
        compiled = compile_step(tx, matrix(), mesh, spec)
    assert not compiled.collectives
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE
    assert 0 <= compiled.aliased - state_bytes(tx, matrix()) / 8 < 100


def test_three_axes_on_eight_gpus():
    mesh = mesh_of((8, 1), ("fsdp", "tp"))
    params = matrix((64, 512, 1000))
    tx = finished(optax.adamw(1e-3))
    compiled = compile_step(tx, params, mesh, (None, "fsdp"))
    assert not compiled.collectives
    assert compiled.kernels == {"optax_flash": 1}
    assert compiled.temporaries < MEGABYTE


def test_shards_that_end_within_a_group_are_gathered():
    mesh = mesh_of((8,), ("fsdp",))
    compiled = compile_step(
        finished(optax.adamw(1e-3)), matrix((512, 128)), mesh, (None, "fsdp")
    )
    assert compiled.collectives


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_leaves_share_kernels(backend):
    shapes = [(64, 64), (128, 64), (4096,), (100, 70), (64,), (256,), (3, 3, 64, 64)]
    params = {
        f"{i}": jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for i, shape in enumerate(shapes)
    }
    compiled = compile_step(finished(optax.adamw(1e-3), implementation=backend), params)
    # Two families, of leaves in codes and of others: 5 and 2 leaves.
    assert compiled.kernels == {"optax_flash": 2}
    assert compiled.temporaries < MEGABYTE


def test_sixteen_small_leaves_share_a_kernel():
    params = {
        f"{i}": jax.ShapeDtypeStruct((64,), jnp.bfloat16) for i in range(3 * 16 + 1)
    }
    compiled = compile_step(finished(optax.sgd(1e-3, momentum=0.9)), params)
    assert compiled.kernels == {"optax_flash": 4}


def test_a_numerics_report_holds_one_leaf_in_float32():
    tx = finished(optax.adamw(1e-3))
    params = {name: matrix()["kernel"] for name in "abcd"}
    args = sharded_like((jax.eval_shape(tx.init, params), params, params), mesh_of())
    look = jax.jit(functools.partial(optax_flash.numerics_report, tx))
    compiled = inspect(look, *args)
    assert compiled.kernels["optax_flash"] == 0
    assert compiled.temporaries < 4 * 4096 * 4096 + MEGABYTE


def test_leaves_beyond_32_bits_are_left_to_xla():
    params = matrix((2**16, 2**15))
    tx = finished(optax.sgd(1e-3, momentum=0.9))
    (path,) = optax_flash.explain(tx, params, platform="cuda").paths
    assert path.implementation == "xla" and "2**31" in path.reason
    assert compile_step(tx, params).kernels["optax_flash"] == 0
    with pytest.raises(ValueError, match=r"kernel.*2\*\*31"):
        jax.eval_shape(
            optax_flash.sgd8(1e-3, 0.9, implementation="triton").update,
            params,
            jax.eval_shape(optax_flash.sgd8(1e-3, 0.9).init, params),
        )


def test_a_shard_of_a_huge_leaf_may_be_small_enough():
    # The rule looks at whole leaves, so that sharding does not change the numbers.
    mesh = mesh_of((8,), ("fsdp",))
    params = matrix((2**16, 2**15))
    compiled = compile_step(
        finished(optax.sgd(1e-3, momentum=0.9)), params, mesh, ("fsdp",)
    )
    assert not compiled.collectives
    assert compiled.kernels["optax_flash"] == 0


def test_a_whole_train_step_has_one_kernel_for_a_matrix():
    model = GPT(GPTConfig(depth=3, width=256))
    tx = make_optimizer("adamw8", steps=100, warmup=10)

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((1, 128), jnp.int32))
        return optax_flash.flax.TrainState.create(
            apply_fn=model.apply, params=params["params"], tx=tx
        )

    state = jax.eval_shape(create)

    def step(state, tokens):
        def loss(params):
            logits = state.apply_fn({"params": params}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    tokens = jax.ShapeDtypeStruct((8, 129), jnp.int32)
    arguments = sharded_like((state, tokens), mesh_of())
    compiled = inspect(jax.jit(step, donate_argnums=0), *arguments)
    matrices = sum(p.ndim > 1 for p in jax.tree.leaves(state.params))
    # All vectors, the scales of norms, share one.
    assert compiled.kernels["optax_flash"] == matrices + 1


DUMP = """
import jax, jax.numpy as jnp, optax, optax_flash
from benchmarks.h100 import compile_step
params = {{"kernel": jax.ShapeDtypeStruct({shape}, jnp.{dtype})}}
tx = optax_flash.master_weights(
    optax_flash.compress(optax.{inner}, {codecs!r}), implementation="pallas"
)
compile_step(tx, params)
"""

dumps_ptx = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="XLA of jax 0.12 compiles Pallas' Triton without dumping its PTX",
)


@dumps_ptx
@pytest.mark.parametrize("codecs", CODECS)
def test_pallas_reads_and_writes_in_vectors(tmp_path, codecs):
    ptx = _ptx(tmp_path, "adamw(1e-3)", codecs, (4096, 4096))
    assert ".local" not in ptx
    assert assemble(ptx, "h100").spilled == 0
    check_widths(ptx, "adamw(1e-3)", codecs)


@dumps_ptx
def test_pallas_keeps_ragged_rows_in_registers(tmp_path):
    assert ".local" not in _ptx(tmp_path, "adamw(1e-3)", "companded8", (4096, 1000))


def check_widths(ptx, inner, codecs):
    """Codes, residuals and 16-bit arrays: 8 or 16 bytes a thread."""
    scalars, scales = _narrow_operands(inner, codecs)
    widths = access_widths(ptx)
    assert widths["load"] and widths["store"]
    for kind, found in widths.items():
        wide = [bytes_ for bytes_ in found if bytes_ >= 8]
        narrow = [bytes_ for bytes_ in found if bytes_ < 8]
        assert len(wide) >= 3, kind
        # A thread has the scales of one group, and reads scalars once.
        limit = scales + (scalars if kind == "load" else 0)
        assert len(narrow) <= limit, (kind, found)


def _ptx(folder, inner, codecs, shape):
    """The PTX of the kernel of a step; compiled in a process that dumps it."""
    script = DUMP.format(
        shape=shape,
        dtype="bfloat16",
        inner=inner,
        codecs=codecs,
    )
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={folder}"}
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment, cwd=ROOT
    )
    found = []
    for path in folder.glob("*.ptx"):
        # The head says for which GPU the kernels are.
        head, *entries = re.split(r"(?=\.visible \.entry)", path.read_text())
        found += [head + x for x in entries if "optax_flash" in x.splitlines()[0]]
    assert found
    return found[0]


def _narrow_operands(inner, codecs):
    """How many scalars, and of how many kinds scales, the kernel of a step reads."""
    inner = eval(f"optax.{inner}")
    tx = optax_flash.master_weights(optax_flash.compress(inner, codecs))
    params = matrix((256, 256))
    state = jax.eval_shape(tx.init, params)
    with fuse.watch() as leaves:
        # Only the state: params that are done are no results of a function.
        jax.make_jaxpr(lambda *args: tx.update(*args)[1])(params, state, params)
    (leaf, _), *_ = leaves
    assert leaf.program
    inputs = leaf.program.inputs
    codecs = [role.codec for role in inputs if role.kind == "scales" and role.codec]
    scales = [codec.scales_per_group for codec in codecs]
    return sum(role.kind == "scalar" for role in inputs), sum(scales)
