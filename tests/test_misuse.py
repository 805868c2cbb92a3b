"""Keys of ``codecs`` that fit nothing, codes of codes, arrays of other shapes."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_flash
from optax_flash import compress, master_weights, state_format

pytestmark = pytest.mark.usefixtures("quick_compile")

PARAMS = {
    "decoder": {"head": jnp.ones((64, 64)), "attention": jnp.ones((64, 64))},
    "bias": jnp.ones(8),
}


class TestKeysThatFitNothing:
    def test_the_nearest_path_is_named(self):
        for key, nearest in (
            ("*haed*", "decoder/head/mu"),
            ("decoder/atention/*", "decoder/attention/mu"),
            ("decoder/head", "decoder/head/mu"),
            ("*/nu", "bias/mu"),
            ("*bais*", "bias/mu"),
        ):
            tx = compress(optax.lion(1e-3), {key: None})
            with pytest.raises(ValueError, match="fits no") as error:
                tx.init(PARAMS)
            assert f"{key!r}" in str(error.value), key
            assert f"nearest is {nearest!r}" in str(error.value), key

    def test_so_is_the_nearest_field(self):
        for key, advice in (
            ("nuu", "The nearest is 'nu'"),
            ("haed", r"as in '\*head\*'"),
            ("head", r"as in '\*head\*'"),
        ):
            with pytest.raises(ValueError, match=f"{key!r}.*{advice}"):
                compress(optax.adam(1e-3), {key: None}).init(PARAMS)

    def test_a_key_that_names_something_passes(self):
        for tx in (
            compress(optax.adam(1e-3), {"*bias*": None}),  # Under min_size.
            compress(optax.adam(1e-3), {"*": None, "*head*": "companded4"}),
            compress(optax.adafactor(1e-3), {"*head*": None}),
            compress(optax.sgd(1e-3), {"*head*": None}),  # There is no state.
        ):
            jax.eval_shape(tx.init, PARAMS)

    def test_a_star_never_raises(self):
        for inner in (optax.adam(1e-3), optax.sgd(1e-3), optax.set_to_zero()):
            for params in (PARAMS, {}, {"frozen": None}, jnp.ones((64, 64))):
                compress(inner, {"*": "companded8"}).init(params)

    def test_one_mapping_serves_all_groups_of_a_partition(self):
        """A group does not see the params of others, and may have none of its own."""
        codecs = {"*head*": None, "decoder/attention/*": "affine8"}
        names = {"decoder": {"head": "a", "attention": "b"}, "bias": "b"}
        for labels in (names, {"decoder": "b", "bias": "b"}):
            groups = {name: optax_flash.adamw8(codecs=codecs) for name in "abc"}
            tx = optax.partition(groups, labels)
            assert set(state_format(tx, PARAMS)["leaves"]) == {
                "decoder/attention/mu",
                "decoder/attention/nu",
            }

    def test_masked_params_hide_only_what_may_be_theirs(self):
        mask = {"decoder": False, "bias": True}
        for key, fits in (("decoder/hed/*", True), ("encoder/*", False)):
            tx = optax.masked(optax_flash.adamw8(codecs={key: None}), mask)
            if fits:
                tx.init(PARAMS)
                continue
            with pytest.raises(ValueError, match="fits no"):
                tx.init(PARAMS)

    def test_tree_map_params_still_finds_the_params(self):
        tx = optax_flash.adamw8(codecs={"*head*": None})
        state = tx.init(PARAMS)
        doubled = optax.tree_map_params(tx, lambda x: x + x, state)
        assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_compressed_twice():
    inner = optax_flash.adamw8(1e-3)
    mask = {"decoder": True, "bias": False}
    for name, tx in {
        "alone": inner,
        "chain": optax.chain(optax.clip(1.0), inner),
        "masked": optax.masked(inner, mask),
        "partition": optax.partition({"a": inner}, lambda p: "a"),
        "weights": master_weights(inner),
    }.items():
        for look in (
            lambda tx: tx.init(PARAMS),
            lambda tx: jax.jit(tx.init)(PARAMS),
            lambda tx: state_format(tx, PARAMS),
        ):
            with pytest.raises(ValueError, match=r"compressed twice.*Remove"):
                look(compress(tx))
                pytest.fail(name)


class TestOtherShapes:
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}

    def other(self, **changed):
        return self.params | {name: jnp.ones(shape) for name, shape in changed.items()}

    def test_gradients_unlike_the_params(self):
        for name, shape in (("kernel", (64, 32)), ("bias", (63,)), ("bias", (64, 64))):
            grads, own = self.other(**{name: shape}), list(self.params[name].shape)
            for wrap in (compress, master_weights):
                tx = wrap(optax.adamw(1e-3))
                with pytest.raises(ValueError) as error:
                    tx.update(grads, tx.init(self.params), self.params)
                message = str(error.value)
                assert repr(name) in message and str(own) in message, message
                assert str(list(shape)) in message and "codec" not in message, message

    def test_gradients_alone_unlike_what_init_saw(self):
        for codecs in (None, "companded4", {"mu": "companded8", "nu": "companded8"}):
            tx = compress(optax.adam(1e-3), codecs)
            state = tx.init(self.params)
            for name, shape in (("kernel", (64, 32)), ("bias", (63,))):
                own = list(self.params[name].shape)
                with pytest.raises(ValueError) as error:
                    tx.update(self.other(**{name: shape}), state)
                message = str(error.value)
                assert repr(name) in message and str(own) in message, message
                assert str(list(shape)) in message and "codec" not in message, message

    def test_params_unlike_what_init_saw(self):
        params = optax_flash.cast_params(self.params, jnp.bfloat16)
        other = jax.tree.map(
            lambda p: p.astype(jnp.bfloat16), self.other(kernel=(64, 32))
        )
        tx = master_weights(optax.sgd(1e-3))
        state = tx.init(params)
        for look in (
            lambda: tx.update(other, state, other),
            lambda: optax_flash.master_params(state, other),
        ):
            with pytest.raises(
                ValueError,
                match=r"'kernel' has shape \[64, 32\], but init saw \[64, 64\]",
            ):
                look()

    def test_a_gradient_for_each_example_passes(self):
        grads = jax.tree.map(lambda p: jnp.stack([p, p]), self.params)
        private = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0)
        sgd8 = optax_flash.sgd8(0.1, momentum=0.9)
        for tx in (
            compress(optax.chain(private, optax.sgd(0.1))),
            master_weights(optax.chain(private, sgd8), finished=False),
        ):
            updates, _ = tx.update(grads, tx.init(self.params), self.params)
            assert jax.tree.map(jnp.shape, updates) == jax.tree.map(
                jnp.shape, self.params
            )
