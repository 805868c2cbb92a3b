"""jax.checking_leaks finds no tracer that outlives the function it was made in."""

import functools

import jax
import jax.numpy as jnp
import optax

import optax_flash

PARAMS = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
TRANSFORMATIONS = {
    "adamw8": optax_flash.adamw8(1e-2),
    "adamw4": optax_flash.adamw4(1e-2),
    "weights": optax_flash.master_weights(optax_flash.adamw8(1e-2)),
    "finished": optax_flash.master_weights(optax_flash.sgd8(1e-2), finished=True),
    "low rank": optax_flash.lora_pre_adamw(1e-2, rank=4),
    "interpreted": optax_flash.sgd8(1e-2, momentum=0.9, implementation="interpret"),
    "nested": optax.MultiSteps(optax_flash.adamw8(1e-2), 2).gradient_transformation(),
}


def loss(params):
    return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))


def step(tx, params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def test_updates_leave_no_tracer_behind():
    leaks = []
    for name, tx in TRANSFORMATIONS.items():
        start = PARAMS, tx.init(PARAMS)

        def body(carry, _, tx=tx):
            return step(tx, *carry), None

        def scan(*start, body=body):
            return jax.lax.scan(body, start, length=2)[0]

        def gradient(*start, scan=scan):
            return jax.grad(lambda scale: scale * loss(scan(*start)[0]))(1.0)

        functions = {"scan": scan, "gradient": gradient}
        functions |= {"init": lambda params, _, tx=tx: tx.init(params)}
        kinds = {
            kind: functools.partial(jax.eval_shape, function, *start)
            for kind, function in functions.items()
        }
        kinds["explain"] = functools.partial(optax_flash.explain, tx, PARAMS)
        if name == "weights":
            kinds["update"] = functools.partial(step, tx, *start)
        for kind, run in kinds.items():
            try:
                with jax.checking_leaks():
                    run()
            except Exception as error:
                leaks.append(f"{name}, {kind}: {str(error)[:200]}")
    assert not leaks, "\n".join(leaks)
