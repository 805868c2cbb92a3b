"""A program on a slice of its leaf computes what it does on the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash.fusion import fuse, partition
from optax_flash.fusion.backends import Target, cpu, xla
from optax_flash.fusion.program import whole
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

# Not fused: in fused loops XLA puts multiply-adds in other places of each program.
NO_FUSION = {"xla_disable_hlo_passes": "fusion"}
jit = functools.partial(jax.jit, compiler_options=NO_FUSION)
BACKENDS = {"xla": xla, "cpu": cpu}


# Both with the default codec, and either with one other.
@pytest.mark.parametrize(
    "codec, backend",
    quick(
        [("companded4", "cpu")],
        [
            ("companded8", "xla"),
            ("companded8", "cpu"),
            ("companded4", "cpu"),
            ("affine8", "xla"),
        ],
    ),
)
def test_slices_equal_the_whole(codec, backend):
    run = functools.partial(BACKENDS[backend].run, target=Target("cpu"))
    params = jnp.zeros((3, 40, 50), jnp.bfloat16)
    tx = optax_flash.master_weights(optax_flash.compress(optax.adamw(1e-2), codec))
    state = jax.jit(tx.init)(params)
    with fuse.watch() as leaves:
        jax.make_jaxpr(lambda s, p: tx.update(p, s, p)[1])(state, params)
    ((leaf, _),) = leaves
    program = leaf.program
    rng = np.random.default_rng(0)

    def operand(x):
        aval = x.aval
        if not aval.shape and aval.dtype == jnp.uint32:
            return jnp.uint32(rng.integers(2**32))
        if aval.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, aval.shape), jnp.uint8)
        return jnp.asarray(0.5 + rng.random(aval.shape), aval.dtype)

    operands = [operand(x) for x in program.jaxpr.invars]
    expected = jit(whole(program))(*operands)
    on_slice = jit(partition.whole((program,), run, True))
    for i in range(3):
        slices = [x[i : i + 1] if x.ndim else x for x in operands]
        for found, of_all in zip(
            on_slice(jnp.int32(i), *slices), expected, strict=True
        ):
            # As bytes, for a NaN is not equal to itself.
            found, of_slice = np.array(found), np.array(of_all[i : i + 1])
            assert found.shape == of_slice.shape and found.dtype == of_slice.dtype
            assert found.tobytes() == of_slice.tobytes()
