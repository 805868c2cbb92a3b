"""What is compared: everything that decides how many bytes an optimizer keeps.

All share the schedule, the clipping and the decay of benchmarks/quality, and all but
the reference keep their weights in bfloat16 and an 8-bit residual.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_flash
from benchmarks.quality.conditions import Condition, matrices

Make = Callable[[optax.Schedule], optax.GradientTransformation]

LEARNING_RATES = {
    "adamw": 3e-3,
    "lora_pre": 3e-3,
    "muon": 3e-2,
    "lora_pre_muon": 3e-2,
    "lowrank": 3e-3,
    "adafactor": 3e-3,
    "tamed": 3e-3,
}
"""Peaks: of three rates, a factor of three apart, the one with the lowest held-out
loss after 200 steps from seed 100. For every rate: python -m benchmarks.budget
--only "F, *" --seeds 100 --steps 200 --learning-rate R --out O.
"""

SHARES = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125, "1/16": 0.0625}
FACTORS = ("mu_left", "mu_right", "nu_left", "nu_right")
DECAY = 0.1


def conditions() -> list[Condition]:
    """All of them; the reference comes first."""
    return [
        Condition("adamw", "float32", _adamw(optax.adamw)),
        _split("adamw", "8 bits", _adamw(optax_flash.adamw8)),
        _split("adamw", "4 bits", _adamw(optax_flash.adamw4)),
        # LoRA-Pre's default, for comparison.
        Condition("adamw", "float32, b2 = 0.95", _adamw(optax.adamw, b2=0.95)),
        *_lora_pre(),
        *_lowrank(),
        *(_split("adafactor", f"{n}-bit momentum", _adafactor(n)) for n in (8, 4)),
        *_tamed(),
    ]


def in_blocks(path: str) -> bool:
    """Which leaves may be of low rank: as in the paper, attention and MLP."""
    return path.startswith("block")


def _split(family: str, name: str, make: Make) -> Condition:
    return Condition(family, name, make, jnp.bfloat16, "exact")


def _adamw(make: Callable[..., Any], **options: Any) -> Make:
    return lambda lr: make(lr, weight_decay=DECAY, mask=matrices, **options)


def _factored(make: Callable[..., Any], **options: Any) -> Make:
    return _adamw(make, where=in_blocks, **options)


def _muon(lr: optax.Schedule) -> optax.GradientTransformation:
    """optax's, as ours is: without Nesterov, and Adam for what is not in a block."""

    def dimensions(params: optax.Params) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers()
        return jax.tree_util.tree_map_with_path(
            lambda path, p: numbers if p.ndim > 1 and in_blocks(_name(path)) else None,
            params,
        )

    return optax.contrib.muon(
        lr,
        nesterov=False,
        weight_decay=DECAY,
        weight_decay_mask=matrices,
        adam_weight_decay=DECAY,
        muon_weight_dimension_numbers=dimensions,
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _lora_pre() -> Iterator[Condition]:
    lora_pre = optax_flash.lora_pre_adamw

    def muon(lr: optax.Schedule, *, mask: Any, **options: Any) -> Any:
        return optax_flash.lora_pre_muon(lr, weight_decay_mask=mask, **options)

    in_float32 = dict.fromkeys(FACTORS)
    for name, share in SHARES.items():
        yield _split("lora_pre", f"rank {name}", _factored(lora_pre, rank=share))
    for name, share in SHARES.items():
        make = _factored(lora_pre, rank=share, codecs=in_float32)
        yield _split("lora_pre", f"rank {name}, float32 factors", make)
    in_4_bits = dict.fromkeys(FACTORS, "companded4")
    make = _factored(lora_pre, rank=0.25, codecs=in_4_bits)
    yield _split("lora_pre", "rank 1/4, 4-bit factors", make)
    options = dict(codecs=in_float32, bias_correction="paper")
    make = _factored(lora_pre, rank=0.25, **options)
    yield _split("lora_pre", "rank 1/4, float32 factors, paper's correction", make)
    slow = _factored(lora_pre, rank=0.25, b2=0.999)
    yield _split("lora_pre", "rank 1/4, b2 = 0.999", slow)
    yield Condition("muon", "float32", _muon)
    options = dict(rank=0.25, adam_weight_decay=DECAY)
    yield _split("lora_pre_muon", "rank 1/4", _factored(muon, **options))
    options |= dict(codecs=dict.fromkeys(FACTORS[:2]))
    make = _factored(muon, **options)
    yield _split("lora_pre_muon", "rank 1/4, float32 factors", make)


def _lowrank() -> Iterator[Condition]:
    lowrank, in_float32 = optax_flash.lowrank_adamw, dict.fromkeys(FACTORS)
    options: dict[str, Any]
    for name in ("1/4", "1/8"):
        options = dict(rank=SHARES[name])
        yield _split("lowrank", f"rank {name}", _factored(lowrank, **options))
        make = _factored(lowrank, **options, codecs=in_float32)
        yield _split("lowrank", f"rank {name}, float32 factors", make)
    options = dict(rank=0.25, strategy="online")
    yield _split("lowrank", "rank 1/4, online", _factored(lowrank, **options))
    make = _factored(lowrank, **options, codecs=in_float32)
    yield _split("lowrank", "rank 1/4, online, float32 factors", make)
    make = _factored(lowrank, rank=0.25, strategy="periodic", refresh_every=20)
    yield _split("lowrank", "rank 1/4, periodic", make)


def _adafactor(bits: int) -> Make:
    """The chain of docs/adafactor.md, with AdamW's decay."""

    def make(lr: optax.Schedule) -> optax.GradientTransformation:
        chain = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.ema(0.9),
            optax.add_decayed_weights(DECAY, matrices),
            optax.scale_by_learning_rate(lr),
        )
        return optax_flash.compress(chain, f"companded{bits}")

    return make


def _tamed() -> Iterator[Condition]:
    for threshold in (0.1, 0.3, 1.0, 5.0):
        make = _adamw(optax_flash.tamed_adamw8, threshold=threshold, relative=True)
        yield _split("tamed", f"threshold {threshold:g}", make)
