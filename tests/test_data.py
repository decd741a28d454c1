"""Data: order, position, sharding, padding, image files, preprocessing."""

import errno
import io
import os
import pathlib
import re
import shutil
import sys
import threading
import time

import cv2
import jax
import numpy as np
import pytest
from conftest import REFERENCE
from PIL import Image

from nfnets.data import (
  batches,
  crops,
  digits,
  encoded,
  folder,
  images,
  sources,
)
from nfnets.data.source import Examples, Sizes, Split
from nfnets.errors import InputError

SIZES = Sizes(train=24, test=32, test_margin=8)


def _numbered(num_examples, bad=()):
  """A split whose images are their own indices; some cannot be read."""

  def read(indices, draws):
    del draws
    pixels = np.tile(indices[:, None, None, None], (1, 2, 2, 3))
    is_good = ~np.isin(indices, bad)
    return Examples(pixels, indices.astype(np.int32), is_good)

  return Split(num_examples, read)


def _take(iterator, num):
  return [next(iterator).labels.tolist() for _ in range(num)]


def test_an_epoch_gives_every_example_once_in_another_order_each_time():
  stream = batches.TrainBatches(_numbered(10), batch_size=4, seed=0)
  seen = [
    i for batch in _take(stream, 5) for i in batch
  ]  # Two epochs, across their border.
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  assert seen[:10] != seen[10:]
  assert stream.position == 20


def test_order_depends_on_the_seed():
  make = lambda seed: batches.TrainBatches(
    _numbered(50), batch_size=50, seed=seed
  )
  assert _take(make(0), 1) == _take(make(0), 1) != _take(make(1), 1)


@pytest.mark.parametrize("num_before", [0, 1, 3, 7])
def test_a_position_resumes_with_exactly_the_rest(num_before):
  options = {"batch_size": 4, "seed": 3}
  whole = _take(batches.TrainBatches(_numbered(10), **options), 12)
  before = batches.TrainBatches(_numbered(10), **options)
  assert _take(before, num_before) == whole[:num_before]
  after = batches.TrainBatches(
    _numbered(10), position=before.position, **options
  )
  assert _take(after, 12 - num_before) == whole[num_before:]


def test_hosts_share_each_batch():
  options = {"batch_size": 4, "seed": 0}
  whole = _take(batches.TrainBatches(_numbered(10), **options), 5)
  hosts = [
    _take(
      batches.TrainBatches(_numbered(10), host=h, num_hosts=2, **options), 5
    )
    for h in (0, 1)
  ]
  assert [a + b for a, b in zip(*hosts, strict=True)] == whole


@pytest.mark.parametrize("num_hosts", [1, 2])
@pytest.mark.parametrize("num_examples", [7, 8, 9])
def test_evaluation_sees_every_example_once(num_examples, num_hosts):
  seen, counts = [], set()
  for host in range(num_hosts):
    mine = list(
      batches.eval_batches(
        _numbered(num_examples), batch_size=4, host=host, num_hosts=num_hosts
      )
    )
    counts.add(len(mine))
    for batch in mine:
      assert len(batch.labels) == 4 // num_hosts
      seen += batch.labels[batch.mask > 0].tolist()
  assert sorted(seen) == list(range(num_examples))
  assert len(counts) == 1  # All hosts take part in every step.


def test_digits_hold_out_a_fifth():
  (train, train_labels), (test, test_labels) = digits.load(32)
  assert train.shape == (1437, 32, 32, 3)
  assert test.shape == (360, 32, 32, 3)
  assert train.dtype == np.uint8
  assert train.max() == 255
  assert set(train_labels) == set(test_labels) == set(range(10))
  flat = {x.tobytes() for x in train} & {x.tobytes() for x in test}
  assert not flat


def test_unknown_source():
  with pytest.raises(InputError, match=r"unknown data source 'digit': did you"):
    sources.load("digit", sizes=SIZES)
  with pytest.raises(
    InputError, match=r"source=folder needs --config.data.dir"
  ):
    sources.load("folder", sizes=SIZES)


def test_evaluation_preprocessing_is_the_published_one():
  expected = np.load(REFERENCE / "eval_preprocess.npz")
  ours = images.resize_crop(expected["decoded"], 96, 32)
  np.testing.assert_allclose(ours, expected["resize_crop"], atol=1e-3)
  ours = images.EVAL_CROPS["padded"](expected["decoded"], 96, 32)
  np.testing.assert_allclose(ours, expected["padded_center_crop"], atol=1e-3)


