"""A call of optax's alias means the same to ours, or is refused by name."""

import inspect

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Ours, optax's, and what ours needs besides.

ALIASES = [
    *[(name, optax.adamw, {}) for name in ("adamw8", "adamw4")],
    *[(name, optax.adam, {}) for name in ("adam8", "adam4")],
    *[(name, optax.lion, {}) for name in ("lion8", "lion4")],
    *[(name, optax.sgd, {}) for name in ("sgd8", "sgd4")],
    ("scale_by_adam8", optax.scale_by_adam, {}),
    ("scale_by_lion8", optax.scale_by_lion, {}),
    ("trace8", optax.trace, {}),
    ("tamed_adamw8", optax.adamw, {"threshold": jnp.inf}),
    ("lora_pre_adamw", optax.adamw, {"rank": 4}),
    ("lowrank_adamw", optax.adamw, {"rank": 4}),
    ("lora_pre_muon", optax.contrib.muon, {"rank": 4}),
]
EXACT = [row for row in ALIASES if "rank" not in row[2]]
# Values that are not the defaults, and of which each changes an update.
VALUES = {
    "learning_rate": 0.5,
    "b1": 0.6,
    "b2": 0.7,
    "eps": 0.1,
    "eps_root": 0.2,
    "weight_decay": 0.3,
    "mask": {"w": True, "b": False},
    "nesterov": True,
    "momentum": 0.8,
    "decay": 0.8,
    "mode": "smooth",
    "smooth_beta": 2.0,
}
REFUSED = {
    "mu_dtype": "bfloat16",
    "accumulator_dtype": "bfloat16",
    "adaptive": True,
    "preconditioning": "aol",
    "muon_weight_dimension_numbers": lambda params: None,
}
# What no refusal needs to be written for: Python says that there is no such argument.
UNKNOWN = {("lora_pre_adamw", "nesterov"), ("lowrank_adamw", "nesterov")}


def ids(rows):
    return [name for name, *_ in rows]


def parameters_of(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name, stock, more", ALIASES, ids=ids(ALIASES))
def test_arguments_stand_where_optax_has_them(name, stock, more):
    ours, theirs = parameters_of(getattr(optax_flash, name)), parameters_of(stock)
    assert {x for x in theirs if x not in ours} == {
        x for alias, x in UNKNOWN if alias == name
    }
    positional = [x for x, p in theirs.items() if p.kind is POSITIONAL]
    assert [x for x, p in ours.items() if p.kind is POSITIONAL] == positional


@pytest.mark.parametrize("name, stock, more", ALIASES, ids=ids(ALIASES))
def test_what_has_no_meaning_is_refused_by_name(name, stock, more):
    alias = getattr(optax_flash, name)
    theirs = parameters_of(stock)
    required = {
        x: 0.1
        for x, p in parameters_of(alias).items()
        if p.default is inspect.Parameter.empty and x not in more
    }
    refused = {x for x in theirs if x in REFUSED}
    for argument in refused:
        with pytest.raises(ValueError, match=f"^{name}: {argument} is "):
            alias(**required, **more, **{argument: REFUSED[argument]})
        # What optax does without being asked to is no reason to complain.
        alias(**required, **more, **{argument: theirs[argument].default})
    for argument in {x for alias, x in UNKNOWN if alias == name}:
        with pytest.raises(TypeError, match=argument):
            alias(**required, **more, **{argument: True})


def run(tx):
    """The updates of three steps."""
    rng = np.random.default_rng(0)

    def random():
        return {
            "w": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32),
            "b": jnp.ones(8),
        }

    params, found = random(), []
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(random(), state, params)
        found.append(updates)
    return found


def differ(a, b):
    pairs = zip(a, b, strict=True)
    return any(np.max(np.abs(x["w"] - y["w"])) > 1e-4 for x, y in pairs)


@pytest.mark.parametrize("name, stock, more", EXACT, ids=ids(EXACT))
def test_arguments_mean_what_they_mean_in_optax(name, stock, more):
    """By name and by position; leaves this small have no codes."""
    alias, theirs = getattr(optax_flash, name), parameters_of(stock)
    accepted = {x: VALUES[x] for x in theirs if x not in REFUSED}
    close = dict(rtol=1e-5, atol=1e-6)
    expected = run(stock(**accepted))
    chex.assert_trees_all_close(run(alias(**accepted, **more)), expected, **close)

    positions = [x for x, p in theirs.items() if p.kind is POSITIONAL]
    in_order = [accepted.get(x) for x in positions]
    rest = {x: v for x, v in accepted.items() if x not in positions}
    chex.assert_trees_all_close(
        run(alias(*in_order, **rest, **more)), expected, **close
    )
    # And they do mean something.
    required = {
        x: VALUES[x] for x, p in theirs.items() if p.default is inspect.Parameter.empty
    }
    assert differ(run(alias(**required, **more)), expected)


@pytest.mark.parametrize("name", ["lora_pre_adamw", "lora_pre_muon", "lowrank_adamw"])
def test_the_second_argument_is_no_rank(name):
    """adamw(1e-3, 0.9) would have had a rank of nine tenths."""
    with pytest.raises(TypeError, match="'rank'"):
        getattr(optax_flash, name)(1e-3, 0.9)
