"""Where to crop: the windows of the published training and evaluation.

A window is (top, left, height, width) in pixels of the decoded image.
"""

import math

Window = tuple[int, int, int, int]

# Of the released pipeline (TensorFlow's `sample_distorted_bounding_box`).
_ATTEMPTS = 10
DRAWS = (_ATTEMPTS, 4)  # Random numbers that one image needs.
MIN_AREA = 0.08  # Share of the image, up to all of it.
_ASPECT = (3 / 4, 4 / 3)  # Width / height.
# At least this share must be covered too, so areas of 8 to 10 % are redrawn.
_MIN_COVERED = 0.1


def random_window(
  height: int,
  width: int,
  draws: list[list[float]],
  *,
  size: int,
  min_area: float = MIN_AREA,
) -> Window:
  """A training crop: random aspect, then height, then place, all uniform.

  Falls back to the evaluation's padded centre crop for `size` when ten draws
  give nothing (a very long image). A draw of the whole image is drawn again.

  Args:
    height, width: Of the image.
    draws: Random numbers, 0 to 1, of shape `DRAWS`.
    size: Of the crop once it is resized.
    min_area: Share of the image that a crop has at least.
  """
  for numbers in draws:
    window = _draw(height, width, min_area, *numbers)
    if window is not None and window[2:] != (height, width):
      return window
  return padded_centre_window(height, width, size=size)


def _draw(
  height: int,
  width: int,
  min_area: float,
  shape: float,
  extent: float,
  y: float,
  x: float,
) -> Window | None:
  """One attempt: a height uniform between those of the smallest and largest."""
  aspect = _ASPECT[0] + shape * (_ASPECT[1] - _ASPECT[0])
  low, high = (
    round(math.sqrt(share * height * width / aspect))
    for share in (min_area, 1.0)
  )
  # The largest height whose width still fits.
  high = min(high, height, int((width + 0.5) / aspect))
  if round(high * aspect) > width:
    high -= 1
  low = min(low, high)
  if low < 1:
    return None
  h = low + int(extent * (high - low + 1))
  w = round(h * aspect)
  if not _MIN_COVERED * height * width <= h * w or w < 1:
    return None
  return int(y * max(1, height - h)), int(x * max(1, width - w)), h, w


def padded_centre_window(
  height: int, width: int, *, size: int, margin: int = 32
) -> Window:
  """The middle square of side `size / (size + margin)` of the shorter side."""
  scale = min(height, width) / (size + margin)
  side = max(1, int(scale * size))
  return (height - side + 1) // 2, (width - side + 1) // 2, side, side