def test_resize_to_the_same_size_is_the_identity():
  image = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
  np.testing.assert_array_equal(images.resize(image, 9), image)


def _photo():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)


def test_image_modes_become_upright_rgb(tmp_path):
  photo = _photo()
  rgb = Image.fromarray(photo)
  grey = np.asarray(rgb.convert("L"))

  rgb.save(tmp_path / "rgb.png")
  np.testing.assert_array_equal(images.read(tmp_path / "rgb.png"), photo)

  rgb.convert("L").save(tmp_path / "grey.png")
  read = images.read(tmp_path / "grey.png")
  np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, -1))

  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
  read = images.read(tmp_path / "grey16.png")
  np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, -1))

  alpha = np.zeros((6, 8, 1), np.uint8)
  Image.fromarray(np.concatenate([photo, alpha], -1)).save(tmp_path / "a.png")
  assert (images.read(tmp_path / "a.png") == 255).all()

  exif = Image.Exif()
  exif[0x0112] = 6  # The camera was held on its side.
  rgb.save(tmp_path / "turned.png", exif=exif)
  read = images.read(tmp_path / "turned.png")
  np.testing.assert_array_equal(read, np.rot90(photo, -1))

  # Of a JPEG too, whatever comes before it.
  rgb.save(tmp_path / "first.jpg", exif=exif)
  first = (tmp_path / "first.jpg").read_bytes()
  name = b"http://ns.adobe.com/xap/1.0/" + 100 * b"."
  before = b"\xff\xe1" + (2 + len(name)).to_bytes(2) + name
  (tmp_path / "later.jpg").write_bytes(first[:2] + before + first[2:])
  (tmp_path / "filled.jpg").write_bytes(first[:2] + b"\xff\xff" + first[2:])
  for jpeg in ("first.jpg", "later.jpg", "filled.jpg"):
    assert images.read(tmp_path / jpeg).shape == (8, 6, 3)

  # Lossy files of what a few cosines describe.
  down, across = np.mgrid[0:32, 0:48]
  smooth = np.stack([5 * down, 255 - 5 * across, 3 * (down + across)], -1)
  smooth = smooth.clip(0, 255).astype(np.uint8)
  of_smooth = Image.fromarray(smooth)

  def assert_near(name, expected):
    difference = np.abs(images.read(tmp_path / name) - expected.astype(float))
    assert difference.max() < 12, name

  of_smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
  assert_near("cmyk.jpg", smooth)
  levels = of_smooth.convert("L")
  levels.save(tmp_path / "grey.jpg", quality=95)
  assert_near("grey.jpg", np.asarray(levels)[..., None].repeat(3, -1))
  of_smooth.save(tmp_path / "turned.jpg", quality=95, exif=exif)
  assert_near("turned.jpg", np.rot90(smooth, -1))
  of_smooth.save(tmp_path / "plain.jpg", quality=95)
  assert_near("plain.jpg", smooth)
  of_smooth.save(tmp_path / "near.avif", quality=95)
  assert_near("near.avif", smooth)
  rgb.save(tmp_path / "exact.webp", lossless=True)
  np.testing.assert_array_equal(images.read(tmp_path / "exact.webp"), photo)

  frames = [rgb.quantize(), Image.new("P", rgb.size)]
  frames[0].save(
    tmp_path / "moving.gif", save_all=True, append_images=frames[1:]
  )
  assert images.read(tmp_path / "moving.gif").std() > 10


def test_files_that_are_no_images(tmp_path):
  (tmp_path / "text.png").write_text("hello")
  with pytest.raises(InputError, match=r"text.png is not an image"):
    images.read(tmp_path / "text.png")
  Image.fromarray(_photo()).save(tmp_path / "whole.png")
  whole = (tmp_path / "whole.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"cut.png cannot be read as an image"):
    images.read(tmp_path / "cut.png")
  Image.fromarray(np.ones((6, 8), np.float32)).save(tmp_path / "fraction.tif")
  with pytest.raises(InputError, match=r"fraction.tif .* are fractions: save"):
    images.read(tmp_path / "fraction.tif")


def test_finding_images(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / ".ipynb_checkpoints").mkdir()
  hidden = ("b/._a.png", ".ipynb_checkpoints/z-checkpoint.jpg")
  for name in ("z.JPG", "b/a.png", "notes.txt", *hidden):
    (tmp_path / name).touch()
  found = [p.relative_to(tmp_path).as_posix() for p in images.find([tmp_path])]
  assert found == ["b/a.png", "z.JPG"]
  found = images.find([f"{tmp_path}/**/*.png"])
  assert found == [tmp_path / "b" / "a.png"]
  # A file that is named is taken, whatever its ending.
  assert images.find([tmp_path / "notes.txt"])
  with pytest.raises(InputError, match=r"nowhere does not exist"):
    images.find([tmp_path / "nowhere"])
  (tmp_path / "pipes").mkdir()
  os.mkfifo(tmp_path / "pipes" / "a.png")  # Nothing may ever come of it.
  (tmp_path / "pipes" / "b.png").symlink_to("gone.png")
  assert images.find(tmp_path / "pipes") == [tmp_path / "pipes" / "b.png"]
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"empty holds no image files"):
    images.find([tmp_path / "empty"])


