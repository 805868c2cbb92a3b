"""Weights as safetensors: what other programs read."""

import os
import pathlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flash.codecs.residual import is_split
from optax_flash.io import formats
from optax_flash.transforms import _arguments, _init
from optax_flash.transforms.master_weights import master_params


def save_safetensors(
    path: str | pathlib.Path,
    params: optax.Params,
    state: optax.OptState | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = jnp.float32,
    without_state: bool = False,
    metadata: Mapping[str, str] | None = None,
    separator: str = ".",
) -> None:
    """Writes weights to a safetensors file, which appears when it is whole.

    A param's name is its path, such as ``"decoder.layer_0.kernel"``. Shapes are Flax's:
    a kernel is not transposed.

    Args:
      path: of the file; one that is there is replaced.
      params: the params.
      state: holds their residuals, see :func:`master_params`; None where the params
        are the weights, as float32 ones are.
      dtype: float32, bfloat16 or another for all floating weights, to which they are
        rounded to nearest; None leaves each in its own.
      without_state: writes half-precision params in a dtype with more bits although
        there is no state: for params that never had residuals.
      metadata: text to keep in the file's header.
      separator: between the parts of a name.

    Raises:
      TypeError: the arguments are swapped.
      ValueError: half-precision params would be written in a dtype with more bits, but
        without the bits that a state has of them; two params have one name, or a param
        is not all on this process's devices; or the params are not those of the state.
      OSError: it could not be written. A file that was there is as it was.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, optax_flash
      >>> params = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
      >>> tx = optax_flash.master_weights(optax_flash.adamw8(1e-3))
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> optax_flash.save_safetensors(path, params, tx.init(params))
      >>> optax_flash.load_safetensors(path, params)["dense"]["kernel"].dtype
      dtype('float32')

    References:
      https://huggingface.co/docs/safetensors
    """
    files = _safetensors()
    call = "save_safetensors(path, params, state)"
    _arguments.check_path(path, call)
    _arguments.check_order(state, params, call)
    weights = params if state is None else master_params(state, params)
    if state is None and not without_state:
        _check_whole(params, dtype)
    arrays = {
        name: _to_host(name, w, dtype) for name, w in _named(weights, separator).items()
    }
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        files.save_file(arrays, unfinished, metadata=dict(metadata or {}) or None)
        os.replace(unfinished, path)
    except Exception as error:
        raise OSError(f"{path} was not written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_safetensors(
    path: str | pathlib.Path, params: optax.Params, *, separator: str = "."
) -> optax.Params:
    """Reads weights that :func:`save_safetensors` wrote.

    Args:
      path: of the file.
      params: give structure and shapes: arrays or ``jax.ShapeDtypeStruct``. Where one
        has a sharding, its weight gets it.
      separator: between the parts of a name.

    Returns:
      A tree like ``params``, in the dtypes of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, or holds other names or shapes; the message names the
        first.
    """
    files = _safetensors()
    _arguments.check_path(path, "load_safetensors(path, params)")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        arrays = files.load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    named = _named(params, separator)
    formats.check_leaves(
        {name: f"an array {list(x.shape)}" for name, x in arrays.items()},
        {name: f"an array {list(x.shape)}" for name, x in named.items()},
        str(path),
    )
    placed = [
        jax.device_put(arrays[name], getattr(x, "sharding", None))
        for name, x in named.items()
    ]
    return jax.tree.structure(params).unflatten(placed)


def _safetensors() -> types.ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'safetensors is not installed: pip install "optax_flash[safetensors]".'
        ) from error
    return safetensors.numpy


def _named(tree: optax.Params, separator: str) -> dict[str, jax.Array]:
    """Leaves by name."""
    named = formats.named_leaves(_init.as_arrays(tree))
    renamed = {path.replace("/", separator): leaf for path, leaf in named.items()}
    if len(renamed) != len(named):
        raise ValueError(
            f"Two params have one name with {separator!r} between its parts. Pass "
            "another separator, such as '/'."
        )
    return renamed


def _check_whole(params: optax.Params, dtype: jax.typing.DTypeLike | None) -> None:
    """Raises where a file would promise more bits than the params have of weights."""
    for name, p in formats.named_leaves(params).items():
        if dtype is None or not is_split(p):
            continue
        if jnp.finfo(dtype).nmant > jnp.finfo(p.dtype).nmant:
            raise ValueError(
                f"{name!r} is {p.dtype}, and would be written as {jnp.dtype(dtype)} "
                "without the lower bits of the weight, which are in the optimizer "
                "state. Call save_safetensors(path, params, state). For params that "
                "have no residuals pass without_state=True; or write what there is, "
                "with dtype=None."
            )


def _to_host(name: str, x: jax.Array, dtype: jax.typing.DTypeLike | None) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"{name!r} is sharded over devices of other processes. Gather the weights, "
            "for example with jax.experimental.multihost_utils.process_allgather."
        )
    if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.asarray(x, dtype)
    return np.asarray(x, order="C")
