"""First steps with a state in codes are those of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.first_steps import (
    OPTIMIZERS,
    SHAPE,
    STORAGE,
    largest_updates,
    losses,
    make,
    over,
    stored,
)
from tests.tiers import quick

CASES = [
    (name, storage)
    for name in OPTIMIZERS
    for storage in STORAGE
    # In 4 bits its trust ratio does not see the small elements beside an outlier.
    if name != "lamb" or storage == "8 bits"
    # A pair of moments of both sizes, of three; the others have each size.
    if storage != "4 and 8 bits" or name in ("adam", "adamw", "nadam")
]


def normal_updates(tx):
    """The largest magnitude of each of some updates, of normal gradients."""
    params, update = jnp.ones(SHAPE), jax.jit(tx.update)
    state, largest = tx.init(params), []
    for i in range(5):
        grads = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), SHAPE)
        updates, state = update(grads, state, params)
        largest.append(jnp.abs(updates).max())
    return jnp.stack(largest)


@pytest.mark.full
@pytest.mark.parametrize("name", ["adam", "adan"])
@pytest.mark.parametrize("storage", STORAGE[1:])
def test_updates_of_normal_gradients_in_a_warmup(name, storage):
    """As beside outliers, though learning rates grow."""
    optimizer = make(name, 20)
    found, stock = (normal_updates(x) for x in (stored(optimizer, storage), optimizer))
    assert over(found, stock).max() <= 3.0


# Every optimizer with both, and every storage.
@pytest.mark.parametrize(
    "name, storage, warmup",
    quick(
        [("adamw", storage, warmup) for storage in STORAGE for warmup in (0, 8)],
        [(*case, (0, 8)[i % 2]) for i, case in enumerate(CASES)],
    ),
)
def test_updates_beside_an_outlier(name, storage, warmup):
    """The largest is within three times float32's, in each of ten steps."""
    found = largest_updates(stored(make(name, warmup), storage))
    assert over(found, stock_updates(name, warmup)).max() <= 3.0


@functools.cache
def stock_updates(name, warmup):
    return largest_updates(make(name, warmup))


@pytest.mark.full
@pytest.mark.parametrize(
    "name, storage",
    [("adamw", "4 bits"), ("adamw", "4 and 8 bits"), ("nadam", "4 and 8 bits")],
)
def test_losses_after_fifty_steps_without_warmup(name, storage):
    """From first and from trained weights, they are within 1 % of float32's."""
    found = losses(stored(make(name), storage), 2)
    for stock, loss in zip(stock_losses(name), found, strict=True):
        np.testing.assert_allclose(loss.mean(), stock.mean(), rtol=0.01)


@functools.cache
def stock_losses(name):
    return losses(make(name), 2)