def test_partners_come_from_another_order():
  make = lambda position: batches.TrainBatches(
    _numbered(10), batch_size=5, seed=0, position=position, with_partners=True
  )
  taken = [batch for _, batch in zip(range(4), make(0), strict=False)]
  for labels in ("labels", "partner_labels"):
    seen = np.concatenate([getattr(batch, labels) for batch in taken]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
  assert (taken[0].labels != taken[0].partner_labels).any()
  assert (taken[0].partner_images[:, 0, 0, 0] == taken[0].partner_labels).all()
  again = next(make(10))
  np.testing.assert_array_equal(again.partner_labels, taken[2].partner_labels)


def test_examples_that_cannot_be_read_are_replaced_in_training():
  stream = batches.TrainBatches(_numbered(6, bad=(2, 3)), batch_size=6, seed=0)
  labels = next(stream).labels.tolist()
  assert len(labels) == 6
  assert set(labels) == {0, 1, 4, 5}
  none = batches.TrainBatches(_numbered(2, bad=(0, 1)), batch_size=2, seed=0)
  with pytest.raises(
    InputError, match=r"none of the 2 images of a batch.* 9 batches after it"
  ):
    next(none)


@pytest.mark.parametrize("position", [0, 4])
def test_one_of_many_hosts_whose_only_image_cannot_be_read(position):
  """Takes its image of the next batch, and the same when it goes on there."""
  (bad,) = batches.epoch_order(8, seed=0, epoch=0)[[position + 1]]
  make = lambda split, start: batches.TrainBatches(
    split, batch_size=4, seed=0, position=start, host=1, num_hosts=4
  )
  whole = make(_numbered(8), 0)
  labels = [next(whole).labels.tolist() for _ in range(3)]
  at = position // 4
  labels[at] = labels[at + 1]
  stream = make(_numbered(8, bad=(bad,)), 0)
  assert [next(stream).labels.tolist() for _ in range(2)] == labels[:2]
  again = make(_numbered(8, bad=(bad,)), position)
  assert next(again).labels.tolist() == labels[at]


def test_examples_that_cannot_be_read_are_masked_in_evaluation():
  found = list(batches.eval_batches(_numbered(6, bad=(2,)), batch_size=4))
  labels = np.concatenate([batch.labels[batch.mask > 0] for batch in found])
  assert labels.tolist() == [0, 1, 3, 4, 5]


def test_reading_ahead_changes_neither_order_nor_position():
  make = lambda: batches.TrainBatches(_numbered(10), batch_size=4, seed=0)
  plain = make()
  with batches.ReadAhead(make()) as ahead:
    for _ in range(7):
      np.testing.assert_array_equal(next(ahead).labels, next(plain).labels)
      assert ahead.position == plain.position


def test_reading_ahead_ends_where_the_batches_do():
  make = lambda: batches.eval_batches(_numbered(10), batch_size=4)
  with batches.ReadAhead(make(), depth=1) as ahead:
    found = [batch.labels.tolist() for batch in ahead]
  assert found == [batch.labels.tolist() for batch in make()]


def test_reading_ahead_raises_what_its_thread_raised():
  none = batches.TrainBatches(_numbered(2, bad=(0, 1)), batch_size=2, seed=0)
  with (
    batches.ReadAhead(none) as ahead,
  ):
    for _ in range(2):  # Whoever asks again does not wait for ever.
      with pytest.raises(InputError, match=r"none of the 2 images"):
        next(ahead)


@pytest.mark.parametrize(
  ("height", "width"), [(375, 500), (500, 333), (64, 64)]
)
def test_random_windows_match_their_definition(height, width):
  rng = np.random.default_rng(0)
  windows = np.array(
    [
      crops.random_window(height, width, draws, size=48)
      for draws in rng.random((3000, *crops.DRAWS)).tolist()
    ]
  )
  top, left, h, w = windows.T
  assert (top >= 0).all()
  assert (left >= 0).all()
  assert (top + h <= height).all()
  assert (left + w <= width).all()
  areas = h * w / (height * width)
  assert areas.min() >= 0.1
  assert areas.min() < 0.13
  assert areas.max() > 0.8
  aspects = w / h
  # Rounding to whole pixels moves small crops a little.
  assert aspects.min() > 3 / 4 - 0.03
  assert aspects.max() < 4 / 3 + 0.06
  # Places are uniform over what is free.
  free = height - h
  share = top[free > 10] / (free[free > 10] - 1)
  np.testing.assert_allclose(share.mean(), 0.5, atol=0.03)


def test_window_of_a_very_long_image_is_the_padded_centre():
  draws = np.random.default_rng(0).random(crops.DRAWS).tolist()
  window = crops.random_window(10, 4000, draws, size=192)
  assert window == crops.padded_centre_window(10, 4000, size=192)
  assert window == (1, 1996, 8, 8)


def _make_folder(root, classes, num, suffix="jpg", seed=0):
  rng = np.random.default_rng(seed)
  for name in classes:
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(num):
      pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i}.{suffix}")


