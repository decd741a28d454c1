"""Splits of encoded images: decode, crop and resize whole batches in threads.

The decoders leave Python's lock, so threads of one process use all cores.
"""

import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nfnets.data import crops, images
from nfnets.data.source import Examples, Sizes, Split
from nfnets.errors import InputError


class Broken:
  """Counts files that cannot be read: each is named once, up to a limit."""

  def __init__(self, limit: int):
    self._limit = limit
    self._errors: set[str] = set()
    self._lock = threading.Lock()

  def add(self, error: InputError) -> None:
    """Says what is wrong with a file, which the error names.

    Raises:
      InputError: when there are more than the limit.
    """
    with self._lock:
      if str(error) in self._errors:
        return
      self._errors.add(str(error))
      if len(self._errors) > self._limit:
        raise InputError(
          f"{len(self._errors)} images could not be read, the last one because "
          f"{error}; more than config.data.max_broken={self._limit}, so "
          "something is wrong with the data set: mend it or raise that"
        )
    warnings.warn(f"skipped: {error}", stacklevel=1)


class Buffers:
  """Memory for batches, used again as soon as nobody else holds it.

  Fresh memory would cost a tenth of the decoding in page faults. Views of an
  array, and a device that reads from it, hold it too. Not for several threads.
  """

  def __init__(self):
    self._kept: list[np.ndarray] = []

  def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array whose content is undefined."""
    for i in range(len(self._kept)):  # No other name for it: that would hold.
      is_fitting = self._kept[i].shape == shape and self._kept[i].dtype == dtype
      if is_fitting and _num_holders(self._kept, i) == _UNHELD:
        return self._kept[i]
    self._kept.append(np.empty(shape, dtype))
    return self._kept[-1]


def _num_holders(arrays: list[np.ndarray], i: int) -> int:
  return sys.getrefcount(arrays[i])


# Of an array that only a list holds.
_UNHELD = _num_holders([np.empty(0)], 0)


def make_split(
  num_examples: int,
  fetch: Callable[[int], tuple[bytes, int, str]],
  *,
  sizes: Sizes,
  pool: ThreadPoolExecutor,
  broken: Broken,
  is_upright: bool = True,
) -> Split:
  """A split over encoded images.

  Args:
    num_examples: How many there are.
    fetch: Index -> (bytes, label, name for errors); called from threads. It
      raises InputError for a file that cannot be read, now or later.
    sizes: Of the images to give.
    pool: Threads that decode; a batch is divided among them.
    broken: Where files are counted that cannot be read.
    is_upright: Whether tags of rotation are followed.
  """

  buffers = Buffers()
  crop_to_test = images.EVAL_CROPS[sizes.test_crop]

  def read(indices: np.ndarray, draws: np.ndarray | None) -> Examples:
    num = len(indices)
    size = sizes.test if draws is None else sizes.train
    # Training rounds to grey levels; evaluation keeps what was published.
    dtype = np.float32 if draws is None else np.uint8
    out = buffers.take((num, size, size, 3), dtype)
    labels = np.zeros(num, np.int32)
    is_good = np.zeros(num, bool)

    def fill(places: range) -> None:
      for at in places:
        try:
          data, labels[at], name = fetch(int(indices[at]))
          image = images.decode(data, name, is_upright=is_upright)
        except InputError as error:
          broken.add(error)
          out[at] = 0
          continue
        if draws is None:
          out[at] = crop_to_test(image, size, sizes.test_margin)
        else:
          _random_crop(image, draws[at].tolist(), out[at], sizes.train_min_area)
        is_good[at] = True

    # Small parts, so that all threads are busy to the end; smaller ones where
    # one of many hosts has few images of a batch.
    step = max(1, min(16, num // (4 * pool._max_workers)))
    parts = [range(i, min(i + step, num)) for i in range(0, num, step)]
    list(pool.map(fill, parts))  # The list raises what a thread raised.
    return Examples(out, labels, is_good)

  return Split(num_examples, read)


def _random_crop(
  image: np.ndarray,
  draws: list[list[float]],
  out: np.ndarray,
  min_area: float,
) -> None:
  """Writes a random crop of [H, W, 3] into uint8 [size, size, 3].

  Bicubic by OpenCV, whose kernel (a = -0.75) is a little sharper than the
  published one: it is what decodes fast enough to train.
  """
  import cv2

  size = out.shape[0]
  top, left, height, width = crops.random_window(
    *image.shape[:2], draws, size=size, min_area=min_area
  )
  part = image[top : top + height, left : left + width]
  cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)


def make_pool(num_threads: int | None = None) -> ThreadPoolExecutor:
  """Threads that decode; OpenCV's own are turned off.

  None: one for each core that this process may use, which on a cluster can be
  few of the machine's.
  """
  import cv2

  if num_threads is None:
    has_affinity = hasattr(os, "sched_getaffinity")  # Not on a Mac.
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    num_threads = cores or 1
  cv2.setNumThreads(0)
  return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
