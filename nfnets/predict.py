"""The story of a prediction: images in, class names out.

In a notebook:

    classifier = Classifier("dm_nfnet_f0")
    for prediction in classifier.predict(["photo.jpg"]):
      print(prediction)
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nfnets import devices, downloads, models, plots, pretrained, steps
from nfnets.augment import Normalization
from nfnets.data import encoded, images
from nfnets.errors import InputError


class Prediction(NamedTuple):
  """The likeliest classes of one image, best first."""

  path: Path
  classes: tuple[tuple[str, float], ...]  # (name, probability)

  def __str__(self) -> str:
    lines = [str(self.path)]
    lines += [f"  {value:7.2%}  {name}" for name, value in self.classes]
    return "\n".join(lines)


class Failure(NamedTuple):
  """An image that could not be read, or whose probabilities are no numbers."""

  path: Path
  reason: str


class Classifier:
  """Weights with all that is needed to classify images.

  What it compiles is kept for the next start (`downloads.keep_compiled`).

  Args:
    source: What `pretrained.load` takes: a published name, a file, a workdir.
    precision: Of activations: `float32`, or `bfloat16`, for accelerators and
      processors with AMX.

  Attributes:
    card: What the weights are.
    model, params: The network with standardised weights (`models.fold`), which
      `model.apply` takes.

  Raises:
    InputError: when there are no such weights, or nobody knows their classes,
      and for an unknown precision.
  """

  def __init__(self, source: str | Path, *, precision: str = "float32"):
    downloads.keep_compiled()
    self._dtype = steps.compute_dtype(precision)
    params, self.card = pretrained.load_with_known_card(source)
    self.model, params = models.fold(self.card.make_model(), params)
    self.params = jax.device_put(self.model.lay_out(params, self._dtype))
    self._probabilities = jax.jit(self._forward)

  def _forward(self, params, batch: jax.Array) -> jax.Array:
    card = self.card
    batch = Normalization(card.mean, card.std)(batch, self._dtype)
    outputs, _ = self.model.apply(params, {}, None, batch)
    return jax.nn.softmax(outputs["logits"])

  def prepare(self, image: np.ndarray) -> np.ndarray:
    """[H, W, 3] grey levels -> [size, size, 3] float32, as in evaluation.

    Raises:
      InputError: for arrays of another shape.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
      raise InputError(
        f"an image of shape {list(image.shape)}: [H, W, 3] is needed, one at a "
        "time, red, green and blue from 0 to 255"
      )
    crop = images.EVAL_CROPS[self.card.crop]
    return crop(image, self.card.image_size, self.card.margin)

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """Of all classes [N, K], for prepared images [N, size, size, 3].

    On a CPU in equal parts, see `devices.images_at_once`.
    """
    most = devices.images_at_once(self.card.image_size)
    num_parts = 1 if most is None else math.ceil(len(batch) / most)
    parts = np.array_split(batch, max(1, num_parts))
    return np.concatenate(
      [jax.device_get(self._probabilities(self.params, x)) for x in parts]
    )

  def predict(
    self,
    paths: str | Path | Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
  ) -> Iterator[Prediction | Failure]:
    """Classifies image files; threads read ahead of the device.

    Args:
      paths: What `images.find` takes: files, folders, patterns; or one.
      top: How many classes of each image to give.
      batch_size: Images computed at once; twice as many are in memory. None:
        32, on a CPU fewer if they are large (8 of 256 px, see
        `devices.images_at_once`). Fewer files are computed as the next power of
        two, so that few programs are compiled.

    Yields:
      In the order of the files, a prediction for each or why there is none.

    Raises:
      InputError: for missing files, and a `top` or `batch_size` below 1.
    """
    if batch_size is None:
      most = devices.images_at_once(self.card.image_size) or 32
      batch_size = min(32, 1 << (most.bit_length() - 1))
    if min(top, batch_size) < 1:
      raise InputError(
        f"top={top}, batch_size={batch_size}: both must be at least 1"
      )
    found = images.find([paths] if isinstance(paths, str | Path) else paths)
    if not found:
      return
    batch_size = min(batch_size, 1 << (len(found) - 1).bit_length())
    pending = None
    with encoded.make_pool() as pool:
      for start in range(0, len(found), batch_size):
        chunk = found[start : start + batch_size]
        batch, failures = self._read(chunk, batch_size, pool)
        values = self._probabilities(self.params, batch)
        # These are computed while the next images are read.
        if pending is not None:
          yield from self._results(*pending, top)
        pending = chunk, failures, values
      if pending is not None:
        yield from self._results(*pending, top)

  def _read(
    self, paths: list[Path], batch_size: int, pool: ThreadPoolExecutor
  ) -> tuple[np.ndarray, dict[Path, str]]:
    """Prepared images, as many for the last ones, and why there is none."""
    size = self.card.image_size
    # One shape, so that nothing is compiled again.
    batch = np.zeros((batch_size, size, size, 3), np.float32)

    def fill(i: int) -> str | None:
      try:
        batch[i] = self.prepare(images.read(paths[i]))
      except InputError as error:
        return str(error)
      return None

    reasons = zip(paths, pool.map(fill, range(len(paths))), strict=True)
    return batch, {path: reason for path, reason in reasons if reason}

  def _results(
    self,
    paths: list[Path],
    failures: dict[Path, str],
    values: jax.Array,
    top: int,
  ) -> Iterator[Prediction | Failure]:
    names = self.card.class_names
    for path, value in zip(paths, jax.device_get(values), strict=False):
      if path in failures:
        yield Failure(path, failures[path])
      elif not np.isfinite(value).all():
        reason = f"{path}: its probabilities are no numbers; are the weights?"
        yield Failure(path, reason)
      else:
        best = np.argsort(-value, kind="stable")[:top]
        yield Prediction(path, tuple((names[i], float(value[i])) for i in best))


# What one picture can hold and still be looked at.
MOST_IN_GRID = 64
_GRID_PIXELS = 400  # Of an image's longer side there.


def save_grid(predictions: list[Prediction], path: Path) -> None:
  """Draws images with their likeliest class; at most `MOST_IN_GRID`."""
  from PIL import Image

  pictures, captions = [], []
  for prediction in predictions[:MOST_IN_GRID]:
    name, value = prediction.classes[0]
    picture = Image.fromarray(images.read(prediction.path))
    picture.thumbnail((_GRID_PIXELS, _GRID_PIXELS))
    pictures.append(np.asarray(picture))
    captions.append(f"{plots.shortened(name, 30)}\n{value:.1%}")
  plots.save_grid(pictures, captions, path)
