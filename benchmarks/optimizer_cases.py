"""What benchmarks/optimizer_table.py runs: optimizers, their settings, their needs."""

from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from optax_flash import Codec, Companded8, compress

SIGNED, UNSIGNED = Companded8(), Companded8(signed=False)


class Case(NamedTuple):
    """An optimizer beside its compressed self.

    Attributes:
      stock: the optimizer of optax.
      extras: what its update asks for besides gradients and params.
      compressed: ``compress(stock)`` where None.
      per_example: it asks for the gradient of each example.
      note: stands in the table behind the verdict.
    """

    stock: optax.GradientTransformation
    extras: tuple[str, ...] = ()
    compressed: optax.GradientTransformation | None = None
    per_example: bool = False
    note: str = ""


class LeftAlone(NamedTuple):
    """A field that ``compress`` does not touch, and how to put it in codes."""

    stock: optax.GradientTransformation
    codecs: dict[str, Codec]
    why: str


def decay_mask(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def private_sums() -> optax.GradientTransformation:
    return contrib.differentially_private_aggregate(1.0, 0.1, key=0)


def galore(base: optax.GradientTransformation) -> optax.GradientTransformation:
    return contrib.galore(1e-2, rank=32, base_optimizer=base)


def cases() -> dict[str, Case]:
    """Every optimizer of optax and optax.contrib, by its name and what is special."""
    momentum = optax.sgd(0.1, momentum=0.9)
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    adam_direction = optax.scale_by_adam()
    return {
        "adabelief": Case(optax.adabelief(3e-3)),
        "adadelta": Case(optax.adadelta(10.0), note="e_g stays"),
        "adafactor": Case(optax.adafactor(3e-2), note="factors stay"),
        "adafactor, momentum": Case(
            optax.adafactor(3e-2, min_dim_size_to_factor=512, momentum=0.9)
        ),
        "adagrad": Case(optax.adagrad(0.1)),
        "adam": Case(optax.adam(3e-3)),
        "adamax": Case(optax.adamax(5e-3)),
        "adamaxw": Case(optax.adamaxw(5e-3)),
        "adamw, masked decay": Case(
            optax.adamw(3e-3, weight_decay=0.1, mask=decay_mask)
        ),
        "adan": Case(optax.adan(3e-3)),
        "amsgrad": Case(optax.amsgrad(3e-3)),
        "fromage": Case(optax.fromage(3e-2)),
        "lamb": Case(optax.lamb(1e-2)),
        "lars": Case(optax.lars(3.0)),
        "lbfgs": Case(
            optax.lbfgs(),
            ("value", "grad", "value_fn"),
            note="its memory is not shaped like params",
        ),
        "lion": Case(optax.lion(1e-3)),
        "nadam": Case(optax.nadam(3e-3)),
        "nadamw": Case(optax.nadamw(3e-3)),
        "noisy_sgd": Case(optax.noisy_sgd(1.0, key=0)),
        "novograd": Case(optax.novograd(1e-2)),
        "optimistic_adam": Case(optax.optimistic_adam(3e-3)),
        "optimistic_adam_v2": Case(optax.optimistic_adam_v2(3e-3)),
        "optimistic_gradient_descent": Case(optax.optimistic_gradient_descent(1.0)),
        "polyak_sgd": Case(optax.polyak_sgd(1.0), ("value",)),
        "radam": Case(optax.radam(5e-3)),
        "rmsprop": Case(optax.rmsprop(2e-3)),
        "rmsprop, momentum": Case(optax.rmsprop(5e-4, momentum=0.9)),
        "rmsprop, centered": Case(
            optax.rmsprop(2e-3, centered=True), note="mu and nu stay"
        ),
        "rprop": Case(optax.rprop(1e-4, max_step_size=1e-3), note="all fields stay"),
        "sgd": Case(optax.sgd(1.0)),
        "sgd, momentum": Case(momentum),
        "sgd, nesterov": Case(optax.sgd(0.1, momentum=0.9, nesterov=True)),
        "sign_sgd": Case(optax.sign_sgd(1e-3)),
        "signum": Case(optax.signum(1e-3)),
        "sm3": Case(optax.sm3(0.3)),
        "yogi": Case(optax.yogi(1e-2)),
        "contrib.acprop": Case(contrib.acprop(2e-3, eps=1e-4)),
        "contrib.ademamix": Case(contrib.ademamix(2e-3), note="m2 stays"),
        "contrib.simplified_ademamix": Case(contrib.simplified_ademamix(3e-5)),
        "contrib.adopt": Case(contrib.adopt(3e-3)),
        "contrib.cocob": Case(contrib.cocob(), note="all sums stay"),
        "contrib.dadapt_adamw": Case(contrib.dadapt_adamw(), note="grad_sum stays"),
        "contrib.dog": Case(contrib.dog(), note="init_params stays"),
        "contrib.dowg": Case(contrib.dowg(), note="init_params stays"),
        "contrib.dpsgd": Case(
            contrib.dpsgd(0.3, 1.0, 0.1, seed=0, momentum=0.9),
            per_example=True,
            note="gradients are not shaped like params; see the next row",
        ),
        "contrib.dpsgd as chain(aggregate, compress(sgd))": Case(
            optax.chain(private_sums(), momentum),
            compressed=optax.chain(private_sums(), compress(momentum)),
            per_example=True,
        ),
        "contrib.galore": Case(
            galore(adam_direction), note="moments are not shaped like params"
        ),
        "contrib.galore(compress(scale_by_adam))": Case(
            galore(adam_direction),
            compressed=galore(compress(adam_direction, min_size=1024)),
        ),
        "contrib.madgrad": Case(contrib.madgrad(1e-2), note="all sums and x0 stay"),
        "contrib.mechanize(adamw)": Case(
            contrib.mechanize(optax.adamw(1e-2)), note="x0 stays"
        ),
        "contrib.momo": Case(contrib.momo(1.0), ("value",)),
        "contrib.momo_adam": Case(contrib.momo_adam(1e-2), ("value",)),
        "contrib.muon": Case(contrib.muon(1e-2)),
        "contrib.prodigy": Case(contrib.prodigy(), note="grad_sum and params0 stay"),
        "contrib.sam(sgd)": Case(contrib.sam(momentum, adversary), note="cache stays"),
        "contrib.sam(sgd), opaque": Case(
            contrib.sam(momentum, adversary, opaque_mode=True), ("grad_fn",)
        ),
        "contrib.schedule_free_adamw": Case(
            contrib.schedule_free_adamw(1e-2), note="z stays"
        ),
        "contrib.schedule_free_sgd": Case(
            contrib.schedule_free_sgd(3.0), note="z stays"
        ),
        "contrib.sophia": Case(contrib.sophia(3e-3), ("obj_fn",)),
    }


def left_alone() -> dict[str, LeftAlone]:
    """Fields that stay in float32 on purpose, and AMSGrad's, which does not."""
    return {
        "rmsprop, centered": LeftAlone(
            optax.rmsprop(2e-3, centered=True),
            {"mu": SIGNED, "nu": UNSIGNED},
            "divides by sqrt(nu - mu²), which noise makes negative",
        ),
        "adadelta": LeftAlone(
            optax.adadelta(10.0),
            {"e_g": UNSIGNED},
            "e_x grows by e_x g² / e_g: noise in e_g compounds",
        ),
        "contrib.ademamix": LeftAlone(
            contrib.ademamix(2e-3),
            {"m2": SIGNED},
            "averages 10,000 steps, and counts five times as much as m1",
        ),
        "contrib.madgrad": LeftAlone(
            contrib.madgrad(1e-2), {"s": SIGNED}, "params are computed from it"
        ),
        "contrib.schedule_free_adamw": LeftAlone(
            contrib.schedule_free_adamw(1e-2), {"z": SIGNED}, "it is the params"
        ),
        "contrib.dog": LeftAlone(
            contrib.dog(),
            {"init_params": SIGNED},
            "noise counts as distance from the start, which sets the step",
        ),
        "contrib.mechanize(adamw)": LeftAlone(
            contrib.mechanize(optax.adamw(1e-2)),
            {"x0": SIGNED},
            "params are computed from it",
        ),
        "amsgrad": LeftAlone(
            optax.amsgrad(3e-3),
            {"nu": UNSIGNED},
            "(in codes by default) nu_max keeps the largest nu, noise included, so "
            "steps shrink",
        ),
    }
