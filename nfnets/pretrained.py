"""Weights in files: read and write, with a card that says what they are.

A file holds the leaves of the two-level parameter dict under "module/name"
keys, as safetensors or as plain npz (no pickle in either), and optionally a
`Card`: enough to rebuild the network and prepare images for it.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfnets import models, optim, pickles
from nfnets.errors import InputError

Params = dict[str, dict[str, np.ndarray]]

# Where the card is: safetensors metadata, and an npz entry (JSON as bytes).
_CARD_KEY = "nfnets"


class Card(NamedTuple):
  """What a set of weights is and how images are prepared for it."""

  model: str  # Name in the variant table.
  overrides: dict[str, Any]  # Columns that differ from the table.
  class_names: tuple[str, ...]
  image_size: int  # Pixels, evaluation.
  crop: str  # Of `data.images.EVAL_CROPS`: how images get to that size.
  margin: int  # Resized to image_size + margin before the middle is cropped.
  mean: tuple[float, ...]  # Per colour, grey levels 0 to 255.
  std: tuple[float, ...]

  def make_model(self) -> models.Model:
    """The network that the weights fit."""
    return models.make(self.model, len(self.class_names), **self.overrides)

  @classmethod
  def from_dict(cls, values: dict[str, Any], origin: str) -> "Card":
    """From parsed JSON; `origin` names the file in errors."""
    if set(values) != set(cls._fields):
      raise InputError(
        f"{origin}: its card has {sorted(values)}, expected "
        f"{sorted(cls._fields)}: it was written by another version"
      )
    return cls(**as_tuples(values))


def as_tuples(value: Any) -> Any:
  """Parsed JSON with the tuples that its lists were."""
  if isinstance(value, dict):
    return {k: as_tuples(v) for k, v in value.items()}
  return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def save(path: str | Path, params: Any, card: Card | None = None) -> None:
  """Writes weights as `.safetensors` or `.npz`, by the name's ending.

  Raises:
    InputError: for another ending.
  """
  path = Path(path)
  flat = _flatten(params)
  text = json.dumps(card._asdict()) if card is not None else None
  partial = path.with_name(f".partial-{path.name}")
  if path.suffix == ".safetensors":
    from safetensors.numpy import save as to_bytes

    # Not the library's own file writing, which only its owner could read.
    metadata = {_CARD_KEY: text} if text else None
    partial.write_bytes(to_bytes(flat, metadata=metadata))
  elif path.suffix == ".npz":
    if text:
      flat[_CARD_KEY] = np.frombuffer(text.encode(), np.uint8)
    np.savez(partial, **flat)
  else:
    raise InputError(f"{path}: weights are saved as .safetensors or .npz")
  os.replace(partial, path)


def load(path: str | Path) -> Params:
  """Weights as a two-level dict of float32 arrays.

  Reads `.safetensors`, plain `.npz`, and the released `F*_haiku.npz`, which are
  pickles (`nfnets.pickles`).

  Raises:
    InputError: when the file is missing, damaged, or of another kind.
  """
  return _load(path)[0]


def load_with_card(path: str | Path) -> tuple[Params, Card | None]:
  """Weights and, if the file has one, their card. Raises as `load`."""
  return _load(path)


def _load(path: str | Path) -> tuple[Params, Card | None]:
  path = Path(path)
  if not path.is_file():
    raise InputError(f"{path}: there is no such weights file")
  read = {".safetensors": _read_safetensors, ".npz": _read_npz}
  if path.suffix not in read:
    raise InputError(f"{path}: weights are read from .safetensors or .npz")
  with path.open("rb") as file:
    is_pickle = pickles.is_pickle(file.read(2))
  # The released files are pickles, though their names end in npz.
  reader = _read_pickle if is_pickle else read[path.suffix]
  flat, text = reader(path)
  params: Params = {}
  for key, value in flat.items():
    module, _, name = key.rpartition("/")
    params.setdefault(module, {})[name] = value.astype(np.float32)
  card = None
  if text is not None:
    card = Card.from_dict(json.loads(text), str(path))
  return params, card


def _read_pickle(path: Path):
  return _flatten(pickles.load(path)), None


def _read_safetensors(path: Path):
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="numpy") as file:
      flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
      return flat, (file.metadata() or {}).get(_CARD_KEY)
  except SafetensorError as error:
    raise InputError(
      f"{path} is damaged or no safetensors file ({error})"
    ) from None


def _read_npz(path: Path):
  try:
    with np.load(path, allow_pickle=False) as file:
      flat = {key: file[key] for key in file.files}
  except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
    raise InputError(
      f"{path} is damaged or no plain npz file ({error})"
    ) from None
  card = flat.pop(_CARD_KEY, None)
  return flat, None if card is None else card.tobytes().decode()


def check(params: Any, model: models.Model, origin: str) -> None:
  """Raises `InputError` unless every name and shape is what the model has."""
  expected, _ = model.shapes()
  ours = {key: value.shape for key, value in _leaves(expected)}
  theirs = {key: value.shape for key, value in _leaves(params)}
  if ours == theirs:
    return
  wrong = [
    f"{key}: {theirs.get(key, 'missing')} in the file, "
    f"{ours.get(key, 'absent')} in {model.name}"
    for key in sorted(ours.keys() | theirs.keys())
    if ours.get(key) != theirs.get(key)
  ]
  more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
  raise InputError(
    f"{origin} does not hold weights of {model.name} with "
    f"{model.num_classes} classes: {'; '.join(wrong[:3])}{more}"
  )


def transfer(
  params: Params,
  fresh: Params,
  model: models.Model,
  *,
  keeps_classifier: bool | None,
  origin: str,
) -> Params:
  """Weights to start training `model` from.

  Args:
    params: What was loaded.
    fresh: What the model was initialised with.
    model: What is to be trained.
    keeps_classifier: Whether the last layer is for the same classes; else it
      is the fresh one. None: it is kept where it fits.
    origin: Where the weights are from, for errors.

  Raises:
    InputError: when they are not weights of this model.
  """
  head = {m: v for m, v in fresh.items() if optim.is_classifier(m)}
  if keeps_classifier is None:
    shapes_of = lambda tree: {
      key: value.shape
      for key, value in _leaves(tree)
      if key.rpartition("/")[0] in head
    }
    keeps_classifier = shapes_of(params) == shapes_of(fresh)
  if not keeps_classifier:
    params = {m: v for m, v in params.items() if not optim.is_classifier(m)}
    params |= head
  check(params, model, origin)
  return {module: params[module] for module in fresh}


def _leaves(params: Any):
  for module, values in params.items():
    for name, value in values.items():
      yield f"{module}/{name}", value


def _flatten(params: Any) -> dict[str, np.ndarray]:
  return {key: np.asarray(value) for key, value in _leaves(params)}
