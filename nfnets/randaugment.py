"""RandAugment on the device: a few random operations on each image.

Shapes: N images, H height, W width. Images are uint8, 0 to 255, [H, W, 3];
inside this file they are planes, [3, H, W], which compile to faster loops.

A magnitude, 0 to 30, says how strong an operation is; 10 is "full". It is a
number, or a traced scalar: then the arguments of the operations are worked out
in float32, which moves some pixels by one grey level, or to the next place.

Sources: "RandAugment: Practical automated data augmentation with a reduced
search space" (Cubuk, Zoph, Shlens, Le 2019, arXiv:1909.13719), as the code
released with NFNets has it: every layer draws one of 16 operations for an image
(equally likely, with replacement) and always applies it; rotations, shears and
translations draw their direction, Cutout its place.

The released operations have quirks, kept by default because the published
accuracies were trained with them. `quirks=False` corrects these and no others:

* Solarize's threshold wraps modulo 256: magnitude 10 inverts all pixels, and 15
  does what 5 does. Corrected, Solarize does nothing from magnitude 10 on.
* Contrast moves pixels away from the grey `min(H * W / 256, 255)`: 144 at
  192 x 192 pixels and 255, white, from 256 x 256 on. Corrected, that grey is
  the mean of the image.
* Posterize keeps `int(0.4 * magnitude)` bits, and more than 8 (from magnitude
  22.5 on, beyond every published recipe) wrap around to 1. Corrected, they
  stay at 8.

The rest is as intended, and the same in both forms: moved images take the
nearest pixel and are grey (128) outside; translations and Cutout count in
pixels whatever the size of the image; and magnitude 0 is not "no change"
(Posterize keeps one bit, Color, Contrast and Brightness a tenth).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nfnets.errors import InputError

Number = float | jax.Array  # Or a traced scalar.

_FILL = 128  # Grey of pixels that an operation leaves without a value.


class _View(NamedTuple):
  """What an operation may depend on besides its magnitude."""

  height: int
  width: int
  low: jax.Array  # [3]: the least value of each colour, float32.
  high: jax.Array  # [3]: the greatest.
  counts: jax.Array  # [3, 256]: how many pixels have each value, int32.
  middle: int | jax.Array  # The grey that Contrast moves pixels away from.
  direction: Number  # 1 or -1.
  centre: jax.Array | None  # [2]: row and column of Cutout's square, int32.
  quirks: bool


class _Plan(NamedTuple):
  """What to do to an image, as the arguments of four passes.

  An operation asks for one pass and leaves the others without effect, so that
  a batch of images with different operations takes the same four passes.
  """

  table: jax.Array  # [3, 256]: the new value of each value, uint8.
  is_smooth: jax.Array  # Blend with the smoothed image, or with the grey one?
  factor: jax.Array  # 1: the image itself; see `_blend`.
  matrix: jax.Array  # [2, 3]: column and row each pixel comes from, float32.
  square: jax.Array  # [4]: first and end row, first and end column to fill.


def _plan(
  table=None,
  *,
  is_smooth=False,
  factor=1.0,
  matrix=((1, 0, 0), (0, 1, 0)),
  square=(0, 0, 0, 0),
) -> _Plan:
  table = jnp.arange(256) if table is None else table
  return _Plan(
    table=jnp.broadcast_to(table.astype(jnp.uint8), (3, 256)),
    is_smooth=jnp.array(is_smooth),
    factor=jnp.array(factor, jnp.float32),
    matrix=jnp.array(matrix, jnp.float32),
    square=jnp.array(square, jnp.int32),
  )


# Arithmetic that is the same however it is compiled.


def _rounded(product: jax.Array) -> jax.Array:
  """A product that is rounded to float32 before it enters a sum.

  Compilers like to make one step with one rounding out of the two, which shows
  where the sum is about a whole number. They do not look through this bound,
  and nothing reaches it that is not far out of range already.
  """
  return jnp.clip(product, -(2.0**24), 2.0**24)


def _add_product(total: jax.Array, x: jax.Array, weight: float) -> jax.Array:
  """`total + x * weight` rounded once, for x in 0 ... 255, all float32.

  In one step on some machines and in two on others, hence by hand: the weight
  has a coarse and a fine half, whose products with x are exact, and the
  rounding error of the first sum is worked out (Knuth's two-sum).
  """
  weight = jnp.float32(weight)
  coarse = jnp.round(weight * 2**12) / 2**12
  product = x * coarse
  summed = total + product
  added = summed - total
  error = (total - (summed - added)) + (product - added)
  return summed + (error + x * (weight - coarse))


def _level(magnitude: Number, full: float) -> Number:
  """The argument of an operation whose argument at magnitude 10 is `full`."""
  level = magnitude / 10 * full
  return _rounded(level) if isinstance(level, jax.Array) else level


def _whole(level: Number) -> int | jax.Array:
  """The level without its fraction."""
  if isinstance(level, jax.Array):
    return jnp.trunc(level).astype(jnp.int32)
  return int(level)


def _blend(start: jax.Array, end: jax.Array, factor: Number) -> jax.Array:
  """From the start (0) to the end (1) and beyond; float32 -> uint8."""
  change = _rounded(jnp.float32(factor) * (end - start))
  return jnp.clip(start + change, 0, 255).astype(jnp.uint8)


# The operations. Each makes a plan out of a view and a magnitude.


def _auto_contrast(view: _View, magnitude: Number) -> _Plan:
  """Stretches each colour to 0 ... 255."""
  values = jnp.broadcast_to(jnp.arange(256), (3, 256))
  low, high = view.low[:, None], view.high[:, None]  # [3, 1]
  scale = 255 / jnp.maximum(high - low, 1)
  stretched = _rounded(values * scale) - _rounded(low * scale)
  stretched = jnp.clip(stretched, 0, 255).astype(jnp.int32)
  return _plan(jnp.where(high > low, stretched, values))


def _equalize(view: _View, magnitude: Number) -> _Plan:
  """Makes the values of each colour about equally frequent."""
  values = jnp.broadcast_to(jnp.arange(256), (3, 256))
  is_last = values == view.high[:, None]
  smaller = jnp.sum(jnp.where(is_last, 0, view.counts), axis=1, keepdims=True)
  step = smaller // 255  # [3, 1]
  before = jnp.cumsum(view.counts, axis=1) - view.counts
  spread = jnp.minimum((before + step // 2) // jnp.maximum(step, 1), 255)
  return _plan(jnp.where(step > 0, spread, values))


def _invert(view: _View, magnitude: Number) -> _Plan:
  return _plan(255 - jnp.arange(256))


def _posterize(view: _View, magnitude: Number) -> _Plan:
  """Keeps the leading bits, at least one."""
  lost = 8 - _whole(_level(magnitude, 4))
  lost = jnp.clip(lost % 256 if view.quirks else lost, 0, 7)
  return _plan(jnp.arange(256) >> lost << lost)


def _solarize(view: _View, magnitude: Number) -> _Plan:
  """Inverts the values from a threshold on."""
  threshold = _whole(_level(magnitude, 256))
  threshold = threshold % 256 if view.quirks else threshold
  values = jnp.arange(256)
  return _plan(jnp.where(values < threshold, values, 255 - values))


def _solarize_add(view: _View, magnitude: Number) -> _Plan:
  """Lightens the darker half of the values."""
  values = jnp.arange(256)
  lighter = jnp.clip(values + _whole(_level(magnitude, 110)), 0, 255)
  return _plan(jnp.where(values < 128, lighter, values))


def _strength(magnitude: Number) -> Number:
  """0.1 to 5.5; 1, no change, at magnitude 5."""
  return _level(magnitude, 1.8) + 0.1


def _contrast(view: _View, magnitude: Number) -> _Plan:
  values = jnp.arange(256.0)
  middle = jnp.full_like(values, view.middle)
  return _plan(_blend(middle, values, _strength(magnitude)))


def _brightness(view: _View, magnitude: Number) -> _Plan:
  values = jnp.arange(256.0)
  return _plan(_blend(jnp.zeros_like(values), values, _strength(magnitude)))


def _color(view: _View, magnitude: Number) -> _Plan:
  return _plan(factor=_strength(magnitude))


def _sharpness(view: _View, magnitude: Number) -> _Plan:
  return _plan(is_smooth=True, factor=_strength(magnitude))


def _rotate(view: _View, magnitude: Number) -> _Plan:
  """About the centre, 30 degrees at full magnitude."""
  angle = _level(magnitude, 30) * (math.pi / 180)
  maths = jnp if isinstance(angle, jax.Array) else math
  cos, sin = maths.cos(angle), maths.sin(angle)
  x, y = view.width - 1, view.height - 1

  def turn(sin):
    right = (x - (x * cos - y * sin)) / 2
    down = (y - (x * sin + y * cos)) / 2
    return jnp.array(((cos, -sin, right), (sin, cos, down)), jnp.float32)

  return _plan(matrix=jnp.where(view.direction > 0, turn(sin), turn(-sin)))


def _shear_x(view: _View, magnitude: Number) -> _Plan:
  shear = _level(magnitude, 0.3) * view.direction
  return _plan(matrix=((1, shear, 0), (0, 1, 0)))


def _shear_y(view: _View, magnitude: Number) -> _Plan:
  shear = _level(magnitude, 0.3) * view.direction
  return _plan(matrix=((1, 0, 0), (shear, 1, 0)))


def _translate_x(view: _View, magnitude: Number) -> _Plan:
  pixels = _level(magnitude, 100) * view.direction
  return _plan(matrix=((1, 0, pixels), (0, 1, 0)))


def _translate_y(view: _View, magnitude: Number) -> _Plan:
  pixels = _level(magnitude, 100) * view.direction
  return _plan(matrix=((1, 0, 0), (0, 1, pixels)))


def _cutout(view: _View, magnitude: Number) -> _Plan:
  """Fills a square; its centre is in the image, the rest may be outside."""
  if view.centre is None:
    raise InputError(
      "Cutout draws its place but was given no key: pass a random key, such as "
      "key=jax.random.key(0)"
    )
  half = _whole(_level(magnitude, 40))
  row, column = view.centre
  return _plan(square=(row - half, row + half, column - half, column + half))


# The four passes, on planes [3, H, W] uint8. With what a plan says by default
# each returns its image.


def _look_up(image: jax.Array, table: jax.Array) -> jax.Array:
  return table.reshape(-1).at[_places(image)].get(mode="promise_in_bounds")


def _places(image: jax.Array) -> jax.Array:
  """Where each value is in a flat table [3 * 256]."""
  return image.astype(jnp.int32) + 256 * jnp.arange(3).reshape(3, 1, 1)


def _blend_with(
  image: jax.Array, is_smooth: jax.Array, factor: jax.Array
) -> jax.Array:
  end = image.astype(jnp.float32)
  grey = jnp.broadcast_to(_grey(image).astype(jnp.float32), end.shape)
  return _blend(jnp.where(is_smooth, _smooth(end), grey), end, factor)


def _grey(image: jax.Array) -> jax.Array:
  """[3, H, W] uint8 -> [1, H, W] int32.

  Weights 0.2989, 0.587, 0.114 and a scale of 255.5 / 255, which is how the
  released code gets back from fractions to bytes; in whole numbers, so without
  rounding (which decides 237 of the 2^24 colours).
  """
  weights = jnp.array([2989, 5870, 1140]).reshape(3, 1, 1)
  total = jnp.sum(image * weights, axis=0, keepdims=True)  # < 2.55e6
  return total * 511 // 5_100_000


def _smooth(image: jax.Array) -> jax.Array:
  """Mean of 3 x 3 pixels, the middle one five times; the border stays.

  Whole numbers, float32 in and out.
  """
  _, height, width = image.shape
  padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)))
  total = jnp.zeros_like(image)
  for i in range(3):
    for j in range(3):
      weight = 5 / 13 if (i, j) == (1, 1) else 1 / 13
      window = padded[:, i : i + height, j : j + width]
      total = _add_product(total, window, weight)
  is_inside = _is_in_square(image.shape, (1, height - 1, 1, width - 1))
  return jnp.where(is_inside, jnp.floor(total), image)


def _is_in_square(shape, square) -> jax.Array:
  """[1, H, W] bool."""
  top, bottom, left, right = square
  _, height, width = shape
  rows = jnp.arange(height).reshape(1, -1, 1)
  columns = jnp.arange(width).reshape(1, 1, -1)
  is_row = (rows >= top) & (rows < bottom)
  return is_row & (columns >= left) & (columns < right)


def _move(image: jax.Array, matrix: jax.Array) -> jax.Array:
  _, height, width = image.shape
  x = jnp.arange(float(width)).reshape(1, -1)
  y = jnp.arange(float(height)).reshape(-1, 1)

  def source(across, down, offset):  # [H, W]
    place = _rounded(across * x) + _rounded(down * y) + offset
    return jax.lax.round(place, jax.lax.RoundingMethod.AWAY_FROM_ZERO)

  column, row = source(*matrix[0]), source(*matrix[1])
  is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  places = jnp.where(is_inside, row * width + column, 0).astype(jnp.int32)
  moved = image.reshape(3, -1).at[:, places].get(mode="promise_in_bounds")
  return jnp.where(is_inside[None], moved, jnp.uint8(_FILL))


def _cut(image: jax.Array, square: jax.Array) -> jax.Array:
  is_cut = _is_in_square(image.shape, square)
  return jnp.where(is_cut, jnp.uint8(_FILL), image)


# The passes in their order, with the fields of a plan that are their arguments:
# the last of them says whether the pass has an effect.
_PASSES = (
  (_look_up, ("table",)),
  (_blend_with, ("is_smooth", "factor")),
  (_move, ("matrix",)),
  (_cut, ("square",)),
)


def _only(
  function: Callable[..., jax.Array],
  is_needed: jax.Array,
  results: jax.Array,
  *arguments: jax.Array,
) -> jax.Array:
  """`vmap(function)(*arguments)` in place of the results where it is needed.

  Slices of an eighth of the batch, those in need first, until none is left. A
  slice may hold others besides: the function must do them no harm.
  """
  num = len(is_needed)
  size = -(-num // 8)
  order = jnp.argsort(~is_needed)

  def replace_some(i, results):
    # The last slice moves back to fit and does some again, to the same end.
    some = jax.lax.dynamic_slice(order, (i * size,), (size,))
    chosen = (argument[some] for argument in arguments)
    return results.at[some].set(jax.vmap(function)(*chosen))

  num_slices = -(-jnp.sum(is_needed) // size)
  return jax.lax.fori_loop(0, num_slices, replace_some, results)


def _differ(values: jax.Array, value: jax.Array) -> jax.Array:
  """[N, ...] and [...] -> [N] bool: which of the values are not the value?"""
  differences = (values != value[None]).reshape(len(values), -1)
  return jnp.any(differences, axis=1)


# What the operations look at.


def _count(image: jax.Array) -> jax.Array:
  """Pixels of each value: [3, H, W] uint8 -> [3, 256] int32."""
  counts = jnp.zeros(3 * 256, jnp.int32).at[_places(image)].add(1)
  return counts.reshape(3, 256)


def _look(image: jax.Array, counts, direction, centre, quirks: bool) -> _View:
  _, height, width = image.shape
  size = height * width
  if quirks:
    middle = min(size // 256, 255)
  else:
    middle = (2 * jnp.sum(_grey(image)) + size) // (2 * size)
  return _View(
    height=height,
    width=width,
    low=jnp.min(image, axis=(1, 2)).astype(jnp.float32),
    high=jnp.max(image, axis=(1, 2)).astype(jnp.float32),
    counts=counts,
    middle=middle,
    direction=direction,
    centre=centre,
    quirks=quirks,
  )


def _draw_centre(key: jax.Array, image: jax.Array) -> jax.Array:
  _, height, width = image.shape
  return jax.random.randint(key, (2,), 0, jnp.array([height, width]))


class Operation(NamedTuple):
  """One operation; call it with an image.

  Args:
    image: uint8 [H, W, 3].
    magnitude: 0 to 30, 10 is full. A negative one turns, shears or translates
      the other way.
    key: for Cutout, which draws where; the others ignore it.
    quirks: keep the released quirks (see the top of the file)?

  Returns:
    uint8 [H, W, 3].
  """

  plan: Callable[[_View, Number], _Plan]
  needs_counts: bool = False

  def __call__(
    self,
    image: jax.Array,
    magnitude: Number,
    *,
    key: jax.Array | None = None,
    quirks: bool = True,
  ) -> jax.Array:
    _check(image, "[H, W, 3]")
    planes = jnp.moveaxis(jnp.asarray(image), -1, 0)
    counts = (
      _count(planes) if self.needs_counts else jnp.zeros((3, 256), jnp.int32)
    )
    centre = None if key is None else _draw_centre(key, planes)
    view = _look(planes, counts, 1, centre, quirks)
    plan = self.plan(view, magnitude)
    for function, names in _PASSES:
      planes = function(planes, *(getattr(plan, name) for name in names))
    return jnp.moveaxis(planes, 0, -1)


# The one list of the operations, in the released order.
OPERATIONS: dict[str, Operation] = {
  "AutoContrast": Operation(_auto_contrast),
  "Equalize": Operation(_equalize, needs_counts=True),
  "Invert": Operation(_invert),
  "Rotate": Operation(_rotate),
  "Posterize": Operation(_posterize),
  "Solarize": Operation(_solarize),
  "Color": Operation(_color),
  "Contrast": Operation(_contrast),
  "Brightness": Operation(_brightness),
  "Sharpness": Operation(_sharpness),
  "ShearX": Operation(_shear_x),
  "ShearY": Operation(_shear_y),
  "TranslateX": Operation(_translate_x),
  "TranslateY": Operation(_translate_y),
  "Cutout": Operation(_cutout),
  "SolarizeAdd": Operation(_solarize_add),
}


def _check(images: jax.Array, shape: str) -> None:
  is_right = images.ndim == shape.count(",") + 1 and images.shape[-1] == 3
  if images.dtype != jnp.uint8 or not is_right:
    raise InputError(
      f"RandAugment got {images.dtype} {list(images.shape)} and needs uint8 "
      f"{shape}: clip to 0 ... 255 and cast first"
    )


def make_randaugment(
  num_layers: int, magnitude: Number, *, quirks: bool = True
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
  """Random operations, drawn for each image and each layer.

  The result for an image depends on its key alone, whatever else is in the
  batch, if the keys are of JAX's default kind (threefry).

  A layer takes a batch through four passes (look up, blend, move, cut), each
  with slices of the images that need it, so that an image pays for what it drew
  and nothing runs one image at a time. Other forms give the same pixels. For 32
  images of 192 x 192 and 4 layers, on 2 CPU cores, images/s: this 2000; one
  image after another with a branch for each operation 1700; all 16 operations
  for each image (`vmap` of `switch`) 150; four passes with the whole batch 75.

  Args:
    num_layers: 4 in the NFNet recipes; 0 leaves RandAugment out.
    magnitude: 0 to 30; 5, 10 or 15 in the NFNet recipes (2102.06171 Table 1).
    quirks: keep the released quirks (see the top of the file)?

  Returns:
    `(keys [N], images uint8 [N, H, W, 3]) -> uint8 [N, H, W, 3]`, or None when
    there are no layers.
  """
  if num_layers < 0:
    raise InputError(
      f"num_layers is {num_layers} and must be at least 0; 0 leaves "
      "RandAugment out"
    )
  if num_layers == 0:
    return None
  operations = list(OPERATIONS.values())

  def draw(key):
    return jax.random.randint(key, (), 0, len(operations))

  def make_plan(drawn, keys, counts, image):
    direction = jax.random.rademacher(keys[0], (), jnp.float32)
    centre = _draw_centre(keys[1], image)
    view = _look(image, counts, direction, centre, quirks)
    plans = [lambda o=o: o.plan(view, magnitude) for o in operations]
    return jax.lax.switch(drawn, plans)

  def randaugment(keys: jax.Array, images: jax.Array) -> jax.Array:
    _check(images, "[N, H, W, 3]")

    def layer(number, planes):
      parts = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
      parts = jax.vmap(lambda key: jax.random.split(key, 3))(parts)  # [N, 3]
      drawn = jax.vmap(draw)(parts[:, 0])
      needs_counts = jnp.array([o.needs_counts for o in operations])[drawn]
      counts = jnp.zeros((len(planes), 3, 256), jnp.int32)
      counts = _only(_count, needs_counts, counts, planes)
      plans = jax.vmap(make_plan)(drawn, parts[:, 1:], counts, planes)
      for function, names in _PASSES:
        arguments = [getattr(plans, name) for name in names]
        is_needed = _differ(arguments[-1], getattr(_plan(), names[-1]))
        planes = _only(function, is_needed, planes, planes, *arguments)
      return planes

    planes = jnp.moveaxis(images, -1, 1)
    planes = jax.lax.fori_loop(0, num_layers, layer, planes)
    return jnp.moveaxis(planes, 1, -1)

  return randaugment