def test_folder_with_a_test_folder(tmp_path):
  _make_folder(tmp_path / "train", ("bee", "ant"), 5)
  _make_folder(tmp_path / "val", ("ant",), 2)
  source = sources.load("folder", sizes=SIZES, directory=str(tmp_path))
  assert source.class_names == ("ant", "bee")
  assert source.train.num_examples == 10
  assert source.test.num_examples == 2
  draws = np.random.default_rng(0).random((10, *crops.DRAWS))
  read = source.train.read(np.arange(10), draws)
  assert read.images.shape == (10, 24, 24, 3)
  assert read.images.dtype == np.uint8
  assert read.labels.tolist() == [0] * 5 + [1] * 5
  assert read.is_good.all()
  again = source.train.read(np.arange(10)[::-1], draws[::-1])
  np.testing.assert_array_equal(again.images[::-1], read.images)
  other = source.train.read(np.arange(10), draws / 2)
  assert (other.images != read.images).any()

  test = source.test.read(np.arange(2), None)
  path = tmp_path / "val" / "ant" / "0.jpg"
  expected = images.resize_crop(images.read(path), 32, 8)
  np.testing.assert_array_equal(test.images[0], expected)


def test_hidden_files_are_no_images_and_other_kinds_are_told(tmp_path):
  _make_folder(tmp_path, ("ant", "bee"), 3)
  listing = folder.scan(tmp_path, held_out_share=0.2)
  (tmp_path / "ant" / "._0.jpg").touch()
  (tmp_path / "ant" / ".ipynb_checkpoints").mkdir()
  (tmp_path / "ant" / ".ipynb_checkpoints" / "0-checkpoint.jpg").touch()
  assert folder.scan(tmp_path, held_out_share=0.2) == listing
  for name in ("a.heic", "b.HEIC", "c.dng", "notes.txt"):
    (tmp_path / "bee" / name).touch()
  with pytest.warns(UserWarning, match=r"3 files in .* \(.dng, .heic\) are le"):
    assert folder.scan(tmp_path, held_out_share=0.2) == listing


def test_images_for_testing_must_be_labelled(tmp_path):
  """Often `test/` has none in class folders, and `val/` beside it has."""
  _make_folder(tmp_path / "train", ("ant", "bee"), 3)
  _make_folder(tmp_path, ("test",), 2)  # test/0.jpg ...
  with pytest.raises(
    InputError, match=r"test holds no images in class folders, .*test/ant/x.jpg"
  ):
    folder.scan(tmp_path, held_out_share=0.2)
  _make_folder(tmp_path / "test", ("unknown",), 2)
  with pytest.raises(InputError, match=r"test has classes that .*: unknown"):
    folder.scan(tmp_path, held_out_share=0.2)
  _make_folder(tmp_path / "val", ("bee",), 2)
  listing = folder.scan(tmp_path, held_out_share=0.2)
  expected = [tmp_path / "val" / "bee" / f"{i}.jpg" for i in range(2)]
  assert listing.test == [(path, 1) for path in expected]
  assert len(listing.train) == 6


def test_folder_without_a_test_folder_holds_out_a_share(tmp_path):
  _make_folder(tmp_path, ("a", "b", "c"), 40, "png")
  scan = lambda: folder.scan(tmp_path, held_out_share=0.25)
  listing = scan()
  assert 18 <= len(listing.test) <= 42  # 30 are expected, as by coins.
  assert {label for _, label in listing.test} == {0, 1, 2}
  everything = {path for path, _ in listing.train + listing.test}
  assert len(everything) == 120
  assert listing == scan()
  assert folder.fingerprint(listing, tmp_path).startswith(
    f"{len(listing.train)} and {len(listing.test)} images in 3 classes, "
  )


