"""What is compared: three optimizers, each with its weights and state stored variously.

The mathematics of an optimizer is the same in all of its conditions: warm-up and cosine
decay to zero, gradients clipped to norm 1, matrices and kernels decayed, norms in
float32. Only storage differs.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flash

LEARNING_RATES = {
    "gpt": {"adamw": 3e-3, "lion": 1e-3, "sgd": 0.3},
    "image": {"adamw": 1e-2, "lion": 1e-3, "sgd": 0.1},
}
"""Peaks: of three or four rates, a factor of three apart, the one with the lowest
held-out loss of the float32 optimizer after 300 steps from seed 100, both neighbours
being worse. For every rate: python -m benchmarks.quality --workload W
--only "O, float32" --seeds 100 --steps 300 --learning-rate R --out F.
"""

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
        return optax_flash.master_weights(tx, codec=self.residual)


def conditions() -> list[Condition]:
    """All of them; the reference of each optimizer comes first."""
    naive = _adamw(optax.adamw, mu_dtype=jnp.bfloat16)
    return [
        *_family("adamw", _adamw, optax.adamw, optax_flash.adamw8, optax_flash.adamw4),
        Condition("adamw", "float32, nudged", _adamw(optax.adamw), nudged=True),
        Condition("adamw", "bfloat16", naive, jnp.bfloat16),
        _without_feedback(),
        *(_mixed(*bits) for bits in ((4, 8), (8, 4))),
        *_family("lion", _lion, optax.lion, optax_flash.lion8, optax_flash.lion4),
        *_family("sgd", _sgd, optax.sgd, optax_flash.sgd8, optax_flash.sgd4),
    ]


def fitting(known: Sequence[Condition], patterns: Sequence[str]) -> list[Condition]:
    """Those whose name fits one of the patterns, such as "lion, *"."""
    return [
        condition
        for condition in known
        if any(fnmatch.fnmatchcase(condition.name, pattern) for pattern in patterns)
    ]


def _family(
    optimizer: str,
    settings: Callable[..., Make],
    stock: Callable[..., Any],
    eight: Callable[..., Any],
    four: Callable[..., Any],
) -> list[Condition]:
    """The conditions that every optimizer has."""
    flashoptim = settings(eight, codecs="flashoptim")
    bfloat16 = jnp.bfloat16
    return [
        Condition(optimizer, "float32", settings(stock)),
        Condition(optimizer, "flashoptim", flashoptim, bfloat16, "flashoptim"),
        Condition(optimizer, "8 bits", settings(eight), bfloat16, "exact"),
        Condition(optimizer, "4 bits", settings(four), bfloat16, "exact"),
    ]


def _without_feedback() -> Condition:
    """AdamW in 4 bits, whose updates do not make up for what rounding adds."""

    def make(*args: Any, **options: Any) -> optax.GradientTransformation:
        inner = optax.adamw(*args, **options)
        return optax_flash.compress(inner, "companded4", error_feedback=False)

    storage = "4 bits, no error feedback"
    return Condition("adamw", storage, _adamw(make), jnp.bfloat16, "exact")


def _mixed(mu: int, nu: int) -> Condition:
    """AdamW whose moments have different codes."""
    codecs = {"mu": f"companded{mu}", "nu": f"companded{nu}"}
    make = _adamw(optax_flash.adamw8, codecs=codecs)
    return Condition(
        "adamw", f"{mu} bits for m, {nu} for v", make, jnp.bfloat16, "exact"
    )


def matrices(params: optax.Params) -> Any:
    """Which params decay: those of two axes or more."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _adamw(make: Callable[..., Any], **options: Any) -> Make:
    return lambda lr: make(lr, weight_decay=0.1, mask=matrices, **options)


def _lion(make: Callable[..., Any], **options: Any) -> Make:
    # Three times as much as for AdamW, as learning rates are about a third.
    return lambda lr: make(lr, weight_decay=0.3, mask=matrices, **options)


def _sgd(make: Callable[..., Any], **options: Any) -> Make:
    return lambda lr: make(lr, momentum=0.9, **options)
