"""From a split to batches: order, sharding by host, padding, reading ahead.

The training order and every random crop are functions of seed, batch size and
place in the stream alone, so a position is one number and a resumed run sees
exactly the examples that were left, cropped as they would have been.
"""

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from nfnets.data import crops
from nfnets.data.batch import Batch
from nfnets.data.source import Examples, Split
from nfnets.errors import InputError

# Streams of examples: those that are trained on, those they are mixed with.
_MAIN, _PARTNERS = 0, 1
_CROPS = 2  # Sets the random numbers of crops apart from those of orders.

# How many batches are looked at for one image that can be read.
_ATTEMPTS = 10


def epoch_order(
  num_examples: int, *, seed: int, epoch: int, stream: int = _MAIN
) -> np.ndarray:
  """The permutation of all examples that epoch `epoch` goes through."""
  key = (seed, epoch, stream) if stream else (seed, epoch)
  return np.random.default_rng(key).permutation(num_examples)


class TrainBatches:
  """Endless training batches; epochs follow each other without a gap.

  Each global batch is the next `batch_size` examples of the stream of epochs;
  this host gets its slice of it. Partners come from a stream of their own in
  another order, so that the first one still goes through every example once an
  epoch.

  Attributes:
    position: Examples given out so far, over all hosts. Pass it back to go on.
  """

  def __init__(
    self,
    split: Split,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    host: int = 0,
    num_hosts: int = 1,
    with_partners: bool = False,
  ):
    self._split = split
    self._batch_size = batch_size
    self._seed = seed
    share = _share(batch_size, num_hosts)
    self._mine = slice(host * share, (host + 1) * share)
    self._streams = (_MAIN, _PARTNERS) if with_partners else (_MAIN,)
    self._orders: dict[int, tuple[int, np.ndarray]] = {}
    self.position = position

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    for ahead in range(_ATTEMPTS):
      position = self.position + ahead * self._batch_size
      parts = [self._part(stream, position) for stream in self._streams]
      indices, draws = map(np.concatenate, zip(*parts, strict=True))
      read = self._split.read(indices, draws)
      if read.is_good.any():
        break
    images, labels = _without_bad(read)
    self.position += self._batch_size
    num = len(parts[0][0])
    batch = Batch(images[:num], labels[:num], np.ones(num, np.float32))
    if len(self._streams) > 1:
      batch = batch._replace(
        partner_images=images[num:], partner_labels=labels[num:]
      )
    return batch

  def _part(self, stream: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """This host's examples of a batch of a stream, and their draws."""
    places = np.arange(position, position + self._batch_size)
    epochs, places = np.divmod(places[self._mine], self._split.num_examples)
    indices = [
      self._order(int(epoch), stream)[places[epochs == epoch]]
      for epoch in np.unique(epochs)
    ]
    # Drawn for the batch of all hosts, so that their number does not matter.
    key = (self._seed, _CROPS, stream, position)
    shape = (self._batch_size, *crops.DRAWS)
    draws = np.random.default_rng(key).random(shape)[self._mine]
    return np.concatenate(indices), draws

  def _order(self, epoch: int, stream: int) -> np.ndarray:
    if stream not in self._orders or self._orders[stream][0] != epoch:
      order = epoch_order(
        self._split.num_examples, seed=self._seed, epoch=epoch, stream=stream
      )
      self._orders[stream] = (epoch, order)
    return self._orders[stream][1]


def _share(batch_size: int, num_hosts: int) -> int:
  """How many examples of a batch each host has."""
  if batch_size < 1 or batch_size % num_hosts:
    raise InputError(
      f"a batch of {batch_size} examples does not divide over {num_hosts} "
      "hosts: use a multiple"
    )
  return batch_size // num_hosts


def _without_bad(read: Examples) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels, unreadable ones replaced by the good ones in turn."""
  good = np.flatnonzero(read.is_good)
  if len(good) == 0:
    raise InputError(
      f"none of the {len(read.labels)} images of a batch could be read, nor "
      f"of the {_ATTEMPTS - 1} batches after it: mend the data set"
    )
  images, labels = read.images, read.labels
  bad = np.flatnonzero(~read.is_good)
  if len(bad):
    chosen = good[np.arange(len(bad)) % len(good)]
    images, labels = (
      np.require(images, None, "W"),
      np.require(labels, None, "W"),
    )
    images[bad], labels[bad] = images[chosen], labels[chosen]
  return images, labels


def eval_batches(
  split: Split, *, batch_size: int, host: int = 0, num_hosts: int = 1
) -> Iterator[Batch]:
  """Every example once, in order; the last batch is padded and masked.

  All hosts give the same number of batches, each its slice of the global one.
  Images that cannot be read are masked too.
  """
  share = _share(batch_size, num_hosts)
  for start in range(0, split.num_examples, batch_size):
    mine = np.arange(share) + start + host * share
    inside = mine < split.num_examples
    read = split.read(np.minimum(mine, split.num_examples - 1), None)
    mask = (inside & read.is_good).astype(np.float32)
    yield Batch(read.images, read.labels, mask)


class ReadAhead:
  """Prepares batches in a thread while the devices work; a context manager.

  Errors of the thread are raised by the next `next`, the end of the batches
  too.

  Attributes:
    position: Of the training batches that were taken, not of those read ahead.
  """

  def __init__(self, batches: Iterator[Batch], *, depth: int = 2):
    self.position = getattr(batches, "position", None)
    self._batches = batches
    self._depth = depth
    self._pending: collections.deque[Future] = collections.deque()
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

  def __enter__(self) -> "ReadAhead":
    for _ in range(self._depth):
      self._ask()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._thread.shutdown(cancel_futures=True)

  def __iter__(self) -> "ReadAhead":
    return self

  def __next__(self) -> Batch:
    self._ask()
    batch, self.position = self._pending.popleft().result()
    return batch

  def _ask(self) -> None:
    self._pending.append(self._thread.submit(self._read))

  def _read(self) -> tuple[Batch, int | None]:
    return next(self._batches), getattr(self._batches, "position", None)
