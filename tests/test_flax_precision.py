"""Which params the train states keep in float32: norms, whatever they are called.

Expected dtypes are written by hand for every leaf: F is float32, H half precision.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_flash
from optax_flash.flax import Optimizer, TrainState, is_norm, norm_paths

F, H = "float32", "bfloat16"
NORM = {"scale": F, "bias": F}
DENSE = {"kernel": H, "bias": H}
X = jnp.ones((2, 4, 8))
ONES = nn.initializers.ones


def dtypes(params):
    return jax.tree.map(lambda p: p.dtype.name, params)


def linen_params(model):
    """Random weights of the shapes that init gives, which is slower to run."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return random_like(nn.unbox(shapes), seed=0)


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32)), params
    )


def linen_dtypes(model):
    def create():
        params = model.init(jax.random.key(0), X)["params"]
        tx = optax_flash.adamw8(1e-3)
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    return dtypes(nn.unbox(jax.eval_shape(create).params))


def nnx_dtypes(make):
    @nnx.eval_shape
    def model():
        model = make()
        Optimizer(model, optax_flash.adamw8(1e-3))
        return model

    return dtypes(nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param))))


class Layers(nn.Module):
    """Every layer of Flax that normalizes, under names that do not say so."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="n1")(x)
        x = nn.RMSNorm(name="n2")(x)
        x = nn.GroupNorm(2, name="n3")(x)
        x = nn.BatchNorm(use_running_average=True, name="n4")(x)
        x = nn.InstanceNorm(name="n5")(x)
        x = nn.LayerNorm(feature_axes=(-2, -1), name="n6")(x)
        x = nn.WeightNorm(nn.Dense(8, name="up"), variable_filter=None, name="n7")(x)
        x = nn.SpectralNorm(nn.Dense(8, name="down"))(x, update_stats=False)
        x = nn.LayerNorm(use_bias=False, name="n8")(x)
        x = nn.LayerNorm(use_scale=False, name="n9_norm")(x)
        return nn.MultiHeadDotProductAttention(2, normalize_qk=True, name="attend")(x)


class TestLinen:
    def test_every_norm_of_flax(self):
        assert linen_dtypes(Layers()) == {
            "n1": NORM,
            "n2": {"scale": F},
            "n3": NORM,
            "n4": NORM,
            "n5": NORM,
            "n6": NORM,
            "n7": {"up/kernel/scale": F, "up/bias/scale": F},
            "n8": {"scale": F},
            "n9_norm": {"bias": F},
            "up": DENSE,
            "down": DENSE,
            "attend": {
                "query": DENSE,
                "key": DENSE,
                "value": DENSE,
                "out": DENSE,
                "query_ln": {"scale": F},
                "key_ln": {"scale": F},
            },
        }

    def test_boxes_with_sharding_names(self):
        class Boxed(nn.Module):
            @nn.compact
            def __call__(self, x):
                names = functools.partial(nn.with_partitioning, names=(None,))
                ones, zeros = names(ONES), names(nn.initializers.zeros)
                return nn.LayerNorm(scale_init=ones, bias_init=zeros, name="n1")(x)

        assert linen_dtypes(Boxed()) == {"n1": NORM}

    def test_params_of_the_users_own(self):
        """Of params called scale, vectors are gains and matrices are not."""

        class Gated(nn.Module):
            @nn.compact
            def __call__(self, x):
                kernel = self.param("kernel", ONES, (8, 8))
                return x @ kernel @ self.param("scale", ONES, (8, 8))

        class Lone(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x @ self.param("scale", ONES, (8, 8))

        class LayerNorm1p(nn.Module):
            @nn.compact
            def __call__(self, x):
                gain = 1 + self.param("gamma", nn.initializers.zeros, (8,))
                return x * gain + self.param("beta", nn.initializers.zeros, (8,))

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = x * self.param("scale", ONES, (8,))
                x = Lone()(Gated()(x))
                x = nn.Dense(8)(LayerNorm1p()(x))
                x = x + self.param("norm_embedding", ONES, (4, 8))
                return x + nn.Dense(8, name="norm_head")(x)

        assert linen_dtypes(Model()) == {
            "scale": F,
            "Gated_0": {"kernel": H, "scale": H},
            "Lone_0": {"scale": H},
            "LayerNorm1p_0": {"gamma": F, "beta": F},
            "Dense_0": DENSE,
            "norm_embedding": H,
            "norm_head": DENSE,
        }

    def test_what_is_in_a_block_called_norm_is_no_norm(self):
        class PreNorm(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(8)(nn.LayerNorm(name="n1")(x))

        model = nn.Sequential([PreNorm(), PreNorm()])
        block = {"Dense_0": DENSE, "n1": NORM}
        assert linen_dtypes(model) == {"layers_0": block, "layers_1": block}
        params = {"PreNorm_0": linen_params(PreNorm())}
        assert norm_paths(params) == ["PreNorm_0/n1/bias", "PreNorm_0/n1/scale"]

    @pytest.mark.parametrize("axis", [0, 1])
    def test_stacked_by_scan(self, axis):
        """Layers along the first axis, or along the second, as MaxText has them."""

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.RMSNorm(name="rms")(nn.LayerNorm(name="n1")(x))
                y = nn.Dense(16, name="up")(y) * self.param("scale", ONES, (16,))
                y = nn.Dense(8, name="down")(y) @ self.param(
                    "mixing_scale", ONES, (8, 8)
                )
                return x + self.param("skip_scale", ONES, (8,)) * y, None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                scan = nn.scan(
                    Block,
                    variable_axes={"params": axis},
                    split_rngs={"params": True},
                    length=3,
                )
                return nn.LayerNorm(name="last")(scan(name="blocks")(x, None)[0])

        gain = linen_params(Model())["blocks"]["rms"]["scale"]
        assert gain.shape == ((3, 8), (8, 3))[axis]
        assert linen_dtypes(Model()) == {
            "blocks": {
                "n1": NORM,
                "rms": {"scale": F},
                "up": DENSE,
                "down": DENSE,
                "scale": F,
                "mixing_scale": H,
                "skip_scale": H,
            },
            "last": NORM,
        }

    def test_stacks_of_stacks(self):
        def shapes(layers):
            return {
                "rms": {"scale": jnp.ones((*layers, 8))},
                "gate": {"scale": jnp.ones((*layers, 8, 8))},
                "up": {"kernel": jnp.ones((*layers, 8, 8))},
            }

        params = {"twice": shapes((2, 3)), "once": shapes((2,)), "alone": shapes(())}
        expected = ["alone/rms/scale", "once/rms/scale", "twice/rms/scale"]
        assert norm_paths(params) == expected
        assert norm_paths(jax.eval_shape(lambda: params)) == expected

    def test_a_stack_of_gpt2_blocks(self):
        """Names of Gemma and MaxText, and gains that are no module's, in a stack."""
        params = {
            "tokens": jnp.ones((64, 8)),
            "blocks": {
                "pre_attention_norm": {"scale": jnp.ones((3, 8))},
                "norm_1": jnp.ones((3, 8)),
                "qkv": jnp.ones((3, 8, 24)),
                "RMSNorm_0": {"weight": jnp.ones((3, 8))},
            },
            "norm": jnp.ones(8),
        }
        assert norm_paths(params) == [
            "blocks/RMSNorm_0/weight",
            "blocks/norm_1",
            "blocks/pre_attention_norm/scale",
            "norm",
        ]

    @pytest.mark.parametrize("layers", [(), (3,)])
    def test_a_bias_stays_with_its_gain(self, layers):
        """Also beside what no norm of Flax has."""
        vector, matrix = jnp.ones((*layers, 8)), jnp.ones((*layers, 8, 8))
        own = {"scale": vector, "bias": vector, "kernel": matrix}
        params = {"a": own, "b": {"kernel": matrix, "bias": vector}}
        assert norm_paths(params) == ["a/bias", "a/scale"]


