"""A run that is killed again and again, at random moments, and resumed each time.

    python tests/killed_run.py FOLDER KILLS SEED

Trains a few weights without interruption into FOLDER/whole, then with KILLS deaths into
FOLDER/killed, each time resuming on another mesh. Prints, as JSON, how the deaths went.
This process imports JAX and never starts it, so that its children are quick to fork.
"""

import json
import os
import pathlib
import random
import select
import signal
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401  imported once for all children
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash.flax
from examples.common.run_folder import RunFolder

STEPS = 120
SAVE_EVERY = 3
SHAPES = {"kernel": (64, 128), "bias": (16,)}
MESHES = [((1, 1), P()), ((8, 1), P("x")), ((4, 2), P("x", "y"))]


def init_state(shape, spec):
    mesh = jax.make_mesh(shape, ("x", "y"))
    rng = np.random.default_rng(0)
    specs = {"kernel": spec, "bias": P()}
    params = {
        name: jax.device_put(
            rng.normal(size=size).astype(np.float32), NamedSharding(mesh, specs[name])
        )
        for name, size in SHAPES.items()
    }
    tx = optax_flash.adamw8(1e-2, weight_decay=0.1)
    state = optax_flash.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.device_put(jnp.zeros([], jnp.int32), NamedSharding(mesh, P()))
    return state.replace(step=step)


def batch(step):
    rng = np.random.default_rng(step)
    return {
        name: rng.normal(size=size).astype(np.float32) for name, size in SHAPES.items()
    }


@jax.jit
def train_step(state, batch):
    """Pulls every weight towards its noisy target; alike on all meshes, to the bit."""
    grads = jax.tree.map(lambda p, b: p.astype(jnp.float32) - b, state.params, batch)
    return state.apply_gradients(grads=grads), grads


def train(folder, mesh, stop, tell):
    state = init_state(*mesh)
    resume = any(name.isdigit() for name in os.listdir(folder / "checkpoints"))
    run = RunFolder(folder, state, resume=resume)
    start = 0
    if resume:
        start = run.latest
        run.restore_log()
        state = run.restore(state)
    tell("resumed", start)
    for step in range(start + 1, stop + 1):
        state, grads = train_step(state, batch(step))
        loss = sum(float(np.square(np.asarray(g)).sum()) for g in grads.values())
        run.log([{"step": step, "loss": loss}])
        if step % SAVE_EVERY == 0:
            run.save(step, state)
            tell("saved", step)
    run.close({})


def die_at_event(count):
    """Dies before this process touches files for the count-th time from here on."""
    left = count

    def hook(event, args):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(folder, mesh, stop, events):
    """Forks a process that trains; returns its id and where to read what it tells."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading

    jax.config.update("jax_disable_most_optimizations", True)

    def tell(what, step):
        os.write(writing, f"{what} {step}\n".encode())
        if what == "resumed" and events:
            die_at_event(events)

    try:
        train(folder, mesh, stop, tell)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def live_and_die(folder, mesh, stop=STEPS, events=None, seconds=None):
    """A process's life: how it ended, and the steps that it resumed from and saved."""
    pid, reading = child(folder, mesh, stop, events)
    told, deadline = "", None
    while True:
        wait = 60 if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([reading], [], [], wait)[0]:
            os.kill(pid, signal.SIGKILL)
            deadline = None
            continue
        received = os.read(reading, 1000).decode()
        if not received:
            break
        told += received
        if seconds is not None and deadline is None:
            deadline = time.monotonic() + seconds
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    lines = [line.split() for line in told.splitlines()]
    resumed = next((int(step) for what, step in lines if what == "resumed"), None)
    saved = [int(step) for what, step in lines if what == "saved"]
    return os.waitstatus_to_exitcode(status), resumed, saved


def unfinished(folder):
    """What saves and deletions that never ended have left."""
    left = (folder / "checkpoints").glob("*tmp*")
    return {(path.name, path.stat().st_ino) for path in left}


def main(folder, kills, seed):
    rng = random.Random(seed)
    for name in ("whole", "warm", "killed"):
        (folder / name / "checkpoints").mkdir(parents=True)
    # Every program is compiled once, so that those who die come as far as to save.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    lives = [live_and_die(folder / "whole", MESHES[0])]
    for i, mesh in enumerate(MESHES[1:], start=1):
        lives.append(live_and_die(folder / "warm", mesh, stop=i * SAVE_EVERY))
    assert [code for code, *_ in lives] == [0] * len(MESHES), "see above"

    deaths, safe = [], 0
    while len(deaths) < kills:
        how = {"events": rng.randrange(1, 200)}
        if rng.random() < 0.4:
            how = {"seconds": rng.uniform(0, 0.3)}
        mesh = MESHES[len(deaths) % len(MESHES)]
        before = unfinished(folder / "killed")
        code, resumed, saved = live_and_die(folder / "killed", mesh, **how)
        mid_save = bool(unfinished(folder / "killed") - before)
        deaths.append(
            {"how": how, "code": code, "resumed": resumed, "safe": safe}
            | {"saved": saved, "mid_save": mid_save}
        )
        safe = max([safe, *saved])
    code, resumed, saved = live_and_die(folder / "killed", MESHES[0])
    deaths.append({"code": code, "resumed": resumed, "safe": safe, "saved": saved})
    print(json.dumps(deaths))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
