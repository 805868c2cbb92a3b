"""Gradients of real training, recorded, so that codecs can be compared without it.

workload -> float32 AdamW -> the gradients of some leaves, for every step of a window
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

B1 = 0.9
B2S = (0.999, 0.95)
LION_B1, LION_B2 = 0.9, 0.99
LEARNING_RATE = 3e-3
WARMUP = 50
CLIP = 1.0


class Leaf(NamedTuple):
    """A recorded leaf, or the rows of it that were recorded.

    Attributes:
      path: like "block_0/qkv/kernel".
      kind: "embedding", "attention", "mlp", "norm", "convolution" or "head".
      shape: of the whole leaf.
      recorded: shape of what was recorded; two-dimensional if not all was.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    recorded: tuple[int, ...]


class Streams(NamedTuple):
    """What training did to some leaves, which lie one after the other along N.

    Attributes:
      name: of the workload.
      leaves: whose sizes sum to N.
      grads: float32 (T, N), of T consecutive steps, clipped by their global norm.
      m: float32 (N,), the average of gradients before those steps: Adam's, with b1,
        and Lion's, with Lion's b2, by these numbers.
      v: float32 (N,) for each b2, the average of squared gradients.
      step: how many steps had been made before.
    """

    name: str
    leaves: tuple[Leaf, ...]
    grads: np.ndarray
    m: dict[float, np.ndarray]
    v: dict[float, np.ndarray]
    step: int


def record(workload: Any, *, steps: int, window: int, max_size: int) -> Streams:
    """Trains for `steps` steps and records the last `window` of them.

    Args:
      workload: see benchmarks/workloads.py.
      steps: how long to train with optax.adamw in float32.
      window: of how many steps gradients are kept.
      max_size: elements of a leaf above which only evenly spaced rows are kept.

    Returns:
      The streams of a leaf of every kind and shape.
    """
    params = workload.init(0)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    leaves = choose(shapes, workload.kind, max_size)
    schedule = optax.warmup_constant_schedule(0.0, LEARNING_RATE, WARMUP)
    clip = optax.clip_by_global_norm(CLIP)
    tx = optax.adamw(schedule, b1=B1, b2=B2S[0], weight_decay=0.1)

    @jax.jit
    def step(params, state, m, v, batch):
        grads = jax.grad(workload.loss)(params, batch)
        grads, _ = clip.update(grads, clip.init(params))
        updates, state = tx.update(grads, state, params)
        kept = _kept(grads, leaves)
        m = {b: b * old + (1 - b) * kept for b, old in m.items()}
        v = {b2: b2 * old + (1 - b2) * kept**2 for b2, old in v.items()}
        return optax.apply_updates(params, updates), state, m, v, kept

    count = sum(int(np.prod(leaf.recorded)) for leaf in leaves)
    state = tx.init(params)
    m = dict.fromkeys((B1, LION_B2), jnp.zeros(count))
    v = dict.fromkeys(B2S, jnp.zeros(count))
    grads = np.empty((window, count), np.float32)
    before = steps - window
    for i in range(steps):
        if i == before:
            start = jax.tree.map(np.asarray, (m, v))
        batch = workload.batch(0, i)
        params, state, m, v, kept = step(params, state, m, v, batch)
        if i >= before:
            grads[i - before] = kept
    return Streams(workload.name, leaves, grads, *start, before)


def choose(shapes: dict[str, tuple[int, ...]], kind: Any, max_size: int) -> tuple:
    """One leaf of every kind and shape, alternately from the first and last layers."""
    alike: dict[Any, list[str]] = {}
    for path, shape in shapes.items():
        alike.setdefault((kind(path), shape), []).append(path)
    chosen = []
    for i, ((name, shape), paths) in enumerate(alike.items()):
        rows = int(np.prod(shape[:-1]))
        fit = min(rows, max(1, max_size // shape[-1]))
        recorded = shape if fit == rows else (fit, shape[-1])
        chosen.append(Leaf(paths[-(i % 2)], name, shape, recorded))
    return tuple(chosen)


def _kept(grads: Any, leaves: tuple[Leaf, ...]) -> jax.Array:
    """The recorded leaves or rows, flat."""
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    parts = []
    for leaf in leaves:
        x = by_path[leaf.path]
        if leaf.recorded != leaf.shape:
            x = x.reshape(-1, x.shape[-1])
            x = x[np.linspace(0, len(x) - 1, leaf.recorded[0]).astype(int)]
        parts.append(x.reshape(-1))
    return jnp.concatenate(parts)


def join(streams: Sequence[Streams]) -> Streams:
    """The leaves of several workloads beside each other.

    Raises:
      ValueError: they are not of the same steps.
    """
    if len({(s.step, len(s.grads)) for s in streams}) > 1:
        steps = ", ".join(f"{s.name}: {len(s.grads)} after {s.step}" for s in streams)
        raise ValueError(
            f"streams of different steps ({steps}); record them again with --record"
        )
    return Streams(
        "+".join(s.name for s in streams),
        tuple(
            leaf._replace(path=f"{s.name}/{leaf.path}")
            for s in streams
            for leaf in s.leaves
        ),
        np.concatenate([s.grads for s in streams], axis=1),
        jax.tree.map(lambda *m: np.concatenate(m), *(s.m for s in streams)),
        jax.tree.map(lambda *v: np.concatenate(v), *(s.v for s in streams)),
        streams[0].step,
    )


def save(streams: Streams, path: pathlib.Path) -> None:
    """Writes streams as .npz."""
    about = {
        "name": streams.name,
        "step": streams.step,
        "leaves": [leaf._asdict() for leaf in streams.leaves],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        about=json.dumps(about),
        grads=streams.grads,
        **{f"m_{b}": m for b, m in streams.m.items()},
        **{f"v_{b2}": v for b2, v in streams.v.items()},
    )


def load(path: pathlib.Path) -> Streams:
    """What :func:`save` wrote."""
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
        m = {b: file[f"m_{b}"] for b in (B1, LION_B2)}
        v = {b2: file[f"v_{b2}"] for b2 in B2S}
        grads = file["grads"]
    leaves = tuple(
        Leaf(leaf["path"], leaf["kind"], tuple(leaf["shape"]), tuple(leaf["recorded"]))
        for leaf in about["leaves"]
    )
    return Streams(about["name"], leaves, grads, m, v, about["step"])
