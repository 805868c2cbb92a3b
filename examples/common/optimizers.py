"""Optimizers by name, ours and optax's, and the schedule that the trainers share.

adamw8                          optax_flash.adamw8
nadamw                          optax.nadamw
muon                            optax.contrib.muon
lowrank_adamw(rank=8)           with options
adamw@flashoptim                optax_flash.compress(optax.adamw(...), "flashoptim")
"""

import ast
import difflib
import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import optax_flash
from optax_flash.flax import norm_paths

LEARNING_RATES = {
    "lion": 1e-3,
    "sgd": 0.3,
    "adafactor": 1e-2,
    "muon": 1e-2,
}
"""Peaks for small models, by what a name begins with; others have RATE."""
RATE = 2e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"b2": 0.95},
    "adamw": {"b2": 0.95},
    "nadamw": {"b2": 0.95},
    "rmsprop": {"decay": 0.95},
    "sgd": {"momentum": 0.9},
}
"""Where the trainers differ from an optimizer's defaults, by the end of its name.

So all kinds of AdamW, such as tamed_adamw8, are compared with one b2.
"""


class Name(NamedTuple):
    """The parts of an optimizer's name."""

    base: str
    options: dict[str, Any]
    codecs: str | None


def matrices(params):
    """A mask for weight decay: True for matrices, False for biases and gains of norms.

    Those of a stack of layers have two axes, so axes alone do not tell.
    """
    norms = frozenset(norm_paths(params))

    def decays(path, p) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return p.ndim > 1 and name not in norms and name.split("/")[-1] != "bias"

    # The path of an nnx.Variable; that of the array in it ends with "value".
    return jax.tree_util.tree_map_with_path(
        decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def factored_adamw(learning_rate, weight_decay=0.0, mask=None):
    """AdamW, its second moment in averages of rows and columns: docs/adafactor.md."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


OWN = {"factored_adamw": factored_adamw}
"""Optimizers that no library has. To try one of your own, add a line."""
NEED_MORE = {"dpsgd", "lbfgs", "momo", "momo_adam"}
"""What takes more than gradients, which is all that the trainers give."""


def not_at_the_ends(path: str) -> bool:
    """Which leaves may be of low rank: as in LoRA-Pre, not embeddings and heads."""
    return "embed" not in path and "head" not in path


def check_name(name: str) -> Name:
    """The parts of a name.

    Raises:
      ValueError: no such optimizer, option or codec.
    """
    found = re.fullmatch(r"(\w+)(\(.*\))?(?:@(\w+))?", name.replace(" ", ""))
    if not found:
        raise ValueError(
            f"optimizer {name!r} is not of the form name(option=value)@codec"
        )
    base, call, codecs = found.groups()
    factory = _factory(base)
    options = _options(name, call or "()")
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"optimizer {name!r}: {base} has no option {option!r}; "
                f"it has {', '.join(known)}"
            )
    if codecs is not None:
        optax_flash.get_codec(codecs)
    return Name(base, options, codecs)


def make_optimizer(
    name: str,
    *,
    steps: int,
    warmup: int,
    learning_rate: float | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Clip to a norm, then the named optimizer under linear warmup and cosine decay.

    The learning rate is a function of the step and of the planned number of steps
    alone, so it takes no notice of when a run was interrupted and resumed.

    Args:
      name: as at the top of this file.
      steps: planned.
      warmup: steps until the peak.
      learning_rate: the peak; None for a default that suits small models.
      weight_decay: of matrices, for the optimizers that know it.
      clip: largest global norm of the gradients; 0 for none.
    """
    base, options, codecs = check_name(name)
    factory = _factory(base)
    peak = _rate(base) if learning_rate is None else learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak / 10,
    )
    known = inspect.signature(factory).parameters
    kind = base.rstrip("48").split("_")[-1]
    ours = {k: v for k, v in OPTIONS.get(kind, {}).items() if k in known}
    settings = ours | options
    if "weight_decay" in known and "mask" in known:
        settings = {"weight_decay": weight_decay, "mask": matrices} | settings
    if "where" in known:
        settings = {"where": not_at_the_ends} | settings
    tx = factory(schedule, **settings)
    if codecs is not None:
        tx = optax_flash.compress(tx, codecs)
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def _factory(base: str):
    """The function of a name, of those whose first argument is a learning rate."""
    modules = {**_factories(optax.contrib), **_factories(optax)}
    known = modules | _factories(optax_flash) | OWN
    if base in NEED_MORE:
        raise ValueError(
            f"optimizer {base!r} needs more than gradients in each update, which these "
            "trainers do not give it"
        )
    if base not in known:
        near = difflib.get_close_matches(base, known, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "see docs/optimizers.md"
        )
        raise ValueError(f"there is no optimizer {base!r}; {hint}")
    return known[base]


def _factories(module) -> dict[str, Any]:
    found = {}
    for name, value in vars(module).items():
        if name.startswith(("_", "scale_by_")) or inspect.isclass(value):
            continue
        # nadamw is a functools.partial.
        if inspect.isfunction(value) or isinstance(value, functools.partial):
            first = next(iter(inspect.signature(value).parameters), None)
            if first == "learning_rate":
                found[name] = value
    return found


def _options(name: str, call: str) -> dict[str, Any]:
    """The keyword arguments of a call such as "(rank=8, b1=0.9)"."""
    try:
        parsed = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(parsed, ast.Call) or parsed.args:
            raise ValueError
        return {str(x.arg): ast.literal_eval(x.value) for x in parsed.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"optimizer {name!r}: {call} are no options, which look like (rank=8)"
        ) from None


def _rate(base: str) -> float:
    return next(
        (rate for start, rate in LEARNING_RATES.items() if base.startswith(start)),
        RATE,
    )
