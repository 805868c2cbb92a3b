"""Two small training tasks on real data, behind one interface.

`gpt()` is the model of examples/lm on Shakespeare's bytes, `image()` a small residual
network on Fashion-MNIST (`make fashion-mnist` fetches it). Both compute in float32
whatever the params are stored in, so that only the optimizer differs between two runs.
"""

import gzip
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.lm.model import GPT, GPTConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
FASHION_MNIST = ROOT / "data" / "fashion-mnist"
HELD_OUT = 0.07  # of each text, its end

Params = Any
Batch = Any


class Workload(NamedTuple):
    """A model, its loss and its data.

    Attributes:
      name: "gpt" or "image".
      init: seed -> float32 params.
      loss: (params, batch) -> mean loss in nats, float32; takes params of any dtype.
      batch: (seed, step) -> arrays of numpy, always the same for the same numbers.
      evaluate: params -> "loss" on held-out data, and "accuracy" for images.
      kind: path of a leaf, like "block_0/qkv/kernel", -> "embedding", "attention",
        "mlp", "norm", "convolution" or "head".
    """

    name: str
    init: Callable[[int], Params]
    loss: Callable[[Params, Batch], jax.Array]
    batch: Callable[[int, int], Batch]
    evaluate: Callable[[Params], dict[str, float]]
    kind: Callable[[str], str]


class Images(NamedTuple):
    """Pictures, (n, height, width) uint8, and their labels, (n,) uint8."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def gpt(
    texts: Mapping[str, bytes] | None = None,
    *,
    depth: int = 2,
    width: int = 128,
    heads: int = 4,
    seq_len: int = 64,
    batch_size: int = 16,
    eval_windows: int = 1024,
) -> Workload:
    """Predicts the next byte of Shakespeare, or of other texts.

    A batch is (batch_size, seq_len + 1) uint8: windows from anywhere in the training
    part of the texts. Held out is the end of each text, in disjoint windows.
    """
    if texts is None:
        from examples.lm.data import shakespeare  # its imports take seconds

        texts = shakespeare()
    train, held_out = _split_texts(texts)
    window = seq_len + 1
    if min(len(train), len(held_out)) < window:
        raise ValueError(
            f"gpt: {len(train)} bytes to train on and {len(held_out)} held out are too "
            f"few for windows of {window}; give longer texts or lower the seq_len"
        )
    model = GPT(GPTConfig(depth=depth, width=width, heads=heads))

    @jax.jit
    def create(key):
        return model.init(key, jnp.zeros((1, seq_len), jnp.int32))["params"]

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        targets = tokens[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def batch(seed, step):
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(train) - window + 1, size=batch_size)
        return train[starts[:, None] + np.arange(window)]

    count = len(held_out) // window
    windows = held_out[: count * window].reshape(count, window)
    windows = windows[:: max(1, count // eval_windows)][:eval_windows]
    metrics = jax.jit(lambda params, tokens: {"loss": loss(params, tokens)})

    return Workload(
        name="gpt",
        init=lambda seed: create(jax.random.key(seed)),
        loss=loss,
        batch=batch,
        evaluate=lambda params: _mean(metrics, params, windows, 4 * batch_size),
        kind=_gpt_kind,
    )


def _split_texts(texts: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of all texts as one array of bytes, and their ends as another."""
    train, held_out = [], []
    for text in texts.values():
        border = len(text) - round(HELD_OUT * len(text))
        train.append(text[:border])
        held_out.append(text[border:])
    return tuple(np.frombuffer(b"".join(part), np.uint8) for part in (train, held_out))


def _gpt_kind(path: str) -> str:
    kinds = {
        "embed": "embedding",
        "qkv": "attention",
        "out": "attention",
        "up": "mlp",
        "down": "mlp",
        "head": "head",
    }
    return _kind(path, kinds, other="norm")


