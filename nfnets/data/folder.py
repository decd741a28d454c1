"""An image folder: one folder per class, as most people have their images.

`train/CLASS/x.jpg` with `test/`, `val/`, `valid/` or `validation/` beside
`train/`; or just `CLASS/x.jpg`, of which a share is held out. Whether an image
is, depends on its own name alone, so it stays where it is when others are
added. (But of a class's few images one at least is on either side, whatever its
name; and its only one is trained on, until there are two.)
"""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

from nfnets.data import images
from nfnets.errors import InputError

# Photographs that nothing here reads.
_OTHER_PICTURES = (
  *(".heic", ".heif", ".jxl", ".jp2"),
  *(".dng", ".arw", ".cr2", ".cr3", ".nef", ".raf"),
)

_HELD_OUT = ("test", "val", "valid", "validation")


class Listing(NamedTuple):
  """The files of a folder, labelled."""

  class_names: tuple[str, ...]  # Sorted; the label is the place in it.
  train: list[tuple[Path, int]]
  test: list[tuple[Path, int]]


def scan(root: Path, *, held_out_share: float) -> Listing:
  """Lists a folder of images.

  Args:
    root: The folder.
    held_out_share: Of the images, when there is no folder for testing.

  Raises:
    InputError: for a folder that is missing or empty, a single class, a class
      without images, test classes that training does not have, or folders for
      testing without any.
  """
  if not root.is_dir():
    raise InputError(
      f"{root} is no folder: give the one with train/CLASS/x.jpg or "
      "CLASS/x.jpg as --config.data.dir"
    )
  train_root, *test_roots = roots(root)
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

  if test_roots:
    by_root = {path: _by_class(path) for path in test_roots}
    # Others may hold images that nobody has labelled.
    is_labelled = lambda path: any(by_root[path].get(name) for name in names)
    test_root = next(filter(is_labelled, test_roots), test_roots[0])
    held_out = by_root[test_root]
    if not any(held_out.values()):
      raise InputError(
        f"{test_root} holds no images in class folders, such as "
        f"{test_root / names[0]}/x.jpg: sort those to test with into such, or "
        f"move the folder away, and a share of {train_root} is held out"
      )
    if unknown := sorted(held_out.keys() - found.keys()):
      raise InputError(
        f"{test_root} has classes that {train_root} has not: "
        f"{', '.join(unknown[:5])}"
      )
    label_of = {name: label for label, name in enumerate(names)}
    train, test = (
      [(path, label_of[name]) for name, files in part.items() for path in files]
      for part in (found, held_out)
    )
    return Listing(names, train, test)

  train, test = [], []
  for label, files in enumerate(found.values()):
    held_out = _held_out(files, train_root, held_out_share)
    test += [(path, label) for path in files if path in held_out]
    train += [(path, label) for path in files if path not in held_out]
  return Listing(names, train, test)


def roots(root: Path) -> list[Path]:
  """The folders of classes: that to train on, and those to test with.

  `train` is the first of them, unless it is a class: with images in it, beside
  other classes.

  Raises:
    InputError: when it may be either.
  """
  train = root / "train"
  if not train.is_dir():
    return [root]
  tests = [root / name for name in _HELD_OUT if (root / name).is_dir()]
  if not tests and len(_folders(root)) > 1:
    shown = (path for path in train.iterdir() if path.name[0] != ".")
    loose = next(filter(images.is_image, shown), None)
    if loose and _folders(train):
      raise InputError(
        f"{train} holds folders and images beside them, such as {loose.name}, "
        f"and {root} other folders: as the part to train on it must have "
        "folders of classes alone, as a class images alone"
      )
    if loose:
      return [root]
  return [train, *tests]


def _held_out(files: list[Path], root: Path, share: float) -> set[Path]:
  """Those whose names hash to the lowest values; one at least, but not all."""

  def draw(path: Path) -> float:
    name = path.relative_to(root).as_posix()
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) / 2**64

  if len(files) == 1:
    return set()
  ordered = sorted(files, key=draw)
  found = [path for path in ordered if draw(path) < share]
  return set(found[: len(files) - 1] or ordered[:1])


def fingerprint(listing: Listing, root: Path) -> str:
  """Says how many images there are; another one when they are others."""
  names = "/".join(listing.class_names)
  digest = hashlib.sha256(names.encode(errors="surrogateescape"))
  for part in (listing.train, listing.test):
    for path, label in part:
      name = path.relative_to(root).as_posix()
      digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
  return (
    f"{len(listing.train):,} and {len(listing.test):,} images in "
    f"{len(listing.class_names)} classes, {digest.hexdigest()[:8]}"
  )


def _folders(root: Path) -> list[Path]:
  """Those in a folder that are not hidden, sorted."""
  inside = (path for path in root.iterdir() if path.name[0] != ".")
  return sorted(filter(Path.is_dir, inside))


def _by_class(root: Path) -> dict[str, list[Path]]:
  """Sorted image files by sorted class folder."""
  found = {folder.name: images.inside_of(folder) for folder in _folders(root)}
  kinds = [path.suffix.lower() for files in found.values() for path in files]
  if others := [kind for kind in kinds if kind in _OTHER_PICTURES]:
    warnings.warn(
      f"{len(others)} files in {root} ({', '.join(sorted(set(others)))}) are "
      "left out: convert them to JPEG or PNG",
      stacklevel=1,
    )
  return {
    name: sorted(filter(images.is_image, files))
    for name, files in found.items()
  }
