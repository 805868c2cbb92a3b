"""Trains the GPT of examples/lm with params and optimizer state sharded over a mesh.

    python -m examples.fsdp.train                        # all GPUs of this machine
    python -m examples.fsdp.train --virtual-devices 8    # or 8 that a CPU plays

JAX's partitioner is the engine. The example says where params lie; where the codes,
scales and residuals of their optimizer lie follows (`state_sharding`), and an update of
them communicates nothing.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_flash
from examples.lm.data import shakespeare
from examples.lm.model import GPT, GPTConfig
from optax_flash.flax import TrainState


def param_spec(path, p) -> P:
    """Where a param lies: in slices over "fsdp", and over "tp" as Megatron has it.

    Matrices that write into the residual stream are cut along their rows for "tp", and
    for "fsdp" too: so no shard ends within a group of 32 columns, which share a scale.
    """
    if p.ndim < 2:
        return P()
    name = path[-2].key
    return P(("tp", "fsdp")) if name in ("out", "down", "embed") else P("fsdp", "tp")


def make_mesh(text: str):
    """A mesh over all devices, such as "fsdp=4,tp=2"; all on "fsdp" where not said."""
    sizes = dict(part.split("=") for part in text.split(",") if part)
    tp = int(sizes.get("tp", 1))
    fsdp = int(sizes.get("fsdp", jax.device_count() // tp))
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=auto)


def make_create(args):
    """A function from a key to the train state; nothing runs yet."""
    heads = args.width // 64 or 1
    model = GPT(GPTConfig(depth=args.depth, width=args.width, heads=heads))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax_flash.adamw8(2e-3, b2=0.95, weight_decay=0.1),
    )

    def create(key):
        tokens = jnp.zeros((1, args.seq_len), jnp.int32)
        params = model.init(key, tokens)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    return create


def train_step(state, tokens):  # tokens: (B, T + 1) -> state, nats per byte
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:].astype(jnp.int32)
        ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def make_batch(text, args, step, sharding):
    """Windows at random places. Every process makes those of its own devices."""
    rng = np.random.default_rng((args.seed, step))
    starts = rng.integers(0, len(text) - args.seq_len - 1, args.batch_size)
    rows = np.stack([text[i : i + args.seq_len + 1] for i in starts])
    return jax.make_array_from_callback(rows.shape, sharding, lambda at: rows[at])


@jax.jit
def checksum(tree):
    """A number that depends on every bit of every array."""

    def of_leaf(x):
        x = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.sum(x.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return functools.reduce(
        lambda a, b: a * 31 + b, map(of_leaf, jax.tree.leaves(tree))
    )


def bytes_per_device(state, sharding) -> int:
    """What one device holds of a state."""
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(sharding), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def train(args, say=print) -> None:
    mesh = make_mesh(args.mesh)
    create, key = make_create(args), jax.random.key(args.seed)

    # Shapes first; then each device makes its own part, and nothing is ever whole.
    abstract = jax.eval_shape(create, key)
    params = abstract.params
    specs = jax.tree_util.tree_map_with_path(param_spec, params)
    sharding = abstract.state_sharding(
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    state = jax.jit(create, out_shardings=sharding)(key)
    step_fn = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(sharding, NamedSharding(mesh, P())),
    )

    count = sum(p.size for p in jax.tree.leaves(params))
    held = bytes_per_device(abstract, sharding)
    say(f"{mesh.size} devices of {jax.process_count()} processes: {dict(mesh.shape)}")
    say(f"{count:,} params; a device holds {held:,} bytes of them and their optimizer")
    text = np.frombuffer(b"".join(shakespeare().values()), np.uint8)
    batch_sharding = NamedSharding(mesh, P("fsdp"))
    for step in range(1, args.steps + 1):
        state, loss = step_fn(state, make_batch(text, args, step, batch_sharding))
        if step == 1 or step % args.log_every == 0:
            say(f"step {step}: {float(loss):.6f} nats per byte")
    say(f"checksum of the state: {int(checksum(state)):08x}")


def parse(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--mesh", default="", help="such as fsdp=4,tp=2; all on fsdp if left out")
    add("--virtual-devices", type=int, help="of this process, on its CPU")
    add("--coordinator", help="host:port of process 0, where there are several")
    add("--processes", type=int, default=1, help="how many there are")
    add("--process-id", type=int, default=0, help="which this is")
    add("--steps", type=int, default=50, help="to train")
    add("--log-every", type=int, default=10, help="steps between two lines")
    add("--batch-size", type=int, default=16, help="windows a step")
    add("--seq-len", type=int, default=128, help="bytes predicted in each window")
    add("--depth", type=int, default=3, help="layers")
    add("--width", type=int, default=256, help="features")
    add("--seed", type=int, default=0, help="of first weights and data")
    return parser.parse_args(args)


def main():
    args = parse()
    if args.virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.virtual_devices)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    train(args, say=print if jax.process_index() == 0 else lambda line: None)


if __name__ == "__main__":
    main()