class Ours(nnx.LayerNorm):
    """A subclass, with a param that Flax's has not."""

    def __init__(self, *args, rngs, **kwargs):
        super().__init__(*args, rngs=rngs, **kwargs)
        self.temperature = nnx.Param(jnp.ones(()))


class RmsNorm(nnx.Module):
    """A norm that is no subclass of Flax's."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(8))


class Gate(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones((8, 8)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.n1 = nnx.LayerNorm(8, rngs=rngs)
        self.n2 = nnx.RMSNorm(8, rngs=rngs)
        self.n3 = nnx.GroupNorm(8, 2, rngs=rngs)
        self.n4 = nnx.BatchNorm(8, rngs=rngs)
        self.n5 = nnx.InstanceNorm(8, rngs=rngs)
        self.n6 = Ours(8, rngs=rngs)
        self.n7 = RmsNorm()
        self.n8 = nnx.List([nnx.LayerNorm(8, rngs=rngs), RmsNorm()])
        self.gate = Gate()
        self.norm_head = nnx.Linear(8, 8, rngs=rngs)
        self.up = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.attend = nnx.MultiHeadAttention(
            2, 8, normalize_qk=True, decode=False, rngs=rngs
        )


BLOCK = {
    "n1": NORM,
    "n2": {"scale": F},
    "n3": NORM,
    "n4": NORM,
    "n5": NORM,
    "n6": NORM | {"temperature": F},
    "n7": {"weight": F},
    "n8": {0: NORM, 1: {"weight": F}},
    "gate": {"scale": H},
    "norm_head": DENSE,
    "up": {"layer_instance": DENSE},
    "attend": {
        "query": DENSE,
        "key": DENSE,
        "value": DENSE,
        "out": DENSE,
        "query_ln": {"scale": F},
        "key_ln": {"scale": F},
    },
}


class TestNnx:
    def test_every_norm_of_flax_and_of_the_users_own(self):
        assert nnx_dtypes(lambda: Block(nnx.Rngs(0))) == BLOCK

    def test_stacked_by_vmap(self):
        make = nnx.vmap(Block)
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3)))
        assert model.n2.scale.shape == (3, 8)
        assert nnx_dtypes(lambda: make(nnx.Rngs(0).split(3))) == BLOCK

    def test_a_norm_in_two_places(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.b = nnx.LayerNorm(8, rngs=rngs)
                self.a = self.b
                self.c = nnx.Linear(8, 8, rngs=rngs)

        assert nnx_dtypes(lambda: Model(nnx.Rngs(0))) == {"a": NORM, "c": DENSE}

    def test_gains_of_weight_norm_that_are_params(self):
        """The layer that it wraps has its own params, and is no norm."""

        def make():
            rngs = nnx.Rngs(0)
            model = nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
            model.gain = nnx.Param(jnp.ones(8))
            return model

        dtypes = nnx_dtypes(make)
        # Its scales are params since Flax 0.12.10 or so, and norms' like the gain.
        scales = dtypes.pop("scales", {})
        assert dtypes == {"gain": F, "layer_instance": DENSE}
        assert set(scales.values()) <= {F}

    def test_only_what_is_trained_is_cast_and_listed(self):
        biases = nnx.All(nnx.Param, nnx.PathContains("bias"))
        model = nnx.List(
            [nnx.LayerNorm(8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(0))]
        )
        optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=biases)
        assert model[0].bias[...].dtype == model[0].scale[...].dtype == F
        assert model[1].bias[...].dtype == H
        assert model[1].kernel[...].dtype == F
        assert optimizer.kept_float32(model) == ["0/bias"]
        assert norm_paths(model, biases) == ["0/bias"]

    def test_a_trained_variable_that_is_no_param(self):
        class Gain(nnx.Variable):
            pass

        class TunedNorm(nnx.Module):
            def __init__(self):
                self.weight, self.table = Gain(jnp.ones(8)), Gain(jnp.ones((8, 8)))

        model = TunedNorm()
        optimizer = Optimizer(model, optax_flash.adamw8(1e-3), wrt=Gain)
        assert optimizer.kept_float32(model) == ["weight"]


class Small(nnx.Module):
    def __init__(self):
        self.n1 = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
        self.rms = RmsNorm()
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))


def kept(**kwargs):
    """What a train state and an optimizer list for the same params."""
    kwargs = {"tx": optax_flash.adamw8(1e-3)} | kwargs
    model = Small()
    params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
    state = TrainState.create(apply_fn=None, params=params, **kwargs)
    return state.kept_float32(), Optimizer(model, **kwargs).kept_float32(model)


class TestChoice:
    def test_kept_float32_lists_norms(self):
        expected = ["n1/bias", "n1/scale", "rms/weight"]
        # A tree of params knows no class names: "rms" might be anything.
        assert kept() == (expected[:2], expected)

    def test_a_function_decides_alone(self):
        def is_up(path, p):
            assert p.dtype == F
            return path.startswith("up")

        assert kept(keep_float32=is_up) == (["up/bias", "up/kernel"],) * 2

    def test_none_keeps_nothing(self):
        assert kept(keep_float32=None) == ([], [])

    def test_params_of_float32_are_all_listed(self):
        names = ["n1/bias", "n1/scale", "rms/weight", "up/bias", "up/kernel"]
        assert kept(param_dtype=jnp.float32) == (names, names)

    def test_another_string_is_refused(self):
        kwargs = dict(tx=optax_flash.adamw8(1e-3), keep_float32="norm")
        with pytest.raises(ValueError, match="'norm'; give \"norms\", a function"):
            TrainState.create(apply_fn=None, params={"w": jnp.ones(8)}, **kwargs)
        with pytest.raises(ValueError, match="'norm'; give \"norms\", a function"):
            Optimizer(Small(), **kwargs)


@pytest.mark.full
def test_norms_are_trained_as_in_stock_flax():
    """Bit for bit what optax makes of float32 params, gains and biases alike."""
    params = linen_params(Layers())
    grads = random_like(params, seed=1)

    @jax.jit
    def step(state):
        like = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        return state.apply_gradients(grads=like)

    # AdamW's divisions are reciprocals in a kernel, which may differ by a last bit.
    tx = optax.sgd(0.1, momentum=0.9)
    stock = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    ours = TrainState.create(apply_fn=None, params=params, tx=tx)
    expected, got = step(stock).params, step(ours).params
    for name in ("n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9_norm"):
        chex.assert_trees_all_equal(got[name], expected[name])


@pytest.mark.parametrize(
    "path, ndim, expected",
    [
        ("attention_norm/scale", 2, True),
        ("blocks/0/norms/1/bias", 1, True),
        ("norm", 1, True),
        ("n1/bias", 1, False),
        ("PreNorm_0/Dense_0/kernel", 2, False),
        ("PreNorm_0/Dense_0/bias", 1, False),
        ("norm_head/kernel", 2, False),
    ],
)
def test_is_norm_goes_by_the_module_that_has_the_param(path, ndim, expected):
    assert is_norm(path, jnp.zeros((4,) * ndim)) is expected
