"""From a split to batches: order, sharding by host, padding.

The training order is a function of (seed, epoch) alone, so a position is one
number and a resumed run sees exactly the examples that were left.
"""

from collections.abc import Iterator

import numpy as np

from nfnets.data.batch import Batch
from nfnets.data.sources import Split


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
  """The permutation of all examples that epoch `epoch` goes through."""
  return np.random.default_rng((seed, epoch)).permutation(num_examples)


class TrainBatches:
  """Endless training batches; epochs follow each other without a gap.

  Each global batch is the next `batch_size` examples of the stream of epochs;
  this host gets its slice of it.

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
  ):
    self._split = split
    self._batch_size = batch_size
    self._seed = seed
    share = batch_size // num_hosts
    self._mine = slice(host * share, (host + 1) * share)
    self._order: tuple[int, np.ndarray] | None = None
    self.position = position

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    stream = np.arange(self.position, self.position + self._batch_size)
    indices = [self._index(int(at)) for at in stream[self._mine]]
    images, labels = self._split.read(np.array(indices))
    self.position += self._batch_size
    return Batch(images, labels, np.ones(len(labels), np.float32))

  def _index(self, at: int) -> int:
    epoch, place = divmod(at, self._split.num_examples)
    if self._order is None or self._order[0] != epoch:
      order = epoch_order(
        self._split.num_examples, seed=self._seed, epoch=epoch
      )
      self._order = (epoch, order)
    return self._order[1][place]


def eval_batches(
  split: Split, *, batch_size: int, host: int = 0, num_hosts: int = 1
) -> Iterator[Batch]:
  """Every example once, in order; the last batch is padded and masked.

  All hosts give the same number of batches, each its slice of the global one.
  """
  share = batch_size // num_hosts
  for start in range(0, split.num_examples, batch_size):
    mine = np.arange(share) + start + host * share
    mask = mine < split.num_examples
    images, labels = split.read(np.minimum(mine, split.num_examples - 1))
    yield Batch(images, labels, mask.astype(np.float32))
