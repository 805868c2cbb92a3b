"""The JAX optimizers that the benchmarks time against each other.

A contender has ``name``, ``weights`` and ``gradients`` (what it stores and gets, for
the tables) and ``make(shapes, seed, looped)``, which returns a run: a call enqueues
``steps`` optimizer steps, ``sync`` waits for all of them, ``close`` gives memory back,
and ``moved_bytes`` is what one step has to read and write. ``make`` raises
:class:`Absent` where the contender cannot be measured.

Every JAX contender's step is one jitted function of params, state and gradients, and
donates params and state.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_flash

PyTree = Any
Shapes = Sequence[tuple[int, ...]]
Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
LOOP_STEPS = 20
"""Steps in one call of a compiled loop."""


class Absent(Exception):
    """Why a contender cannot be measured here."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def draw(shapes: Shapes, dtype: Any, seed: int) -> dict[str, jax.Array]:
    """Random numbers of a leaf set: ``{"leaf_0": ..., "leaf_1": ...}``."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(shapes))
    return {
        f"leaf_{i}": _normal(key, tuple(shape), jnp.dtype(dtype))
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def count_bytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class JaxRun:
    """A JAX contender's params, state and gradients, and the function that steps."""

    def __init__(self, step: Step, steps: int, params, state, grads, params_read: bool):
        self._step = step
        self._params, self._state, self._grads = params, state, grads
        self.steps = steps
        params_moved = count_bytes(params) * (2 if params_read else 1)
        self.moved_bytes = params_moved + 2 * count_bytes(state) + count_bytes(grads)

    def __call__(self) -> None:
        self._params, self._state = self._step(self._params, self._state, self._grads)

    def sync(self) -> None:
        jax.block_until_ready((self._params, self._state))

    def close(self) -> None:
        pass  # JAX's allocator reuses what the arrays leave behind.


class JaxContender:
    """An optimizer in JAX.

    Args:
      name: in tables and files.
      build: returns ``init(params) -> state`` and ``step(params, state, grads) ->
        (params, state)``.
      weights: how weights are stored, in words.
      dtype: of params and gradients.
      params_read: False where a step computes params without reading them.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], tuple[Callable[[PyTree], PyTree], Step]],
        *,
        weights: str,
        dtype: Any = jnp.bfloat16,
        params_read: bool = True,
    ):
        self.name = name
        self.weights = weights
        self.gradients = jnp.dtype(dtype).name
        self._build = build
        self._params_read = params_read

    @functools.cached_property
    def _functions(self) -> tuple[Callable[[PyTree], PyTree], Step, Step]:
        """The state's maker and both steps; kept, so that rounds compile once."""
        init, step = self._build()

        def loop(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
            def body(_, carry):
                # Without it, work on the gradients alone could leave the loop.
                carry, these_grads = jax.lax.optimization_barrier((carry, grads))
                return step(*carry, these_grads)

            return jax.lax.fori_loop(0, LOOP_STEPS, body, (params, state))

        # Unused params are kept, for the new ones to be written in their place.
        donating = functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
        return init, donating(step), donating(loop)

    def make(self, shapes: Shapes, seed: int, looped: bool = False) -> JaxRun:
        init, step, loop = self._functions
        params = draw(shapes, self.gradients, seed)
        return JaxRun(
            loop if looped else step,
            LOOP_STEPS if looped else 1,
            params,
            init(params),
            draw(shapes, self.gradients, seed + 1),
            self._params_read,
        )


def transformation(
    name: str,
    make: Callable[[], optax.GradientTransformation],
    *,
    weights: str,
    dtype: Any = jnp.bfloat16,
) -> JaxContender:
    """The contender that steps with an optax transformation and ``apply_updates``."""

    def build() -> tuple[Callable[[PyTree], PyTree], Step]:
        tx = make()

        def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    return JaxContender(name, build, weights=weights, dtype=dtype)


def ours(
    implementation: str | None, finished: bool, name: str = "adamw8"
) -> JaxContender:
    """AdamW with a state in codes, on bfloat16 params with an 8-bit residual.

    None is the default implementation, which is chosen leaf by leaf.
    """

    def make() -> optax.GradientTransformation:
        if implementation == "triton":
            require("jax_triton")
        alias = getattr(optax_flash, name)
        inner = alias(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        return optax_flash.master_weights(
            inner, finished=finished, implementation=implementation
        )

    kind = "finished" if finished else "additive"
    title = f"{name}, {kind}, {implementation or 'default'}"
    return transformation(title, make, weights="bfloat16 + 8 bits")


def optax_float32() -> JaxContender:
    return transformation(
        "optax.adamw",
        lambda: optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        weights="float32",
        dtype=jnp.float32,
    )


def optax_master_copy() -> JaxContender:
    """Mixed precision as it is mostly done: float32 weights live in the state."""

    def build() -> tuple[Callable[[PyTree], PyTree], Step]:
        tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def cast(tree: PyTree, dtype: Any) -> PyTree:
            return jax.tree.map(lambda x: x.astype(dtype), tree)

        def init(params: PyTree) -> PyTree:
            master = cast(params, jnp.float32)
            return master, tx.init(master)

        def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
            del params
            master, inner = state
            updates, inner = tx.update(cast(grads, jnp.float32), inner, master)
            master = optax.apply_updates(master, updates)
            return cast(master, jnp.bfloat16), (master, inner)

        return init, step

    return JaxContender(
        "optax.adamw, master copy",
        build,
        weights="bfloat16 + float32 copy",
        params_read=False,
    )


def flashoptim_jax(fused: bool) -> JaxContender:
    """The PyPI package flashoptim-jax. Its fused kernels run on GPUs only."""

    def build() -> tuple[Callable[[PyTree], PyTree], Step]:
        if fused and jax.default_backend() != "gpu":
            raise Absent("its fused kernels need a GPU")
        require("flashoptim_jax", "flashoptim-jax")
        import flashoptim_jax

        optimizer = flashoptim_jax.flash_adamw(
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused
        )
        return optimizer.init, optimizer.step

    name = "flashoptim-jax" + ("" if fused else ", unfused")
    return JaxContender(name, build, weights="bfloat16 + 8 bits")


def require(module: str, package: str | None = None) -> None:
    """Raises :class:`Absent` where a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{package or module} is not installed")
