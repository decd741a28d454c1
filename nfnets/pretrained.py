"""Weights from files, runs and the network, and into files.

Our own files hold the leaves of the two-level parameter dict under
"module/name" keys, as safetensors or as plain npz (no pickle in either), and
optionally a `Card`: enough to rebuild the network and prepare images for it.
Matrices and kernels may be int8 there, with a float32 scale for each output
channel under "module/name.scale"; they are float32 again once loaded.
The released pickles and timm's safetensors are read too.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nfnets import card as cards
from nfnets import devices, downloads, models, pickles, runs, timm
from nfnets.card import Card
from nfnets.errors import InputError, unknown
from nfnets.files import local, unfinished
from nfnets.models.plan import is_classifier

Params = dict[str, dict[str, np.ndarray]]
Shapes = dict[str, tuple[int, ...]]

# Where the card is: safetensors metadata, and an npz entry (JSON as bytes).
_CARD_KEY = "nfnets"

_SCALE = ".scale"  # After the key of an int8 array: of its scales.


def load(source: str | Path) -> Params:
  """Weights as a two-level dict of float32 arrays.

  Args:
    source: A published name (`dm_nfnet_f0` ... `dm_nfnet_f6`, see `downloads`),
      which is downloaded once; or the workdir of a run, whose averaged weights
      are meant; or a file: ours
      (`.safetensors`, plain `.npz`), the released `F*_haiku.npz`, which are
      pickles (`nfnets.pickles`), or timm's `.safetensors` (`nfnets.timm`). What
      a file is, is seen from its content.

  Raises:
    InputError: when there is none, or it is damaged or of another kind.
  """
  return load_with_card(source)[0]


def load_with_card(source: str | Path) -> tuple[Params, Card | None]:
  """Weights and what they are; arguments and errors as of `load`.

  Files that say nothing about themselves are known by their shapes: with a
  thousand classes they get the card of weights for ImageNet, else none.
  """
  params, card, _ = load_with_model(source)
  return params, card


def load_with_known_card(source: str | Path) -> tuple[Params, Card]:
  """As `load_with_card`, of weights that say what they are.

  Raises:
    InputError: also for weights that do not.
  """
  params, card, model = load_with_model(source)
  if model is None:
    raise _unknown_network(source, params)
  if card is None:
    raise InputError(
      f"{source} is {model.name} with {model.num_classes} classes, of which "
      "it does not say the names: start training from it "
      "(--config.init_from), or save it with a card (`pretrained.save`)"
    )
  return params, card


def card_to_start_from(source: str | Path) -> Card:
  """The card of weights whose classes need no names, as they are replaced.

  Without names, of a network for ImageNet with other classes, it is that of its
  weights for ImageNet.

  Raises:
    InputError: also for weights that nobody knows the network of.
  """
  params, card, model = load_with_model(source)
  if model is None:
    raise _unknown_network(source, params)
  return card or cards.for_imagenet(model, Path(source).name)


def _unknown_network(source: str | Path, params: Params) -> InputError:
  names = [name.lstrip("/") for name in list(_flatten(params))[:2]]
  return InputError(
    f"{source} ({', '.join(names)}, ...) has no card "
    "that names its network and classes, nor the shapes of one for ImageNet "
    "that is known here (`nfnets info`): use weights that `nfnets train` or "
    "`export` wrote, a release or timm's"
  )


def load_with_model(
  source: str | Path, *, trained_in_timm: bool = False
) -> tuple[Params, Card | None, models.Model | None]:
  """As `load_with_card`, and the network, which may be known without a card.

  Args:
    source: See `load`.
    trained_in_timm: See `timm.to_ours`.
  """
  name = str(source)
  if name in downloads.PUBLISHED:
    path = downloads.fetch(name)
    params, _ = load_file(path)
    model = models.make(downloads.PUBLISHED[name].model)
    check(params, model, str(path))
    return params, cards.for_imagenet(model, name), model
  path = Path(local(name))
  if path.is_dir():
    return _load_workdir(path)
  if not path.exists() and not path.suffix and len(path.parts) == 1:
    raise unknown(
      "weights (no file or folder, and no published name)",
      name,
      downloads.PUBLISHED,
    )
  return _load_file(path, trained_in_timm=trained_in_timm)


def _load_workdir(workdir: Path) -> tuple[Params, Card | None, models.Model]:
  workdir = runs.newest_round(workdir)
  card = runs.card_of(workdir)
  finished = workdir / "weights.safetensors"
  if finished.is_file():
    return _load_file(finished)
  # Here, as it takes long and weights files do without.
  from nfnets import checkpoint

  model, mesh = card.make_model(), devices.make_small_mesh()
  found = checkpoint.load_weights(workdir, model, mesh)
  return jax.device_get(found["ema_params"]), card, model


def step_of(path: Path) -> int | None:
  """Updates that weights of a run had seen; None: unknown, or no such file.

  Raises:
    InputError: for a card that is damaged or of another version.
  """
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="numpy") as file:
      text = (file.metadata() or {}).get(_CARD_KEY)
  except (FileNotFoundError, SafetensorError):
    return None
  return Card.from_json(text, str(path)).step if text else None


def load_file(path: str | Path) -> tuple[Params, Card | None]:
  """As `load_with_card`, of a file."""
  params, card, _ = _load_file(Path(path))
  return params, card


def _load_file(
  path: Path, *, trained_in_timm: bool = False
) -> tuple[Params, Card | None, models.Model | None]:
  if not path.is_file():
    raise InputError(f"{path}: there is no such weights file or workdir")
  if path.suffix not in (".safetensors", ".npz"):
    raise InputError(
      f"{path}: weights are read from .safetensors, .npz or the workdir of a "
      "run; exported programs cannot be read back"
    )
  with path.open("rb") as file:
    start = file.read(9)
  # Names may lie: the released files are pickles and end in npz.
  is_pickle = pickles.is_pickle(start[:2])
  if is_pickle:
    flat, text = _read_pickle(path)
  elif start.startswith(b"PK"):
    flat, text = _read_npz(path)
  elif start[8:] == b"{":
    flat, text = _read_safetensors(path)
  else:
    raise InputError(
      f"{path} is damaged or no weights file: it begins with {start!r}, and "
      "neither safetensors, npz nor pickles do"
    )

  if timm.is_timm(flat):
    model = _recognize(flat, str(path), _timm_candidates(flat))
    params = timm.to_ours(flat, model, trained_in_timm=trained_in_timm)
    return params, _published_card(model, path), model
  params: Params = {}
  flat = _dequantize(flat, path)
  for key, value in flat.items():
    module, _, name = key.rpartition("/")
    params.setdefault(module, {})[name] = value.astype(np.float32, copy=False)
  if text is not None:
    card = Card.from_json(text, str(path))
    model = card.make_model()
    check(params, model, str(path))
    return params, card, model
  try:
    model = _recognize(flat, str(path), _our_candidates(flat))
  except InputError:
    if is_pickle:  # Only published networks are in pickles.
      raise
    return params, None, None  # With other columns than the table's.
  return params, _published_card(model, path), model


def _published_card(model: models.Model, path: Path) -> Card | None:
  is_imagenet = model.num_classes == 1000
  return cards.for_imagenet(model, path.name) if is_imagenet else None


class _Candidate(NamedTuple):
  """A network that a file may be of."""

  title: str
  model: models.Model
  shapes: Shapes


def recognize(params: Any, origin: str) -> models.Model:
  """The network of the table that weights fit.

  Raises:
    InputError: when it is none, with the differences to the nearest.
  """
  flat = _flatten(params)
  return _recognize(flat, origin, _our_candidates(flat))


def _our_candidates(flat: dict[str, np.ndarray]) -> Iterable[_Candidate]:
  num_classes = next(
    (
      len(value)
      for key, value in flat.items()
      if key.endswith("/b") and is_classifier(key)
    ),
    1000,
  )
  for name in models.VARIANTS:
    model = models.make(name, num_classes)
    yield _Candidate(name, model, _shapes_of(model.shapes()[0]))


def _timm_candidates(flat: dict[str, np.ndarray]) -> Iterable[_Candidate]:
  has_skip_gain = any(key.endswith(".skipinit_gain") for key in flat)
  num_classes = len(flat.get("head.fc.bias", range(1000)))
  for name in models.VARIANTS:
    model = models.make(name, num_classes)
    theirs = timm.name_of(model)
    if theirs and has_skip_gain != timm.is_native(model):
      yield _Candidate(f"timm's {theirs}", model, timm.shapes(model))


def _recognize(
  flat: dict[str, np.ndarray], origin: str, candidates: Iterable[_Candidate]
) -> models.Model:
  """The network that has exactly these names and shapes.

  Raises:
    InputError: when none has, with the differences to the nearest.
  """
  theirs = {key: value.shape for key, value in flat.items()}
  nearest, most = None, -np.inf
  for candidate in candidates:
    if candidate.shapes == theirs:
      return candidate.model
    num_equal = len(candidate.shapes.items() & theirs.items())
    # Of two with as much in common the one that has less beside it.
    score = 2 * num_equal - len(candidate.shapes)
    if score > most:
      nearest, most = candidate, score
  raise _mismatch(origin, nearest, theirs)


def _mismatch(origin: str, expected: _Candidate, theirs: Shapes) -> InputError:
  """Both sides of the first differences."""
  ours, name = expected.shapes, expected.model.name
  wrong = [
    f"{key}: {theirs.get(key, 'missing')} in the file, "
    f"{ours.get(key, 'absent')} in {name}"
    for key in sorted(ours.keys() | theirs.keys())
    if ours.get(key) != theirs.get(key)
  ]
  more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
  return InputError(
    f"{origin} does not hold weights of {expected.title} with "
    f"{expected.model.num_classes} classes: {'; '.join(wrong[:3])}{more}"
  )


def check(params: Any, model: models.Model, origin: str) -> None:
  """Raises `InputError` unless every name and shape is what the model has."""
  expected = _Candidate(model.name, model, _shapes_of(model.shapes()[0]))
  theirs = _shapes_of(params)
  if theirs != expected.shapes:
    raise _mismatch(origin, expected, theirs)


def save(
  path: str | Path,
  params: Any,
  card: Card | None = None,
  *,
  is_int8: bool = False,
) -> None:
  """Writes weights as `.safetensors` or `.npz`, by the name's ending.

  Args:
    path, params, card: Where to, what, and what it is.
    is_int8: Whether matrices and kernels are rounded to 255 levels for each
      output channel, a quarter of the bytes.

  Raises:
    InputError: for another ending, and weights that the card is not of (such as
      folded or stacked ones).
  """
  path = Path(path)
  text = None
  if card is not None:
    check(params, card.make_model(), str(path))
    text = json.dumps(card._asdict(), default=lambda array: array.tolist())
  flat = _flatten(params)
  save_tensors(path, _quantize(flat) if is_int8 else flat, text)


def save_tensors(
  path: Path, tensors: dict[str, np.ndarray], card: str | None = None
) -> None:
  """Writes arrays by name; errors as `save`."""
  # The library for safetensors writes memory as it lies, transposed or not.
  tensors = {key: np.asarray(x, order="C") for key, x in tensors.items()}
  if path.suffix == ".safetensors":
    from safetensors.numpy import save as to_bytes

    # Not the library's own file writing, which only its owner could read.
    metadata = {_CARD_KEY: card} if card else None
    with unfinished(path) as partial:
      partial.write_bytes(to_bytes(tensors, metadata=metadata))
  elif path.suffix == ".npz":
    if card:
      tensors = tensors | {_CARD_KEY: np.frombuffer(card.encode(), np.uint8)}
    # NumPy has no name for bfloat16 ("V"), and would not read it again.
    tensors = {
      key: x.astype(np.float32) if x.dtype.kind == "V" else x
      for key, x in tensors.items()
    }
    with unfinished(path) as partial:
      np.savez(partial, **tensors)
  else:
    raise InputError(f"{path}: weights are saved as .safetensors or .npz")


def _quantize(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Matrices and kernels as int8, symmetric about 0, and their scales."""
  found = {}
  for key, value in flat.items():
    found[key] = value
    if value.ndim > 1:
      largest = np.max(np.abs(value), axis=tuple(range(value.ndim - 1)))
      if not np.isfinite(largest).all():
        raise InputError(f"{key} has numbers that are not finite, no int8")
      scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
      found[key] = np.rint(value / scale).astype(np.int8)
      found[key + _SCALE] = scale
  return found


