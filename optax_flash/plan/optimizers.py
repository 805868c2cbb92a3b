"""Optimizers by the names that the command line knows."""

from collections.abc import Callable

import optax

import optax_flash
from optax_flash.plan.names import look_up

LEARNING_RATE = 1e-3
"""Any: it takes no memory."""

OURS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw8": lambda: optax_flash.adamw8(LEARNING_RATE),
    "adamw4": lambda: optax_flash.adamw4(LEARNING_RATE),
    "adam8": lambda: optax_flash.adam8(LEARNING_RATE),
    "adam4": lambda: optax_flash.adam4(LEARNING_RATE),
    "lion8": lambda: optax_flash.lion8(LEARNING_RATE),
    "lion4": lambda: optax_flash.lion4(LEARNING_RATE),
    "sgd8": lambda: optax_flash.sgd8(LEARNING_RATE, 0.9),
    "sgd4": lambda: optax_flash.sgd4(LEARNING_RATE, 0.9),
    "tamed_adamw8": lambda: optax_flash.tamed_adamw8(threshold=1.0, relative=True),
    "lora_pre_adamw": lambda: optax_flash.lora_pre_adamw(
        LEARNING_RATE, rank=0.25, where=_is_inner
    ),
    "lora_pre_muon": lambda: optax_flash.lora_pre_muon(
        LEARNING_RATE, rank=0.25, where=_is_inner
    ),
    "lowrank_adamw": lambda: optax_flash.lowrank_adamw(
        LEARNING_RATE, rank=0.25, where=_is_inner
    ),
}
OPTAX: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(LEARNING_RATE),
    "adam": lambda: optax.adam(LEARNING_RATE),
    "lion": lambda: optax.lion(LEARNING_RATE),
    "sgd": lambda: optax.sgd(LEARNING_RATE, 0.9),
    "adafactor": lambda: optax.adafactor(LEARNING_RATE),
    "muon": lambda: optax.contrib.muon(LEARNING_RATE),
}


def named(name: str) -> optax.GradientTransformation:
    """An optimizer with its defaults; momentum 0.9, and rank a quarter of the width.

    Raises:
      ValueError: the name is not known. The message lists those that are.
    """
    return look_up("Optimizer", OURS | OPTAX, name)()


def _is_inner(path: str) -> bool:
    """Embeddings and heads keep whole moments."""
    return not path.startswith(("embed", "head"))
