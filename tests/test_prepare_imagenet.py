"""ImageNet from its tar files to an evaluated network: TFDS's own builder.

Preparing needs TensorFlow, so the script builds an environment with it; these
tests run with `scripts/test.sh -m tensorflow`. The tar files are the test's
own, in the published layout: real JPEGs, TFDS's class ids, and the two kinds of
file that the builder mends (a CMYK JPEG, a PNG with a JPEG's name).
"""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import SMALL, kill_when, read_rows
from PIL import Image

from nfnets.data import imagenet, sources
from nfnets.data.source import Sizes

pytestmark = pytest.mark.tensorflow

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"

# Class ids with some of their training images.
TRAIN = {
  "n01440764": ["JPEG"] * 8,
  "n01739381": ["JPEG"] * 8 + ["CMYK"],
  "n02105855": ["JPEG"] * 8 + ["PNG"],
}
NAMES = {"CMYK": "n01739381_1309.JPEG", "PNG": "n02105855_2933.JPEG"}
NUM_VALIDATION = 6


def _image(seed, kind="JPEG"):
  """A file with coloured blocks, the seed written into their colours."""
  pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
  image = Image.fromarray(pixels).resize((60, 50), Image.Resampling.NEAREST)
  if kind == "CMYK":
    image = image.convert("CMYK")
  file = io.BytesIO()
  image.save(file, "PNG" if kind == "PNG" else "JPEG")
  return file.getvalue()


def _add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
  """The two tar files, in the layout of image-net.org."""
  folder = tmp_path_factory.mktemp("tars")
  with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
    for label, (synset, kinds) in enumerate(TRAIN.items()):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as tar:
        for i, kind in enumerate(kinds):
          name = NAMES.get(kind, f"{synset}_{i}.JPEG")
          _add(tar, name, _image(100 * label + i, kind))
      _add(train, f"{synset}.tar", inner.getvalue())
  with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
    for i in reversed(range(NUM_VALIDATION)):  # Not in the labels' order.
      name = f"ILSVRC2012_val_{i + 1:08}.JPEG"
      _add(tar, name, _image(1000 + i))
  return folder


