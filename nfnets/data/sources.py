"""Data sets by name: the one table, and what each is made from."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nfnets.data import digits, encoded, folder, imagenet, images, tfds_source
from nfnets.data.source import Examples, Sizes, Source, Split
from nfnets.errors import UsageError, unknown


def load(
  name: str,
  *,
  sizes: Sizes,
  directory: str | None = None,
  tfds_name: str | None = None,
  train_split: str = "train_and_valid",
  test_split: str = "test",
  held_out_share: float = 0.2,
  max_broken: int = 100,
  num_threads: int | None = None,
) -> Source:
  """Opens a data set.

  Args:
    name: A key of `SOURCES`.
    sizes: Of the images to give.
    directory: Where it is, for those that are not part of a package.
    tfds_name: Of a TFDS set.
    train_split, test_split: Of a TFDS set, in the paper's names
      (`tfds_source.SPLITS`).
    held_out_share: For testing, where a data set does not say.
    max_broken: Files that may be unreadable before it is an error.
    num_threads: That decode; None: one per core that the process may use.

  Raises:
    UsageError: for an unknown name.
    InputError: for a data set that is not there or cannot be used.
  """
  if name not in SOURCES:
    raise unknown("data source", name, SOURCES)
  pool = None
  if name in _ENCODED:
    if not directory:
      raise UsageError(f"config.data.source={name} needs --config.data.dir")
    pool = encoded.make_pool(num_threads)
  return SOURCES[name](
    sizes=sizes,
    directory=Path(directory) if directory else None,
    tfds_name=tfds_name,
    splits=(train_split, test_split),
    held_out_share=held_out_share,
    broken=encoded.Broken(max_broken),
    pool=pool,
  )


def _digits(*, sizes: Sizes, **unused) -> Source:
  del unused
  train, _ = digits.load(sizes.train)
  _, test = digits.load(sizes.test)
  return Source(digits.CLASS_NAMES, _in_memory(*train), _in_memory(*test))


def _synthetic(*, sizes: Sizes, **unused) -> Source:
  """Noise with ImageNet's classes, to time everything but the reading."""
  del unused

  def split(num_examples: int, size: int) -> Split:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, size, size, 3)).astype(np.uint8)
    read = lambda indices, _: Examples(
      noise[indices % 64],
      (indices % 1000).astype(np.int32),
      np.ones(len(indices), bool),
    )
    return Split(num_examples, read)

  names = tuple(f"class {i}" for i in range(1000))
  return Source(names, split(1_281_167, sizes.train), split(50_000, sizes.test))


def _tfds(
  *, sizes, directory, tfds_name, splits, broken, pool, **unused
) -> Source:
  del unused
  if not tfds_name:
    raise UsageError("config.data.source=tfds needs --config.data.tfds_name")
  builder = tfds_source.open_builder(directory, tfds_name)
  _, label_key = tfds_source.keys(builder)

  def split(name: str) -> Split:
    num_examples, fetch = tfds_source.open_split(builder, name)
    return encoded.make_split(
      num_examples,
      fetch,
      sizes=sizes,
      pool=pool,
      broken=broken,
      is_upright=False,  # As published.
    )

  if builder.info.name == "imagenet2012":
    # A copy may lack the file of names, and has numbers then.
    names = imagenet.class_names()
  else:
    names = imagenet.readable(builder.info.features[label_key].names)
    if names == tuple(map(str, range(len(names)))):
      warnings.warn(
        f"{builder.data_dir} has no names of its classes "
        f"({label_key}.labels.txt), which are numbers here",
        stacklevel=1,
      )
  train, test = map(split, splits)
  fingerprint = (
    f"{builder.info.full_name}, {train.num_examples:,} and "
    f"{test.num_examples:,} images"
  )
  return Source(names, train, test, fingerprint)


def _folder(
  *, sizes, directory, held_out_share, broken, pool, **unused
) -> Source:
  del unused
  listing = folder.scan(directory, held_out_share=held_out_share)

  def split(files: list[tuple[Path, int]]) -> Split:
    def fetch(index: int) -> tuple[bytes, int, str]:
      path, label = files[index]
      return images.read_bytes(path), label, str(path)

    return encoded.make_split(
      len(files), fetch, sizes=sizes, pool=pool, broken=broken
    )

  # Of names in an old encoding the bytes that are no text become `\xe9`.
  names = imagenet.readable(
    [
      os.fsencode(name).decode(errors="backslashreplace")
      for name in listing.class_names
    ]
  )
  return Source(
    names,
    split(listing.train),
    split(listing.test),
    folder.fingerprint(listing, directory),
  )


def _in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
  def read(indices: np.ndarray, draws: np.ndarray | None) -> Examples:
    del draws  # Whole images, as they are.
    good = np.ones(len(indices), bool)
    return Examples(images[indices], labels[indices], good)

  return Split(len(labels), read)


SOURCES: dict[str, Callable[..., Source]] = {
  "digits": _digits,
  "folder": _folder,
  "synthetic": _synthetic,
  "tfds": _tfds,
}

_ENCODED = ("folder", "tfds")
IN_MEMORY = ("digits", "synthetic")  # Of the size that is asked for.