class ResNet(nn.Module):
    """Pre-activation residual blocks, one per width; each after the first halves."""

    widths: tuple[int, ...]
    classes: int = 10
    groups: int = 8  # of each GroupNorm

    @nn.compact
    def __call__(self, x):  # (B, H, W) uint8 -> (B, classes)
        def norm(name, x):
            return nn.GroupNorm(self.groups, dtype=jnp.float32, name=name)(x)

        def conv(name, x, features, size=3, stride=1):
            return nn.Conv(
                features,
                (size, size),
                strides=stride,
                use_bias=False,
                dtype=jnp.float32,
                name=name,
            )(x)

        x = (x[..., None].astype(jnp.float32) - 73.0) / 90.0  # of Fashion-MNIST
        x = conv("stem", x, self.widths[0], stride=2)
        for i, width in enumerate(self.widths):
            stride = 1 if i == 0 else 2
            y = nn.relu(norm(f"norm_{i}a", x))
            if i > 0:
                x = conv(f"shortcut_{i}", y, width, size=1, stride=stride)
            y = conv(f"conv_{i}a", y, width, stride=stride)
            y = nn.relu(norm(f"norm_{i}b", y))
            x = x + conv(f"conv_{i}b", y, width)
        x = nn.relu(norm("norm", x)).mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)


def image(
    arrays: Images | None = None,
    *,
    widths: tuple[int, ...] = (32, 64, 96),
    batch_size: int = 32,
    eval_images: int = 10_000,
) -> Workload:
    """Names the garment in a picture of Fashion-MNIST, or of other pictures.

    A batch is a dict of "image", (batch_size, height, width) uint8, and "label",
    (batch_size,) int32; the pictures are shifted by up to two pixels and half of them
    are mirrored.
    """
    images, labels, test_images, test_labels = arrays or fashion_mnist()
    count, height, width = images.shape
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    model = ResNet(widths)

    @jax.jit
    def create(key):
        return model.init(key, jnp.zeros((1, height, width), jnp.uint8))["params"]

    def loss_and_hits(params, batch):
        logits = model.apply({"params": params}, batch["image"])
        label = batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return losses.mean(), (jnp.argmax(logits, -1) == label).mean()

    def batch(seed, step):
        rng = np.random.default_rng((seed, step))
        picked = rng.integers(count, size=batch_size)
        top, left = rng.integers(5, size=(2, batch_size, 1))
        mirrored = rng.random((batch_size, 1)) < 0.5
        columns = np.arange(width)
        columns = left + np.where(mirrored, columns[::-1], columns)
        rows = top + np.arange(height)
        shifted = padded[picked[:, None, None], rows[:, :, None], columns[:, None, :]]
        return {"image": shifted, "label": labels[picked].astype(np.int32)}

    @jax.jit
    def metrics(params, batch):
        loss, hits = loss_and_hits(params, batch)
        return {"loss": loss, "accuracy": hits}

    held_out = {
        "image": test_images[:eval_images],
        "label": test_labels[:eval_images].astype(np.int32),
    }
    return Workload(
        name="image",
        init=lambda seed: create(jax.random.key(seed)),
        loss=lambda params, batch: loss_and_hits(params, batch)[0],
        batch=batch,
        evaluate=lambda params: _mean(metrics, params, held_out, 4 * batch_size),
        kind=_image_kind,
    )


def _image_kind(path: str) -> str:
    kinds = {"stem": "convolution", "conv": "convolution", "shortcut": "convolution"}
    return _kind(path, kinds | {"head": "head"}, other="norm")


def _kind(path: str, kinds: Mapping[str, str], other: str) -> str:
    """The kind of the first part of the path that begins with one of the names."""
    for part in path.split("/"):
        for name, kind in kinds.items():
            if part == name or part.startswith(f"{name}_"):
                return kind
    return other


def _mean(metrics, params: Params, data: Batch, batch_size: int) -> dict[str, float]:
    """The mean over the examples of data of what metrics says of each batch."""
    count = len(jax.tree.leaves(data)[0])
    totals: dict[str, float] = {}
    for start in range(0, count, batch_size):
        part = jax.tree.map(lambda x, at=start: x[at : at + batch_size], data)
        size = min(batch_size, count - start)
        for name, value in metrics(params, part).items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
    return {name: total / count for name, total in totals.items()}


def fashion_mnist(folder: pathlib.Path = FASHION_MNIST) -> Images:
    """Fashion-MNIST: 60,000 pictures to train on and 10,000 to test, 28 x 28."""
    files = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST: {folder} has no {', '.join(missing)}. "
            "Run `make fashion-mnist`, or put the four files of the data set there."
        )
    return Images(*(_read_idx(folder / name) for name in files))


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of bytes in IDX format: its rank, its big-endian sizes, its data."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
