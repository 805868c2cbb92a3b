"""States, transformations and params that are not the right ones: errors by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash

MAKE = {
    "adamw8": lambda: optax_flash.adamw8(1e-2),
    "tame": lambda: optax_flash.tame(1.0),
    "tamed_adamw8": lambda: optax_flash.tamed_adamw8(1e-2, threshold=1.0),
    "lora_pre_adamw": lambda: optax_flash.lora_pre_adamw(1e-2, rank=4),
    "lora_pre_muon": lambda: optax_flash.lora_pre_muon(1e-2, rank=4),
    "lowrank_adamw": lambda: optax_flash.lowrank_adamw(1e-2, rank=4),
    "scale_by_lora_pre": lambda: optax_flash.scale_by_lora_pre(rank=4),
    "scale_by_lora_pre_muon": lambda: optax_flash.scale_by_lora_pre_muon(rank=4),
    "scale_by_lowrank_adam": lambda: optax_flash.scale_by_lowrank_adam(rank=4),
    "master_weights": lambda: optax_flash.master_weights(optax_flash.adamw8(1e-2)),
}


def params():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)}


@pytest.mark.parametrize("name, other", list(itertools.permutations(MAKE, 2)))
def test_a_state_of_another_optimizer_is_refused_by_name(name, other):
    tx, p = MAKE[name](), params()
    state = jax.eval_shape(MAKE[other]().init, p)
    with pytest.raises(ValueError, match="(?s)state.*(call init again|made it)"):
        jax.eval_shape(lambda state: tx.update(p, state, p), state)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "around",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.partition({"a": tx}, lambda p: jax.tree.map(lambda _: "a", p)),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        optax_flash.compress,
    ],
)
def test_master_weights_inside_is_refused_by_init(around, finished):
    inner = optax_flash.master_weights(optax.adamw(1e-3), finished=finished)
    with pytest.raises(ValueError, match="compress: .*master_weights.*outermost"):
        optax_flash.compress(around(inner)).init(params())
    with pytest.raises(ValueError, match="master_weights.*outermost"):
        optax_flash.master_weights(around(inner)).init(params())


def test_scales_that_a_trainer_has_cast_are_named_with_their_dtype():
    tx, p = optax_flash.adamw8(1e-2), params()
    state = tx.init(p)

    def cast(dtype, tree):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            tree,
        )

    wide = cast(jnp.float32, state)
    message = "scales of 'w/mu' are float32, but .* in bfloat16.*has cast the optimizer"
    with pytest.raises(ValueError, match=message):
        tx.update(p, wide, p)
    found, expected = (tx.update(p, x, p)[0] for x in (cast(jnp.bfloat16, wide), state))
    assert np.array_equal(found["w"], expected["w"])


@pytest.mark.parametrize("codec", ["affine8", "flashoptim"])
def test_other_codecs_of_the_same_structure_are_both_named(codec):
    p = params()
    state = optax_flash.adamw8(1e-2).init(p)
    other = "Affine8" if codec == "affine8" else "FlashOptim8"
    with pytest.raises(ValueError, match=f"'w/mu'.*by Companded8.*under {other}"):
        optax_flash.adamw8(1e-2, codecs=codec).update(p, state, p)


def test_tools_take_a_whole_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(64, 64, 128, 2, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    tx = optax_flash.adamw8(1e-2)
    state = tx.init(arrays)

    def same(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))

    plain = optax_flash.to_optax_state(tx, state, model)
    same(plain, optax_flash.to_optax_state(tx, state, arrays))
    again = optax_flash.from_optax_state(tx, plain[1], model)
    same(again, optax_flash.from_optax_state(tx, plain[1], arrays))
    same(
        optax_flash.numerics_report(tx, state, model, arrays),
        optax_flash.numerics_report(tx, state, arrays, arrays),
    )
    for tool in (
        optax_flash.state_format,
        optax_flash.explain,
        lambda tx, p: str(optax_flash.memory_report(tx, p)),
    ):
        assert tool(tx, model) == tool(tx, arrays)
    jax.tree.map(
        lambda x, y: None,
        optax_flash.differentiable(tx, state, model),
        optax_flash.differentiable(tx, state, arrays),
    )
