"""Signs of states in codes: names alone never take them away."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optax_flash
from optax_flash import Companded4, Companded8, compress, state_format
from optax_flash.lowrank import lora_pre, lora_pre_muon
from optax_flash.transforms import _mirror, _rules

pytestmark = pytest.mark.usefixtures("quick_compile")

PARAMS = {"kernel": jnp.zeros((64, 64))}


class HeavyBall(NamedTuple):
    v: Any


class ScaleByAdamState(NamedTuple):
    """Called as optax's is."""

    nu: Any


def heavy_ball(make=HeavyBall):
    """A velocity in a field whose name is also one of second moments."""

    def init(params):
        return make(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        (velocity,) = state.values() if isinstance(state, dict) else state
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        return jax.tree.map(lambda v: -0.1 * v, velocity), make(velocity)

    return optax.GradientTransformation(init, update)


def as_dict(velocity):
    return {"v": velocity}


def five_steps(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(5):
        grads = {"kernel": jax.random.normal(jax.random.key(i), (64, 64))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"]


def offered(error):
    """The mappings that a message says to write: signed, unsigned, left."""
    found = re.findall(r"codecs=(\{[^}]*\})", str(error.value))
    return [eval(text, {"optax_flash": optax_flash}) for text in found]


def test_a_velocity_called_v_is_refused_and_right_as_the_message_says():
    exact = five_steps(heavy_ball())
    for make in (HeavyBall, as_dict):
        for codecs in (None, "companded8", {"*kernel*": "companded8"}):
            with pytest.raises(ValueError, match="'kernel/v' is a field of") as error:
                compress(heavy_ball(make), codecs).init(PARAMS)
            signed, unsigned, left = offered(error)
            distance = jnp.linalg.norm(
                five_steps(compress(heavy_ball(make), signed)) - exact
            )
            assert distance < 0.02 * jnp.linalg.norm(exact), codecs
            tx = compress(heavy_ball(make), left)
            np.testing.assert_allclose(five_steps(tx), exact, rtol=1e-5, atol=1e-7)
            leaves = state_format(compress(heavy_ball(make), unsigned), PARAMS)[
                "leaves"
            ]
            assert leaves == {"kernel/v": repr(Companded8(signed=False))}


def test_the_message_names_the_class_and_keeps_what_was_asked_for():
    codecs = {"*bias*": None, "*": "companded4"}
    params = PARAMS | {"bias": jnp.zeros(8192)}
    with pytest.raises(ValueError, match=r"test_signs\.HeavyBall") as error:
        compress(heavy_ball(), codecs).init(params)
    signed, *_ = offered(error)
    assert list(signed) == ["*bias*", "*", "v"]
    leaves = state_format(compress(heavy_ball(), signed), params)["leaves"]
    assert leaves == {"kernel/v": repr(Companded4(signed=True))}


def test_a_class_with_the_name_of_one_of_optax_is_not_it():
    with pytest.raises(ValueError, match=r"'kernel/nu'.*test_signs\.ScaleByAdamState"):
        compress(heavy_ball(ScaleByAdamState)).init(PARAMS)
    leaves = state_format(compress(optax.adam(0.1)), PARAMS)["leaves"]
    assert leaves["kernel/nu"] == repr(Companded8(signed=False))


def test_what_stays_in_float32_needs_no_sign():
    expected = five_steps(heavy_ball())
    for tx in (
        compress(heavy_ball(), min_size=5000),
        compress(heavy_ball(), {"*kernel*": None}),
        compress(heavy_ball(), {"*": None}),
    ):
        np.testing.assert_allclose(five_steps(tx), expected, rtol=1e-5, atol=1e-7)


def test_a_codec_for_the_field_decides():
    for codec, signed in (
        ("companded8", True),
        (Companded8(signed=True), True),
        (Companded8(signed=False), False),
    ):
        tx = compress(heavy_ball(), {"v": codec})
        leaves = state_format(tx, PARAMS)["leaves"]
        assert leaves == {"kernel/v": repr(Companded8(signed=signed))}, codec


def test_error_feedback_is_for_velocities_and_not_for_second_moments():
    def differs(codec):
        def last(error_feedback):
            tx = compress(heavy_ball(), {"v": codec}, error_feedback=error_feedback)
            return five_steps(tx)

        return bool(jnp.any(last(True) != last(False)))

    assert differs(Companded4(signed=True))
    assert not differs(Companded4(signed=False))


def test_the_classes_that_rules_name_exist():
    """A class that optax renames would lose its rules without a word."""
    modules = (
        optax._src.transform,
        optax.contrib._ademamix,
        optax.contrib._sophia,
        lora_pre,
        lora_pre_muon,
    )
    found = {
        _mirror.class_name(cls)
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type)
    }
    assert {*_rules.FIELDS_BY_STATE, *_rules.FACTORS_IN_CODES} <= found
