"""Plain trees of params: rules on paths, auxiliaries, other libraries, populations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from tests.clients import problem
from tests.tiers import quick

pytestmark = pytest.mark.usefixtures("quick_compile")

SPECS = {
    layer: {name: P(*axes) for name, axes in names.items()}
    for layer, names in problem.NAMES.items()
}


def placed(tree, specs, mesh):
    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs)


def stepping(tx):
    """The step of a plain loop."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def stock_run(tx, steps):
    params, step = problem.weights(), stepping(tx)
    state = tx.init(params)
    for _ in range(steps):
        params, state = problem.wait(step(params, state))
    return params


class EasyDeL:
    """Regular expressions on paths place each array, written anew.

    The first that is found in a path gives the spec; what has fewer axes, or axes that
    do not divide, loses what does not fit.
    """

    rules = (
        (r"up/kernel", P("fsdp", "tp")),
        (r"down/kernel", P("tp", "fsdp")),
        (r"bias", P("fsdp")),
        (r".*", P()),
    )

    def __init__(self, tx, mesh):
        self.tx, self.mesh = tx, mesh

    def sharding(self, tree):
        def of(path, x):
            name = "/".join(re.findall(r"[\w.]+", jax.tree_util.keystr(path)))
            spec = next(spec for rule, spec in self.rules if re.search(rule, name))
            fitted = [
                None if entry is None or size % self.mesh.shape[entry] else entry
                for entry, size in zip(spec, x.shape, strict=False)
            ]
            return NamedSharding(self.mesh, P(*fitted))

        return jax.tree_util.tree_map_with_path(of, tree)

    def new(self):
        def create(params):
            return params, self.tx.init(params)

        params = problem.weights()
        sharding = self.sharding(jax.eval_shape(create, params))
        return jax.jit(create, out_shardings=sharding)(params)

    def train(self, params, state, steps):
        @jax.jit
        def step(params, state):
            grads = jax.grad(problem.loss)(params)
            updates, state = self.tx.update(updates=grads, state=state, params=params)
            if hasattr(self.tx, "apply_updates_hook"):
                return self.tx.apply_updates_hook(params, updates), state
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                params, state = problem.wait(step(params, state))
        return params, state