def _prepare(*arguments):
  return subprocess.run(
    [SCRIPTS / "prepare_imagenet.sh", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


NUM_TRAIN = sum(map(len, TRAIN.values()))
COUNTS = [f"--num_train={NUM_TRAIN}", f"--num_validation={NUM_VALIDATION}"]


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
  out = tmp_path_factory.mktemp("prepared")
  result = _prepare(f"--tars={tars}", f"--out={out}", *COUNTS)
  assert result.returncode == 0, result.stderr
  assert f"train: {NUM_TRAIN} images, {NUM_TRAIN} expected" in result.stdout
  assert "done: " in result.stdout
  assert "examples" in result.stderr  # TFDS's own progress bars.
  return out


@pytest.fixture(scope="module")
def tfrecords(tars, tmp_path_factory):
  """The same set in the format that most people have."""
  out = tmp_path_factory.mktemp("tfrecords")
  python = SCRIPTS.parent / ".venv-tensorflow" / "bin" / "python"
  code = (
    "import tensorflow_datasets as tfds\n"
    f"builder = tfds.builder('imagenet2012', data_dir={str(out)!r})\n"
    "config = tfds.download.DownloadConfig(\n"
    f"  manual_dir={str(tars)!r}, try_download_gcs=False)\n"
    "builder.download_and_prepare(download_config=config)\n"
  )
  subprocess.run([python, "-c", code], check=True)
  return out / "imagenet2012" / "5.1.0"


def _load(data_dir):
  return sources.load(
    "tfds",
    sizes=Sizes(train=24, test=32, test_margin=8),
    directory=str(data_dir),
    tfds_name="imagenet2012",
  )


def test_every_image_arrives_with_its_label(prepared):
  source = _load(prepared)
  assert len(source.class_names) == 1000
  assert source.train.num_examples == NUM_TRAIN
  assert source.test.num_examples == NUM_VALIDATION
  read = source.train.read(np.arange(NUM_TRAIN), None)
  assert read.is_good.all()
  names = np.array(source.class_names)[read.labels]
  words = imagenet.readable([*TRAIN])
  for name, kinds in zip(words, TRAIN.values(), strict=True):
    assert (names == name).sum() == len(kinds)
  # TFDS's list of validation labels is in the order of the sorted names.
  expected = ["n01751748", "n09193705", "n02105855", "n04263257", "n03125729"]
  read = source.test.read(np.arange(NUM_VALIDATION), None)
  found = set(np.array(source.class_names)[read.labels])
  assert set(imagenet.readable(expected)) <= found


def test_a_conversion_holds_the_same_examples(prepared, tfrecords, tmp_path):
  copy = tmp_path / "imagenet2012" / "5.1.0"
  shutil.copytree(tfrecords, copy)
  for _ in range(2):  # The second time there is nothing left to do.
    result = _prepare(f"--convert={copy}", *COUNTS)
    assert result.returncode == 0, result.stderr
    assert "done: " in result.stdout
  ours, theirs = _load(tmp_path), _load(prepared)
  for split in ("train", "test"):
    num = getattr(ours, split).num_examples
    a, b = (
      getattr(source, split).read(np.arange(num), None)
      for source in (ours, theirs)
    )
    # TFDS shuffles by a hash of the names: the same order in both formats.
    assert (a.labels == b.labels).all()
    assert (a.images == b.images).all()


def test_a_conversion_is_mended(prepared, tfrecords, tmp_path):
  """Whatever is missing of it is made once more, and nothing else."""
  copy = tmp_path / "imagenet2012" / "5.1.0"
  shutil.copytree(tfrecords, copy)
  info = (copy / "dataset_info.json").read_bytes()
  assert _prepare(f"--convert={copy}", *COUNTS).returncode == 0
  (shard,) = copy.glob("*validation.array_record*")
  whole = shard.read_bytes()

  shard.unlink()
  (copy / f"incomplete.ABC.{shard.name}").write_bytes(b"of a killed run")
  result = _prepare(f"--convert={copy}", *COUNTS)
  assert result.returncode == 0, result.stderr
  assert "Converting 1 shards of " in result.stdout
  assert shard.read_bytes() == whole
  assert not list(copy.glob("incomplete*"))

  # Killed after the last shard.
  (copy / "dataset_info.json").write_bytes(info)
  result = _prepare(f"--convert={copy}", *COUNTS)
  assert result.returncode == 0, result.stderr
  assert "Converting" not in result.stdout
  assert _load(tmp_path).test.num_examples == NUM_VALIDATION

  shard.write_bytes(whole[: len(whole) // 2])
  result = _prepare(f"--convert={copy}", *COUNTS)
  assert result.returncode == 1
  assert f"1 damaged or missing shards ({shard.name}): " in result.stderr


def test_a_set_of_another_name_is_converted(tfrecords, tmp_path):
  """Nothing is known of how many images it should have."""
  copy = tmp_path / "photos" / "5.1.0"
  copy.mkdir(parents=True)
  for path in tfrecords.iterdir():
    data = path.read_bytes()
    if path.suffix == ".json":
      data = data.replace(b"imagenet2012", b"photos")
    (copy / path.name.replace("imagenet2012", "photos")).write_bytes(data)
  result = _prepare(f"--convert={copy}")
  assert result.returncode == 0, result.stderr
  assert f"train: {NUM_TRAIN} images\n" in result.stdout


def test_what_can_go_wrong(tars, prepared, tfrecords, tmp_path):
  result = _prepare(f"--tars={tmp_path}", f"--out={tmp_path}")
  assert result.returncode == 1
  assert "lacks ILSVRC2012_img_train.tar and ILSVRC" in result.stderr
  result = _prepare(f"--tars={tars}", f"--out={prepared}")
  assert result.returncode == 1
  assert f"train: {NUM_TRAIN} images, 1,281,167 expected" in result.stdout
  assert "is not the whole of imagenet2012" in result.stderr
  result = _prepare(f"--tars={tars}", f"--out={tfrecords.parent.parent}")
  assert result.returncode == 1
  assert (
    "is there already as tfrecord: convert it with --convert=" in result.stderr
  )
  result = _prepare(f"--convert={tfrecords}")  # Said before hours of work.
  assert result.returncode == 1
  assert "the set that is to be converted has no more" in result.stderr
  assert "delete" not in result.stderr
  assert not list(tfrecords.glob("*array_record*"))
  unfinished = tmp_path / "out" / "imagenet2012" / "5.1.0"
  unfinished.mkdir(parents=True)
  result = _prepare(f"--tars={tars}", f"--out={tmp_path / 'out'}")
  assert result.returncode == 1
  assert "is there, but no finished set" in result.stderr
  unfinished.rename(unfinished.parent / "incomplete.ABC_5.1.0")
  result = _prepare(f"--tars={tars}", f"--out={tmp_path / 'out'}", *COUNTS)
  assert result.returncode == 0, result.stderr
  assert "incomplete.ABC_5.1.0 was left by a run that was" in result.stdout
  result = _prepare(f"--convert={tmp_path}")
  assert "is no prepared TFDS set" in result.stderr
  result = _prepare(f"--tars={tars}")
  assert result.returncode == 2
  assert "--out goes with --tars" in result.stderr


def test_the_recipe_trains_resumes_and_evaluates(
  prepared, tfrecords, nfnets, environment, tmp_path
):
  """Without TensorFlow: a module of that name that raises stands in its way."""
  blocked = tmp_path / "blocked"
  blocked.mkdir()
  (blocked / "tensorflow.py").write_text("raise ImportError('not here')\n")
  recipe = [
    "--config=configs/nfnet_imagenet.py:F0",
    f"--config.data.dir={prepared}",
    "--config.data.train_size=32",
    "--config.data.test_size=48",
    *(f"--config.model.{k}={v}" for k, v in SMALL.items()),
    "--config.train.batch_size=8",
    "--config.train.epochs=2",
    "--config.train.precision=float32",
    "--config.augment.randaugment_layers=1",
    "--config.augment.randaugment_magnitude=5",
    "--config.optim.warmup_epochs=0.2",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_steps=1",
    "--config.eval.batch_size=4",
  ]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  without = {"PYTHONPATH": str(blocked)}
  record = killed / "metrics.jsonl"
  command = [sys.executable, "-m", "nfnets.main", "train"]
  assert kill_when(
    lambda: record.exists() and '"step": 3,' in record.read_text(),
    [*command, *recipe, f"--workdir={killed}"],
    environment | without,
  )
  for workdir in (whole, killed):
    result = nfnets("train", *recipe, f"--workdir={workdir}", **without)
    assert result.returncode == 0, result.stderr
  assert re.search(r"from step [12]", result.stdout)
  rows = read_rows(whole)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert read_rows(killed) == rows
  result = nfnets(
    "evaluate",
    *recipe,
    f"--weights={whole / 'weights.safetensors'}",
    "--json",
    **without,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)["weights"]
  assert found["num_examples"] == NUM_VALIDATION

  result = nfnets(
    "train",
    *recipe,
    f"--config.data.dir={tfrecords.parent.parent}",
    f"--workdir={tmp_path / 'refused'}",
    **without,
  )
  assert result.returncode == 1
  assert "is prepared as tfrecord" in result.stderr
  assert "prepare_imagenet.sh --convert=" in result.stderr
