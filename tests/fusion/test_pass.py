"""How an update is cut into scalars and programs, and what does not fit."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash.fusion import fuse
from optax_flash.fusion.jaxprs import flat_equations

SHAPE = (64, 128)


def params_of(*names, shape=SHAPE, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name in names}


def leaves_of(tx, params):
    """The leaves into which an update is cut."""
    with fuse.watch() as leaves:
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    return [leaf for leaf, _ in leaves]


def step(tx, params, grads):
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return updates, state


def assert_right(inner, reason, params=None):
    """All leaves are left to XLA for this reason, and the updates are optax's."""
    params = params or params_of("kernel")
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
    tx = optax_flash.compress(inner)
    (path,) = optax_flash.explain(tx, params, platform="cuda").paths
    assert path.implementation == "xla" and reason in path.reason
    updates, _ = step(tx, params, grads)
    expected, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    with pytest.raises(ValueError) as raised:
        named = optax_flash.compress(inner, implementation="interpret")
        jax.eval_shape(named.update, grads, named.init(params), params)
    assert "'kernel'" in str(raised.value) and reason in str(raised.value)


def test_equal_leaves_share_a_program():
    leaves = leaves_of(optax_flash.adamw8(1e-3), params_of("a", "b", "c"))
    assert len(leaves) == 3
    assert len({id(leaf.program) for leaf in leaves}) == 1
    # Also with those of another trace.
    (again,) = leaves_of(optax_flash.adamw8(1e-3), params_of("other"))
    assert again.program is leaves[0].program


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_take_the_place_of_their_like(dtype):
    """An update in float32 has no room where a gradient in bfloat16 was."""
    tx, params, grads = optax_flash.adamw8(1e-3), params_of("a"), params_of("a")
    grads = jax.tree.map(lambda g: g.astype(dtype), grads)
    with fuse.watch() as leaves:
        jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)
    ((leaf, _),) = leaves
    jaxpr, aliases = leaf.program.jaxpr, leaf.program.aliases
    found = [
        (x.aval.dtype, jaxpr.invars[alias].aval.dtype)
        for x, alias in zip(jaxpr.outvars, aliases, strict=True)
        if alias is not None
    ]
    assert all(result == operand for result, operand in found)
    # Two moments with scales; the update where it fits.
    assert len(found) == (5 if dtype == jnp.float32 else 4)


def test_another_number_is_another_program():
    (a,) = leaves_of(optax_flash.adamw8(1e-3), params_of("a"))
    (b,) = leaves_of(optax_flash.adamw8(1e-3, b1=0.8), params_of("a"))
    assert a.program != b.program


def test_a_mask_by_path_makes_two_programs():
    tx = optax_flash.adamw8(1e-3, mask={"a": True, "b": False})
    decayed, other = leaves_of(tx, params_of("a", "b"))
    assert decayed.program != other.program
    assert len(decayed.program.inputs) == len(other.program.inputs) + 1


def test_shape_alone_makes_another_program_of_the_same_family():
    params = params_of("a") | params_of("b", shape=(32, 256))
    a, b = leaves_of(optax_flash.adamw8(1e-3), params)
    assert a.program != b.program
    assert a.program.family == b.program.family


def test_a_jitted_function_of_the_whole_tree_ties_no_leaves_together():
    @jax.jit
    def halved(tree):
        inner = jax.jit(lambda tree: jax.tree.map(lambda x: x / 2, tree))
        return jax.tree.map(jnp.negative, inner(inner(tree)))

    inner = optax.chain(
        optax.stateless(lambda updates, _: halved(halved(updates))), optax.adam(1e-2)
    )
    params = params_of("a", "b")
    tx = optax_flash.compress(inner)
    a, b = leaves_of(tx, params)
    assert a.program is b.program
    expected, _ = inner.update(params, inner.init(params), params)
    chex.assert_trees_all_close(step(tx, params, params)[0], expected, rtol=1e-5)


def test_a_global_norm_is_a_scalar_and_the_rest_elementwise():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    (leaf,) = leaves_of(optax_flash.compress(inner), params_of("kernel"))
    names = {eqn.primitive.name for eqn in flat_equations(leaf.program.jaxpr)}
    assert "reduce_sum" not in names
    assert leaf.reason is None


def test_a_norm_of_the_update_needs_a_pass_before():
    tx = optax_flash.compress(optax.lamb(1e-3))
    (path,) = optax_flash.explain(tx, params_of("kernel"), platform="cuda").paths
    assert path.implementation == "pallas" and "after a pass" in path.reason


def test_half_precision_gradients_enter_the_kernel_as_they_are():
    (leaf,) = leaves_of(
        optax_flash.adamw8(1e-3), params_of("kernel", dtype=jnp.bfloat16)
    )
    full = [
        x.aval.dtype
        for x, role in zip(leaf.program.jaxpr.invars, leaf.program.inputs, strict=True)
        if role.kind == "full"
    ]
    assert full == [jnp.bfloat16, jnp.bfloat16]


