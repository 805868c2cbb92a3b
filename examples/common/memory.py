"""Bytes that training takes: counted on its arrays, asked of XLA and of the device."""

from typing import Any

import jax
from jax import stages


def count_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def live_bytes(state, *, released: bool = False) -> dict[str, int]:
    """Bytes that a step holds, by what they are for.

    "residual" is what the weights lack of 24 or 32 bits; it is 0 where the weights are
    not split. Whatever else the optimizer keeps counts as "optimizer state". A gradient
    has its param's dtype; released ones are never there all at once.
    """
    residual = count_bytes(getattr(state.opt_state, "residual", ()))
    return {
        "weights": count_bytes(state.params),
        "residual": residual,
        "optimizer state": count_bytes(state.opt_state) - residual,
        "gradients": 0 if released else count_bytes(state.params),
    }


def peak_bytes(live: dict[str, int], step: stages.Compiled) -> dict[str, Any]:
    """What a step needs: "live" arrays, "compiled" in all, and at the "allocator".

    "compiled" is what XLA says: arguments, results that reuse no argument's buffer, and
    temporaries, activations among them. "allocator" is the most that the first device
    ever held; None for devices that do not count, as CPUs.
    """
    needs, device = step.memory_analysis(), jax.local_devices()[0]
    compiled = None
    if needs is not None:
        compiled = (
            needs.argument_size_in_bytes
            + needs.output_size_in_bytes
            - needs.alias_size_in_bytes
            + needs.temp_size_in_bytes
        )
    allocator = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "live": sum(live.values()),
        "compiled": compiled,
        "allocator": allocator,
    }
