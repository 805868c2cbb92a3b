"""Handing extra arguments, such as ``value=``, to whatever takes them."""

import inspect

import optax


def with_extra_args(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that takes extra arguments, and drops them only if it must.

    ``optax.with_extra_args_support`` goes by the type alone. ``optax.MultiSteps`` and
    its ``gradient_transformation()`` have another type, and an update that hands all
    extra arguments on.
    """
    if isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx
    parameters = inspect.signature(tx.update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
