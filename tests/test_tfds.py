"""TFDS sets: prepared by the test, read without TensorFlow, trained on."""

import io
import json
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, kill_when, read_rows
from PIL import Image

from nfnets import card as cards
from nfnets import models, pretrained
from nfnets.data import images, sources, tfds_source
from nfnets.data.source import Sizes
from nfnets.errors import InputError
from nfnets.models.plan import is_classifier

tfds = pytest.importorskip("tensorflow_datasets")

SIZES = Sizes(train=24, test=32, test_margin=8)


def _jpeg(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3))
  file = io.BytesIO()
  tags = Image.Exif()
  tags[0x0112] = 1 + seed % 8  # How to turn it, which TensorFlow does not.
  Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", exif=tags)
  return file.getvalue()


class Insects(tfds.core.GeneratorBasedBuilder):
  """Noise in TFDS's ImageNet layout: JPEGs with a label, train, validation."""

  VERSION = tfds.core.Version("1.0.0")
  NUM_TEST = 10

  def _info(self):
    features = {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=["ant", "bee", "fly"]),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(0, 40),
      "validation": self._generate_examples(100, self.NUM_TEST),
    }

  def _generate_examples(self, start, num):
    for i in range(start, start + num):
      image = io.BytesIO(_jpeg(i))
      yield i, {"file_name": f"{i}.jpg", "image": image, "label": i % 3}


class Moths(Insects):
  """As many to test as to train on, for as many shards."""

  NUM_TEST = 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  builder = Insects(data_dir=str(root), file_format="array_record")
  builder.download_and_prepare()
  return root


def _load(data_dir, **options):
  options = {"tfds_name": "insects", "sizes": SIZES} | options
  return sources.load("tfds", directory=str(data_dir), **options)


def test_splits_have_the_papers_names(data_dir):
  source = _load(data_dir)
  assert source.class_names == ("ant", "bee", "fly")
  assert source.train.num_examples == 40
  assert source.test.num_examples == 10
  inner = _load(data_dir, train_split="train", test_split="valid")
  assert inner.train.num_examples == 36
  assert inner.test.num_examples == 4
  assert "tensorflow" not in sys.modules


def test_examples_are_the_files_that_were_prepared(data_dir):
  source = _load(data_dir)
  read = source.test.read(np.arange(10), None)
  as_it_lies = {
    i: np.array(Image.open(io.BytesIO(_jpeg(100 + i)))) for i in range(10)
  }
  assert {image.shape for image in as_it_lies.values()} == {(40, 50, 3)}
  expected = {
    (100 + i) % 3: images.resize_crop(image, 32, 8)
    for i, image in as_it_lies.items()
  }
  assert sorted(read.labels) == sorted((100 + i) % 3 for i in range(10))
  for label, image in expected.items():
    assert any(
      (image == ours).all()
      for ours, its in zip(read.images, read.labels, strict=True)
      if its == label
    )


def test_sets_that_are_not_there(data_dir, tmp_path):
  with pytest.raises(InputError, match=r"no prepared TFDS set 'birds' below"):
    _load(data_dir, tfds_name="birds")
  with pytest.raises(InputError, match=r"no prepared TFDS set 'insects' below"):
    _load(tmp_path)
  with pytest.raises(InputError, match=r"unknown split 'tran': did you mean"):
    _load(data_dir, train_split="tran")
  builder = tfds_source.open_builder(str(data_dir), "insects")
  info = types.SimpleNamespace(name="insects", splits={"test": None})
  with pytest.raises(
    InputError, match=r"no split to train on \(it has test\): .*_split=test"
  ):
    tfds_source.slice_of(types.SimpleNamespace(info=info), "train")
  for below in ("insects", "insects/1.0.0"):
    with pytest.raises(InputError, match=rf"data_dir, here {data_dir} \("):
      _load(data_dir / below)
  assert tfds_source.slice_of(builder, "train_and_valid") == "train"


