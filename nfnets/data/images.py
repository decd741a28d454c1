"""Image files and the published evaluation preprocessing.

Shapes: H height, W width in pixels; images [H, W, 3] with values 0 to 255.
"""

import glob
import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nfnets.data import crops
from nfnets.errors import InputError
from nfnets.files import local

SUFFIXES = (
  *(".jpg", ".jpeg", ".jpe", ".jfif"),
  *(".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
)


def find(paths: str | Path | Iterable[str | Path]) -> list[Path]:
  """Image files among files, folders, patterns and file URLs, in order.

  Folders are searched recursively; a pattern is one of the shell's, in which
  `**` stands for any folders.

  Raises:
    InputError: for a path that does not exist, or under which no images are,
      and for what is none.
  """
  found = []
  for given in [paths] if isinstance(paths, str | Path) else paths:
    if not isinstance(given, str | os.PathLike):
      raise InputError(
        f"a {type(given).__name__} is no path: give image files or folders "
        "(arrays go to `prepare` and `probabilities` of a `Classifier`)"
      )
    given = local(os.fspath(given))
    path = Path(given)
    if path.is_dir():
      # A pipe would be waited for; a link that is broken is told so.
      inside = [
        file
        for file in filter(is_image, inside_of(path))
        if os.path.isfile(file) or not os.path.exists(file)
      ]
    elif path.exists() or path.is_symlink():  # One that is broken is told so.
      inside = [path]
    elif glob.has_magic(given):
      matches = map(Path, glob.glob(given, recursive=True))
      inside = list(filter(is_image, matches))
    else:
      raise InputError(f"{given} does not exist: give image files or folders")
    if not inside:
      raise InputError(
        f"{given} holds no image files (looked for {', '.join(SUFFIXES)})"
      )
    found += sorted(inside)
  return found


def inside_of(folder: Path) -> list[Path]:
  """All that is below a folder and not hidden, as `.name` and in `.name/`.

  Such are the copies that notebooks keep, and what Macs put beside each file.

  Raises:
    OSError: for a folder that cannot be read, rather than leaving it out.
  """

  def fail(error: OSError) -> None:
    raise error

  found = []
  for root, folders, files in os.walk(folder, onerror=fail):
    folders[:] = [name for name in folders if name[0] != "."]
    found += [Path(root, name) for name in files if name[0] != "."]
  return found


def is_image(path: Path) -> bool:
  """Whether a file is one by its name."""
  return path.suffix.lower() in SUFFIXES


def read(path: str | Path) -> np.ndarray:
  """Decodes an image file: see `decode`.

  Raises:
    InputError: when the file cannot be read as an image.
  """
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error}") from None
  return decode(data, str(path))


def read_bytes(path: str | Path) -> bytes:
  """The bytes of a file of a data set.

  Raises:
    InputError: when there is none, or it may not be read, or is something else
      (a pipe would be waited for).
    OSError: when it may be read another time.
  """
  try:
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(number, "rb") as file:
      if not stat.S_ISREG(os.fstat(number).st_mode):
        raise InputError(f"{path} cannot be read: it is no file")
      return file.read()
  except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
    raise InputError(f"{path} cannot be read: {error.strerror}") from None


def decode(data: bytes, name: str, *, is_upright: bool = True) -> np.ndarray:
  """Decodes an image: uint8 [H, W, 3] RGB.

  Plain JPEGs take a fast way that leaves Python's lock to other threads.

  Rotation tags are followed, palettes and grey images become RGB, transparency
  is laid on white, 16-bit grey is scaled, and of an animation the first frame
  is taken.

  Args:
    data: The file's bytes.
    name: Of the file, for errors.
    is_upright: As a person would see it; if not, rotation tags are left alone,
      as TensorFlow does, and so the published pipeline.

  Raises:
    InputError: when the bytes cannot be read as an image.
  """
  is_jpeg = data[:3] == b"\xff\xd8\xff"
  if is_jpeg and not (is_upright and _has_exif(data)):
    image = _decode_plain_jpeg(data)
    if image is not None:
      return image
  from PIL import Image, ImageOps

  try:
    with Image.open(io.BytesIO(data)) as image:
      if is_upright:
        image = ImageOps.exif_transpose(image)
      if image.mode == "F":
        raise ValueError("its pixels are fractions: save it with 8 or 16 bits")
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
      f"{name} is not an image in a known format (or is damaged)"
    ) from None
  except MemoryError:
    raise
  # Pillow raises whatever it stumbles over in damaged tags.
  except Exception as e:
    raise InputError(f"{name} cannot be read as an image: {e}") from None