def test_images_stay_on_their_side_when_others_are_added(tmp_path):
  scan = lambda: folder.scan(tmp_path, held_out_share=0.2)
  prints = set()
  _make_folder(tmp_path, ("b", "c"), 3)
  trained_on = set()
  for num, names in ((5, ("b", "c")), (30, ("a", "b")), (31, ("c",))):
    _make_folder(tmp_path, names, num)
    listing = scan()
    prints.add(folder.fingerprint(listing, tmp_path))
    tested = {path for path, _ in listing.test}
    assert not trained_on & tested
    trained_on |= {path for path, _ in listing.train}
  assert len(prints) == 3


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_few_images_are_on_both_sides(tmp_path, num):
  """Whatever the names: one at least to train with, and one to test."""
  for trial in range(8):
    root = tmp_path / str(trial)
    _make_folder(root, (f"x{trial}", f"y{trial}"), num)
    for share in (0.01, 0.99):
      listing = folder.scan(root, held_out_share=share)
      for label in (0, 1):
        trained, tested = (
          [x for x in part if x[1] == label]
          for part in (listing.train, listing.test)
        )
        assert trained
        assert bool(tested) == (num > 1)


def test_classes_with_names_of_old_archives(tmp_path):
  for name in ("a", os.fsdecode(b"caf\xe9")):
    (tmp_path / name).mkdir()
    for i in range(2):
      (tmp_path / name / f"{i}.png").touch()
  listing = folder.scan(tmp_path, held_out_share=0.5)
  text = folder.fingerprint(listing, tmp_path)
  assert text.startswith("2 and 2 images in 2 classes, ")
  # Files and pictures can be written with what the rest is told.
  source = sources.load("folder", sizes=SIZES, directory=str(tmp_path))
  assert source.class_names == ("a", r"caf\xe9")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
  _make_folder(tmp_path, ("ant", "bee"), 2)
  list_folder = os.scandir

  def fail(path):
    if str(path).endswith("bee"):
      raise OSError(errno.ESTALE, "Stale file handle", str(path))
    return list_folder(path)

  monkeypatch.setattr(os, "scandir", fail)
  for read in (
    lambda: folder.scan(tmp_path, held_out_share=0.5),
    lambda: images.find([tmp_path]),
  ):
    with pytest.raises(OSError, match=r"Stale file handle: .*bee"):
      read()


def test_a_class_that_is_called_train(tmp_path):
  _make_folder(tmp_path, ("bus", "train"), 4)
  scan = lambda: folder.scan(tmp_path, held_out_share=0.5)
  assert scan().class_names == ("bus", "train")
  _make_folder(tmp_path / "train", ("steam", "diesel"), 4)
  with pytest.raises(InputError, match=r"train holds folders and images"):
    scan()
  for path in (tmp_path / "train").glob("*.jpg"):
    path.unlink()
  assert scan().class_names == ("diesel", "steam")


def test_what_lies_beside_the_parts_changes_no_class(tmp_path):
  for name in ("train", "test"):
    _make_folder(tmp_path / name, ("ant", "bee"), 2)
  (tmp_path / "other").mkdir()
  shutil.copy(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "train")
  scan = lambda: folder.scan(tmp_path, held_out_share=0.5)
  assert scan().class_names == ("ant", "bee")
  for name in ("ant", "bee"):
    shutil.rmtree(tmp_path / "train" / name)
  with pytest.raises(InputError, match=r"train has 0 class folders"):
    scan()


def test_a_broken_link_among_images_is_one_that_cannot_be_read(tmp_path):
  (tmp_path / "a.png").symlink_to("nowhere.png")
  found = images.find([tmp_path])
  assert images.find(found) == found
  with pytest.raises(InputError, match=r"a.png cannot be read"):
    images.read(found[0])


