"""Data sets by name: what there is to read, before any batching."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nfnets.data import digits
from nfnets.errors import unknown


class Split(NamedTuple):
  """Examples with random access.

  Attributes:
    num_examples: How many there are.
    read: Indices [n] -> images uint8 [n, size, size, 3], labels int32 [n].
  """

  num_examples: int
  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Source(NamedTuple):
  """A data set: its splits and the names of its classes."""

  class_names: tuple[str, ...]
  train: Split
  test: Split


def _digits(image_size: int) -> Source:
  train, test = digits.load(image_size)
  return Source(digits.CLASS_NAMES, _in_memory(*train), _in_memory(*test))


def _in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
  return Split(len(labels), lambda indices: (images[indices], labels[indices]))


SOURCES: dict[str, Callable[[int], Source]] = {"digits": _digits}


def load(name: str, *, image_size: int) -> Source:
  """Opens a data set by name, giving images of image_size x image_size pixels.

  Raises:
    UsageError: for an unknown name.
  """
  if name not in SOURCES:
    raise unknown("data source", name, SOURCES)
  return SOURCES[name](image_size)