class TestRulesOnPaths:
    @pytest.mark.parametrize("name", quick(["adamw8"], ["adamw8", "adamw4"]))
    def test_easydel(self, name, tmp_path):
        tx = getattr(optax_flash, name)(1e-3)
        trainer = EasyDeL(tx, problem.mesh())
        params, state = trainer.new()
        columns = problem.HIDDEN // (2 if name == "adamw4" else 1)
        mu = state.mu["up"]["kernel"]
        problem.check_shards("mu", mu, (problem.N_IN // 4, columns // 2))
        # 64 columns in two groups, which do not divide by four.
        scales = state.scales["mu_scales"]["down"]["kernel"]
        problem.check_shards("scales", scales, (problem.HIDDEN // 2, 2))
        halfway = trainer.train(params, state, 4)
        problem.save(tmp_path, halfway)
        params, state = trainer.train(*halfway, 4)

        start, stock = problem.weights(), stock_run(optax.adamw(1e-3), 8)
        at_most = {"adamw8": 0.02, "adamw4": 0.3}[name]
        problem.check_close(f"EasyDeL, {name}", params, stock, start, at_most)

        other = EasyDeL(tx, problem.mesh(2, 4))
        shapes = jax.eval_shape(lambda: halfway)
        target = problem.abstract(shapes, other.sharding(shapes))
        restored = problem.restore(tmp_path, target)
        problem.check_equal(other.train(*restored, 4), (params, state))

    @pytest.mark.full
    @pytest.mark.parametrize("name", ["lora_pre_adamw", "lowrank_adamw"])
    def test_factors(self, name):
        """A rule for a matrix is about its axes, and factors have others.

        ``state_sharding`` knows which axis of its param a factor has.
        """
        tx = getattr(optax_flash, name)(1e-3, rank=16)
        mesh, params = problem.mesh(), problem.weights()
        state = jax.eval_shape(tx.init, params)
        by_rules = EasyDeL(tx, mesh).sharding(state)
        # (rank, 64) and (rank, 256) of a matrix (64, 256) under P("fsdp", "tp").
        for sharding, left, right in (
            (by_rules, P("fsdp", "tp"), P("fsdp", "tp")),
            (state_sharding(tx, params, mesh), P(None, "fsdp"), P(None, "tp")),
        ):
            for field, spec in (("mu_left", left), ("mu_right", right)):
                factor = optax.tree.get(sharding, field)["up"]["kernel"]
                assert factor.is_equivalent_to(NamedSharding(mesh, spec), 2), field

        # Either way numbers are right: as on one device, up to the order of sums. In
        # codes a last bit may round another way, so factors are in float32 here.
        exact = dict.fromkeys(("mu_left", "mu_right", "nu_left", "nu_right"))
        tx = getattr(optax_flash, name)(1e-3, rank=16, codecs=exact)
        trainer = EasyDeL(tx, mesh)
        ours, _ = trainer.train(*trainer.new(), 4)
        assert problem.difference(ours, stock_run(tx, 4), params) < 1e-4

    def test_tree_map_params(self):
        """Codes get their param's spec, scales none: ``state_sharding`` shards them."""
        tx, mesh = optax_flash.adamw8(1e-3), problem.mesh()
        params = placed(problem.weights(), SPECS, mesh)
        specs = optax.tree_map_params(
            tx,
            lambda _, spec: spec,
            jax.eval_shape(tx.init, params),
            SPECS,
            transform_non_params=lambda _: P(),
        )
        assert optax.tree.get(specs, "mu") == SPECS
        assert specs.scales == P() and specs.step == P()

        def init(params):
            return tx.init(params)

        sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        state = jax.jit(init, out_shardings=sharding)(params)
        problem.check_shards("mu", state.mu["up"]["kernel"], (16, 128))
        problem.check_shards("mu of a bias", state.mu["up"]["bias"], (128,))
        scales = state.scales["mu_scales"]["up"]["kernel"]
        problem.check_shards("scales", scales, (64, 8))
        with pytest.warns(UserWarning, match="'down/kernel'.*64 columns in 4 shards"):
            sharding = state_sharding(tx, problem.weights(), mesh)
        scales = sharding.scales["mu_scales"]["up"]["kernel"]
        assert scales.spec == P("fsdp", "tp")

    @pytest.mark.full
    def test_tree_map_params_of_a_bias_on_all_devices(self):
        mesh = jax.make_mesh((8,), ("fsdp",))
        params = {"bias": jnp.zeros(256), "kernel": jnp.ones((64, 256))}
        of_params = {"bias": P("fsdp"), "kernel": P(None, "fsdp")}
        for tx in (optax_flash.adamw8(1e-3), optax_flash.adamw4(1e-3)):
            specs = optax.tree_map_params(
                tx,
                lambda _, spec: spec,
                jax.eval_shape(tx.init, params),
                of_params,
                transform_non_params=lambda _: P(),
            )
            sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            state = jax.jit(lambda tx=tx: tx.init(params), out_shardings=sharding)()
            problem.check_shards("mu", state.mu["bias"], (32,))


def state_sharding(tx, params, mesh):
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return optax_flash.state_sharding(tx, jax.eval_shape(lambda: params), sharding)


def test_head_of_a_language_model():
    """151,936 columns on 8 devices are 4,748 whole groups of 32, but not on each."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    of_head = NamedSharding(mesh, P(None, "x"))
    tx = optax_flash.adamw8(1e-3)
    random = np.random.default_rng(0)
    whole = {
        "head": jnp.asarray(random.normal(size=(8, 151_936)).astype(np.float32) / 64)
    }
    head = jax.device_put(whole, of_head)
    sharding = optax_flash.state_sharding(tx, head)
    state = tx.init(head)
    for x, s in zip(*map(jax.tree.leaves, (state, sharding)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    problem.check_shards("mu", state.mu["head"], (8, 151_936 // 8))
    scales = state.scales["mu_scales"]["head"]
    assert problem.shard_shape(scales)[1] * 8 == scales.shape[1]

    step = jax.jit(tx.update, out_shardings=({"head": of_head}, sharding))
    text = step.lower(head, state, head).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text, collective
    updates, state = step(head, state, head)
    plain_updates, plain = jax.jit(tx.update)(whole, tx.init(whole), whole)
    problem.check_equal((updates, state), (plain_updates, plain))
    _, inner = optax_flash.to_optax_state(tx, state, head)
    mu = optax.tree.get(inner, "mu")["head"]
    by_group = (8, scales.shape[1], -1)
    expected = 0.1 * np.asarray(whole["head"]).reshape(by_group)
    error = np.abs(np.asarray(mu).reshape(by_group) - expected).max(2)
    assert (error <= 0.016 * np.abs(expected).max(2)).all()
