"""The card of a set of weights: what it is and how images are prepared for it.

Files of weights carry one as JSON, a run keeps it in its `config.json`, and
weights from elsewhere get one when they are recognised.
"""

import json
from typing import Any, NamedTuple

from nfnets import models
from nfnets.data import imagenet
from nfnets.errors import InputError

# Of red, green and blue over ImageNet's training set, grey levels 0 to 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


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
  source: str = ""  # Where the weights are from.
  step: int | None = None  # Updates made, of a run of `nfnets train`.

  def make_model(
    self, num_classes: int | None = None, **options: Any
  ) -> models.Model:
    """The network that the weights fit, unless told otherwise.

    Args:
      num_classes: None: those of the card.
      options: See `models.make`.
    """
    if num_classes is None:
      num_classes = len(self.class_names)
    return models.make(self.model, num_classes, **(self.overrides | options))

  @classmethod
  def from_json(cls, text: str | bytes, origin: str) -> "Card":
    """From JSON; `origin` names the file in errors."""
    try:
      values = json.loads(text)
    except ValueError as error:
      raise InputError(f"{origin}: its card is no JSON ({error})") from None
    return cls.from_dict(values, origin)

  @classmethod
  def from_dict(cls, values: dict[str, Any], origin: str) -> "Card":
    """From parsed JSON; `origin` names the file in errors."""
    required = set(cls._fields) - set(cls._field_defaults)
    known = set(values) if isinstance(values, dict) else set()
    if not required <= known <= set(cls._fields):
      raise InputError(
        f"{origin}: its card has {sorted(known)}, expected "
        f"{sorted(cls._fields)}: it was written by another version"
      )
    return cls(**as_tuples(values))


def as_tuples(value: Any) -> Any:
  """Parsed JSON with the tuples that its lists were."""
  if isinstance(value, dict):
    return {k: as_tuples(v) for k, v in value.items()}
  return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def for_imagenet(model: models.Model, source: str) -> Card:
  """The card of weights that were published for ImageNet.

  NFNets are evaluated on the distorted whole image, as released; ResNets and
  RegNets on its middle; timm's on the middle too, with the share of the image
  that its own evaluation keeps.
  """
  size = model.variant.test_size
  crop, margin = "padded", 32
  if model.plan.padding == "symmetric":
    share = {"NFNet": 1.0, "NF_ResNet": 0.94, "NF_RegNet": 0.9}
    if model.name.startswith("timm_nfnet"):
      share["NFNet"] = 0.9
    margin = round(size / share[model.plan.name]) - size
  elif model.plan.name == "NFNet":
    crop = "resize"
  return Card(
    model=model.name,
    overrides={},
    class_names=imagenet.class_names(),
    image_size=size,
    crop=crop,
    margin=margin,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source=source,
  )