def _dequantize(
  flat: dict[str, np.ndarray], path: Path
) -> dict[str, np.ndarray]:
  """Undoes `_quantize`, up to its rounding; other arrays as they are."""
  found = dict(flat)
  for key, value in flat.items():
    if value.dtype == np.int8:
      scale = found.pop(key + _SCALE, None)
      if scale is None or scale.shape != value.shape[-1:]:
        raise InputError(f"{path} is damaged: {key} is int8 without its scales")
      found[key] = value * scale
  return found


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
    if {np.asarray(value).dtype.kind for value in flat.values()} - set("fiu"):
      raise ValueError  # Of other files in a zip this is "S", bytes.
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
    raise InputError(
      f"{path} is damaged or no npz file of plain arrays of numbers"
    ) from None
  card = flat.pop(_CARD_KEY, None)
  return flat, None if card is None else card.tobytes()


def transfer(
  params: Params,
  fresh: Params,
  model: models.Model,
  *,
  old_names: tuple[str, ...] | None,
  new_names: tuple[str, ...],
  origin: str,
) -> Params:
  """Weights to start training `model` from.

  Of the classifier the rows of classes that have the same name are kept; the
  others are fresh.

  Args:
    params: What was loaded.
    fresh: What the model was initialised with.
    model: What is to be trained.
    old_names, new_names: Classes of what was loaded and of the model. None: not
      known; then the classifier is kept where it fits.
    origin: Where the weights are from, for errors.

  Raises:
    InputError: when they are not weights of this model.
  """
  (head,) = (module for module in fresh if is_classifier(module))
  old = params.get(head, {})
  for names, values in ((old_names, old), (new_names, fresh[head])):
    num_classes = np.size(values["b"]) if "b" in values else None
    if None not in (names, num_classes) and len(names) != num_classes:
      raise InputError(
        f"{origin}: {len(names)} names for a classifier of {num_classes} "
        "classes"
      )
  shapes_of = lambda values: {k: np.shape(v) for k, v in values.items()}
  if old_names is None and shapes_of(old) == shapes_of(fresh[head]):
    old_names = new_names
  new = {name: np.array(value) for name, value in fresh[head].items()}
  found = params | {head: new}
  check(found, model, origin)
  places = {name: i for i, name in enumerate(old_names or ())}
  for i, name in enumerate(new_names):
    if name in places:
      for leaf, rows in new.items():
        rows[..., i] = old[leaf][..., places[name]]
  return {module: found[module] for module in fresh}


def _leaves(params: Any):
  for module, values in params.items():
    for name, value in values.items():
      yield f"{module}/{name}", value


def _flatten(params: Any) -> dict[str, np.ndarray]:
  return {key: np.asarray(value) for key, value in _leaves(params)}


def _shapes_of(params: Any) -> Shapes:
  return {key: np.shape(value) for key, value in _leaves(params)}
