"""ImageNet's thousand classes: WordNet identifiers and what people call them.

`imagenet_classes.txt` has a line for each, sorted by identifier, which is the
order of the labels in every published set of weights.
"""

import functools
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def _names_by_id() -> dict[str, str]:
  path = Path(__file__).with_name("imagenet_classes.txt")
  lines = path.read_text(encoding="utf-8").splitlines()
  return dict(line.split(" ", 1) for line in lines)


def class_names() -> tuple[str, ...]:
  """The names in the order of the labels."""
  return tuple(_names_by_id().values())


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """Names of classes, in words where all of them are WordNet identifiers."""
  known = _names_by_id()
  if all(name in known for name in names):
    return tuple(known[name] for name in names)
  return tuple(names)
