"""Image files and the published evaluation preprocessing, in NumPy and Pillow.

Shapes: H height, W width in pixels; images [H, W, 3] with values 0 to 255.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nfnets.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def find(paths: Iterable[str | Path]) -> list[Path]:
  """Image files among files and folders (searched recursively), in order.

  Raises:
    InputError: for a path that does not exist or a folder without images.
  """
  found = []
  for path in map(Path, paths):
    if path.is_dir():
      inside = sorted(
        p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES
      )
      if not inside:
        raise InputError(
          f"{path} holds no image files (looked for {', '.join(SUFFIXES)})"
        )
      found += inside
    elif path.exists():
      found.append(path)
    else:
      raise InputError(f"{path} does not exist: give image files or folders")
  return found


def read(path: str | Path) -> np.ndarray:
  """Decodes an image file: uint8 [H, W, 3] RGB, upright.

  Rotation tags are followed, palettes and grey images become RGB, transparency
  is laid on white, 16-bit grey is scaled, and of an animation the first frame
  is taken.

  Raises:
    InputError: when the file cannot be read as an image.
  """
  from PIL import Image, ImageOps

  try:
    with Image.open(path) as image:
      image = ImageOps.exif_transpose(image)
      if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
      if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
      return np.array(image.convert("RGB"))
  except Image.UnidentifiedImageError:
    raise InputError(
      f"{path} is not an image in a known format (or is damaged)"
    ) from None
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
    raise InputError(f"{path} cannot be read as an image: {e}") from None


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes [H, W, C] to [size, size, C], distorting the aspect ratio.

  TensorFlow's bicubic (Keys, a = -0.5, half-pixel centres) without
  antialiasing, which the published evaluation used. Returns float32 that may
  leave 0 to 255 slightly: it is not clamped.
  """
  rows = _cubic_weights(image.shape[0], size)
  columns = _cubic_weights(image.shape[1], size)
  image = image.astype(np.float32)
  # Gather the four taps of each output row, then of each column.
  image = sum(
    image[index] * weight[:, None, None]
    for index, weight in zip(*rows, strict=True)
  )
  return sum(
    image[:, index] * weight[None, :, None]
    for index, weight in zip(*columns, strict=True)
  )


def _cubic_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Input positions and weights, both [4, new], for one axis.

  Taps outside the image get no weight and the rest is scaled up to sum to one;
  the fraction is rounded to 1/1024, both as TensorFlow does.
  """
  centre = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(
    old / new
  ) - 0.5
  below = np.floor(centre)
  fraction = np.round((centre - below) * 1024) / 1024
  taps = np.arange(-1, 3)[:, None]  # [4, 1]
  distance = np.abs(taps - fraction)  # [4, new]
  a = -0.5
  near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
  far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
  weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
  positions = below.astype(np.int64) + taps
  inside = (positions >= 0) & (positions < old)
  weights = np.where(inside, weights, 0)
  weights /= weights.sum(axis=0)
  return positions.clip(0, old - 1), weights.astype(np.float32)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
  """The middle [size, size, C] of a larger image."""
  top, left = ((side - size) // 2 for side in image.shape[:2])
  return image[top : top + size, left : left + size]


def resize_crop(image: np.ndarray, size: int, margin: int) -> np.ndarray:
  """Resizes to a square of side `size + margin`, then crops its middle.

  With margin 32 the evaluation preprocessing of the released NFNets.
  Returns float32 [size, size, C], not clamped.
  """
  return centre_crop(resize(image, size + margin), size)


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Rounds to the nearest grey level within 0 to 255."""
  return np.clip(np.round(image), 0, 255).astype(np.uint8)
