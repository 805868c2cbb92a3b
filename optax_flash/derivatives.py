"""``differentiable``: a state through which derivatives go where updates are traced."""

from typing import Any

import jax
import optax

from optax_flash.transforms import _records
from optax_flash.transforms.compress import CompressState, with_carried


def differentiable(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> optax.OptState:
    r"""A state that carries derivatives beside its codes.

    Derivatives go straight through codes and split weights:

    .. math::
      \mathrm{d}\,\mathrm{decode}(\mathrm{encode}(m)) = \mathrm{d}m, \qquad
      \mathrm{d}\,\mathrm{join}(\mathrm{split}(w)) = \mathrm{d}w

    Codes are integers and have no derivatives. An update that sees that it is being
    differentiated puts an array of zeros beside the codes of each leaf, whose
    derivative is that of the leaf. Under ``jax.jit``, ``lax.scan`` or ``lax.cond``
    *inside* of ``jax.grad`` an update cannot see it. It carries derivatives there if it
    is given a state that does, as this function makes it.

    Values stay what they are. The zeros take 4 bytes for each number in codes;
    ``optax.tree.set(state, carried=None)`` drops them.

    Args:
      tx: the transformation that made the state, however deeply it wraps ours.
      state: its state.
      params: those that it is for.

    Returns:
      The same state, with ``CompressState.carried``.

    Raises:
      ValueError: the state is not ``tx``'s.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flash
      >>> tx = optax_flash.sgd8(0.1, momentum=0.9)
      >>> params = jnp.ones((64, 64))
      >>> state = optax_flash.differentiable(tx, tx.init(params), params)
      >>> def loss_after_training(params, state):
      ...     def step(carry, _):
      ...         params, state = carry
      ...         updates, state = tx.update(params, state, params)
      ...         return (optax.apply_updates(params, updates), state), None
      ...     (params, _), _ = jax.lax.scan(step, (params, state), length=3)
      ...     return jnp.sum(params)
      >>> print(jax.grad(loss_after_training)(params, state)[0, 0])
      0.486
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, _records.Configured | CompressState)

    nodes, structure = jax.tree.flatten(_records.describe(tx, params), is_leaf=is_ours)
    try:
        parts = structure.flatten_up_to(state)
    except (ValueError, TypeError) as error:
        raise ValueError(_FOREIGN) from error
    for i, (node, part) in enumerate(zip(nodes, parts, strict=True)):
        if isinstance(node, CompressState):
            raise ValueError(
                "differentiable: tx.init was traced before, inside of jax.jit, and so "
                "does not say which codecs it uses. Make tx of the init without jit."
            )
        if isinstance(node, _records.Configured):
            if not isinstance(part, CompressState):
                raise ValueError(_FOREIGN)
            parts[i] = with_carried(node.config, part, node.params)
    return structure.unflatten(parts)


_FOREIGN = (
    "differentiable: the state has another structure than tx.init makes for these "
    "params. Pass the transformation that made it."
)