def _has_exif(data: bytes) -> bool:
  """Whether one of the segments before a JPEG's pixels may say how to turn it.

  Each is FF, its kind, its length with these two bytes, and what it says; the
  pixels' kind is DA. More FF may come before, and some kinds say nothing.
  """
  start = 2
  while data[start : start + 1] == b"\xff":
    kind = data[start + 1 : start + 2]
    if kind == b"\xe1" and data[start + 4 : start + 8] == b"Exif":
      return True
    if kind in (b"\xda", b""):
      break
    if kind == b"\xff":
      start += 1
    elif kind == b"\x01" or b"\xd0" <= kind <= b"\xd7":
      start += 2
    else:
      start += 2 + int.from_bytes(data[start + 2 : start + 4])
  return False


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
  """RGB or grey JPEG; None for what Pillow should look at."""
  import simplejpeg

  try:
    *_, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if colorspace not in ("YCbCr", "Gray", "RGB"):
      return None
    return simplejpeg.decode_jpeg(data)
  except ValueError:
    return None


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes [H, W, C] to [size, size, C], distorting the aspect ratio.

  TensorFlow's bicubic (Keys, a = -0.5, half-pixel centres) without
  antialiasing, which the published evaluation used. Returns float32 that may
  leave 0 to 255 slightly: it is not clamped.
  """
  return _resize_part(image, size, 0, size)


def _resize_part(
  image: np.ndarray, size: int, start: int, length: int
) -> np.ndarray:
  """Rows and columns `start` to `start + length` of a resized image."""
  part = slice(start, start + length)
  for axis in (0, 1):
    positions, weights = _cubic_weights(image.shape[axis], size)
    image = _sum_of_taps(image, positions[:, part], weights[:, part], axis)
  return image


def _sum_of_taps(
  image: np.ndarray, positions: np.ndarray, weights: np.ndarray, axis: int
) -> np.ndarray:
  """Rows or columns of the image at [4, new] positions, weighted; float32."""
  shape = [1, 1, 1]
  shape[axis] = -1
  total = None
  for index, weight in zip(positions, weights, strict=True):
    tap = np.take(image, index, axis).astype(np.float32, copy=False)
    tap *= weight.reshape(shape)
    total = tap if total is None else np.add(total, tap, out=total)
  return total


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


def resize_crop(image: np.ndarray, size: int, margin: int) -> np.ndarray:
  """The middle of the image resized to a square of side `size + margin`.

  With margin 32 the evaluation preprocessing of the released NFNets.
  Returns float32 [size, size, C], not clamped.
  """
  return _resize_part(image, size + margin, (margin + 1) // 2, size)


def padded_centre_crop(
  image: np.ndarray, size: int, margin: int = 32
) -> np.ndarray:
  """The middle square with a margin in proportion, resized to `size`.

  With margin 32 the evaluation preprocessing of the released ResNets. Returns
  as `resize_crop`.
  """
  top, left, height, width = crops.padded_centre_window(
    *image.shape[:2], size=size, margin=margin
  )
  return resize(image[top : top + height, left : left + width], size)


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Rounds to the nearest grey level within 0 to 255."""
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


# (image, size, margin) -> float32 [size, size, C], by name.
EVAL_CROPS = {"resize": resize_crop, "padded": padded_centre_crop}