def test_folders_that_cannot_be_used(tmp_path):
  scan = lambda root: folder.scan(root, held_out_share=0.2)
  with pytest.raises(InputError, match=r"absent is no folder: give the one"):
    scan(tmp_path / "absent")
  with pytest.raises(
    InputError, match=r"has 0 class folders \(none\): at least"
  ):
    scan(tmp_path)
  _make_folder(tmp_path / "train", ("a",), 2)
  with pytest.raises(
    InputError, match=r"has 1 class folder \(a\): at least two"
  ):
    scan(tmp_path)
  (tmp_path / "train" / "b").mkdir()
  with pytest.raises(InputError, match=r"b holds no image files"):
    scan(tmp_path)
  _make_folder(tmp_path / "train", ("c",), 2)
  (tmp_path / "train" / "b").rmdir()
  _make_folder(tmp_path / "test", ("d",), 1)
  with pytest.raises(InputError, match=r"test has classes that .* has not: d"):
    scan(tmp_path)


def test_broken_files_are_named_once_and_skipped_up_to_a_limit(tmp_path):
  _make_folder(tmp_path / "train", ("a", "b"), 4)
  for name in ("a/0.jpg", "b/1.jpg"):
    (tmp_path / "train" / name).write_bytes(b"\xff\xd8\xff garbage")
  load = lambda limit: sources.load(
    "folder", sizes=SIZES, directory=str(tmp_path), max_broken=limit
  )
  split = load(2).train
  draws = np.zeros((split.num_examples, *crops.DRAWS))
  with pytest.warns(UserWarning, match=r"skipped: .*jpg") as warned:
    for _ in range(2):
      read = split.read(np.arange(split.num_examples), draws)
  assert len(warned) == 2
  assert (~read.is_good).sum() == 2
  split = load(1).train
  with (
    pytest.warns(UserWarning, match="skipped"),
    pytest.raises(InputError, match=r"2 images could not be .*max_broken=1"),
  ):
    split.read(np.arange(split.num_examples), draws)


def test_files_that_cannot_be_opened_are_skipped_too(tmp_path):
  _make_folder(tmp_path / "train", ("a", "b"), 4)
  (tmp_path / "train" / "b" / "9.jpg").symlink_to(tmp_path / "absent.jpg")
  damaged = tmp_path / "train" / "b" / "2.jpg"
  start, rest = damaged.read_bytes()[:2], damaged.read_bytes()[2:]
  # To be turned, and with a resolution that is no number.
  tags = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
  tags += b"\x01\x1a\0\x07\0\0\0\x01\0\0\0\x20\0\0\0\0"
  damaged.write_bytes(
    start + b"\xff\xe1" + (2 + len(tags)).to_bytes(2) + tags + rest
  )
  _make_folder(tmp_path / "test", ("a",), 1)
  split = sources.load("folder", sizes=SIZES, directory=str(tmp_path)).train
  (tmp_path / "train" / "a" / "0.jpg").unlink()
  (tmp_path / "train" / "a" / "0.jpg").mkdir()
  draws = np.zeros((split.num_examples, *crops.DRAWS))
  with pytest.warns(UserWarning, match="skipped") as warned:
    read = split.read(np.arange(split.num_examples), draws)
  texts = sorted(str(warning.message) for warning in warned)
  for text, pattern in zip(
    texts,
    (
      r"a/0.jpg cannot be read: Is a directory",
      r"b/2.jpg cannot be read as an image",
      r"b/9.jpg cannot be read: No such file",
    ),
    strict=True,
  ):
    assert re.search(pattern, text), text
  assert (~read.is_good).sum() == 3


def test_memory_of_batches_is_used_again_but_never_while_it_is_held():
  buffers = encoded.Buffers()
  first = buffers.take((4, 2), np.uint8)
  first[:] = 7
  address, view = first.ctypes.data, first[1:3]
  del first
  second = buffers.take((4, 2), np.uint8)
  assert not np.shares_memory(view, second)
  second[:] = 9
  assert (view == 7).all()
  del view
  assert buffers.take((4, 3), np.uint8).shape == (4, 3)
  assert buffers.take((4, 2), np.float32).dtype == np.float32
  assert buffers.take((4, 2), np.uint8).ctypes.data == address


def test_what_is_on_a_device_is_never_overwritten():
  """A device may read from the batch's own memory, or later."""
  buffers = encoded.Buffers()
  on_device = []
  for i in range(20):
    batch = buffers.take((64, 64, 3), np.uint8)
    batch[:] = i
    on_device.append(jax.device_put(batch))
    del batch
  for i, array in enumerate(on_device):
    assert (np.asarray(array) == i).all()


def _colored_folder(root, num):
  """Plain images whose colour is their number."""
  for i in range(num):
    folder = root / "train" / f"class_{i % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (i, 255 - i, 0)).save(folder / f"{i:03}.png")
  _make_folder(root / "test", ("class_0",), 1)
  return root


