"""Bad input: each error names the leaf, what was found and the way out."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash import Affine8, Companded8, compress, master_weights

PARAMS = {"layer": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}


@pytest.mark.parametrize("wrap", [compress, master_weights])
@pytest.mark.parametrize("leaf", ["text", jnp.tanh, object()])
def test_params_that_are_no_arrays(wrap, leaf):
    params = PARAMS | {"other": {"steps": leaf}}
    with pytest.raises(ValueError, match=r"'other/steps' is a .*optax\.masked"):
        wrap(optax.adam(1e-3)).init(params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool])
def test_matrices_that_cannot_be_orthogonalised(dtype):
    params = {"other": {"steps": jnp.zeros((4, 4), dtype)}}
    with pytest.raises(ValueError, match=r"'other/steps'.*optax\.masked"):
        optax_flash.scale_by_lora_pre_muon(2).init(params)


def test_complex_params_can_be_split():
    tx = optax.contrib.split_real_and_imaginary(optax_flash.adam8(1e-3))
    params = {"w": jnp.ones((64, 64), jnp.complex64)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.complex64


@pytest.mark.parametrize(
    "make",
    [
        lambda: compress(optax.adam(1e-3), "int3"),
        lambda: compress(optax.adam(1e-3), {"mu": "int3"}),
        lambda: optax_flash.adamw8(codecs="int3"),
    ],
)
def test_unknown_codec(make):
    with pytest.raises(ValueError, match="int3.*companded8.*flashoptim.*affine8"):
        make()


def test_codecs_of_a_wrong_type():
    with pytest.raises(ValueError, match="codec, a name or a mapping"):
        compress(optax.adam(1e-3), 8)


def test_unknown_field():
    tx = compress(optax.adam(1e-3), {"momentum": "affine8"})
    with pytest.raises(ValueError, match="'momentum'.*'mu', 'nu'"):
        tx.init(PARAMS)


@pytest.mark.parametrize("bits", [8, 16, 23, "24", None])
def test_bits(bits):
    with pytest.raises(ValueError, match=f"24.*32.*{bits}"):
        master_weights(optax.adam(1e-3), bits)


def test_unknown_residual_codec():
    with pytest.raises(ValueError, match="'kahan'.*exact, flashoptim"):
        master_weights(optax.adam(1e-3), codec="kahan")


@pytest.mark.parametrize("wrap", [compress, master_weights])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"layer": {"kernel": p["layer"]["kernel"]}}, "'layer/bias' is mis"),
        (lambda p: p | {"new": p["layer"]["bias"]}, "'new' is not in the state"),
        (lambda p: {"layer": list(p["layer"].values())}, "is missing"),
    ],
)
def test_another_tree(wrap, change, message):
    tx = wrap(optax.adam(1e-3))
    other = change(PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(other, tx.init(PARAMS), other)


def test_gradients_unlike_the_params():
    tx = master_weights(optax.sgd(1e-3))
    grads = {"layer": {"kernel": jnp.ones((64, 64))}}
    with pytest.raises(ValueError, match="gradients: 'layer/bias' is missing"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("wrap", [compress, master_weights])
def test_a_foreign_state(wrap):
    inner = optax.adam(1e-3)
    with pytest.raises(ValueError, match="tuple"):
        wrap(inner).update(PARAMS, inner.init(PARAMS), PARAMS)


def test_no_params():
    tx = master_weights(optax.sgd(1e-3))
    with pytest.raises(ValueError, match="update needs the params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "made_with, read_with",
    [
        (None, "flashoptim"),
        (None, "affine8"),
        (None, Companded8(group=64)),
        ("affine8", Affine8(group=64)),
        ({"*kernel*": None}, None),
        (None, {"*kernel*": None}),
    ],
)
def test_a_state_of_other_codecs(made_with, read_with):
    params = {"layer": {"kernel": jnp.ones((64, 256))}}
    state = compress(optax.adam(1e-3), made_with).init(params)
    tx = compress(optax.adam(1e-3), read_with)
    with pytest.raises(ValueError, match=r"layer/kernel/mu.*other codecs"):
        tx.update(params, state, params)


def test_a_state_with_other_fields_in_codes():
    state = compress(optax.adam(1e-3), {"nu": None}).init(PARAMS)
    with pytest.raises(ValueError, match="other codecs"):
        compress(optax.adam(1e-3)).update(PARAMS, state, PARAMS)


def test_a_state_of_other_bits():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = master_weights(optax.sgd(1e-3), 32).init(params)
    with pytest.raises(ValueError, match=r"'w'.*uint16.*bits"):
        master_weights(optax.sgd(1e-3), 24).update(params, state, params)


class TestCheckpointFormat:
    """What shapes and dtypes do not tell is kept beside the arrays."""

    def test_equal_formats_pass(self):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        optax_flash.check_format(saved, optax_flash.adamw8(1e-4), PARAMS)

    def test_it_is_plain_data(self):
        import json

        tx = optax.chain(optax.clip(1.0), master_weights(optax_flash.adamw8(1e-3)))
        params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
        saved = optax_flash.state_format(tx, params)
        assert json.loads(json.dumps(saved)) == saved
        assert set(saved["leaves"]) == {"w/mu", "w/nu", "w/residual"}

    @pytest.mark.parametrize(
        "other",
        [
            optax_flash.adamw8(codecs="flashoptim"),
            optax_flash.adamw8(codecs={"mu": Companded8(group=16)}),
            optax_flash.adamw8(codecs={"*kernel*": None}),
            compress(optax.adamw(1e-3), min_size=5000),
            optax.adamw(1e-3),
        ],
    )
    def test_other_formats_do_not(self, other):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        with pytest.raises(ValueError, match="layer/kernel/mu.*checkpoint's codecs"):
            optax_flash.check_format(saved, other, PARAMS)

    def test_other_bits_do_not(self):
        params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
        saved = optax_flash.state_format(master_weights(optax.sgd(1.0)), params)
        for other in (
            master_weights(optax.sgd(1.0), 32),
            master_weights(optax.sgd(1.0), codec="flashoptim"),
        ):
            with pytest.raises(ValueError, match="'w/residual'"):
                optax_flash.check_format(saved, other, params)

    def test_another_version_does_not(self):
        saved = optax_flash.state_format(optax_flash.adamw8(1e-3), PARAMS)
        with pytest.raises(ValueError, match="version 0"):
            optax_flash.check_format(
                saved | {"version": 0}, optax_flash.adamw8(1e-3), PARAMS
            )


class TestFinishedParams:
    """Nothing but apply_updates may follow ``master_weights(finished=True)``."""

    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}

    @pytest.mark.parametrize(
        "after",
        [
            optax.scale(0.5),
            optax.clip_by_global_norm(1.0),
            optax.clip(1.0),
            optax.add_decayed_weights(0.1),
            optax.trace(0.9),
            optax.scale_by_adam(),
            optax.ema(0.9),
            optax.zero_nans(),
            compress(optax.adam(1e-3)),
        ],
    )
    def test_a_transformation_after_it(self, after):
        tx = optax.chain(master_weights(optax.sgd(0.1), finished=True), after)
        with pytest.raises(TypeError, match="outermost transformation"):
            tx.update(self.params, tx.init(self.params), self.params)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 2),
        ],
    )
    def test_a_wrapper_that_computes_with_updates(self, wrap):
        tx = wrap(master_weights(optax.sgd(0.1), finished=True))
        with pytest.raises(TypeError, match=r"outermost.*'w'"):
            tx.update(self.params, tx.init(self.params), self.params)

    def test_other_params(self):
        tx = master_weights(optax.sgd(0.1), finished=True)
        updates, _ = tx.update(self.params, tx.init(self.params), self.params)
        with pytest.raises(TypeError, match="float32.*params that update saw"):
            optax.apply_updates({"w": np.ones((64, 64), np.float32)}, updates)


def test_master_params_of_a_state_without_residuals():
    with pytest.raises(ValueError, match="0 MasterWeightsStates"):
        optax_flash.master_params(PARAMS, optax.adam(1e-3).init(PARAMS))


def test_changed_params_without_a_digest():
    state = master_weights(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="track_params=True"):
        optax_flash.changed_params(PARAMS, state)
