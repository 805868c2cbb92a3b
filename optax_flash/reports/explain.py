"""``explain``: which implementation runs each leaf of an optimizer, and why."""

import dataclasses
from typing import Any

import jax
import optax

from optax_flash.fusion import fuse, untraced
from optax_flash.fusion.backends import PLATFORMS, Target, choose, gpu
from optax_flash.fusion.split import LeafUpdate
from optax_flash.reports import table
from optax_flash.transforms import _arguments, _init, _mirror
from optax_flash.transforms._extra_args import with_extra_args


@dataclasses.dataclass(frozen=True)
class Path:
    """What happens to leaves that are alike.

    Attributes:
      params: their paths.
      shape: of each.
      implementation: ``"xla"``, ``"pallas"`` or ``"triton"``.
      reason: why this one, in words.
    """

    params: tuple[str, ...]
    shape: tuple[int, ...]
    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How an optimizer's update runs; prints as a table.

    Attributes:
      platform: the one that it is for.
      paths: one for each group of leaves that are alike.
    """

    platform: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        rows = [("leaves", "first", "shape", "runs in", "because")]
        for path in self.paths:
            rows.append(
                (
                    str(len(path.params)),
                    path.params[0],
                    str(list(path.shape)),
                    path.implementation,
                    path.reason,
                )
            )
        return f"on {self.platform}\n{table.text(rows, left=range(1, 5))}"


def explain(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    platform: str | None = None,
    **extra_args: Any,
) -> Explanation:
    """Tells for each leaf which implementation runs it, and why.

    Args:
      tx: any transformation with :func:`compress` or :func:`master_weights` in it.
      params: arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      platform: ``"cuda"`` or ``"gpu"``, ``"tpu"``, ``"cpu"``, ``"rocm"``; None for the
        one at hand. There are no kernels for AMD's GPUs, ``"rocm"``: XLA runs all. For
        ``"cuda"`` without a GPU at hand, one that kernels are compiled for is presumed,
        with the packages that are installed here.
      **extra_args: what ``tx.update`` needs beside gradients and params.

    Returns:
      An :class:`Explanation`, which prints as a table.

    Raises:
      TypeError: the arguments are swapped.
      ValueError: an unknown platform.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flash
      >>> params = {"kernel": jnp.ones((512, 512))}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax_flash.adamw8(1e-3))
      >>> print(optax_flash.explain(tx, params, platform="cuda"))
      on cuda
      leaves  first   shape       runs in  because
           1  kernel  [512, 512]  pallas   elementwise; jax-triton is not installed
    """
    call = "explain(tx, params)"
    _arguments.check_transformation(tx, (params,), call)
    _arguments.check_params(params, call)
    platform = _at_hand() if platform is None else _canonical(platform)
    params = _init.as_arrays(_mirror.arrays_of(params))
    update = with_extra_args(tx).update
    with fuse.watch() as leaves:
        try:
            jax.eval_shape(
                lambda params: update(params, tx.init(params), params, **extra_args)[1],
                params,
            )
        except untraced.CannotTrace:
            return _untraced(platform, params)
        except untraced.ERRORS as error:
            if not leaves:
                raise TypeError(
                    "explain: which implementation runs a leaf is seen in the traced "
                    f"update, and this one cannot be traced: {untraced.ADVICE}."
                ) from error
    groups: dict[Any, list[str]] = {}
    kind_of_gpu = (gpu.at_hand() or gpu.PRESUMED) if platform == "cuda" else None
    target = Target(platform, kind_of_gpu)
    for leaf, implementation in leaves:
        kind = _kind(leaf, implementation, target)
        groups.setdefault(kind, []).extend(leaf.names or ["(state)"])
    seen = {name for names in groups.values() for name in names}
    for path, p in zip(
        _mirror.leaf_paths(params), jax.tree.leaves(params), strict=True
    ):
        if leaves and path not in seen and not p.shape:
            reason = "it is a scalar, as bias corrections are"
            groups.setdefault(((), "xla", reason, None), []).append(path)
    return Explanation(
        platform,
        tuple(
            Path(tuple(names), shape, name, reason)
            for (shape, name, reason, _), names in groups.items()
        ),
    )


def _untraced(platform: str, params: Any) -> Explanation:
    """Of an update that runs one operation after another, outside of jit."""
    reason = (
        "the update cannot be traced, so it runs one operation after another, and not "
        f"under jit: {untraced.ADVICE}"
    )
    rows = zip(_mirror.leaf_paths(params), jax.tree.leaves(params), strict=True)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for path, p in rows:
        by_shape.setdefault(p.shape, []).append(path)
    return Explanation(
        platform,
        tuple(Path(tuple(x), shape, "xla", reason) for shape, x in by_shape.items()),
    )


def _at_hand() -> str:
    """The default backend; JAX says "gpu" of AMD's GPUs too."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    version = jax.devices()[0].client.platform_version
    return "rocm" if "rocm" in version.lower() else "cuda"


def _canonical(platform: str) -> str:
    """A known platform's name; "gpu" is NVIDIA's."""
    name = "cuda" if platform == "gpu" else platform
    if name not in PLATFORMS:
        raise ValueError(
            f"Unknown platform {platform!r}. Known names: {', '.join(PLATFORMS)}, and "
            "gpu for cuda."
        )
    return name


def _kind(
    leaf: LeafUpdate, implementation: str | None, target: Target
) -> tuple[Any, ...]:
    """What leaves that are alike have in common."""
    shape = leaf.results[0].aval.shape
    if leaf.program is None:
        return shape, "xla", leaf.reason, None
    try:
        backend, reason = choose(leaf.program, implementation, target)
    except ValueError as error:
        # Of one asked for by name. An update there raises the same.
        return shape, implementation, f"asked for, and raises: {error}", leaf.program
    if leaf.reason and backend.name != "xla":
        reason = reason.replace("elementwise", leaf.reason, 1)
    return shape, backend.name, reason, leaf.program
