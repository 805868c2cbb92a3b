"""``numerics_report``: what storage does to an optimizer's numbers at one step."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_flash.codecs import groups
from optax_flash.codecs.residual import codec_of, half_code, is_split
from optax_flash.fusion import fuse
from optax_flash.reports import table
from optax_flash.transforms import (
    _arguments,
    _boxes,
    _entries,
    _init,
    _inside,
    _mirror,
)
from optax_flash.transforms._extra_args import with_extra_args
from optax_flash.transforms.compress import CompressState
from optax_flash.transforms.master_weights import MasterWeightsState

Scalars = dict[str, jax.Array]


class NumericsReport(NamedTuple):
    """What :func:`numerics_report` returns: float32 scalars by name.

    A tree of arrays, so it can leave a jitted function. Outside of one it prints as a
    table, and :meth:`warn` tells what is wrong. Names of params are paths such as
    ``"decoder/kernel"``; of leaves in codes, with their field, ``"decoder/kernel/mu"``.

    Attributes:
      update_rms: by param, the root mean square of the step, learning rate included.
      half_code: by param, the mean over its weights of half the distance to the next
        weight that can be stored. Smaller steps do not survive rounding to nearest.
      lost: by param that is rounded to nearest, the share of its weights that take a
        step, and one below half a code. They stand still.
      noisy: the same by param that is rounded stochastically. They move as they should
        in the mean, and rounding adds up to a code of noise.
      zero: by leaf in codes, the share of elements that decode to 0.
      saturated: by leaf in codes, the share of elements with an outermost code.
      non_finite: by leaf in codes, the share of groups whose scale is NaN or infinite.
    """

    update_rms: Scalars
    half_code: Scalars
    lost: Scalars
    noisy: Scalars
    zero: Scalars
    saturated: Scalars
    non_finite: Scalars

    def __str__(self) -> str:
        report = jax.device_get(self)
        steps = [("param", "step RMS", "half a code", "smaller steps", "are")]
        for path, rms in report.update_rms.items():
            fate = "noisy" if path in report.noisy else "lost"
            small = getattr(report, fate)[path]
            half = report.half_code[path]
            steps.append((path, f"{rms:.1e}", f"{half:.1e}", f"{small:.2%}", fate))
        codes = [("codes", "zero", "saturated", "non-finite groups")]
        for name, zero in report.zero.items():
            top, bad = report.saturated[name], report.non_finite[name]
            codes.append((name, f"{zero:.2%}", f"{top:.2%}", f"{bad:.2%}"))
        tables = [steps, codes] if report.zero else [steps]
        return "\n\n".join(map(table.text, tables))

    def warn(self, share: float = 0.5) -> None:
        """Warns of each param or leaf where something is wrong. Not under jit.

        Args:
          share: of a param's weights whose steps are below half a code; more of them
            are worth a warning. Any non-finite group is.
        """
        for complaint in _complaints(jax.device_get(self), share):
            warnings.warn(complaint, stacklevel=2)


def numerics_report(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    grads: optax.Updates,
    **extra_args: Any,
) -> NumericsReport:
    r"""Looks at the codes of a state, and at the step that gradients will make.

    With :math:`w` the weights, :math:`u` the update and :math:`h(w)` half the distance
    between neighbouring weights as they are stored,

    .. math::
      \text{small} = \frac{1}{n} \sum_i [\, 0 < |u_i| < h(w_i) \,]
      \qquad
      h(w) = 2^{\lfloor \log_2 |w| \rfloor} \cdot
      \begin{cases}
        2^{-16} & \text{bfloat16, 8-bit residual} \\
        2^{-24} & \text{bfloat16, 16-bit residual; float32} \\
        2^{-8} & \text{bfloat16 alone}
      \end{cases}

    The transformation is needed beside the state: it makes the step.

    Pure; meant for ``jax.jit``. The update is computed once more, and the new state
    not at all, so it costs about what a step does, and no memory for another state.
    It is plain JAX whatever ``implementation`` the transformation names.

    Args:
      tx: the transformation, however deeply it wraps ours; one that is not ours has
        no codes.
      state: its state.
      params: arrays, as ``tx.update`` takes them.
      grads: arrays like the params.
      **extra_args: what ``tx.update`` needs beside them.

    Returns:
      A :class:`NumericsReport`. Leaves that are empty or not floating have no entry.
      Where ``tx`` holds an update back (``optax.MultiSteps`` between two steps,
      ``optax.apply_if_finite`` at NaN) the steps are zeros, and zeros are never small.

    Raises:
      ValueError: the state is not of ``tx`` and ``params``.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax_flash
      >>> params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      >>> tx = optax_flash.master_weights(optax_flash.adamw8(1e-6))
      >>> state = tx.init(params)
      >>> look = jax.jit(functools.partial(optax_flash.numerics_report, tx))
      >>> report = look(state, params, params)
      >>> print(report)
      param  step RMS  half a code  smaller steps    are
      w       1.0e-06      1.5e-05        100.00%  noisy
      <BLANKLINE>
      codes     zero  saturated  non-finite groups
      w/mu   100.00%      0.00%              0.00%
      w/nu   100.00%      0.00%              0.00%
      >>> report._asdict()["noisy"]["w"]
      Array(1., dtype=float32)
    """
    call = "numerics_report(tx, state, params, grads)"
    _arguments.check_transformation(tx, (state, params, grads), call)
    for other in (params, grads):
        _arguments.check_order(state, other, call)
    params = _mirror.arrays_of(params)
    params, grads = _init.as_arrays((params, grads))
    _mirror.check_mirrors(params, grads, "numerics_report: the gradients")
    _inside.check_made_by(tx, state, params, "numerics_report")
    stored = [
        leaf
        for node in _inside.ours(state)
        if isinstance(node, CompressState)
        for leaf in _entries.entries(node)
    ]
    paths, leaves = _mirror.leaf_paths(params), jax.tree.leaves(params)
    residuals = _residuals(state, params)
    updates = _updates(tx, state, params, residuals, grads, extra_args)
    report = NumericsReport({}, {}, {}, {}, {}, {}, {})
    for path, p, r, update in zip(paths, leaves, residuals, updates, strict=True):
        if not p.size or not jnp.issubdtype(p.dtype, jnp.floating):
            continue
        step = jnp.abs(update.astype(jnp.float32))
        half = half_code(p, r)
        noisy = r is not None and codec_of(r).is_stochastic(p.dtype)
        small = (step > 0) & (step < half)
        square, mean_half, share = _means(jnp.square(step), half, small)
        report.update_rms[path] = jnp.sqrt(square)
        report.half_code[path] = mean_half
        (report.noisy if noisy else report.lost)[path] = share
    for leaf in stored:
        name = _unused(leaf.name, report.zero)
        # Apart from the update, which decodes them too: an array that both read would
        # be kept in memory.
        codes = lax.optimization_barrier(leaf.codes)
        x = leaf.codec.decode(codes, leaf.scales, leaf.shape)
        outermost = leaf.codec.saturated(codes, leaf.shape)
        report.zero[name], report.saturated[name] = _means(x == 0, outermost)
        bad = ~jnp.isfinite(leaf.scales.astype(jnp.float32))
        bad = jnp.any(groups.split(bad, leaf.codec.scales_per_group), axis=-1)
        (report.non_finite[name],) = _means(bad)
    return report


def _residuals(state: optax.OptState, params: optax.Params) -> list[Any]:
    """The residual of each param; None where it has none."""
    state, params = _boxes.unboxed(state), _boxes.unboxed(params)
    leaves = jax.tree.leaves(params)
    residuals: list[Any] = [None] * len(leaves)

    for node in _mirror.nodes(state, MasterWeightsState):
        _mirror.check_mirrors(node.residual, params, "numerics_report: the params")
        for i, r in enumerate(_mirror.entries(node.residual, params)):
            if hasattr(r, "dtype") and is_split(leaves[i]):
                residuals[i] = r
    return residuals


def _updates(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    residuals: list[Any],
    grads: optax.Updates,
    extra_args: dict[str, Any],
) -> list[Any]:
    """What the step adds to each weight, before that is rounded to what is stored."""
    leaves, structure = jax.tree.flatten(params)
    weights32, grads32 = [], []
    rows = zip(leaves, residuals, structure.flatten_up_to(grads), strict=True)
    for p, r, g in rows:
        # master_weights has nothing to round where it gets the weights themselves.
        weights32.append(p if r is None else codec_of(r).join(p, r))
        grads32.append(g if r is None else g.astype(jnp.float32))
    with fuse.dry():
        updates, _ = with_extra_args(tx).update(
            structure.unflatten(grads32),
            state,
            structure.unflatten(weights32),
            **extra_args,
        )
    return structure.flatten_up_to(updates)


def _means(*arrays: jax.Array) -> list[jax.Array]:
    """The means of arrays of one shape, float32.

    Their rows are summed in one pass over what they are computed from: separate sums
    would, on a CPU, each want an array of floats in memory.
    """
    arrays = tuple(
        jnp.atleast_1d(x.astype(jnp.int32) if x.dtype == bool else x) for x in arrays
    )
    n = arrays[0].shape[-1]
    sums = lax.reduce(
        arrays,
        tuple(np.zeros([], x.dtype) for x in arrays),
        lambda sums, xs: tuple(a + b for a, b in zip(sums, xs, strict=True)),
        (arrays[0].ndim - 1,),
    )
    return [jnp.mean(x.astype(jnp.float32)) / n for x in sums]


def _unused(name: str, taken: Scalars) -> str:
    """The name, numbered where several transformations have a field of that name."""
    count, unused = 0, name
    while unused in taken:
        count += 1
        unused = f"{name}_{count}"
    return unused


def _complaints(report: NumericsReport, share: float) -> Iterator[str]:
    for path, rms in report.update_rms.items():
        is_noisy, half = path in report.noisy, report.half_code[path]
        small = (report.noisy if is_noisy else report.lost)[path]
        if not small > share:
            continue
        if is_noisy:
            outcome = (
                ". Stochastic rounding keeps them in the mean, but adds noise of a "
                "code, which prevails over the movement for about "
                f"{2 * half / rms:,.0f} equal steps. bits=32 in "
                "optax_flash.master_weights makes codes smaller."
            )
        else:
            outcome = (
                " and are lost. Raise the learning rate, or keep the weights in more "
                "bits: optax_flash.master_weights, bits=32."
            )
        yield (
            f"{path!r}: the learning rate is small for these weights. {small:.0%} of "
            f"their steps (RMS {rms:.1e}) are below half a code ({half:.1e}){outcome}"
        )
    for name, bad in report.non_finite.items():
        if bad > 0:
            yield (
                f"{name!r}: {bad:.2%} of the groups are not finite, and will not be "
                "again. Restore a checkpoint, and skip such gradients with "
                "optax.apply_if_finite."
            )
