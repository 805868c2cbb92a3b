"""Bytes that training really holds: counted on its arrays, not from a formula."""

import jax

import optax_flash.flax


def count_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def live_bytes(state) -> dict[str, int]:
    """Bytes of a train state, by what they are for.

    "residual" is what the weights lack of 24 or 32 bits; it is 0 where the weights are
    not split. Whatever else the optimizer keeps counts as "optimizer state".
    """
    split = isinstance(state, optax_flash.flax.TrainState)
    residual = count_bytes(state.opt_state.residual) if split else 0
    return {
        "weights": count_bytes(state.params),
        "residual": residual,
        "optimizer state": count_bytes(state.opt_state) - residual,
    }
