"""``plan``: what a training step takes on each device."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flash.codecs import residual as residuals
from optax_flash.plan import activations, models, optimizers, shards
from optax_flash.plan.devices import DEVICES, Device
from optax_flash.plan.names import look_up
from optax_flash.plan.result import Plan
from optax_flash.transforms import _arguments, master_weights

PyTree = Any

FLOAT32 = "optax.adamw, float32"
MIXED = "optax.adamw, bfloat16 with float32 masters"


def plan(
    model: str | models.Model | PyTree,
    optimizer: str | optax.GradientTransformation = "adamw8",
    device: str | Device = "h100-80gb",
    mesh: Mapping[str, int] | None = None,
    *,
    bits: int | None | str = "auto",
    param_dtype: jax.typing.DTypeLike | None = None,
    batch: int = 1,
    length: int | None = None,
    remat: bool = True,
    release: bool = False,
    loss_chunks: int = 1,
    memory_fraction: float | None = None,
) -> Plan:
    """What a training step takes on each device, from shapes alone.

    Weights and state are counted. What a step needs besides is an estimate, see
    :mod:`optax_flash.plan.activations`: within a few percent of what XLA's compiler
    takes for the transformers that it was compared with (``docs/plan.md``). It holds
    of steps that donate params and state, and of elementwise optimizers.

    Args:
      model: a name in :data:`PRESETS`, a :class:`Model`, or any tree of
        ``jax.ShapeDtypeStruct``; leaves may have NamedShardings. Of such a tree there
        are no activations.
      optimizer: a name in ``optimizers.OURS`` or ``optimizers.OPTAX``, or a
        transformation without :func:`master_weights`, which ``bits`` adds.
      device: a name in :data:`DEVICES`, or a :class:`Device`.
      mesh: devices along the axes "fsdp" (divides weights, state and batch) and "data"
        (divides the batch); None for a single device, or that of the params.
      bits: 24 or 32 bits of weights in half-precision params and a residual; None for
        no residual; "auto": 24 for an optimizer of ours by name, None for others.
      param_dtype: None for bfloat16 where there are bits, and else float32; for a tree
        of params, theirs.
      batch: examples in a step, on all devices together.
      length: tokens of each; None for the model's own.
      remat: whether layers keep only their inputs for the backward pass.
      release: whether each layer's gradient is used and freed in the backward pass.
      loss_chunks: in how many pieces, one after the other, logits are made.
      memory_fraction: how much of the device may be used; None for what JAX takes by
        default.

    Returns:
      A :class:`Plan`.

    Raises:
      ValueError: an unknown name (the message lists the known ones), a batch that the
        mesh does not divide, sizes below 1, bits with params that are not half
        precision.

    Example:
      >>> from optax_flash.plan import plan
      >>> ours = plan("llama-3.1-8b", "adamw8", "h100-80gb", length=2048)
      >>> ours.fits, f"{ours.total / 2**30:.0f} of {ours.usable / 2**30:.0f} GiB"
      (True, '53 of 59 GiB')
      >>> plan("llama-3.1-8b", "adamw", "h100-80gb", length=2048).fits
      False
    """
    if not isinstance(optimizer, str) or _arguments.is_transformation(model):
        call = "plan(model, optimizer)"
        _arguments.check_transformation(optimizer, (model,), call)
    if isinstance(device, str):
        device = look_up("Device", DEVICES, device)
    named = isinstance(optimizer, str)
    if bits == "auto":
        bits = 24 if named and optimizer in optimizers.OURS else None
    known = _model(model)
    length = known.length if length is None else length
    for name, value in (
        ("batch", batch),
        ("length", length),
        ("loss_chunks", loss_chunks),
    ):
        if value < 1:
            raise ValueError(f"plan: {name} is {value}; give 1 or more.")
    if param_dtype is None and not _is_tree(model):
        param_dtype = jnp.bfloat16 if bits else jnp.float32

    inner = optimizers.named(optimizer) if isinstance(optimizer, str) else optimizer
    job = _Job(known, _placed(known.params, param_dtype, mesh), length, loss_chunks)
    if batch % job.devices:
        raise ValueError(
            f"plan: a batch of {batch} does not divide over {job.devices} devices."
        )
    for leaf in jax.tree.leaves(job.params):
        # Whole numbers, of which there may be some among the params, stay as they are.
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        if bits and floating and leaf.dtype not in residuals.SPLIT_DTYPES:
            raise ValueError(
                f"plan: {bits} bits are kept in bfloat16 or float16 params and a "
                f"residual, not in {leaf.dtype}. Pass bits=None or another param_dtype."
            )
    tx = master_weights.master_weights(inner, int(bits)) if bits else inner

    held = {"weights": shards.nbytes(job.params)}
    held |= shards.state_bytes(tx, job.params)
    peak = functools.partial(job.peak, sum(held.values()))
    most = job.temporaries(batch, remat, release)
    fraction = device.fraction if memory_fraction is None else memory_fraction
    if not 0 < fraction <= 1:
        raise ValueError(f"plan: memory_fraction is {fraction}; give one in (0, 1].")
    usable = int(device.memory * fraction)
    estimated = known.architecture is not None
    return Plan(
        title=_title(known.name, optimizer if named else "", bits, device, job.devices),
        params=known.size,
        devices=job.devices,
        batch=batch,
        length=length,
        component_bytes=held
        | {"gradients": most.gradients, "activations": most.activations},
        gradients={
            "all at once": job.temporaries(batch, remat, False).gradients,
            "released": job.temporaries(batch, remat, True).gradients,
        },
        activations={
            "kept": job.temporaries(batch, False, release).activations,
            "rematerialized": job.temporaries(batch, True, release).activations,
        }
        if estimated
        else {},
        device=device,
        usable=usable,
        largest_batch=job.devices
        * _largest(lambda n: peak(n * job.devices, remat, release) <= usable)
        if estimated
        else None,
        baselines=_baselines(job, batch, remat),
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """Params in their places, and what does not change with the batch."""

    model: models.Model
    params: PyTree
    length: int
    loss_chunks: int

    @property
    def devices(self) -> int:
        return jax.tree.leaves(self.params)[0].sharding.mesh.size

    def peak(self, held: int, batch: int, remat: bool, release: bool) -> int:
        return held + sum(self.temporaries(batch, remat, release))

    def temporaries(
        self, batch: int, remat: bool, release: bool
    ) -> activations.Temporaries:
        architecture, params = self.model.architecture, self.params
        if architecture is None:
            grads = [shards.nbytes(x) for x in jax.tree.leaves(params)]
            return activations.Temporaries(max(grads) if release else sum(grads), 0)
        untied = not getattr(architecture, "tied", False)
        load = activations.Load(
            batch=batch // self.devices,
            length=self.length,
            remat=remat,
            release=release,
            loss_chunks=self.loss_chunks,
            gradients=self._gradients(),
            layer_weights=_layer(params["blocks"], _compute_bytes),
            head_weights=_compute_bytes(params["head" if untied else "embed"]),
            sharded=self._is_sharded(),
            cast=any(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(params)),
        )
        return architecture.temporaries(load)

    def _gradients(self) -> activations.Gradients:
        params = self.params
        return activations.Gradients(
            blocks=shards.nbytes(params["blocks"]),
            layer=_layer(params["blocks"], shards.nbytes),
            embed=shards.nbytes(params["embed"]),
            head=shards.nbytes(params["head"]),
        )

    def _is_sharded(self) -> bool:
        leaves = jax.tree.leaves(self.params)
        return any(not x.sharding.is_fully_replicated for x in leaves)


def _model(model: Any) -> models.Model:
    if isinstance(model, str):
        return models.preset(model)
    if isinstance(model, models.Model):
        return model
    return models.Model("these params", model)


def _is_tree(model: Any) -> bool:
    return not isinstance(model, str | models.Model)


def _placed(params: PyTree, dtype: Any, mesh: Mapping[str, int] | None) -> PyTree:
    """The params in their dtype and with a sharding each."""

    def cast(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding):
            sharding = None
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        own = dtype if dtype and floating else x.dtype
        return jax.ShapeDtypeStruct(x.shape, own, sharding=sharding)

    params = jax.tree.map(cast, params)
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("plan: there are no params.")
    if mesh is None and all(x.sharding is not None for x in leaves):
        return params
    return shards.place(params, shards.make_mesh(mesh or {"data": 1}))


def _layer(blocks: PyTree, count: Any) -> int:
    """Bytes of one layer: of stacked blocks their mean, of others the largest."""
    stacks = {x.shape[0] for x in jax.tree.leaves(blocks)}
    if len(stacks) == 1:
        return count(blocks) // stacks.pop()
    return max(count(block) for block in blocks.values())


def _compute_bytes(tree: PyTree) -> int:
    """Bytes of weights in bfloat16, not sharded."""
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    return activations.COMPUTE_BYTES * numbers


def _baselines(job: _Job, batch: int, remat: bool) -> dict[str, int]:
    """The same step with optax's AdamW, in float32 and in mixed precision."""

    def like(dtype: Any) -> PyTree:
        return jax.tree.map(
            lambda x: (
                x.update(dtype=dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            job.params,
        )

    full, half = like(jnp.float32), like(jnp.bfloat16)
    state = shards.state_bytes(optimizers.named("adamw"), full)
    moments = sum(state.values())
    whole = dataclasses.replace(job, params=full)
    mixed = dataclasses.replace(job, params=half)
    masters = shards.nbytes(full) + moments
    return {
        FLOAT32: whole.peak(masters, batch, remat, False),
        MIXED: mixed.peak(shards.nbytes(half) + masters, batch, remat, False),
    }


def _largest(fits: Any) -> int:
    """The largest number that fits, 0 where 1 does not."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _title(name: str, optimizer: str, bits: Any, device: Device, devices: int) -> str:
    weights = f"{bits}-bit weights" if bits else ""
    count = f"{devices} x {device.name}"
    return ", ".join(filter(None, [name, optimizer, weights, count]))
