"""The optimizers that train.py knows by name, and the schedule they share.

Each entry is (factory, learning rate): the factory takes (learning rate, weight decay),
and the learning rate is a sensible default for the small models of this folder. To try
an optimizer of your own, add a line.
"""

import jax
import optax

import optax_flash


def matrices(params):
    """A mask for weight decay: True for matrices, False for the scales of norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(make):
    return lambda lr, decay: make(lr, b2=0.95, weight_decay=decay, mask=matrices)


def lion(make):
    return lambda lr, decay: make(lr, weight_decay=decay, mask=matrices)


def plain(make, **options):
    """For optimizers without weight decay of their own: it is not applied."""
    return lambda lr, decay: make(lr, **options)


def factored_adamw(lr, decay):
    """AdamW, its second moment in averages of rows and columns: docs/adafactor.md."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9),
        optax.add_decayed_weights(decay, matrices),
        optax.scale_by_learning_rate(lr),
    )


def compressed(make, codecs):
    return lambda lr, decay: optax_flash.compress(make(lr, decay), codecs)


OPTIMIZERS = {
    "adamw": (adamw(optax.adamw), 2e-3),
    "adam": (plain(optax.adam, b2=0.95), 2e-3),
    "nadamw": (adamw(optax.nadamw), 2e-3),
    "lion": (lion(optax.lion), 1e-3),
    "sgd": (plain(optax.sgd, momentum=0.9), 0.3),
    "rmsprop": (plain(optax.rmsprop, decay=0.95), 2e-3),
    "adafactor": (plain(optax.adafactor), 1e-2),
    "factored_adamw": (factored_adamw, 2e-3),
    # The same, with their state in 8 or 4 bits.
    "adamw8": (adamw(optax_flash.adamw8), 2e-3),
    "adam8": (plain(optax_flash.adam8, b2=0.95), 2e-3),
    "lion8": (lion(optax_flash.lion8), 1e-3),
    "sgd8": (plain(optax_flash.sgd8, momentum=0.9), 0.3),
    "factored_adamw8": (compressed(factored_adamw, "companded8"), 2e-3),
    "adamw4": (adamw(optax_flash.adamw4), 2e-3),
    "adam4": (plain(optax_flash.adam4, b2=0.95), 2e-3),
    "lion4": (lion(optax_flash.lion4), 1e-3),
    "sgd4": (plain(optax_flash.sgd4, momentum=0.9), 0.3),
    "factored_adamw4": (compressed(factored_adamw, "companded4"), 2e-3),
}


def make_optimizer(
    name: str,
    *,
    steps: int,
    warmup: int,
    learning_rate: float | None = None,
    weight_decay: float = 0.1,
) -> optax.GradientTransformation:
    """Clip to norm 1, then the named optimizer under linear warmup and cosine decay.

    The learning rate is a function of the step and of the planned number of steps
    alone, so it takes no notice of when a run was interrupted and resumed.
    """
    factory, default = OPTIMIZERS[name]
    peak = default if learning_rate is None else learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak / 10,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), factory(schedule, weight_decay))