def _numbers_of(images_of_batch):
  assert (images_of_batch == images_of_batch[:, :1, :1]).all()
  return images_of_batch[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("position", [0, 16])
def test_hosts_read_disjoint_files_that_are_the_epoch(tmp_path, position):
  """Real files: two hosts' shards, from the start and after a resume."""
  root = _colored_folder(tmp_path, 24)
  seen = {}
  for host in (0, 1):
    source = sources.load("folder", sizes=SIZES, directory=str(root))
    stream = batches.TrainBatches(
      source.train,
      batch_size=8,
      seed=1,
      position=position,
      host=host,
      num_hosts=2,
      with_partners=True,
    )
    with batches.ReadAhead(stream) as ahead:
      seen[host] = [next(ahead) for _ in range(6 - position // 8)]
  for host, found in seen.items():
    assert all(len(batch.images) == 4 for batch in found), host
  for name in ("images", "partner_images"):
    whole = [
      _numbers_of(getattr(a, name)) + _numbers_of(getattr(b, name))
      for a, b in zip(seen[0], seen[1], strict=True)
    ]
    order = [i for batch in whole for i in batch]
    rest = len(order) % 24 or 24  # Of the epoch that was resumed.
    assert sorted(order[-24:]) == list(range(24))
    assert len(set(order[:rest])) == rest
    # As one host would have seen it, cropped the same.
    alone = batches.TrainBatches(
      sources.load("folder", sizes=SIZES, directory=str(root)).train,
      batch_size=8,
      seed=1,
      with_partners=True,
    )
    expected = [_numbers_of(getattr(next(alone), name)) for _ in range(6)]
    assert whole == expected[position // 8 :]


def test_crops_do_not_depend_on_the_number_of_hosts(tmp_path):
  _make_folder(tmp_path / "train", ("a", "b"), 8)
  source = sources.load("folder", sizes=SIZES, directory=str(tmp_path))
  make = lambda **options: batches.TrainBatches(
    source.train, batch_size=8, seed=0, **options
  )
  whole = next(make()).images.copy()
  halves = [next(make(host=h, num_hosts=2)).images.copy() for h in (0, 1)]
  np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_few_images_keep_all_threads_busy():
  """As a host of many has them: each thread waits here for all the others."""
  together = threading.Barrier(8)
  file = io.BytesIO()
  Image.new("RGB", (30, 20)).save(file, "PNG")

  def fetch(index):
    together.wait(timeout=20)
    return file.getvalue(), index, ""

  split = encoded.make_split(
    16,
    fetch,
    sizes=SIZES,
    pool=encoded.make_pool(8),
    broken=encoded.Broken(0),
  )
  assert split.read(np.arange(16), None).labels.tolist() == list(range(16))


def test_the_number_of_threads_changes_no_image(tmp_path):
  """Nor the sizes of the parts that they get."""
  _make_folder(tmp_path / "train", ("a", "b"), 20)
  draws = np.random.default_rng(0).random((32, *crops.DRAWS))
  one, *others = (
    sources.load(
      "folder", sizes=SIZES, directory=str(tmp_path), num_threads=num_threads
    ).train.read(np.arange(32), draws)
    for num_threads in (1, 3, 8)
  )
  for other in others:
    np.testing.assert_array_equal(other.images, one.images)
    np.testing.assert_array_equal(other.labels, one.labels)


def _resident_bytes():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_thousands_of_batches(tmp_path):
  _make_folder(tmp_path / "train", ("a", "b"), 8)
  sizes = SIZES._replace(train=64)
  source = sources.load("folder", sizes=sizes, directory=str(tmp_path))
  stream = batches.TrainBatches(
    source.train, batch_size=2, seed=0, with_partners=True
  )
  with batches.ReadAhead(stream) as ahead:
    for _ in range(1000):  # What is made once has been made after these.
      jax.device_put(next(ahead).images)
    before = _resident_bytes()
    for _ in range(2000):
      jax.device_put(next(ahead).images)
    grown = _resident_bytes() - before
  # A leak of one batch in ten would be 9 MiB.
  assert grown < 4 * 2**20, f"{grown / 2**20:.1f} MiB"


def test_an_error_of_a_decoding_thread_surfaces_at_once(tmp_path):
  """Also while the main thread waits for the next batch."""
  _make_folder(tmp_path / "train", ("a", "b"), 8)
  source = sources.load(
    "folder", sizes=SIZES, directory=str(tmp_path), max_broken=0
  )
  stream = batches.TrainBatches(source.train, batch_size=8, seed=0)
  with batches.ReadAhead(stream) as ahead:
    next(ahead)
    for path in tmp_path.rglob("*.jpg"):
      path.unlink()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"jpg cannot be read: No such file"):
      for _ in range(4):  # Two batches may have been read before.
        next(ahead)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(("batch_size", "num_hosts"), [(10, 3), (0, 1)])
def test_a_batch_that_hosts_do_not_divide_is_refused(batch_size, num_hosts):
  options = {"batch_size": batch_size, "num_hosts": num_hosts}
  with pytest.raises(InputError, match=rf"batch of {batch_size} examples does"):
    batches.TrainBatches(_numbered(17), seed=0, **options)
  with pytest.raises(InputError, match=rf"batch of {batch_size} examples does"):
    next(batches.eval_batches(_numbered(17), **options))


@pytest.mark.parametrize("bad", [(), (2, 3)])
def test_images_that_cannot_be_written_are_batches_too(bad):
  """As those of JAX arrays."""

  def read(indices, draws):
    found = _numbered(6, bad).read(indices, draws)
    for array in found:
      array.flags.writeable = False
    return found

  stream = batches.TrainBatches(Split(6, read), batch_size=6, seed=0)
  assert set(next(stream).labels.tolist()) == {0, 1, 2, 3, 4, 5} - set(bad)


def test_what_is_no_path(tmp_path):
  (tmp_path / "a.png").touch()
  assert images.find(str(tmp_path)) == [tmp_path / "a.png"]
  with pytest.raises(InputError, match=r"a ndarray is no path: give image fil"):
    images.find(np.zeros((2, 8, 8, 3)))


def test_a_pipe_among_images_is_skipped(tmp_path):
  """It would be waited for."""
  _make_folder(tmp_path, ("ant", "bee"), 3)
  os.mkfifo(tmp_path / "bee" / "pipe.png")
  with pytest.warns(UserWarning, match=r"pipe.png .*is no file"):
    source = sources.load(
      "folder", sizes=SIZES, directory=str(tmp_path), held_out_share=0.0
    )
    draws = np.zeros((source.train.num_examples, *crops.DRAWS))
    found = source.train.read(np.arange(len(draws)), draws)
  assert len(found.is_good) - found.is_good.sum() == 1


def test_windows_are_anywhere():
  rng = np.random.default_rng(0)
  height, width = 500, 400
  windows = [
    crops.random_window(height, width, draws, size=48)
    for draws in rng.random((3000, *crops.DRAWS)).tolist()
  ]
  top, left, h, w = np.array(windows).T
  free = (height - h > 10) & (width - w > 10)
  down = top[free] / (height - h - 1)[free]
  across = left[free] / (width - w - 1)[free]
  for share in (down, across):
    np.testing.assert_allclose(
      np.quantile(share, (0.1, 0.5, 0.9)), (0.1, 0.5, 0.9), atol=0.04
    )
  assert abs(np.corrcoef(down, across)[0, 1]) < 0.1


@pytest.mark.parametrize("min_area", [0.08, 0.7])
def test_a_training_image_is_its_window(tmp_path, min_area):
  _make_folder(tmp_path / "train", ("a", "b"), 5, "png")
  _make_folder(tmp_path / "test", ("a",), 1, "png")
  sizes = SIZES._replace(train_min_area=min_area)
  split = sources.load("folder", sizes=sizes, directory=str(tmp_path)).train
  draws = np.random.default_rng(0).random((10, *crops.DRAWS))
  found = split.read(np.arange(10), draws).images
  paths = sorted((tmp_path / "train").rglob("*.png"))
  areas = []
  for path, numbers, ours in zip(paths, draws.tolist(), found, strict=True):
    top, left, h, w = crops.random_window(
      40, 50, numbers, size=24, min_area=min_area
    )
    part = images.read(path)[top : top + h, left : left + w]
    assert part.shape == (h, w, 3)
    expected = cv2.resize(part, (24, 24), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(ours, expected)
    areas.append(h * w / (40 * 50))
  assert min(areas) > 0.9 * min_area
  assert min_area > 0.5 or min(areas) < 0.5


def test_crops_are_drawn_anew():
  seen = []

  def read(indices, draws):
    seen.extend(np.split(draws, len(draws) // 4))
    return _numbered(10).read(indices, draws)

  for seed in (0, 1):
    stream = batches.TrainBatches(
      Split(10, read), batch_size=4, seed=seed, with_partners=True
    )
    for _ in range(3):
      next(stream)
  assert len(seen) == 12  # Two seeds, three batches, images and partners.
  assert len({draws.tobytes() for draws in seen}) == 12
