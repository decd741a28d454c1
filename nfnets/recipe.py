"""From a config to what a run needs: derived values and checked ones.

Configs store what a person decides; everything that follows from them is
worked out here, once, after the overrides.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from nfnets import card as cards
from nfnets import devices, models, optim, pretrained, runs, steps
from nfnets.augment import Augment, Normalization, make_augment
from nfnets.data import folder, images, sources
from nfnets.data.source import Sizes, Source
from nfnets.errors import InputError, UsageError, unknown
from nfnets.files import local, unfinished

# What a workdir is bound to, besides the model.
_FIXED = (
  "classes",
  "data.eval_crop",
  "data.eval_margin",
  "data.held_out_share",
  "data.min_area",
  "data.mean",
  "data.source",
  "data.std",
  "data.test_size",
  "data.test_split",
  "data.tfds_name",
  "data.train_size",
  "data.train_split",
  "images",
  "init_from",
  "seed",
  "train.batch_size",
  "with AGC",
)


class Recipe(NamedTuple):
  """A config with what follows from it."""

  config: ConfigDict
  source: Source
  model: models.Model
  card: cards.Card
  train_size: int  # Pixels.
  steps_per_epoch: float
  total_steps: int
  warmup_steps: int
  eval_every_steps: int
  peak_learning_rate: float

  @property
  def normalization(self) -> Normalization:
    return Normalization(self.card.mean, self.card.std)

  @property
  def needs_partners(self) -> bool:
    """Whether a second image is read for each."""
    a = self.config.augment
    is_mixed = bool(a.mixup_alpha) or a.cutmix
    return is_mixed and a.partners == "fresh"

  def micro_batches(self, num_devices: int) -> int:
    """Into how many parts a step divides the images of a device."""
    c = self.config
    if c.train.accumulate is not None:
      return c.train.accumulate
    if c.optim.sam_rho:  # Each part would climb by itself.
      return 1
    num = c.train.batch_size // num_devices
    return devices.micro_batches(num, self.train_size)

  def identity(self) -> dict[str, Any]:
    """What all hosts of a run must have in common, by name."""
    values = _flatten(self.config.to_dict())
    for name in ("data.dir", "data.num_threads"):
      del values[name]
    counts = [s.num_examples for s in (self.source.train, self.source.test)]
    return values | {"images": [self.source.fingerprint, *counts]}

  def make_augment(self) -> Augment:
    """What happens to the images inside the step."""
    a = self.config.augment
    magnitude = a.randaugment_magnitude
    if magnitude is None:
      magnitude = self.model.variant.randaugment_magnitude
    return make_augment(
      flip=a.flip,
      shift=a.shift,
      mixup_alpha=a.mixup_alpha,
      cutmix=a.cutmix,
      randaugment_layers=a.randaugment_layers,
      randaugment_magnitude=magnitude,
      randaugment_quirks=a.randaugment_quirks,
    )

  def make_optimizer(self):
    """The optimiser, with the schedule of this run."""
    c = self.config.optim
    schedule = self.make_schedule()
    return optim.make_optimizer(
      schedule,
      momentum=c.momentum,
      weight_decay=c.weight_decay,
      clipping=c.agc_clipping or None,
      clipping_eps=c.agc_eps,
      stage_of=self.model.stage_of,
      unit_axes=self.model.unit_axes,
      is_frozen=self.is_frozen,
    )

  def is_frozen(self, module: str) -> bool:
    """Whether a module keeps its weights."""
    return self.model.stage_of(module) in _words(self.config.optim.frozen)

  def make_schedule(self):
    """Learning rate by step."""
    return optim.make_schedule(
      peak=self.peak_learning_rate,
      warmup_steps=self.warmup_steps,
      total_steps=self.total_steps,
    )


PARTNERS = ("fresh", "roll")

_PREPROCESSING = ("eval_crop", "eval_margin", "mean", "std")


def _preprocessing(config: ConfigDict) -> dict[str, Any]:
  return {name: config.data[name] for name in _PREPROCESSING}


def _card_of_start(config: ConfigDict) -> cards.Card:
  """The card of the weights that a run starts from."""
  if config.init_from is None:
    raise UsageError(
      "this recipe takes network and preprocessing from the weights that it "
      "starts from: give --config.init_from=WEIGHTS (a file, a workdir or a "
      "published name such as dm_nfnet_f0)"
    )
  return pretrained.card_to_start_from(config.init_from)


def check_columns(card: cards.Card) -> None:
  """Raises for weights of a network that a config has no keys for."""
  known = base.get_config().model
  if other := [name for name in card.overrides if name not in known]:
    raise InputError(
      f"the weights' {card.model} has {other[0]}={card.overrides[other[0]]!r}, "
      "which is no key of config.model: use it from Python (`models.make`)"
    )


def fill(config: ConfigDict, card: cards.Card) -> ConfigDict:
  """A config whose open values are those of weights with this card."""
  config = config.copy_and_resolve_references()
  if config.model.name is None:
    check_columns(card)
    config.model.name = card.model
    for column, value in card.overrides.items():
      if config.model[column] is None:
        config.model[column] = value
    row = models.variant(card.model)
    is_usual = card.image_size == row.test_size
    if config.data.train_size is None and not is_usual:
      config.data.train_size = card.image_size
    if config.data.test_size is None:
      config.data.test_size = max(
        card.image_size, config.data.train_size or card.image_size
      )
  values = (card.crop, card.margin, card.mean, card.std)
  for name, value in zip(_PREPROCESSING, values, strict=True):
    if config.data[name] is None:
      config.data[name] = value
  return config


def _origin(config: ConfigDict) -> str:
  """What is said of the weights of a run."""
  data = config.data.tfds_name or config.data.source
  if config.data.source == "folder" and config.data.dir:
    data = f"folder {Path(config.data.dir).name}"
  start = f", from {Path(config.init_from).name}" if config.init_from else ""
  return f"trained on {data}{start}"


def _words(text: str) -> tuple[str, ...]:
  return tuple(word for word in text.replace(" ", "").split(",") if word)


def check(config: ConfigDict) -> None:
  """Raises `UsageError` for what is no config, or has impossible values."""
  if not isinstance(config, ConfigDict):
    raise UsageError(
      f"the recipe returns a {type(config).__name__}: start it from "
      "configs.base.get_config()"
    )
  _check_keys(config.to_dict())
  _check_values(config)


def open_keys() -> list[str]:
  """The keys of a config that may be None."""
  flat = _flatten(base.get_config().to_dict())
  of_weights = ["model.name", *(f"data.{name}" for name in _PREPROCESSING)]
  return of_weights + [key for key, value in flat.items() if value is None]


def check_given(config: ConfigDict, given: Sequence[str]) -> None:
  """Raises `UsageError` for a key that somebody gave in vain."""
  for section, what in (("train", ""), ("optim", "warmup_")):
    epochs, steps = (f"{section}.{what}{unit}" for unit in ("epochs", "steps"))
    num = config[section][f"{what}steps"]  # Goes before epochs.
    if epochs in given and steps not in given and num is not None:
      raise UsageError(
        f"--config.{epochs} has no effect where config.{steps}={num}: give "
        f"--config.{steps}=None too"
      )


def check_apart(config: ConfigDict, workdir: Path) -> None:
  """Raises where a run would test on what it is trained on.

  Or would take its workdir for a class of images.
  """
  train, test = splits = config.data.train_split, config.data.test_split
  shares = "train_and_valid" in splits and (
    "train" in splits or "valid" in splits
  )
  if config.data.source == "tfds" and (train == test or shares):
    raise UsageError(
      f"config.data.train_split={train} and test_split={test} have images in "
      "common: choose others, such as train and valid, or train_and_valid and "
      "test"
    )
  if config.data.source != "folder" or not config.data.dir:
    return
  path = workdir.resolve()
  for root in folder.roots(Path(local(config.data.dir)).resolve()):
    if not path.is_relative_to(root):
      continue
    if not any(part[0] == "." for part in path.relative_to(root).parts):
      raise InputError(
        f"--workdir={workdir} is inside of {root}, where each folder is a "
        "class: choose one elsewhere"
      )


def _on_this_machine(config: ConfigDict) -> ConfigDict:
  """With `~` expanded in its paths; raises for addresses on the network."""
  config = config.copy_and_resolve_references()
  for section, key in ((config, "init_from"), (config.data, "dir")):
    if section[key] is not None:
      section[key] = local(section[key])
  return config


def resolve(config: ConfigDict) -> Recipe:
  """Works out a config.

  Raises:
    UsageError: for an unknown name or a value out of its range.
  """
  check(config)
  config = _on_this_machine(config)
  if config.model.name is None or None in _preprocessing(config).values():
    folder = config.data.dir if config.data.source == "folder" else None
    if folder is not None and not Path(folder).is_dir():
      # Said before weights are downloaded.
      raise InputError(f"--config.data.dir={folder}: there is no such folder")
    config = fill(config, _card_of_start(config))
  if config.data.source in sources.IN_MEMORY:
    config.data.eval_crop, config.data.eval_margin = "resize", 0
  columns = config.model.to_dict()
  name = columns.pop("name")
  overrides = {k: v for k, v in columns.items() if v is not None}
  try:
    row = models.variant(name, **overrides)
  except InputError as error:
    raise UsageError(f"config.model: {error}") from None
  train_size = config.data.train_size or row.train_size
  test_size = config.data.test_size or row.test_size
  d = config.data
  source = sources.load(
    d.source,
    sizes=Sizes(train_size, test_size, d.eval_margin, d.eval_crop, d.min_area),
    directory=d.dir,
    tfds_name=d.tfds_name,
    train_split=d.train_split,
    test_split=d.test_split,
    held_out_share=d.held_out_share,
    max_broken=d.max_broken,
    num_threads=d.num_threads,
  )
  if source.test.num_examples == 0:
    raise InputError(
      f"config.data.source={d.source}: there are no images to test with; of "
      "image folders one is held out of each class that has two or more"
    )
  num_classes = len(source.class_names)
  try:
    model = models.make(
      name,
      num_classes,
      remat=config.train.remat,
      is_scanned=config.train.scan,
      is_packed=config.train.packed,
      **overrides,
    )
  except InputError as error:
    raise UsageError(f"config.train: {error}") from None
  _check_frozen(config, model)
  _check_magnitude(config, row)

  c = config.train
  steps_per_epoch = source.train.num_examples / c.batch_size
  total_steps = c.steps or int(c.epochs * steps_per_epoch)
  warmup_steps = config.optim.warmup_steps
  if warmup_steps is None:
    warmup_steps = round(config.optim.warmup_epochs * steps_per_epoch)
  if total_steps < 1:
    raise UsageError(
      f"config.train: {c.epochs:g} epochs of {source.train.num_examples} "
      f"images in batches of {c.batch_size} are less than one step: raise "
      "epochs or lower batch_size"
    )
  return Recipe(
    config=config,
    source=source,
    model=model,
    card=cards.Card(
      model=name,
      overrides=overrides,
      class_names=source.class_names,
      image_size=test_size,
      crop=config.data.eval_crop,
      margin=config.data.eval_margin,
      mean=config.data.mean,
      std=config.data.std,
      source=_origin(config),
    ),
    train_size=train_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
    warmup_steps=warmup_steps,
    eval_every_steps=max(1, round(config.eval.every_epochs * steps_per_epoch)),
    peak_learning_rate=config.optim.lr_per_256 * c.batch_size / 256,
  )


# What numbers may be, by key.
_RANGES = (
  (
    (
      "train.epochs",
      "train.steps",
      "train.batch_size",
      "train.accumulate",
      "train.patience",
      "eval.batch_size",
      "eval.every_epochs",
      "log_every_steps",
      "checkpoint_every_steps",
      "keep_checkpoints",
      "data.train_size",
      "data.test_size",
      "data.num_threads",
      "optim.agc_eps",
    ),
    lambda x: 0 < x < math.inf,
    "more than 0 and finite",
  ),
  (
    (
      "data.eval_margin",
      "optim.lr_per_256",
      "optim.warmup_epochs",
      "optim.warmup_steps",
      "optim.weight_decay",
      "optim.agc_clipping",
      "optim.sam_rho",
      "augment.mixup_alpha",
      "augment.randaugment_layers",
      "data.max_broken",
    ),
    lambda x: 0 <= x < math.inf,
    "0 or more and finite",
  ),
  (
    (
      "augment.shift",
      "data.held_out_share",
      "train.label_smoothing",
      "optim.momentum",
      "optim.ema_decay",
    ),
    lambda x: 0 <= x < 1,
    "at least 0 and below 1",
  ),
  (
    ("optim.sam_share", "data.min_area"),
    lambda x: 0 < x <= 1,
    "above 0 and at most 1",
  ),
  (("augment.randaugment_magnitude",), lambda x: 0 <= x <= 30, "0 to 30"),
  (("seed",), lambda x: 0 <= x < 2**31, "0 to 2147483647"),
  (("data.mean",), lambda x: _is_color(x), "three numbers, one per colour"),
  (
    ("data.std",),
    lambda x: _is_color(x) and min(x) > 0,
    "three numbers above 0, one per colour",
  ),
)


def _is_color(value: Any) -> bool:
  return len(value) == 3 and all(
    isinstance(x, int | float) and math.isfinite(x) for x in value
  )


def _check_keys(config: dict[str, Any]) -> None:
  """Raises `UsageError` unless a config has exactly the keys of the base."""
  ours, theirs = _flatten(base.get_config().to_dict()), _flatten(config)
  for key in theirs:
    if key not in ours:
      raise unknown("config key", key, ours)
  if missing := sorted(ours.keys() - theirs.keys()):
    raise UsageError(
      f"the config lacks {', '.join(missing)}: start a recipe from "
      "configs.base.get_config()"
    )


def _check_values(config: ConfigDict) -> None:
  """Raises `UsageError` for values that cannot be meant."""
  flat = _flatten(config.to_dict())
  for keys, is_good, what in _RANGES:
    for key in keys:
      if flat[key] is not None and not is_good(flat[key]):
        raise UsageError(f"config.{key}={flat[key]}: must be {what}")
  for key, values in (
    ("augment.partners", PARTNERS),
    ("data.eval_crop", images.EVAL_CROPS),
    ("train.precision", steps.PRECISIONS),
  ):
    if flat[key] is not None and flat[key] not in values:
      raise unknown(key, flat[key], values)


def _check_magnitude(config: ConfigDict, row: models.Variant) -> None:
  """Magnitude 0, a harsh one, is used only if it was asked for."""
  augment = config.augment
  is_open = augment.randaugment_layers and augment.randaugment_magnitude is None
  if is_open and not row.randaugment_magnitude:
    raise UsageError(
      f"config.augment.randaugment_layers={augment.randaugment_layers}: no "
      f"magnitude was published for {config.model.name}; give "
      "--config.augment.randaugment_magnitude (of NFNets it is 5 to 15, and 0 "
      "changes images too), or 0 layers"
    )


def _check_frozen(config: ConfigDict, model: models.Model) -> None:
  params, _ = model.shapes()
  parts = sorted({model.stage_of(module) for module in params})
  frozen = _words(config.optim.frozen)
  for part in frozen:
    if part not in parts:
      raise unknown("part in config.optim.frozen", part, parts)
  if set(parts) <= set(frozen):
    raise UsageError(
      f"config.optim.frozen={config.optim.frozen}: nothing is left to train"
    )


def changes_since(
  recipe: Recipe, workdir: Path, *, may_change: Sequence[str] = ()
) -> list[str]:
  """What differs from the config a workdir was last started with.

  A workdir belongs to one model, data set, batch size and seed. Other settings
  may change from one start to the next (a lower learning rate after a
  divergence, say); each is returned as a line "key: old -> new".

  Args:
    may_change: Keys that may, though a workdir belongs to them in training.

  Raises:
    InputError: when the workdir belongs to another run.
  """
  old = _flatten(load_config(workdir).to_dict())
  new = _flatten(recipe.config.to_dict())
  old["classes"] = list(runs.card_of(workdir).class_names)
  new["classes"] = list(recipe.card.class_names)
  derived = runs.read_config(workdir).get("derived", {})
  old["images"] = derived.get("images", recipe.source.fingerprint)
  new["images"] = recipe.source.fingerprint
  # Without AGC the optimiser's state has another structure.
  for flat in (old, new):
    flat["with AGC"] = bool(flat["optim.agc_clipping"])
  changed = {
    key: f"{key}: {old.get(key)} -> {new.get(key)}"
    for key in sorted(old | new)
    if old.get(key) != new.get(key)
  }
  if fixed := [
    change
    for key, change in changed.items()
    if (key.startswith("model.") or key in _FIXED) and key not in may_change
  ]:
    raise InputError(
      f"{workdir} holds another run ({', '.join(fixed)}): choose another "
      "--workdir, or give the config that this one was started with"
    )
  return list(changed.values())


def drawn_by(recipe: Recipe, num_devices: int) -> dict[str, int]:
  """What random draws of a step depend on, beside its config."""
  return {
    "num_devices": num_devices,
    "micro_batches": recipe.micro_batches(num_devices),
  }


def save(recipe: Recipe, workdir: Path, *, num_devices: int) -> None:
  """Writes the resolved config, what follows from it, and the card."""
  derived = recipe._asdict()
  for name in ("config", "source", "model", "card"):
    del derived[name]
  derived["num_params"] = recipe.model.count_params()
  derived["images"] = recipe.source.fingerprint
  derived |= drawn_by(recipe, num_devices)
  text = json.dumps(
    {
      "config": recipe.config.to_dict(),
      "derived": derived,
      "card": recipe.card._asdict(),
    },
    indent=2,
  )
  with unfinished(workdir / runs.CONFIG) as partial:
    partial.write_text(text + "\n")


def load_config(workdir: Path) -> ConfigDict:
  """The config that a workdir was last started with.

  Raises:
    InputError: when there is none, or one of another version.
  """
  config = base.get_config()
  try:
    saved = cards.as_tuples(runs.read_config(workdir)["config"])
    _check_keys(saved)
    config.update(saved)
  except (KeyError, TypeError, UsageError) as error:
    raise InputError(
      f"{workdir / runs.CONFIG} is no config of this version ({error})"
    ) from None
  return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
