"""``differentiable``: a state through which derivatives go where updates are traced."""

import optax

from optax_flash.transforms import _arguments, _inside, _mirror
from optax_flash.transforms._carried import with_carried


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
      TypeError: the arguments are swapped.
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
    call = "differentiable(tx, state, params)"
    _arguments.check_transformation(tx, (state, params), call)
    _arguments.check_order(state, params, call)
    params = _mirror.arrays_of(params)
    _inside.check_made_by(tx, state, params, "differentiable")
    return _inside.map_compressed(with_carried, state)