def test_every_array_of_the_state_is_updated_in_place():
    tx = optax_flash.master_weights(optax_flash.adamw8(1e-3), finished=False)
    (leaf,) = leaves_of(tx, params_of("kernel", dtype=jnp.bfloat16))
    # The gradient's buffer, the residual's, those of two codes and of two scales.
    assert len(set(leaf.program.aliases) - {None}) == 6


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: optax.contrib.muon(1e-3), "an array is reshaped"),
        (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8), "shapes"),
        (lambda: optax.apply_if_finite(optax.sgd(0.1), 3), "lax.cond"),
    ],
)
def test_what_does_not_fit_says_why(make, reason):
    explanation = optax_flash.explain(
        optax_flash.compress(make()), params_of("kernel"), platform="cuda"
    )
    reasons = [x.reason for x in explanation.paths if x.implementation == "xla"]
    assert any(reason in found for found in reasons)
    assert "kernel" in str(explanation)


def test_explain_prints_one_line_for_leaves_that_are_alike():
    params = params_of("a", "b") | {"scale": jnp.ones(())}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax_flash.adamw8(1e-3))
    cuda = optax_flash.explain(tx, params, platform="cuda")
    assert [len(path.params) for path in cuda.paths] == [2, 1]
    assert [path.implementation for path in cuda.paths] == ["pallas", "xla"]
    cpu = optax_flash.explain(tx, params, platform="cpu")
    assert {path.implementation for path in cpu.paths} == {"xla"}
    assert len(str(cuda).splitlines()) == 4


def scale_by(function):
    """A stateless transformation of each leaf."""
    return optax.stateless(lambda updates, _: jax.tree.map(function, updates))


class TestBadInput:
    def test_closed_over_array_of_the_params_shape(self):
        mask = jnp.asarray(np.random.default_rng(1).random(SHAPE), jnp.float32)
        inner = optax.chain(scale_by(lambda g: g * mask), optax.adam(1e-2))
        params = params_of("kernel")
        tx = functools.partial(optax_flash.compress, inner)
        (leaf,) = leaves_of(tx(), params)
        assert leaf.reason is None
        kernel, _ = step(tx(implementation="interpret"), params, params)
        xla, _ = step(tx(implementation="xla"), params, params)
        chex.assert_trees_all_close(kernel, xla, rtol=1e-6)
        expected, _ = inner.update(params, inner.init(params), params)
        chex.assert_trees_all_close(xla, expected, rtol=1e-5)

    def test_closed_over_tracer(self):
        params = params_of("kernel")

        @jax.jit
        def update(rate):
            tx = optax_flash.compress(optax.sgd(rate, momentum=0.9))
            return tx.update(params, tx.init(params), params)[0]

        chex.assert_trees_all_close(
            update(0.5), jax.tree.map(lambda p: -0.5 * p, params)
        )

    def test_host_callback(self):
        def double(g):
            shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
            return jax.pure_callback(lambda x: 2 * np.asarray(x), shape, g)

        assert_right(optax.chain(scale_by(double), optax.adam(1e-2)), "a host callback")

    def test_side_effects_happen_once(self):
        seen = []

        def look(g):
            jax.debug.callback(lambda x: seen.append(float(x)), g[0, 0])
            return g

        params = params_of("kernel")
        tx = optax_flash.compress(optax.chain(scale_by(look), optax.adam(1e-2)))
        (path,) = optax_flash.explain(tx, params, platform="cuda").paths
        assert "side effects" in path.reason
        state = tx.init(params)
        jax.block_until_ready(jax.jit(tx.update)(params, state, params))
        jax.effects_barrier()
        assert seen == [float(params["kernel"][0, 0])]

    def test_random_keys(self):
        key = jax.random.key(0)
        noise = optax.add_noise(eta=0.1, gamma=0.5, key=key)
        assert_right(optax.chain(noise, optax.adam(1e-2)), "random numbers")

    def test_float64(self):
        with jax.enable_x64(True):
            params = params_of("kernel", dtype=jnp.float64)
            assert_right(optax.adam(1e-2), "float64", params)

    def test_float32_where_float64_is_on(self):
        with jax.enable_x64(True):
            params = params_of("kernel")
            tx = functools.partial(optax_flash.adamw8, 1e-2)
            kernel, _ = step(tx(implementation="interpret"), params, params)
            xla, _ = step(tx(), params, params)
            assert xla["kernel"].dtype == jnp.float32
            chex.assert_trees_all_close(kernel, xla, rtol=1e-6)

    @pytest.mark.parametrize("implementation", ["xla", "interpret"])
    def test_weak_types(self, implementation):
        weak = {"kernel": jnp.broadcast_to(jnp.asarray(0.5), SHAPE)}
        assert weak["kernel"].weak_type
        tx = optax_flash.adamw8(1e-2, implementation=implementation)
        state = tx.init(weak)
        updates, new_state = step(tx, weak, weak)
        chex.assert_trees_all_equal_dtypes(new_state, state)
        strong = {"kernel": jnp.full(SHAPE, 0.5, jnp.float32)}
        chex.assert_trees_all_close(updates, step(tx, strong, strong)[0], rtol=1e-6)

    def test_more_elements_than_kernels_count(self):
        params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)}
        tx = optax_flash.adamw8(1e-3)
        (path,) = optax_flash.explain(tx, params, platform="cuda").paths
        assert path.implementation == "xla" and "2**31" in path.reason
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)

    def test_groups_that_are_no_power_of_two(self):
        params = params_of("kernel", shape=(64, 96))
        codec = optax_flash.Companded8(group=48)
        tx = optax_flash.adamw8(1e-3, codecs=codec)
        (path,) = optax_flash.explain(tx, params, platform="cuda").paths
        assert path.implementation == "xla" and "48" in path.reason
        step(tx, params, params)

    def test_empty_leaves(self):
        params = params_of("kernel") | {"empty": jnp.zeros((0, 32))}
        updates, _ = step(optax_flash.adamw8(1e-3), params, params)
        assert updates["empty"].shape == (0, 32)


