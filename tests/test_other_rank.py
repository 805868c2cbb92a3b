"""A low-rank state of another rank is of other shapes, and fits all the same."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from optax_flash import check_format, state_format

pytestmark = pytest.mark.usefixtures("quick_compile")

PARAMS = {"w": jnp.ones((2, 128, 192)), "b": jnp.ones(192)}
MATRIX = {"w": PARAMS["w"]}
ALONE = {
    "scale_by_lora_pre": (optax_flash.scale_by_lora_pre, PARAMS),
    "scale_by_lora_pre_muon": (optax_flash.scale_by_lora_pre_muon, MATRIX),
    "scale_by_lowrank_adam": (
        functools.partial(optax_flash.scale_by_lowrank_adam, min_dim=1),
        PARAMS,
    ),
}
ALIASES = {
    "lora_pre_adamw": (functools.partial(optax_flash.lora_pre_adamw, 1e-3), PARAMS),
    "lora_pre_muon": (functools.partial(optax_flash.lora_pre_muon, 1e-3), PARAMS),
    "lowrank_adamw": (functools.partial(optax_flash.lowrank_adamw, 1e-3), PARAMS),
}


@pytest.fixture(
    name="case", params=[*ALONE.items(), *ALIASES.items()], ids=lambda x: x[0]
)
def case_fixture(request):
    return request.param[1]


# A share of the smaller side is a rank, too: 0.5 is 64 of 128.
@pytest.mark.parametrize("rank", [64, 0.5, 8])
@pytest.mark.parametrize("with_params", [True, False])
def test_update(case, rank, with_params):
    make, params = case
    state = make(rank=rank).init(params)
    shapes = r"factors \[2, {0}, 128\] and \[2, {0}, 192\]"
    found = shapes.format(64 if rank == 0.5 else rank)
    message = f"{found} of 'w', .*{shapes.format(32)}.*another rank.*init again"
    given = [params] if with_params else []
    with pytest.raises(ValueError, match=message):
        make(rank=32).update(params, state, *given)


@pytest.mark.parametrize("read_with, made_with", [(32, 128), (128, 32)])
def test_a_leaf_that_one_of_them_does_not_factor(read_with, made_with):
    tx = optax_flash.scale_by_lora_pre(rank=read_with)
    state = optax_flash.scale_by_lora_pre(rank=made_with).init(MATRIX)
    none = "has no factors"
    some = r"has factors \[2, 32, 128\] and \[2, 32, 192\]"
    found, expected = (some, none) if made_with == 32 else (none, some)
    with pytest.raises(ValueError, match=f"{found} of 'w'.*{expected}"):
        tx.update(MATRIX, state)


def test_a_leaf_that_where_leaves_out():
    where = {"where": lambda path: path != "w"}
    for make, params in ALONE.values():
        state = make(rank=32).init(params)
        with pytest.raises(ValueError, match="of 'w'.*transformation has no factors"):
            make(rank=32, **where).update(params, state, params)


@pytest.mark.parametrize("alias", ALIASES)
def test_formats(alias):
    make, params = ALIASES[alias]
    tx, other = make(rank=32), make(rank=64)
    saved = state_format(tx, params)
    assert saved["leaves"]["w/mu_right"].endswith(" of [2, 32, 192]")
    check_format(saved, make(rank=0.25), params)
    message = r"'w/mu_left' as .* of \[2, 64, 128\].* of \[2, 32, 128\].*rank"
    with pytest.raises(ValueError, match=message):
        check_format(state_format(other, params), tx, params)
    with pytest.raises(ValueError, match=message):
        flax.serialization.from_bytes(
            tx.init(params), flax.serialization.to_bytes(other.init(params))
        )


@pytest.mark.parametrize("name", ["scale_by_lora_pre", "scale_by_lowrank_adam"])
def test_what_is_no_other_rank(name):
    """Leaves without a gradient, whole numbers, and the same rank as a share."""
    make, params = ALONE[name]
    random = np.random.default_rng(0)
    grads = {k: jnp.asarray(random.normal(size=x.shape)) for k, x in params.items()}
    tx = make(rank=0.25)
    expected, _ = tx.update(grads, tx.init(params), params)
    found, _ = make(rank=32).update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    more = params | {"frozen": params["w"], "steps": jnp.ones((128, 128), jnp.int32)}
    mask = {"w": True, "b": True, "frozen": False, "steps": True}
    masked = optax.masked(tx, mask)
    of_more = grads | {"frozen": grads["w"], "steps": jnp.zeros((128, 128))}
    found, _ = masked.update(of_more, masked.init(more), more)
    for key in params:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6)
