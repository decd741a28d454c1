"""RandAugment: the released pixels, each image by itself, quirks by name."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from nfnets import devices, randaugment
from nfnets.errors import InputError

# In the released order.
NAMES = [
  *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize"),
  *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"),
  *("TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
]
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
SIZE = (24, 40, 3)
NUM = 16
KEY = jax.random.key(0)

RELEASED = dict(np.load(REFERENCE / "randaugment.npz"))
PHOTO = RELEASED.pop("image")

few = functools.partial(
  hypothesis.settings, derandomize=True, deadline=None, database=None
)


def draw_images(num, seed=0):
  """Noise without the ends of the range, so that AutoContrast has an effect."""
  generator = np.random.default_rng(seed)
  return generator.integers(10, 240, (num, *SIZE), dtype=np.uint8)


def apply(name, image, magnitude, **options):
  key = KEY if name == "Cutout" else None
  operation = randaugment.OPERATIONS[name]
  return np.asarray(operation(image, magnitude, key=key, **options))


@functools.cache
def compiled(num_layers, magnitude):
  """RandAugment as one program; shared, since it takes seconds to compile."""
  return jax.jit(randaugment.make_randaugment(num_layers, magnitude))


@functools.cache
def compiled_for_all():
  """Four layers, with the magnitude as a third argument."""

  def run(keys, images, magnitude):
    return randaugment.make_randaugment(4, magnitude)(keys, images)

  return jax.jit(run)


def augment(keys, images, magnitude=7.5):
  return np.asarray(compiled_for_all()(keys, images, jnp.float32(magnitude)))


# The released pixels.


def assert_released(name, result, expected):
  assert result.dtype == np.uint8
  if name in MOVES:
    assert np.mean(np.all(result == expected, axis=-1)) >= 0.995
  else:
    tolerance = 1 if name == "Sharpness" else 0
    np.testing.assert_allclose(result.astype(int), expected, 0, tolerance)


@pytest.mark.parametrize("label", RELEASED)
def test_released_pixels(label):
  name, magnitude, *sign = label.split("/")
  magnitude = -int(magnitude) if sign == ["-"] else int(magnitude)
  result = apply(name, PHOTO, magnitude)
  assert_released(name, result, RELEASED[label])


def test_released_pixels_cover_the_operations():
  labels = {label.split("/")[0] for label in RELEASED}
  assert labels == set(NAMES) - {"Cutout"}
  assert len(RELEASED) == 2 * (10 + 2 * 5)


def test_operations_in_the_released_order():
  assert list(randaugment.OPERATIONS) == NAMES


# Arguments at magnitudes without stored pixels, worked out by hand.


def test_translations_in_pixels():
  for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
    moved = apply(name, PHOTO, 0.7)  # 7 pixels.
    inside, outside = np.split(moved, [-7], axis)
    np.testing.assert_array_equal(inside, np.split(PHOTO, [7], axis)[1])
    np.testing.assert_array_equal(outside, 128)


def test_a_quarter_turn():
  np.testing.assert_array_equal(apply("Rotate", PHOTO, 30), np.rot90(PHOTO))
  np.testing.assert_array_equal(apply("Rotate", PHOTO, -30), np.rot90(PHOTO, 3))


@pytest.mark.parametrize(
  ("name", "magnitude", "value", "expected"),
  [
    ("Brightness", 10, 100, 190),
    ("Brightness", 0, 100, 10),
    ("Posterize", 10, 0b10110111, 0b10110000),
    ("Posterize", 0, 0b10110111, 0b10000000),
    ("Solarize", 2, 51, 204),  # int(51.2) and up.
    ("Solarize", 2, 50, 50),
    ("SolarizeAdd", 1, 100, 111),
    ("SolarizeAdd", 1, 128, 128),
    ("SolarizeAdd", 23, 0, 252),  # 23 / 10 * 110 is just below 253.
    ("Contrast", 10, 100, 157),  # 36 + 1.9 * 64, and 96 * 96 / 256 = 36.
  ],
)
def test_arguments(name, magnitude, value, expected):
  image = np.full_like(PHOTO, value)
  assert np.unique(apply(name, image, magnitude)).tolist() == [expected]


def test_lookups_of_one_colour_leave_the_others():
  image = np.clip(PHOTO, 10, 240)
  image[..., 1] = 77  # Nothing to stretch or to spread.
  for name in ("AutoContrast", "Equalize"):
    result = apply(name, image, 5)
    np.testing.assert_array_equal(result[..., 1], 77)
    assert np.any(result[..., 0] != image[..., 0])


def test_equalized_values_are_equally_frequent():
  dark = np.random.default_rng(0).uniform(0, 15, PHOTO.shape) ** 2
  result = apply("Equalize", dark.astype(np.uint8), 5)
  quarters = np.histogram(result, bins=4, range=(0, 256))[0]
  np.testing.assert_allclose(quarters / result.size, 0.25, atol=0.05)


# Compiled or not, traced or not.


@pytest.mark.parametrize("name", NAMES)
def test_compiled_pixels_are_the_same(name):
  operation = randaugment.OPERATIONS[name]
  function = functools.partial(operation, magnitude=12.7, key=KEY)
  np.testing.assert_array_equal(jax.jit(function)(PHOTO), function(PHOTO))


@pytest.mark.parametrize("name", NAMES)
def test_traced_magnitudes(name):
  traced = jax.jit(lambda m: randaugment.OPERATIONS[name](PHOTO, m, key=KEY))
  for magnitude in (5, 10, 15):
    expected = apply(name, PHOTO, magnitude).astype(int)
    result = np.asarray(traced(jnp.float32(magnitude)))
    difference = np.abs(result - expected)
    if name in MOVES:
      assert np.mean(difference > 0) < 0.01
    else:
      assert np.mean(difference > 0) < 0.1
      assert np.max(difference) <= 1


# Cutout.


def test_cutout_is_a_square_around_a_place_inside():
  image = jnp.zeros(SIZE, jnp.uint8)
  keys = jax.random.split(KEY, 500)

  @jax.jit
  @jax.vmap
  def cutout(key):
    return randaugment.OPERATIONS["Cutout"](image, 1.5, key=key)

  results = np.asarray(cutout(keys))
  assert set(np.unique(results)) == {0, 128}
  ends = [set(), set()]
  for result in results:
    places = np.nonzero(result[..., 0])
    sides = [np.ptp(place) + 1 for place in places]
    assert len(places[0]) == np.prod(sides)  # Filled without a hole.
    np.testing.assert_array_equal(result, result[..., :1].repeat(3, -1))
    for axis in (0, 1):
      low, high = places[axis].min(), places[axis].max() + 1
      # 12 pixels, or less where a border is in the way: never less than half.
      is_whole = low > 0 and high < SIZE[axis]
      assert sides[axis] == 12 if is_whole else 6 <= sides[axis] <= 12
      ends[axis].add(int(high))
  # The centre may be in every row and column.
  assert ends[0] == set(range(6, 25))
  assert ends[1] == set(range(6, 41))


def test_cutout_needs_a_key():
  with pytest.raises(InputError, match=r"Cutout .* pass a random key"):
    randaugment.OPERATIONS["Cutout"](PHOTO, 5)


# Quirks.


@pytest.mark.parametrize(
  ("magnitude", "changed"),
  [
    (5, []),
    (10, ["Contrast", "Solarize"]),
    (20, ["Contrast", "Solarize"]),
    (22.5, ["Contrast", "Posterize", "Solarize"]),
  ],
)
def test_quirks_change_these_operations_only(magnitude, changed):
  differ = [
    name
    for name in NAMES
    if np.any(
      apply(name, PHOTO, magnitude)
      != apply(name, PHOTO, magnitude, quirks=False)
    )
  ]
  assert sorted(differ) == changed


def test_solarize_wraps_only_as_a_quirk():
  solarize = functools.partial(apply, "Solarize", PHOTO)
  np.testing.assert_array_equal(solarize(10), 255 - PHOTO)
  np.testing.assert_array_equal(solarize(15), solarize(5))
  for magnitude in (10, 15, 30):
    np.testing.assert_array_equal(solarize(magnitude, quirks=False), PHOTO)


def test_posterize_wraps_only_as_a_quirk():
  posterize = functools.partial(apply, "Posterize", PHOTO)
  np.testing.assert_array_equal(posterize(20), PHOTO)
  np.testing.assert_array_equal(posterize(25), PHOTO & 128)
  np.testing.assert_array_equal(posterize(25, quirks=False), PHOTO)


def test_contrast_keeps_the_mean_unless_as_a_quirk():
  # Grey 100 and 140 in equal parts; grey images come out at most one lower.
  image = np.full_like(PHOTO, 100)
  image[::2] = 140
  result = apply("Contrast", image, 0, quirks=False)
  assert np.unique(result).tolist() in ([117, 121], [118, 122])
  assert np.unique(apply("Contrast", image, 0)).tolist() == [42, 46]


def test_the_batch_can_do_without_quirks():
  images = np.repeat(draw_images(1), 64, 0)
  randomize = randaugment.make_randaugment(1, 15, quirks=False)
  results = jax.jit(randomize)(jax.random.split(KEY, 64), images)
  found = {image.tobytes() for image in np.asarray(results)}
  for name in ("Contrast", "Solarize"):
    assert apply(name, images[0], 15).tobytes() not in found
    assert apply(name, images[0], 15, quirks=False).tobytes() in found


# The batch.


@hypothesis.given(st.floats(0, 30), st.sampled_from(NAMES))
@few(max_examples=40)
def test_any_magnitude_keeps_type_and_shape(magnitude, name):
  images = draw_images(NUM)
  for result, image in (
    (augment(jax.random.split(KEY, NUM), images, magnitude), images),
    (apply(name, images[0], magnitude), images[0]),
  ):
    assert (result.dtype, result.shape) == (np.uint8, image.shape)


@hypothesis.given(st.integers(0, 1000), st.data())
@few(max_examples=20)
def test_an_image_does_not_depend_on_its_batch(seed, data):
  keys = jax.random.split(jax.random.key(seed), NUM)
  images = draw_images(NUM, seed)
  results = augment(keys, images)
  # Among others, and in batches of other sizes.
  order = np.array(data.draw(st.permutations(range(NUM))))
  np.testing.assert_array_equal(
    augment(keys[order], images[order]), results[order]
  )
  for size in (1, 11):
    some = order[:size]
    np.testing.assert_array_equal(
      augment(keys[some], images[some]), results[some]
    )


def test_devices_do_not_matter():
  keys, images = jax.random.split(KEY, NUM), draw_images(NUM)
  randomize = randaugment.make_randaugment(4, jnp.float32(7.5))
  split = PartitionSpec(devices.AXIS)
  mapped = jax.shard_map(
    randomize,
    mesh=devices.make_mesh(),
    in_specs=split,
    out_specs=split,
    check_vma=False,
  )
  np.testing.assert_array_equal(
    jax.jit(mapped)(keys, images), augment(keys, images, 7.5)
  )


def test_the_key_decides():
  images = np.repeat(draw_images(1), NUM, 0)
  one, again, other = (
    augment(jax.random.split(jax.random.key(seed), NUM), images, 2)
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert np.mean(np.any(one != other, axis=(1, 2, 3))) > 0.8
  assert len({image.tobytes() for image in one}) > 0.8 * NUM


def test_every_layer_draws_every_operation_in_both_directions():
  """One layer is one operation, as it is by itself, and each is as likely."""
  num, magnitude = 640, 2
  image = draw_images(1)[0]
  known = {
    apply(name, image, sign * magnitude).tobytes(): f"{name} {sign}"
    for name in NAMES
    if name != "Cutout"
    for sign in ((1, -1) if name in MOVES else (1,))
  }
  assert len(known) == 20  # All differ.
  keys = jax.random.split(KEY, num)
  randomize = compiled(1, magnitude)
  counts = dict.fromkeys([*known.values(), "Cutout"], 0)
  for result in np.asarray(randomize(keys, np.repeat(image[None], num, 0))):
    label = known.get(result.tobytes(), "Cutout")
    counts[label] += 1
    if label == "Cutout":
      is_cut = np.any(result != image, axis=-1)
      assert np.all(result[is_cut] == 128)
      assert 8 * 8 <= np.sum(is_cut) <= 16 * 16
  # 40 of each, 20 of each direction; four standard deviations.
  for label, count in counts.items():
    expected = 20 if label.split()[0] in MOVES else 40
    assert abs(count - expected) < 4 * expected**0.5, label


def test_layers_add_up():
  """Two layers take Invert twice for some, and rarely leave an image be."""
  image = draw_images(1)[0]
  keys, images = jax.random.split(KEY, 640), np.repeat(image[None], 640, 0)
  results = {n: np.asarray(compiled(n, 2)(keys, images)) for n in (1, 2)}
  assert not np.any(np.all(results[1] == image, axis=(1, 2, 3)))
  assert np.any(np.all(results[2] == image, axis=(1, 2, 3)))
  num_distinct = [len({x.tobytes() for x in results[n]}) for n in (1, 2)]
  assert num_distinct[1] > 3 * num_distinct[0]


# What it is given.


def test_no_layers_are_no_function():
  assert randaugment.make_randaugment(0, 10) is None


def test_wrong_input():
  with pytest.raises(InputError, match="num_layers is -1"):
    randaugment.make_randaugment(-1, 10)
  keys = jax.random.split(KEY, 2)
  with pytest.raises(InputError, match=r"got float32 .* needs uint8 \[N, H"):
    randaugment.make_randaugment(2, 10)(keys, jnp.zeros((2, 8, 8, 3)))
  with pytest.raises(InputError, match=r"got uint8 \[8, 8\] .* \[H, W, 3\]"):
    randaugment.OPERATIONS["Invert"](jnp.zeros((8, 8), jnp.uint8), 5)