class TestNamedImplementations:
    def test_unknown_name(self):
        for make in (optax_flash.adamw8, optax_flash.lion8):
            with pytest.raises(ValueError, match="Unknown implementation 'cuda'"):
                make(1e-3, implementation="cuda")
        with pytest.raises(ValueError, match="Unknown implementation"):
            optax_flash.master_weights(optax.sgd(0.1), implementation="cuda")

    def test_another_platform(self):
        tx = optax_flash.adamw8(1e-3, implementation="pallas")
        params = params_of("kernel")
        with pytest.raises(ValueError, match="'pallas' needs an NVIDIA GPU.*cpu"):
            jax.jit(tx.update)(params, tx.init(params), params)

    def test_every_reason_is_listed(self):
        inner = optax.chain(
            optax.masked(
                optax.add_noise(0.1, 0.5, key=jax.random.key(0)),
                {
                    "a": True,
                    "b": False,
                    "c": False,
                    "d": False,
                },
            ),
            optax.adam(1e-3),
        )
        tx = optax_flash.compress(inner, implementation="pallas")
        params = params_of("a", "c") | {
            "b": jnp.zeros((0, 32)),
            "d": jax.ShapeDtypeStruct((2**16, 2**15), "float32"),
        }
        with pytest.raises(ValueError) as raised:
            jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        message = str(raised.value)
        assert "'a': random numbers" in message
        assert "'b': it is empty" in message
        assert "'d': it has 2**31" in message
        assert "'c'" not in message

    def test_the_inner_one_is_heard(self):
        tx = optax_flash.master_weights(
            optax_flash.compress(optax.contrib.muon(1e-3), implementation="pallas")
        )
        params = params_of("kernel")
        with pytest.raises(ValueError, match="'pallas' does not fit"):
            jax.eval_shape(tx.update, params, tx.init(params), params)

    def test_two_names(self):
        tx = optax_flash.master_weights(
            optax_flash.adamw8(1e-3, implementation="xla"), implementation="pallas"
        )
        params = params_of("kernel")
        with pytest.raises(ValueError, match="several implementations"):
            jax.eval_shape(tx.update, params, tx.init(params), params)


class TestTransformations:
    """Steps under jax's own transformations."""

    def test_vmap(self):
        tx = optax_flash.adamw8(1e-2)
        params = params_of("kernel")
        states = jax.vmap(tx.init)(jax.tree.map(lambda p: jnp.stack([p, p]), params))
        grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        updates, _ = jax.vmap(tx.update, (0, 0, None))(grads, states, params)
        for i in range(2):
            grad, found = jax.tree.map(operator.itemgetter(i), (grads, updates))
            expected, _ = step(tx, params, grad)
            chex.assert_trees_all_close(found, expected, rtol=1e-5)

    def test_gradient_through_a_step(self):
        params = params_of("kernel")
        tx = optax_flash.compress(optax.sgd(0.5, momentum=0.9))
        plain = optax.sgd(0.5, momentum=0.9)

        def after(grads, tx):
            updates, _ = tx.update(grads, tx.init(params), params)
            return jnp.sum(optax.apply_updates(params, updates)["kernel"] ** 2)

        found = jax.grad(after)(params, tx)
        chex.assert_trees_all_close(found, jax.grad(after)(params, plain), rtol=1e-6)

    def test_scan(self):
        tx = optax_flash.master_weights(optax_flash.adamw8(1e-2))
        params = params_of("kernel", dtype=jnp.bfloat16)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        scanned, _ = jax.lax.scan(body, carry, length=3)
        for _ in range(3):
            carry, _ = jax.jit(body)(carry, None)
        chex.assert_trees_all_equal(scanned, carry)


def test_an_inner_update_may_be_jitted():
    # Traced again, the outer update finds the inner one in jax's cache.
    inner = optax_flash.adamw8(1e-3)
    inner = inner._replace(update=jax.jit(inner.update))
    tx = optax_flash.master_weights(inner, finished=False)
    params = jnp.ones((64, 64), jnp.bfloat16)
    state = tx.init(params)
    first = jax.jit(tx.update)(params, state, params)
    second = jax.jit(lambda *args: tx.update(*args))(params, state, params)
    chex.assert_trees_all_equal(first, second)
