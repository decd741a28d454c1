"""Data: order, position, sharding, padding, image files, preprocessing."""

import numpy as np
import pytest
from conftest import REFERENCE
from PIL import Image

from nfnets.data import batches, digits, images, sources
from nfnets.errors import InputError


def _numbered(num_examples):
  """A split whose images are their own indices."""

  def read(indices):
    pixels = np.broadcast_to(
      indices[:, None, None, None], (len(indices), 2, 2, 3)
    )
    return pixels, indices.astype(np.int32)

  return sources.Split(num_examples, read)


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
    sources.load("digit", image_size=32)


def test_evaluation_preprocessing_is_the_published_one():
  expected = np.load(REFERENCE / "eval_preprocess.npz")
  ours = images.resize_crop(expected["decoded"], 96, 32)
  np.testing.assert_allclose(ours, expected["resize_crop"], atol=1e-3)


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

  rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
  assert images.read(tmp_path / "cmyk.jpg").shape == (6, 8, 3)

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


def test_finding_images(tmp_path):
  (tmp_path / "b").mkdir()
  for name in ("z.JPG", "b/a.png", "notes.txt"):
    (tmp_path / name).touch()
  found = [p.relative_to(tmp_path).as_posix() for p in images.find([tmp_path])]
  assert found == ["b/a.png", "z.JPG"]
  # A file that is named is taken, whatever its ending.
  assert images.find([tmp_path / "notes.txt"])
  with pytest.raises(InputError, match=r"nowhere does not exist"):
    images.find([tmp_path / "nowhere"])
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"empty holds no image files"):
    images.find([tmp_path / "empty"])
