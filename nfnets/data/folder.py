"""An image folder: one folder per class, as most people have their images.

`train/CLASS/x.jpg` with `test/`, `val/`, `valid/` or `validation/` beside
`train/`; or just `CLASS/x.jpg`, of which a seeded share is held out per class.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nfnets.data import images
from nfnets.errors import InputError

_HELD_OUT = ("test", "val", "valid", "validation")


class Listing(NamedTuple):
  """The files of a folder, labelled."""

  class_names: tuple[str, ...]  # Sorted; the label is the place in it.
  train: list[tuple[Path, int]]
  test: list[tuple[Path, int]]


def scan(root: Path, *, held_out_share: float, seed: int) -> Listing:
  """Lists a folder of images.

  Args:
    root: The folder.
    held_out_share: Of each class, when there is no folder for testing.
    seed: Of that choice.

  Raises:
    InputError: for a folder that is missing or empty, a single class, a class
      without images, or test classes that training does not have.
  """
  if not root.is_dir():
    raise InputError(
      f"{root} is no folder: give the one with train/CLASS/x.jpg or "
      "CLASS/x.jpg as --config.data.dir"
    )
  train_root = root / "train" if (root / "train").is_dir() else root
  found = _by_class(train_root)
  names = tuple(found)
  if len(names) < 2:
    raise InputError(
      f"{train_root} has {len(names)} class folder{'s'[len(names) == 1 :]} "
      f"({', '.join(names) or 'none'}): at least two are needed, one per class"
    )
  for name, files in found.items():
    if not files:
      raise InputError(
        f"{train_root / name} holds no image files: add some or remove it"
      )

  test_roots = [root / name for name in _HELD_OUT if (root / name).is_dir()]
  if train_root != root and test_roots:
    held_out = _by_class(test_roots[0])
    if unknown := sorted(held_out.keys() - found.keys()):
      raise InputError(
        f"{test_roots[0]} has classes that {train_root} has not: "
        f"{', '.join(unknown[:5])}"
      )
    test = [
      (path, names.index(name))
      for name, files in held_out.items()
      for path in files
    ]
    train = [(p, names.index(n)) for n, files in found.items() for p in files]
    return Listing(names, train, test)

  train, test = [], []
  for label, files in enumerate(found.values()):
    num_test = round(len(files) * held_out_share)
    # At least one of each, where there are two.
    num_test = min(max(num_test, 1), len(files) - 1)
    order = np.random.default_rng((seed, label)).permutation(len(files))
    test += [(files[i], label) for i in sorted(order[:num_test])]
    train += [(files[i], label) for i in sorted(order[num_test:])]
  return Listing(names, train, test)


def _by_class(root: Path) -> dict[str, list[Path]]:
  """Sorted image files by sorted class folder."""
  folders = sorted(
    p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")
  )
  return {
    folder.name: sorted(
      p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES
    )
    for folder in folders
  }