def test_files_that_are_missing_or_damaged(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  (shard,) = tmp_path.rglob("*train.array_record*")
  data = bytearray(shard.read_bytes())
  data[6000:12_000] = bytes(6000)  # Of some examples.
  shard.write_bytes(data)
  source = _load(tmp_path)
  with pytest.warns(
    UserWarning, match=rf"skipped: .*\[\d+\] of {shard.name}: Corrupted"
  ):
    read = source.train.read(np.arange(40), None)
  assert 0 < read.is_good.sum() < 40
  source = _load(tmp_path, max_broken=0)
  with pytest.raises(
    InputError, match=r"train_and_valid \[\d+\] of .*: Corrupted"
  ):
    source.train.read(np.arange(40), None)
  for size in (len(data) // 2, 0):
    shard.write_bytes(data[:size])  # As of a copy that was broken off.
    with pytest.raises(
      InputError, match=f"has 1 damaged files, as {shard.name}, .*: copy"
    ):
      _load(tmp_path)
  shard.unlink()
  with pytest.raises(
    InputError, match=f"lacks 1 of its files, as {shard.name}"
  ):
    _load(tmp_path)


class Flowers(Insects):
  """A set with another label and mask, and all of TFDS's splits."""

  def _info(self):
    features = {
      "image": tfds.features.Image(),
      "mask": tfds.features.Image(shape=(None, None, 1)),
      "label": tfds.features.ClassLabel(names=["iris", "lily", "rose"]),
      "family": tfds.features.ClassLabel(num_classes=2),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    numbers = {"train": 5, "validation": 6, "test": 7}
    return {name: self._generate_examples(0, n) for name, n in numbers.items()}

  def _generate_examples(self, start, num):
    for i in range(start, start + num):
      image, mask = (io.BytesIO(_jpeg(i)) for _ in range(2))
      label = -1 if i == 6 else i % 3  # As of a split without labels.
      yield i, {"image": image, "mask": mask, "label": label, "family": 0}


def test_a_set_that_says_which_of_its_features_count(tmp_path):
  builder = Flowers(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  source = _load(tmp_path, tfds_name="flowers", test_split="validation")
  assert source.test.num_examples == 6
  source = _load(tmp_path, tfds_name="flowers")
  assert source.test.num_examples == 7
  assert source.class_names == ("iris", "lily", "rose")
  with pytest.warns(UserWarning, match="label -1, which is none of 3 classes"):
    read = source.test.read(np.arange(7), None)
  assert read.is_good.sum() == 6
  inner = _load(
    tmp_path, tfds_name="flowers", train_split="train", test_split="valid"
  )
  assert (inner.train.num_examples, inner.test.num_examples) == (4, 1)
  (names,) = tmp_path.rglob("label.labels.txt")
  names.unlink()
  with pytest.warns(UserWarning, match=r"no names of its .*label.labels.txt"):
    source = _load(tmp_path, tfds_name="flowers")
  assert source.class_names == ("0", "1", "2")


@pytest.mark.parametrize("hard", [1024, 30])
def test_more_files_than_a_shell_lets_a_process_open(hard, tmp_path):
  """Each of 80 shards stays open; shells allow 1,024, ImageNet has more."""
  builder = Moths(data_dir=str(tmp_path), file_format="array_record")
  shards = tfds.download.DownloadConfig(num_shards=40)
  builder.download_and_prepare(download_config=shards)
  code = f"""
import resource
import numpy as np
from nfnets.data import sources
from nfnets.data.source import Sizes
resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, {hard}), {hard}))
source = sources.load(
  "tfds", directory={str(tmp_path)!r}, tfds_name="moths",
  sizes=Sizes(train=24, test=32, test_margin=8),
)
for split in (source.train, source.test):
  print(split.read(np.arange(split.num_examples), None).is_good.sum())"""
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  if hard == 1024:
    assert result.stdout.split() == ["40", "40"], result.stderr
  else:
    message = r"has 40 files of train, .* may open 30 \(`ulimit -Hn`\): raise"
    assert re.search(message, result.stderr), result.stderr


def test_a_tfrecord_set_gets_the_name_of_the_converter(data_dir, tmp_path):
  builder = tfds_source.open_builder(data_dir, "insects")
  root = tmp_path / "insects" / "1.0.0"
  root.mkdir(parents=True)
  for path in builder.data_path.iterdir():
    text = path.read_bytes()
    if path.suffix == ".json":
      text = text.replace(b"array_record", b"tfrecord")
    (root / path.name.replace("array_record", "tfrecord")).write_bytes(text)
  with pytest.raises(
    InputError, match=r"prepared as tfrecord.*prepare_imagenet.sh --convert="
  ):
    _load(tmp_path)


def test_the_imagenet_recipe_trains_resumes_and_evaluates(
  data_dir, nfnets, environment, tmp_path
):
  """The published recipe as it is but for a small network and few steps."""
  recipe = [
    "--config=configs/nfnet_imagenet.py:F0",
    f"--config.data.dir={data_dir}",
    "--config.data.tfds_name=insects",
    "--config.data.train_size=24",
    "--config.data.test_size=32",
    *(f"--config.model.{k}={v}" for k, v in SMALL.items()),
    "--config.train.batch_size=8",
    "--config.train.precision=float32",
    "--config.augment.randaugment_layers=1",
    "--config.augment.randaugment_magnitude=5",
    "--config.optim.warmup_epochs=0.2",
    "--config.log_every_steps=1",
    "--config.eval.batch_size=4",
    "--config.train.epochs=1.0",
    "--config.checkpoint_every_steps=2",
  ]
  killed = ["train", *recipe, f"--workdir={tmp_path / 'killed'}"]
  assert kill_when(
    (tmp_path / "killed" / "checkpoints" / "2").is_dir,
    [sys.executable, "-m", "nfnets.main", *killed],
    environment,
  )
  for name in ("killed", "whole"):
    result = nfnets("train", *recipe, f"--workdir={tmp_path / name}")
    assert result.returncode == 0, result.stderr
    start = r"from step [2-4]$" if name == "killed" else "from scratch$"
    assert re.search(start, result.stdout, re.M), result.stdout
  rows = read_rows(tmp_path / "whole")
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert read_rows(tmp_path / "killed") == rows

  workdir = tmp_path / "whole"
  result = nfnets("evaluate", f"--workdir={workdir}", "--json")
  assert json.loads(result.stdout)["ema"]["num_examples"] == 10


@pytest.mark.slow
def test_weights_are_fine_tuned_on_a_set(data_dir, nfnets, tmp_path):
  """Of two other classes; network and preprocessing are the weights' own."""
  model = models.make("nfnet_tiny", num_classes=2, **SMALL)
  params, _ = model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
  card = cards.Card(
    model="nfnet_tiny",
    overrides=SMALL,
    class_names=("ant", "wasp"),
    image_size=28,
    crop="padded",
    margin=4,
    mean=(100.0, 110.0, 120.0),
    std=(60.0, 50.0, 40.0),
  )
  weights, workdir = tmp_path / "start.safetensors", tmp_path / "run"
  pretrained.save(weights, params, card)
  options = [
    "--config=configs/finetune.py:tfds",
    f"--config.init_from={weights}",
    f"--config.data.dir={data_dir}",
    "--config.data.tfds_name=insects",
    "--config.train.epochs=3",
    "--config.train.batch_size=8",
    f"--workdir={workdir}",
  ]
  result = nfnets("train", *options)
  assert result.returncode == 0, result.stderr
  rows = read_rows(workdir, "eval")
  assert [row["step"] for row in rows] == [5, 10, 15]
  tuned, tuned_card = pretrained.load_with_card(workdir)
  assert tuned_card.class_names == ("ant", "bee", "fly")
  assert tuned_card.overrides.items() >= SMALL.items()
  kept = ("model", "image_size", "crop", "margin", "mean", "std")
  for field in kept:
    assert getattr(tuned_card, field) == getattr(card, field), field
  moved = [
    np.abs(value - params[module][name]).max()
    for module, values in tuned.items()
    for name, value in values.items()
    if not is_classifier(module)
  ]
  assert 0 < max(moved) < 0.5  # It started from these weights.
  assert tuned["NFNet/~/linear"]["w"].shape[1] == 3

  complete = nfnets("train", *options)
  assert "is complete" in complete.stdout, complete.stderr


def test_a_batch_can_be_looked_at(data_dir, nfnets, tmp_path):
  result = nfnets(
    "show-batch",
    "--config=configs/nfnet_imagenet.py:F0",
    f"--config.data.dir={data_dir}",
    "--config.data.tfds_name=insects",
    "--num_images=6",
    f"--out={tmp_path / 'sheet.png'}",
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"wrote {tmp_path / 'sheet.png'}\n"
  with Image.open(tmp_path / "sheet.png") as sheet:
    assert sheet.size[0] > sheet.size[1] > 300
    is_blank = np.asarray(sheet)[..., :3].min(-1) == 255
    assert is_blank.mean() < 0.5


def test_the_papers_validation_images_are_ten_thousand():
  counts = {"train": 1_281_167, "validation": 50_000}
  splits = {k: types.SimpleNamespace(num_examples=n) for k, n in counts.items()}
  info = types.SimpleNamespace(name="imagenet2012", splits=splits)
  builder = types.SimpleNamespace(info=info)
  found = [tfds_source.slice_of(builder, s) for s in tfds_source.SPLITS]
  images = ["train[10000:]", "train", "train[:10000]"]
  assert found == [*images, "validation", "validation"]
