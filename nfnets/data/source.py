"""What a data set is to the rest: splits with random access.

Every kind of data set (`sources.py` has the table) is read through `Split`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nfnets.data import crops


class Examples(NamedTuple):
  """Some examples as they were read."""

  images: np.ndarray  # [n, size, size, 3] uint8; float32 in exact evaluation.
  labels: np.ndarray  # [n] int32.
  is_good: np.ndarray  # [n] bool: False where the file could not be read.


class Split(NamedTuple):
  """Examples with random access.

  Attributes:
    num_examples: How many there are.
    read: `(indices [n], draws) -> Examples`. With draws [n, *crops.DRAWS]
      (training) each image is cropped at random as its numbers say; with None
      (evaluation) none is.
  """

  num_examples: int
  read: Callable[[np.ndarray, np.ndarray | None], Examples]


class Source(NamedTuple):
  """A data set: the names of its classes, and two splits."""

  class_names: tuple[str, ...]
  train: Split
  test: Split
  fingerprint: str = ""  # Another one when there are other images.


class Sizes(NamedTuple):
  """How a source prepares its images."""

  train: int  # Pixels, side of a training image.
  test: int  # Pixels, side of an evaluation image.
  test_margin: int  # Pixels around it before the middle is cropped.
  test_crop: str = "resize"  # Of `images.EVAL_CROPS`.
  train_min_area: float = crops.MIN_AREA  # Share of the image in a crop.
