"""What low-rank Adam becomes on H100s: temporaries, custom calls and collectives.

Compiled, not run, see ``make test-cuda``.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import optax_flash
from benchmarks.h100 import mesh_of, sharded_like

pytestmark = pytest.mark.cuda

SIDE, RANK = 4096, 128
DENSE = 4 * SIDE * SIDE
STRATEGIES = {"randomized": 1, "periodic": 200, "online": 1}


def compiled(strategy, mesh=None, spec=(), shape=(SIDE, SIDE), dtype=jnp.bfloat16):
    mesh = mesh or mesh_of()
    tx = optax_flash.scale_by_lowrank_adam(
        rank=RANK, strategy=strategy, refresh_every=STRATEGIES[strategy]
    )
    grads = {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    state = jax.eval_shape(tx.init, grads)
    grads = sharded_like(grads, mesh, spec)
    placed = {
        field: sharded_like(getattr(state, field), mesh, factor_spec)
        for field, factor_spec in {
            "mu_left": (None, *spec[:1]),
            "mu_right": (None, *spec[1:2]),
            "nu_left": (None, *spec[:1]),
            "nu_right": (None, *spec[1:2]),
        }.items()
    }
    state = sharded_like(state, mesh)._replace(**placed)
    return jax.jit(tx.update, donate_argnums=(0, 1)).lower(grads, state).compile()


def sizes(text, name):
    """Elements of what each instruction of a kind makes."""
    found = []
    for line in text.splitlines():
        made = re.search(rf"= (.*?) {name}(?:-start)?\(", line)
        if made:
            for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", made.group(1)):
                size = 1
                for n in filter(None, dims.split(",")):
                    size *= int(n)
                found.append(size)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_temporaries_are_two_dense_leaves_and_nothing_long_is_factorised(strategy):
    """cuSOLVER sees rank x rank matrices: no SVD, and no QR."""
    step = compiled(strategy)
    sketches = 24 * (RANK + 8) * SIDE * 4
    assert step.memory_analysis().temp_size_in_bytes < 2 * DENSE + sketches
    targets = set(re.findall(r'custom_call_target="([^"]*)"', step.as_text()))
    assert not [x for x in targets if re.search("svd|geqrf|orgqr|householder", x, re.I)]


# Every strategy with the spec that splits both axes, and with one that splits one.
@pytest.mark.parametrize(
    "strategy, spec",
    [
        *((strategy, ("fsdp", "tp")) for strategy in STRATEGIES),
        ("randomized", ("fsdp",)),
        ("periodic", (None, "fsdp")),
        ("online", ("fsdp",)),
    ],
    ids=str,
)
def test_collectives_are_no_larger_than_the_sketch(strategy, spec):
    mesh = mesh_of((4, 2), ("fsdp", "tp"))
    text = compiled(strategy, mesh, spec).as_text()
    # The oversampled sketch has eight rows more than a factor, and XLA sends numbers
    # of each row along with it.
    rows = RANK if strategy == "online" else RANK + 8
    seen = set()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        found = sizes(text, name)
        if found:
            seen.add(name)
            assert max(found) <= rows * (SIDE + 2)
    # Factors are gathered only where the two branches of a cond meet.
    gathers = {"all-gather"} if strategy == "periodic" else set()
    assert seen <= {"all-reduce"} | gathers
