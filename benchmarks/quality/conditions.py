"""What is compared: three optimizers, each with its weights and state stored variously.

The mathematics of an optimizer is the same in all of its conditions: warm-up and cosine
decay to zero, gradients clipped to norm 1, matrices and kernels decayed, norms in
float32. Only storage differs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flash

LEARNING_RATES = {
    "gpt": {"adamw": 3e-3, "lion": 1e-3, "sgd": 0.3},
    "image": {"adamw": 3e-3, "lion": 3e-4, "sgd": 0.1},
}
"""Peaks: the best of a coarse search with float32 at seed 100, see the README."""

Make = Callable[[optax.Schedule], optax.GradientTransformation]


class Condition(NamedTuple):
    """One way to store the weights and the state of an optimizer.

    Attributes:
      optimizer: "adamw", "lion" or "sgd".
      storage: the name of the way.
      make: schedule of learning rates -> transformation.
      params: dtype of the params, norms excepted.
      residual: codec of the residuals of :func:`optax_flash.master_weights`, None
        where params are all there is.
      nudged: the first weights are the next larger float32 numbers.
    """

    optimizer: str
    storage: str
    make: Make
    params: Any = jnp.float32
    residual: str | None = None
    nudged: bool = False

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.storage}"

    def transformation(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """All that happens to a gradient."""
        tx = optax.chain(optax.clip_by_global_norm(1.0), self.make(schedule))
        if self.residual is None:
            return tx
        return optax_flash.master_weights(tx, codec=self.residual, finished=True)


def conditions() -> list[Condition]:
    """All that this version of optax_flash has."""
    return [
        *_family("adamw", _adamw(optax.adamw), "adamw8", "adamw4", _adamw),
        Condition("adamw", "float32, nudged", _adamw(optax.adamw), nudged=True),
        Condition(
            "adamw",
            "bfloat16",
            _adamw(optax.adamw, mu_dtype=jnp.bfloat16),
            jnp.bfloat16,
        ),
        *_family("lion", _lion(optax.lion), "lion8", "lion4", _lion),
        *_family("sgd", _sgd(optax.sgd), "sgd8", "sgd4", _sgd),
    ]


def absent() -> dict[str, str]:
    """Conditions that this version of optax_flash cannot run, and why."""
    return {
        f"{optimizer}, 4 bits": f"optax_flash has no {optimizer}4"
        for optimizer in ("adamw", "lion", "sgd")
        if not hasattr(optax_flash, f"{optimizer}4")
    }


def _family(
    optimizer: str, stock: Make, eight: str, four: str, settings: Callable[..., Make]
) -> list[Condition]:
    """The conditions that every optimizer has."""
    bfloat16 = jnp.bfloat16
    make8 = getattr(optax_flash, eight)
    flashoptim = settings(make8, codecs="flashoptim")
    family = [
        Condition(optimizer, "float32", stock),
        Condition(optimizer, "flashoptim", flashoptim, bfloat16, "flashoptim"),
        Condition(optimizer, "8 bits", settings(make8), bfloat16, "exact"),
    ]
    if hasattr(optax_flash, four):
        make4 = getattr(optax_flash, four)
        family.append(
            Condition(optimizer, "4 bits", settings(make4), bfloat16, "exact")
        )
    return family


def _matrices(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _adamw(make: Callable[..., Any], **options: Any) -> Make:
    return lambda lr: make(lr, weight_decay=0.1, mask=_matrices, **options)


def _lion(make: Callable[..., Any], **options: Any) -> Make:
    # Three times as much as for AdamW, as learning rates are about a third.
    return lambda lr: make(lr, weight_decay=0.3, mask=_matrices, **options)


def _sgd(make: Callable[..., Any], **options: Any) -> Make:
    return lambda lr: make(lr, momentum=0.9, **options)
