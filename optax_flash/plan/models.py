"""Known models: the shapes of their params, and what they are built of."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_flash.plan.activations import Convolutions, Transformer
from optax_flash.plan.names import look_up

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the planner sees it.

    Attributes:
      name: for titles.
      params: a tree of ``jax.ShapeDtypeStruct``. Where there is an architecture, a
        dictionary of "embed", "blocks" (layers stacked along a first axis) and "head".
      architecture: what the activations are computed from; None: they are left out.
      length: tokens of an example, if nothing else is said; 1 for images.

    Raises:
      ValueError: an architecture, and other params.
    """

    name: str
    params: PyTree
    architecture: Transformer | Convolutions | None = None
    length: int = 1

    def __post_init__(self) -> None:
        parts = {"embed", "blocks", "head"}
        if self.architecture and set(self.params) != parts:
            raise ValueError(
                f"Model {self.name!r} has the params {sorted(self.params)}; with an "
                f"architecture they are {sorted(parts)}."
            )

    @property
    def size(self) -> int:
        """How many numbers the params hold."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.params))


def preset(name: str) -> Model:
    """A known model.

    Args:
      name: one of :data:`PRESETS`.

    Raises:
      ValueError: the name is not known. The message lists those that are.

    Example:
      >>> from optax_flash.plan import preset
      >>> preset("llama-3.1-8b").size
      8030261248
    """
    return look_up("Model", PRESETS, name)()


def llama(
    name: str,
    *,
    layers: int,
    width: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 128_256,
    tied: bool = False,
    head_width: int | None = None,
    length: int = 8_192,
) -> Model:
    """A Llama: RMSNorm, rotary positions, grouped queries, a gated MLP, no biases."""
    head_width = head_width or width // heads
    rows, keys = heads * head_width, kv_heads * head_width
    blocks = {
        "attention_norm": (width,),
        "query": (width, rows),
        "key": (width, keys),
        "value": (width, keys),
        "out": (rows, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    head = {"norm": (width,)} | ({} if tied else {"kernel": (width, vocabulary)})
    params = {
        "embed": {"embedding": (vocabulary, width)},
        "blocks": _stacked(layers, blocks),
        "head": head,
    }
    architecture = Transformer(
        layers=layers,
        width=width,
        hidden=hidden,
        keys=keys,
        vocabulary=vocabulary,
        gated=True,
        tied=tied,
    )
    return Model(name, _shapes(params), architecture, length)


def gpt2(
    name: str,
    *,
    layers: int,
    width: int,
    vocabulary: int = 50_257,
    length: int = 1_024,
    hidden: int | None = None,
) -> Model:
    """A GPT-2: LayerNorm, learned positions, biases, GELU, a tied head."""
    hidden = hidden or 4 * width
    params = {
        "embed": {"embedding": (vocabulary, width), "positions": (length, width)},
        "blocks": _stacked(layers, _block_with_biases(width, hidden)),
        "head": {"norm": _norm(width)},
    }
    architecture = Transformer(
        layers=layers,
        width=width,
        hidden=hidden,
        keys=width,
        vocabulary=vocabulary,
        gated=False,
        tied=True,
    )
    return Model(name, _shapes(params), architecture, length)


def vit(name: str, *, layers: int, width: int, image: int, patch: int) -> Model:
    """A ViT with a class token, learned positions and 1,000 classes."""
    length = (image // patch) ** 2 + 1
    params = {
        "embed": {
            "patches": {"kernel": (patch, patch, 3, width), "bias": (width,)},
            "class": (width,),
            "positions": (length, width),
        },
        "blocks": _stacked(layers, _block_with_biases(width, 4 * width)),
        "head": {"norm": _norm(width)} | {"classes": _dense(width, 1_000)},
    }
    architecture = Transformer(
        layers=layers,
        width=width,
        hidden=4 * width,
        keys=width,
        # One vector of an image is classified, not each token.
        vocabulary=0,
        gated=False,
        tied=False,
    )
    return Model(name, _shapes(params), architecture, length)


def resnet50() -> Model:
    """A ResNet-50 for 224 x 224 images and 1,000 classes, stride in the 3 x 3."""

    def conv(size: int, inputs: int, outputs: int) -> PyTree:
        return {"kernel": (size, size, inputs, outputs), "norm": _norm(outputs)}

    blocks, sizes = {}, []
    inputs, side = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            before, side = side, side // stride
            block = {
                "in": conv(1, inputs, inner),
                "mid": conv(3, inner, inner),
                "out": conv(1, inner, outer),
            }
            made = before**2 * inner + side**2 * (inner + outer)
            if not i:
                block["skip"] = conv(1, inputs, outer)
                made += side**2 * outer
            blocks[f"block_{stage}_{i}"] = block
            sizes.append((before**2 * inputs, made))
            inputs = outer
    params = {
        "embed": conv(7, 3, 64),
        "blocks": blocks,
        "head": _dense(inputs, 1_000),
    }
    stem = 112**2 * 64
    return Model("resnet-50", _shapes(params), Convolutions(stem, tuple(sizes)))


PRESETS: dict[str, Callable[[], Model]] = {
    "gpt2-124m": functools.partial(gpt2, "gpt2-124m", layers=12, width=768),
    "gpt2-355m": functools.partial(gpt2, "gpt2-355m", layers=24, width=1_024),
    "gpt2-774m": functools.partial(gpt2, "gpt2-774m", layers=36, width=1_280),
    "gpt2-xl": functools.partial(gpt2, "gpt2-xl", layers=48, width=1_600),
    "llama-3.2-1b": functools.partial(
        llama,
        "llama-3.2-1b",
        layers=16,
        width=2_048,
        hidden=8_192,
        heads=32,
        kv_heads=8,
        tied=True,
    ),
    "llama-3.1-8b": functools.partial(
        llama,
        "llama-3.1-8b",
        layers=32,
        width=4_096,
        hidden=14_336,
        heads=32,
        kv_heads=8,
    ),
    "llama-3.1-70b": functools.partial(
        llama,
        "llama-3.1-70b",
        layers=80,
        width=8_192,
        hidden=28_672,
        heads=64,
        kv_heads=8,
    ),
    "vit-b16": functools.partial(
        vit, "vit-b16", layers=12, width=768, image=224, patch=16
    ),
    "resnet-50": resnet50,
}
"""Known models by name."""


def _block_with_biases(width: int, hidden: int) -> PyTree:
    """A layer of GPT-2 or ViT."""
    return {
        "attention_norm": _norm(width),
        "qkv": _dense(width, 3 * width),
        "out": _dense(width, width),
        "mlp_norm": _norm(width),
        "up": _dense(width, hidden),
        "down": _dense(hidden, width),
    }


def _norm(width: int) -> PyTree:
    return {"scale": (width,), "bias": (width,)}


def _dense(inputs: int, outputs: int) -> PyTree:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _stacked(layers: int, block: PyTree) -> PyTree:
    return jax.tree.map(lambda shape: (layers, *shape), block, is_leaf=_is_shape)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=_is_shape
    )
