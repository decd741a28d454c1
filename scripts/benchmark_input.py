"""Images per second of input pipelines for the F0 recipe, side by side.

Started by benchmark_input.sh. Each row runs in a process of its own, all rows
in turn, several rounds; the table gives medians over the rounds. The images are
scikit-learn's two photographs, cropped at random and saved as JPEGs of
ImageNet's average size (500 x 375 pixels, about 94 KB here).

`finished` counts images as the step gets them: with partners, two were decoded.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from benchmark_machine import num_cores

SIZE = 192  # Pixels, F0's training images.
NUM_LAYERS, MAGNITUDE = 4, 5  # Of RandAugment.
BATCH = 256  # Images per batch of this host.
PER_DEVICE = 32  # Of 4,096 on 128 cores; the released code mixes within them.


class Row:
  """One thing that is timed."""

  def __init__(self, run: Callable[[Path], Iterator[int]], text: str):
    self.run = run  # folder -> endless iterator: images finished since last
    self.text = text


# Ours.


def ours(folder: Path, *, partners: bool) -> Iterator[int]:
  """What `nfnets train` does on the host, on an array_record set."""
  from nfnets.data import batches, sources
  from nfnets.data.source import Sizes

  source = sources.load(
    "tfds",
    sizes=Sizes(train=SIZE, test=256, test_margin=32),
    directory=str(folder),
    tfds_name="photos",
  )
  stream = batches.TrainBatches(
    source.train, batch_size=BATCH, seed=0, with_partners=partners
  )
  with batches.ReadAhead(stream) as ahead:
    while True:
      yield len(next(ahead).images)


def bare(folder: Path) -> Iterator[int]:
  """The decoders and nothing else, on files that are in memory."""
  import cv2
  import simplejpeg

  from nfnets.data import crops

  cv2.setNumThreads(0)
  files = load_jpegs(folder)
  rng = np.random.default_rng(0)
  windows = []
  for i in range(4 * len(files)):
    height, width, *_ = simplejpeg.decode_jpeg_header(files[i % len(files)])
    draws = rng.random(crops.DRAWS).tolist()
    windows.append(crops.random_window(height, width, draws, size=SIZE))

  def work(indices: range) -> int:
    for i in indices:
      image = simplejpeg.decode_jpeg(files[i % len(files)])
      top, left, height, width = windows[i % len(windows)]
      part = image[top : top + height, left : left + width]
      cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return len(indices)

  num_threads = num_cores()
  with ThreadPoolExecutor(num_threads) as pool:
    start = 0
    while True:
      parts = [
        range(start + k, start + BATCH * 2, num_threads)
        for k in range(num_threads)
      ]
      yield sum(pool.map(work, parts))
      start += BATCH * 2


# Pillow in worker processes, as in PyTorch's DataLoader.


def pillow(folder: Path) -> Iterator[int]:
  """Crop and flip alone: whole batches made by one process per core."""
  import multiprocessing

  context = multiprocessing.get_context("spawn")
  with context.Pool(num_cores(), _pillow_start, (folder,)) as pool:
    for batch in pool.imap(_pillow_batch, iter(int, 1)):
      yield len(batch)


def _pillow_start(folder: Path) -> None:
  global _files
  _files = load_jpegs(folder)


def _pillow_batch(_: int) -> np.ndarray:
  from PIL import Image

  from nfnets.data import crops

  rng = np.random.default_rng()
  batch = np.empty((64, SIZE, SIZE, 3), np.uint8)
  for i, at in enumerate(rng.integers(0, len(_files), len(batch))):
    image = Image.open(io.BytesIO(_files[at])).convert("RGB")
    top, left, height, width = crops.random_window(
      image.height, image.width, rng.random(crops.DRAWS).tolist(), size=SIZE
    )
    image = image.resize(
      (SIZE, SIZE),
      Image.Resampling.BICUBIC,
      box=(left, top, left + width, top + height),
    )
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    batch[i] = image
  return batch


# tf.data, written from TensorFlow's own operations.


def tf_data(folder: Path, *, augmented: bool) -> Iterator[int]:
  """Everything on the host, as published; or decode, crop, resize alone."""
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  files = load_jpegs(folder)
  labels = np.arange(len(files)) % 1000

  def prepare(data, label):
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(data),
      bounding_boxes=tf.zeros((1, 0, 4)),
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.08, 1.0),
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    top, left, _ = tf.unstack(begin)
    height, width, _ = tf.unstack(size)
    window = tf.stack([top, left, height, width])
    image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.random_flip_left_right(image)
    image = tf.image.resize(image, (SIZE, SIZE), "bicubic")
    return tf.ensure_shape(image, (SIZE, SIZE, 3)), tf.one_hot(label, 1000)

  def mix(images, labels):
    """Pairs of a temporary batch: MixUp for half of them, CutMix for half."""
    num = PER_DEVICE // 2
    mixup = tf.stack([_tf_mixup_weights() for _ in range(num)])
    cutmix = tf.stack([_tf_cutmix_weights() for _ in range(num)])
    weights = tf.concat([mixup, cutmix], axis=0)
    share = tf.reduce_mean(weights, axis=(1, 2))
    return tuple(
      w * x[:PER_DEVICE] + (1 - w) * x[PER_DEVICE:]
      for w, x in ((weights, images), (share, labels))
    )

  def finish(image, label):
    image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
    image = _tf_randaugment(image)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    image = (tf.cast(image, tf.float32) - mean) / std
    return tf.cast(image, tf.bfloat16), label

  def to_uint8(image, label):
    return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8), label

  data = tf.data.Dataset.from_tensor_slices((files, labels))
  data = data.shuffle(len(files)).repeat().map(prepare, tf.data.AUTOTUNE)
  if augmented:  # In the released code's order.
    data = data.batch(2 * PER_DEVICE, drop_remainder=True)
    data = data.map(mix, tf.data.AUTOTUNE).unbatch()
    data = data.map(finish, tf.data.AUTOTUNE)
  else:
    data = data.map(to_uint8, tf.data.AUTOTUNE)
  options = tf.data.Options()
  options.threading.private_threadpool_size = num_cores()
  options.deterministic = False
  data = data.batch(BATCH).prefetch(tf.data.AUTOTUNE).with_options(options)
  for images, _ in data:
    yield len(images)


def _tf_mixup_weights():
  import tensorflow as tf

  # Beta(a, a) from two gammas.
  gammas = tf.random.gamma((2,), 0.2) + 1e-12
  return tf.fill((SIZE, SIZE, 1), gammas[0] / tf.reduce_sum(gammas))


def _tf_cutmix_weights():
  import tensorflow as tf

  area, y, x = tf.unstack(tf.random.uniform((3,)))
  half = tf.sqrt(area) * SIZE / 2
  at = tf.range(SIZE, dtype=tf.float32)
  rows, columns = (tf.abs(at - centre * SIZE) < half for centre in (y, x))
  inside = rows[:, None, None] & columns[None, :, None]
  return 1 - tf.cast(inside, tf.float32)


def _tf_randaugment(image):
  import tensorflow as tf

  level = MAGNITUDE / 10
  grey = lambda x: tf.tile(tf.image.rgb_to_grayscale(x), (1, 1, 3))
  sign = lambda v: tf.where(tf.random.uniform(()) < 0.5, v, -v)

  def blend(other, x, factor):
    other, x = (tf.cast(y, tf.float32) for y in (other, x))
    mixed = other + factor * (x - other)
    return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)

  def transform(x, *matrix):
    return tf.raw_ops.ImageProjectiveTransformV3(
      images=x[None],
      transforms=tf.stack([*map(float_, matrix), 0.0, 0.0])[None],
      output_shape=tf.constant([SIZE, SIZE]),
      interpolation="NEAREST",
      fill_mode="CONSTANT",
      fill_value=128.0,
    )[0]

  float_ = lambda v: tf.cast(v, tf.float32)

  def rotate(x):
    angle = sign(level * 30 * np.pi / 180)
    c, s, m = tf.cos(angle), tf.sin(angle), (SIZE - 1) / 2
    return transform(x, c, -s, m - c * m + s * m, s, c, m - s * m - c * m)

  def autocontrast(x):
    f = float_(x)
    low = tf.reduce_min(f, axis=(0, 1))
    high = tf.reduce_max(f, axis=(0, 1))
    scaled = (f - low) * 255 / tf.maximum(high - low, 1)
    return tf.cast(tf.where(high > low, scaled, f), tf.uint8)

  def equalize(x):
    def channel(c):
      histogram = tf.histogram_fixed_width(tf.cast(c, tf.int32), (0, 255), 256)
      last = tf.reduce_max(tf.where(histogram > 0, tf.range(256), 0))
      step = (tf.reduce_sum(histogram) - histogram[last]) // 255
      table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(
        step, 1
      )
      table = tf.where(step > 0, tf.clip_by_value(table, 0, 255), tf.range(256))
      return tf.gather(tf.cast(table, tf.uint8), tf.cast(c, tf.int32))

    return tf.stack([channel(x[..., i]) for i in range(3)], axis=-1)

  def sharpness(x):
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    kernel = np.tile(kernel[:, :, None, None] / 13, (1, 1, 3, 1))
    blurred = tf.nn.depthwise_conv2d(
      float_(x)[None], kernel, (1, 1, 1, 1), "VALID"
    )[0]
    blurred = tf.pad(blurred, ((1, 1), (1, 1), (0, 0)))
    inner = tf.pad(tf.ones((SIZE - 2, SIZE - 2, 1)), ((1, 1), (1, 1), (0, 0)))
    return blend(tf.where(inner > 0, blurred, float_(x)), x, 0.1 + level * 1.8)

  def cutout(x):
    half = level * 40
    y, z = tf.unstack(tf.random.uniform((2,)) * SIZE)
    at = tf.range(SIZE, dtype=tf.float32)
    rows, columns = tf.abs(at - y) < half, tf.abs(at - z) < half
    inside = rows[:, None, None] & columns[None, :, None]
    return tf.where(inside, tf.constant(128, tf.uint8), x)

  def contrast(x):
    mean = tf.reduce_mean(float_(tf.image.rgb_to_grayscale(x)))
    return blend(tf.fill((SIZE, SIZE, 3), mean), x, 0.1 + level * 1.8)

  def solarize_add(x):
    added = tf.cast(x, tf.int32) + int(level * 110)
    added = tf.cast(tf.clip_by_value(added, 0, 255), tf.uint8)
    return tf.where(x < 128, added, x)

  shift = level * 100
  operations = [
    autocontrast,
    equalize,
    lambda x: 255 - x,
    rotate,
    lambda x: tf.bitwise.left_shift(
      tf.bitwise.right_shift(x, np.uint8(8 - int(level * 4))),
      np.uint8(8 - int(level * 4)),
    ),
    lambda x: tf.where(x < int(level * 255), x, 255 - x),
    lambda x: blend(grey(x), x, 0.1 + level * 1.8),
    contrast,
    lambda x: blend(tf.zeros_like(x), x, 0.1 + level * 1.8),
    sharpness,
    lambda x: transform(x, 1, sign(level * 0.3), 0, 0, 1, 0),
    lambda x: transform(x, 1, 0, 0, sign(level * 0.3), 1, 0),
    lambda x: transform(x, 1, 0, sign(shift), 0, 1, 0),
    lambda x: transform(x, 1, 0, 0, 0, 1, sign(shift)),
    cutout,
    solarize_add,
  ]
  for _ in range(NUM_LAYERS):
    choice = tf.random.uniform((), 0, len(operations), tf.int32)
    x = image
    branches = [lambda op=op, x=x: op(x) for op in operations]
    image = tf.ensure_shape(tf.switch_case(choice, branches), (SIZE, SIZE, 3))
  return image


# The device's share.


def augmentation(folder: Path) -> Iterator[int]:
  """The recipe's augmentation, compiled, on JAX's default device."""
  del folder
  import jax
  import jax.numpy as jnp

  from nfnets.augment import make_augment
  from nfnets.data.batch import Batch

  augment = jax.jit(
    make_augment(
      flip=True,
      mixup_alpha=0.2,
      cutmix=True,
      randaugment_layers=NUM_LAYERS,
      randaugment_magnitude=MAGNITUDE,
    )
  )
  num = 32 if jax.default_backend() == "cpu" else BATCH
  rng = np.random.default_rng(0)
  images, partners = rng.integers(0, 256, (2, num, SIZE, SIZE, 3), np.uint8)
  labels = np.arange(num, dtype=np.int32)
  batch = jax.device_put(
    Batch(images, labels, np.ones(num, np.float32), partners, labels)
  )
  step = 0
  while True:
    key = jax.random.key(step)
    jax.block_until_ready(augment(key, jnp.arange(num), batch))
    yield num
    step += 1


ROWS = {
  "bare": Row(bare, "simplejpeg and OpenCV alone, threads: decoded"),
  "ours_fresh": Row(
    lambda folder: ours(folder, partners=True), "ours, `fresh`: finished"
  ),
  "ours_roll": Row(
    lambda folder: ours(folder, partners=False), "ours, `roll`: finished"
  ),
  "tf_published": Row(
    lambda folder: tf_data(folder, augmented=True),
    "tf.data, published (mixing, RandAugment): finished",
  ),
  "tf_bare": Row(
    lambda folder: tf_data(folder, augmented=False),
    "tf.data, decode, crop, resize: decoded",
  ),
  "pillow": Row(pillow, "Pillow, worker processes, crop and flip: finished"),
  "augmentation": Row(augmentation, "our augmentation, on JAX's device"),
}


def make_images(folder: Path, num: int) -> None:
  """Writes the JPEGs, as files and as a TFDS set (without TensorFlow)."""
  import tensorflow_datasets as tfds
  from PIL import Image
  from sklearn.datasets import load_sample_images

  photos = [Image.fromarray(photo) for photo in load_sample_images().images]
  rng = np.random.default_rng(0)
  files = []
  for i in range(num):
    width, height = rng.integers(400, 640), rng.integers(300, 427)
    left, top = rng.integers(0, 641 - width), rng.integers(0, 428 - height)
    part = photos[i % 2].crop((left, top, left + width, top + height))
    file = io.BytesIO()
    part.resize((500, 375), Image.Resampling.BICUBIC).save(
      file, "JPEG", quality=97
    )
    files.append(file.getvalue())
    (folder / f"{i:05}.jpg").write_bytes(files[-1])

  class Photos(tfds.core.GeneratorBasedBuilder):
    """The files with made-up labels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {name: self._generate_examples() for name in ("train", "test")}

    def _generate_examples(self):
      for i, data in enumerate(files):
        yield i, {"image": io.BytesIO(data), "label": i % 1000}

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(None):
    builder = Photos(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()


def load_jpegs(folder: Path) -> list[bytes]:
  """The files, into memory."""
  return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def measure(name: str, folder: Path, seconds: float) -> float:
  """Images per second of one row, after a warm-up of a third of the time."""
  counts = iter(ROWS[name].run(folder))
  next(counts)
  start = time.perf_counter()
  while time.perf_counter() - start < seconds / 3:
    next(counts)
  num, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    num += next(counts)
  return num / (time.perf_counter() - start)


def to_markdown(rates: dict[str, list[float]]) -> str:
  """The table of the README."""
  cores = num_cores()
  published = statistics.median(rates.get("tf_published", [0]))
  lines = [
    "| images per second | median | range | per core | x published |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name, values in rates.items():
    median = statistics.median(values)
    ratio = f"{median / published:.2f}" if published else ""
    lines.append(
      f"| {ROWS[name].text} | {median:.0f} | {min(values):.0f} to "
      f"{max(values):.0f} | {median / cores:.0f} | {ratio} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="benchmark_input.sh", description=__doc__.split("\n\n")[0]
  )
  parser.add_argument(
    "--rows",
    nargs="+",
    choices=ROWS,
    default=list(ROWS),
    metavar="ROW",
    help=f"which, of {', '.join(ROWS)} (default: all)",
  )
  parser.add_argument(
    "--rounds", type=int, default=5, help="of all rows (default: 5)"
  )
  parser.add_argument(
    "--seconds", type=float, default=9, help="per row and round (default: 9)"
  )
  parser.add_argument(
    "--images", type=int, default=512, help="different ones (default: 512)"
  )
  parser.add_argument(
    "--out", type=Path, help="also write the figures there, as JSON"
  )
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  for option in ("rounds", "seconds", "images"):
    if not getattr(args, option) > 0:
      parser.error(f"--{option}={getattr(args, option)} is not positive")
  if args.one:
    name, folder = args.one
    print(measure(name, Path(folder), args.seconds), flush=True)
    os._exit(0)  # Threads and workers that are still busy end with it.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    compare(args)
  except KeyboardInterrupt:
    sys.exit(130)


def compare(args: argparse.Namespace) -> None:
  """Times all rows in turn and prints the table."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      make_images(Path(folder), args.images)
    except ModuleNotFoundError as error:
      sys.exit(
        f"{error}: the images are made by tensorflow-datasets, Pillow "
        "and scikit-learn"
      )
    size = statistics.mean(map(len, load_jpegs(Path(folder)))) / 1000
    rates: dict[str, list[float]] = {name: [] for name in args.rows}
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # Workers end by force.
    for i in range(args.rounds):
      for name in list(rates):
        command = [sys.executable, __file__, f"--seconds={args.seconds}"]
        result = subprocess.run(
          [*command, "--one", name, folder],
          env=quiet,
          stdout=subprocess.PIPE,
          text=True,
          check=False,
        )
        if result.returncode:
          del rates[name]
          print(f"{name} failed and is left out", file=sys.stderr, flush=True)
          continue
        rates[name].append(float(result.stdout.split()[-1]))
        print(
          f"round {i + 1}/{args.rounds}  {name:13} {rates[name][-1]:7.0f}/s",
          file=sys.stderr,
          flush=True,
        )
  if not rates:
    sys.exit("nothing could be measured")
  table = to_markdown(rates)
  print(
    f"{num_cores()} cores ({platform.processor() or platform.machine()}), "
    f"Python {platform.python_version()}, {args.images} JPEGs of "
    f"{size:.0f} KB, {args.rounds} rounds of {args.seconds:g} s\n\n{table}"
  )
  if args.out:
    args.out.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
  main()
