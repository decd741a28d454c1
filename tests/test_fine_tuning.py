"""Fine-tuning through the command line: digits as PNG files, in two rounds.

The weights that it starts from know the digits 0 to 4. The first folder has the
digits 5 to 7; then 8 and 9 arrive, and more images of the others.
"""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import (
  SMALL,
  draw_params,
  kill_when,
  param_shapes,
  read_rows,
  run_pod,
)
from PIL import Image
from sklearn.datasets import load_digits

from configs import base, finetune
from nfnets import card as cards
from nfnets import (
  checkpoint,
  evaluate,
  export,
  models,
  pretrained,
  recipe,
  rounds,
  timm,
  train,
)
from nfnets.errors import InputError, UsageError
from nfnets.models.plan import is_classifier
from nfnets.patience import Patience

NAMES = "zero one two three four five six seven eight nine".split()  # noqa: SIM905

# What suits digits, and few seconds.
OPTIONS = [
  "--config.augment.flip=False",
  "--config.data.min_area=0.7",
  "--config.train.epochs=12",
  "--config.eval.every_epochs=2",
  "--config.optim.lr_per_256=0.5",
]
# Saves before the second evaluation, so that there is something to go on from.
KILLED_OPTIONS = ["--config.checkpoint_every_steps=25"]


def _write_digits(folder, digits, numbers, suffix="png", mode="RGB"):
  data = load_digits()
  for digit in digits:
    root = folder / NAMES[digit]
    root.mkdir(parents=True, exist_ok=True)
    scans = data.images[data.target == digit][numbers]
    for i, scan in enumerate(scans, start=numbers.start or 0):
      image = Image.fromarray((scan / 16 * 255).astype(np.uint8)).convert(mode)
      image.resize((40, 40)).save(root / f"{i:03}.{suffix}")


def _train(nfnets, *options, **kwargs):
  result = nfnets("train", *options, **kwargs)
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.fixture(scope="module")
def start(nfnets, tmp_path_factory):
  """A workdir whose weights know five digits."""
  root = tmp_path_factory.mktemp("start")
  _write_digits(root / "images", range(5), slice(0, 120))
  _train(
    nfnets,
    "--config=configs/digits.py",
    f"--workdir={root / 'run'}",
    "--config.data.source=folder",
    f"--config.data.dir={root / 'images'}",
    "--config.data.min_area=0.7",
    "--config.train.epochs=6",
    *(f"--config.model.{k}={v}" for k, v in SMALL.items()),
  )
  return root / "run"


def _fine_tune(start, folder, workdir, *options):
  return [
    "--config=configs/finetune.py:folder",
    f"--config.init_from={start}",
    f"--config.data.dir={folder}",
    f"--workdir={workdir}",
    *OPTIONS,
    *options,
  ]


def test_two_rounds(start, nfnets, environment, tmp_path):
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  command = _fine_tune(start, photos, workdir)

  # Images of mixed modes: colour, grey, palettes, transparency.
  _write_digits(photos, (5, 6, 7), slice(0, 40), mode="L")
  _write_digits(photos, (5, 6, 7), slice(40, 60), mode="P")
  _write_digits(photos, (5, 6, 7), slice(60, 80), mode="RGBA")
  first = _train(nfnets, *command)
  found = re.search(r"done: test accuracy (\S+)% .* are in (.*)$", first, re.M)
  assert found[2] == str(workdir / "round_001")
  assert float(found[1]) > 85  # A tiny network, 80 images of each.
  weights, card = pretrained.load_with_card(workdir)
  assert card.class_names == ("five", "seven", "six")
  assert card.model == "nfnet_tiny"
  assert card.overrides.items() >= SMALL.items()
  assert card.source == "trained on folder photos, from run"
  assert "held-out images" not in first  # Nothing was known before.

  # The same command again: there is nothing to do.
  again = _train(nfnets, *command)
  assert "round_001 is complete" in again
  assert pretrained.load(workdir).keys() == weights.keys()

  _write_digits(photos, (5, 6, 7), slice(80, 120))
  _write_digits(photos, (8, 9), slice(0, 120))
  shutil.copytree(workdir, tmp_path / "killed" / "run")
  second = _train(nfnets, *command)
  assert "another round starts from" in second
  _, grown_card = pretrained.load_with_card(workdir)
  assert grown_card.class_names == ("eight", "five", "nine", "seven", "six")
  rows = json.loads((workdir / "round_002" / "growth.json").read_text())
  assert rows["known classes"]["before"] > 0.85
  assert rows["known classes"]["after"] > 0.85
  assert rows["new classes"]["before"] == 0
  assert rows["new classes"]["after"] > 0.8
  assert [rows[k]["classes"] for k in rows] == [3, 2, 5]
  total = rows["all classes"]["images"]
  assert (
    rows["known classes"]["images"] + rows["new classes"]["images"] == total
  )
  assert re.search(r"known classes +\d+ +\S+% +\S+%", second)
  # The first round is left as it was.
  old = workdir / "round_001" / "weights.safetensors"
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(old), weights)

  # A round that was killed ends as if it had not been.
  killed = tmp_path / "killed" / "run"
  command = [*_fine_tune(start, photos, killed), *KILLED_OPTIONS]
  checkpoints = killed / "round_002" / "checkpoints"
  assert kill_when(
    lambda: (checkpoints / "25").is_dir(),
    [sys.executable, "-m", "nfnets.main", "train", *command],
    environment,
  )
  assert not (killed / "round_002" / "weights.safetensors").exists()
  resumed = _train(nfnets, *command)
  assert re.search(r"round_002 from step \d+", resumed)
  for name in ("weights.safetensors", "growth.json"):
    whole = workdir / "round_002" / name
    assert (killed / "round_002" / name).read_bytes() == whole.read_bytes()
  evaluations = read_rows(workdir / "round_002", "eval")
  assert read_rows(killed / "round_002", "eval") == evaluations

  # Every other command takes the workdir, and means its newest round.
  result = nfnets("evaluate", f"--workdir={workdir}", "--json")
  results = json.loads(result.stdout)
  assert results["best"]["top1"] == pytest.approx(
    rows["all classes"]["after"], abs=1e-6
  )
  grid = tmp_path / "grid.png"
  predicted = nfnets(
    "predict",
    f"--workdir={workdir}",
    f"{photos}/n*/*.png",
    "--csv",
    "--top=1",
    f"--grid={grid}",
  )
  assert predicted.returncode == 0, predicted.stderr
  lines = predicted.stdout.splitlines()
  assert lines[0] == "path,rank,class,probability"
  assert len(lines) == 121
  assert sum(",1,nine," in line for line in lines) > 100
  with Image.open(grid) as picture:
    assert min(picture.size) > 500


def test_wrong_input_is_one_line(start, nfnets_here, tmp_path):
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  _write_digits(photos, (5, 6), slice(0, 10))

  def fails(*options, exit_code=1, pattern):
    result = nfnets_here("train", *_fine_tune(start, photos, workdir, *options))
    assert result.returncode == exit_code, result.stdout
    assert "Traceback" not in result.stderr
    assert re.search(pattern, result.stderr), result.stderr
    assert not (workdir / "round_001" / "config.json").exists()

  (photos / "none").mkdir()
  fails(pattern=r"none holds no image files: add some or remove it")
  (photos / "none").rmdir()
  fails(
    "--config.model.name=nf_regnet_b0",
    pattern=r"does not hold weights of nf_regnet_b0 .* absent in nf_regnet_b0",
  )
  fails(
    "--config.optim.frozen=stem,stage9",
    exit_code=2,
    pattern=r"'stage9': did you mean stage.* known: head, stage1",
  )
  fails(
    "--config.optim.frozen=stem,stage1,stage2,head",
    exit_code=2,
    pattern="nothing is left to train",
  )
  fails(
    "--config.init_from=dm_nfnet_f0",
    f"--config.data.dir={photos}z",
    pattern="photosz: there is no such folder",
  )
  fails("--config.init_from=absent.npz", pattern="no such weights file")
  damaged = tmp_path / "damaged.safetensors"
  whole = (start / "weights.safetensors").read_bytes()
  damaged.write_bytes(whole[:1000])
  fails(f"--config.init_from={damaged}", pattern="is damaged or no safetensor")
  shutil.rmtree(photos / "six")
  fails(pattern=r"has 1 class folder \(five\): at least two are needed")


def test_a_round_goes_on_at_its_own_sizes(start, tmp_path):
  """Given the size of tests alone, images to train on stay as small."""
  _write_digits(tmp_path / "photos", (5, 6), slice(0, 10))
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(start), str(tmp_path / "photos")
  config.data.test_size = 40
  workdir = tmp_path / "run"
  begun, folder = rounds.choose(config, workdir)
  assert folder == workdir / "round_001"
  folder.mkdir(parents=True)
  r = recipe.resolve(begun)
  recipe.save(r, folder, num_devices=1)
  assert (r.train_size, r.card.image_size) == (32, 40)
  (workdir / "round_001.bak").mkdir()

  # Of the workdir, and of the round itself, which stays one.
  for given in (workdir, folder):
    chosen, found = rounds.choose(config, given)
    assert found == folder
    assert recipe.changes_since(recipe.resolve(chosen), folder) == []
  _write_digits(tmp_path / "photos", (5, 6), slice(10, 20))
  chosen, found = rounds.choose(config, workdir)
  assert found == workdir / "round_002"
  assert recipe.resolve(chosen).train_size == 32
  chosen, found = rounds.choose(config, folder)
  assert found == folder
  with pytest.raises(InputError, match=r"another run \(images: "):
    recipe.changes_since(recipe.resolve(chosen), folder)

  # The weights that it began with may be written otherwise, or be left out.
  config.init_from = str(start / ".." / start.name)
  assert rounds.choose(config, workdir)[1] == workdir / "round_002"
  config.init_from = None
  assert rounds.choose(config, workdir)[1] == workdir / "round_002"
  config.init_from = "dm_nfnet_f1"
  for given in (workdir, folder):
    with pytest.raises(InputError, match=r"began with .*for dm_nfnet_f1 choo"):
      rounds.choose(config, given)


def test_a_round_goes_on_with_its_own_settings(
  tmp_path, nfnets_here, monkeypatch
):
  """Of the workdir alone, though it has no weights yet."""
  _write_digits(tmp_path / "photos", (5, 6), slice(0, 10))
  config = base.get_config()
  config.data.source, config.data.dir = "folder", str(tmp_path / "photos")
  config.data.grows = True
  workdir = tmp_path / "run"
  for number, rate in ((1, 0.5), (2, 0.25)):
    config.optim.lr_per_256 = rate
    folder = workdir / f"round_00{number}"
    folder.mkdir(parents=True)
    recipe.save(recipe.resolve(config), folder, num_devices=1)
  (workdir / "round_001" / "weights.safetensors").touch()
  found = []

  def stop(config, workdir):
    found.append((config.optim.lr_per_256, workdir))
    raise InputError("enough")

  monkeypatch.setattr(train, "train", stop)
  assert nfnets_here("train", f"--workdir={workdir}").returncode == 1
  assert found == [(0.25, workdir)]


def test_a_round_is_found_where_its_workdir_was_moved(start, tmp_path):
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  _write_digits(photos, (5, 6), slice(0, 10))
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(start), str(photos)
  for number, init_from in ((1, start), (2, tmp_path / "old" / "round_001")):
    folder = workdir / f"round_00{number}"
    folder.mkdir(parents=True)
    r = recipe.resolve(config)
    r.config.init_from = str(init_from)
    recipe.save(r, folder, num_devices=1)
  shutil.copy(start / "weights.safetensors", workdir / "round_001")
  chosen, folder = rounds.choose(config, workdir)
  assert folder == workdir / "round_002"
  assert chosen.init_from == str(workdir / "round_001")
  shutil.copy(start / "weights.safetensors", folder)  # Of one that has begun.
  chosen, folder = rounds.choose(config, workdir)
  assert recipe.changes_since(recipe.resolve(chosen), folder) == []

  # A round that is trained now, or that lacks its config, is not passed over.
  _write_digits(photos, (5, 6), slice(10, 20))
  (folder / "weights.safetensors").rename(tmp_path / "kept")
  chosen, _ = rounds.choose(config, workdir)  # After one without weights.
  assert chosen.init_from == str(workdir / "round_001")
  (tmp_path / "kept").rename(folder / "weights.safetensors")
  with (
    checkpoint.locked(folder),
    pytest.raises(InputError, match=r"another process is training in .*_002"),
  ):
    rounds.choose(config, workdir)
  found = workdir / "round_003"
  assert rounds.choose(config, workdir)[1] == found
  found.mkdir()
  shutil.copy(start / "weights.safetensors", found)
  with pytest.raises(InputError, match=r"round_003 has weights but no config"):
    rounds.choose(config, workdir)

  # What it began with may be given though the first round is gone.
  shutil.rmtree(found)
  shutil.rmtree(workdir / "round_001")
  assert rounds.choose(config, workdir)[1] == found


def test_where_a_workdir_is_no_class(tmp_path):
  """Beside the parts to train on and to test with, and where it is hidden."""
  _write_digits(tmp_path, (5, 6), slice(0, 3))
  config = finetune.get_config("folder")
  config.data.dir = str(tmp_path)
  recipe.check_apart(config, tmp_path / ".runs" / "x")
  (tmp_path / "train").mkdir()
  shutil.copy(tmp_path / "five" / "000.png", tmp_path / "train")
  with pytest.raises(InputError, match=r"is inside of .*each folder is a cl"):
    recipe.check_apart(config, tmp_path / "run")
  for name in ("five", "six"):
    shutil.move(tmp_path / name, tmp_path / "train" / name)
  (tmp_path / "test").mkdir()
  recipe.check_apart(config, tmp_path / "run")
  for part in ("train", "test"):
    with pytest.raises(InputError, match=r"is inside of .*each folder is a cl"):
      recipe.check_apart(config, tmp_path / part / "run")


def test_what_is_trained_on_is_not_tested_on(tmp_path):
  config = finetune.get_config("tfds")
  for splits in ("train", "valid"), ("train_and_valid", "test"):
    config.data.train_split, config.data.test_split = splits
    recipe.check_apart(config, tmp_path)
  for splits in (
    ("train_and_valid", "valid"),
    ("valid", "train_and_valid"),
    ("train", "train_and_valid"),
    ("valid", "valid"),
  ):
    config.data.train_split, config.data.test_split = splits
    with pytest.raises(UsageError, match="have images in common: choose"):
      recipe.check_apart(config, tmp_path)


def test_a_workdir_is_no_class(nfnets_here, tmp_path):
  _write_digits(tmp_path, (5, 6), slice(0, 10))
  command = [
    "train",
    "--config=configs/finetune.py:folder",
    "--config.data.dir=.",
  ]
  for options in ([], ["--workdir=mine/run"]):
    result = nfnets_here(*command, *options, cwd=tmp_path)
    assert result.returncode == 1
    assert re.search(
      r"workdir=\S+ is inside of .*each folder is", result.stderr
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["five", "six"]


def test_a_run_and_rounds_do_not_share_a_workdir(start, nfnets_here, tmp_path):
  """Nothing is written, and other commands still find what is there."""
  _write_digits(tmp_path / "photos", (5, 6), slice(0, 40))
  workdir = tmp_path / "run"
  shutil.copytree(start, workdir)
  before = set(workdir.rglob("*"))
  command = _fine_tune(start, tmp_path / "photos", workdir)
  result = nfnets_here("train", *command)
  assert result.returncode == 1
  assert re.search(r"another run, one without rounds: choose", result.stderr)
  assert set(workdir.rglob("*")) == before
  # What a first round leaves whose weights were not there.
  (workdir / "round_001" / "checkpoints").mkdir(parents=True)
  assert pretrained.load(workdir).keys() == pretrained.load(start).keys()

  (tmp_path / "rounds").mkdir()
  shutil.move(workdir, tmp_path / "rounds" / "round_001")
  command = [*command, "--config.data.grows=False"]
  command += [f"--workdir={tmp_path / 'rounds'}"]
  result = nfnets_here("train", *command)
  assert result.returncode == 1
  assert re.search(r"holds round_001 of images that are added", result.stderr)


def test_a_group_of_classes_without_held_out_images_is_left_out():
  before, after = np.diag([3, 1, 0]), np.diag([2, 2, 0])
  before[0, 1] = after[1, 0] = 1
  tables = {"before": before, "after": after}
  rows = rounds.compare(tables, np.array([True, True, False]))
  known = {"classes": 2, "images": 5, "before": 4 / 5, "after": 4 / 5}
  assert rows == {"known classes": known, "all classes": known | {"classes": 3}}
  json.dumps(rows, allow_nan=False)
  rows = rounds.compare(tables, np.array([True, False, False]))
  assert rows["known classes"]["before"] == 3 / 4
  assert rows["new classes"] == {
    "classes": 2,
    "images": 3,
    "before": 1,
    "after": 2 / 3,
  }


def test_images_to_test_with_are_needed(start, tmp_path):
  _write_digits(tmp_path, (5, 6), slice(0, 1))
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(start), str(tmp_path)
  with pytest.raises(InputError, match=r"no images to test with; of image fo"):
    recipe.resolve(config)


@pytest.mark.slow
def test_two_processes_train_two_rounds(start, environment, tmp_path):
  """Hosts of a pod compare known and new classes together."""
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  command = _fine_tune(start, photos, workdir, "--config.train.epochs=3")
  for digits in ((5, 6), (5, 6, 7)):
    _write_digits(photos, digits, slice(0, 40))
    results = run_pod(environment, *command)
    for code, output, errors in results:
      assert code == 0, output + errors
  assert re.search(r"known classes +\d+ +\S+% +\S+%", results[0][1])
  assert "known classes" not in results[1][1]
  rows = json.loads((workdir / "round_002" / "growth.json").read_text())
  assert rows["new classes"]["classes"] == 1


def test_without_weights_it_says_what_to_give():
  with pytest.raises(InputError, match=r"give --config.init_from=WEIGHTS"):
    recipe.resolve(finetune.get_config("folder"))


def test_images_that_change_within_a_run_are_refused(
  start, nfnets_here, tmp_path
):
  """Without rounds: the order of the examples would be another."""
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  _write_digits(photos, (5, 6), slice(0, 30))
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(start), str(photos)
  config.data.grows = False
  (workdir / "checkpoints" / "1").mkdir(parents=True)
  recipe.save(recipe.resolve(config), workdir, num_devices=1)
  _write_digits(photos, (5, 6), slice(30, 40))
  result = nfnets_here("train", f"--workdir={workdir}")
  assert result.returncode == 1
  assert re.search(r"another run \(images: .*classes.* -> ", result.stderr)


def test_frozen_parts_keep_their_weights(start, nfnets, tmp_path):
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  _write_digits(photos, (5, 6), slice(0, 40))
  command = _fine_tune(start, photos, workdir, "--config.train.epochs=2")
  _train(nfnets, *command, "--config.optim.frozen=stem,stage1")
  before, after = pretrained.load(start), pretrained.load(workdir)
  _, card = pretrained.load_with_card(workdir)
  stage_of = card.make_model().stage_of
  moved = {"stem": 0.0, "stage1": 0.0, "stage2": 0.0, "head": 0.0}
  for module, values in after.items():
    if is_classifier(module):
      continue
    for name, value in values.items():
      change = np.max(np.abs(value - before[module][name]))
      moved[stage_of(module)] = max(moved[stage_of(module)], change)
  # The average of equal numbers may round.
  assert moved["stem"] < 1e-6
  assert moved["stage1"] < 1e-6
  assert moved["stage2"] > 1e-4
  assert moved["head"] > 1e-4


def test_a_class_that_arrives_while_a_round_trains_is_of_the_next(
  start, tmp_path, capsys, monkeypatch
):
  photos, folder = tmp_path / "photos", tmp_path / "run" / "round_001"
  _write_digits(photos, (4, 5), slice(0, 40))
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(start), str(photos)
  config.data.test_size = 40
  r = recipe.resolve(config)
  folder.mkdir(parents=True)
  recipe.save(r, folder, num_devices=1)
  old, card = pretrained.load_with_card(start)
  names = {"old_names": card.class_names, "new_names": r.card.class_names}
  fresh = draw_params(param_shapes(r.model))
  trained = pretrained.transfer(old, fresh, r.model, origin="", **names)
  pretrained.save(folder / "weights.safetensors", trained, r.card)
  _write_digits(photos, (6,), slice(0, 40))
  sizes, over_split = [], evaluate.over_split

  def watch(*arguments, **options):
    sizes.append(options["image_size"])
    return over_split(*arguments, **options)

  monkeypatch.setattr(evaluate, "over_split", watch)
  rounds.report(r, folder)
  assert sizes == [40]
  rows = json.loads((folder / "growth.json").read_text())
  assert [rows[group]["classes"] for group in rows] == [1, 1, 2]
  # The start knows no 5, whatever it takes one for.
  assert rows["new classes"]["before"] == 0
  assert rows["known classes"]["before"] == 1
  assert rows["all classes"]["images"] == r.source.test.num_examples

  # The run is over; that its start is gone by now is no failure.
  r.config.init_from = str(tmp_path / "gone")
  rounds.report(r, folder)
  assert "cannot be compared: " in capsys.readouterr().out


def test_a_run_ends_when_nothing_gets_better(start, nfnets, tmp_path):
  """A learning rate of nothing: the first evaluation stays the best."""
  photos, workdir = tmp_path / "photos", tmp_path / "run"
  _write_digits(photos, (5, 6), slice(0, 40))
  options = ["--config.train.patience=2", "--config.train.epochs=4"]
  options += ["--config.optim.lr_per_256=0.0", "--config.data.grows=False"]
  options += ["--config.eval.every_epochs=1"]
  command = _fine_tune(start, photos, workdir)
  output = _train(nfnets, *command, *options)
  assert "no better in 2 evaluations" in output
  rows = read_rows(workdir, "eval")
  assert len(rows) == 3
  kept = {p.name for p in workdir.iterdir()}
  assert "weights.safetensors" in kept
  assert "best.safetensors" not in kept
  # It is over, however often it is started.
  again = _train(nfnets, *command, *options)
  assert "is complete" in again
  assert read_rows(workdir, "eval") == rows
  longer = [*command, *options, "--config.train.epochs=5"]
  refused = nfnets("train", *longer)
  assert refused.returncode == 1
  assert "or raise config.train.patience to train" in refused.stderr
  # Without patience it goes on; the best weights are kept.
  best = (workdir / "weights.safetensors").read_bytes()
  impatient = tmp_path / "impatient.py"
  impatient.write_text(
    "from configs import finetune\n\n\n"
    "def get_config():\n"
    "  config = finetune.get_config('folder')\n"
    "  config.train.patience = None\n"
    "  return config\n"
  )
  options = [x for x in options if "patience" not in x]
  options += [f"--config={impatient}"]
  _train(nfnets, *command, *options)
  step = rows[0]["step"]
  assert (workdir / f"weights_{step}.safetensors").read_bytes() == best
  steps = [row["step"] for row in read_rows(workdir, "eval")]
  assert len(steps) == 4
  last = workdir / "weights.safetensors"
  assert pretrained.load_with_card(last)[1].step == steps[-1]


def test_patience_reads_the_record(tmp_path):
  values = [0.5, 0.7, 0.6, 0.7, 0.8, 0.1]
  lines = [
    json.dumps({"step": i, "kind": "eval", "ema_top1": v, "ema_loss": 1.0})
    + "\n"
    for i, v in enumerate(values, start=1)
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  card = _card()
  best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5}
  exhausted = {1: False, 2: False, 3: False, 4: True, 5: False, 6: False}
  for step in best:
    pretrained.save(
      tmp_path / "best.safetensors", _params(), card._replace(step=best[step])
    )
    patience = Patience(tmp_path, 2, step=step)
    assert patience.best["step"] == best[step]
    assert patience.is_exhausted == exhausted[step]


def test_the_best_are_weights_that_are_there(tmp_path):
  """Not those of a record whose weights are lost, or were never kept."""
  lines = [
    json.dumps(
      {"step": step, "kind": "eval", "ema_top1": value, "ema_loss": 1.0}
    )
    + "\n"
    for step, value in enumerate((0.5, 0.9, 0.6), start=1)
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  assert Patience(tmp_path, 1, step=3).best is None
  assert not Patience(tmp_path, 1, step=3).is_exhausted
  finished = tmp_path / "weights.safetensors"
  # Weights of step 4 were left by a run that went back; older files say none.
  for step, best in ((4, None), (3, 3), (2, 2), (None, 2)):
    pretrained.save(finished, _params(), _card()._replace(step=step))
    patience = Patience(tmp_path, 1, step=3)
    assert (patience.best and patience.best["step"]) == best
    patience.go_on()
    assert finished.exists() == (best is None)
    if best is not None:
      assert Patience(tmp_path, 1, step=3).best["step"] == best
      assert patience.finish()
      assert pretrained.step_of(finished) == step


def test_counting_from_weights_that_are_there_goes_on(tmp_path):
  """Patience came after step 3: a start later decides as if there was none."""
  values = (0.5, 0.9, 0.6, 0.7, 0.65, 0.64)
  record = tmp_path / "metrics.jsonl"
  for step, value in enumerate(values, start=1):
    row = {"step": step, "kind": "eval", "ema_top1": value, "ema_loss": 1.0}
    with record.open("a") as file:
      file.write(json.dumps(row) + "\n")
    if step < 3:
      continue
    patience = Patience(tmp_path, 2, step=step)
    if step in (3, 4):
      patience.save(_params(), _card()._replace(step=step))
      patience = Patience(tmp_path, 2, step=step)
    assert patience.best["step"] == min(step, 4)
    assert patience.is_exhausted == (step == 6)


def test_of_equal_accuracies_the_best_has_the_least_loss(tmp_path):
  """But a run ends as if they were equal."""
  patience = Patience(tmp_path, 3, step=0)
  found = [
    patience.add({"step": step, "ema_top1": top1, "ema_loss": loss})
    for step, (top1, loss) in enumerate(
      [(1, 0.9), (1, 0.5), (1, 0.6), (0, 0.1)]
    )
  ]
  assert found == [True, True, False, False]
  assert patience.best["step"] == 1
  assert patience.is_exhausted


def test_patience_goes_on_alike_after_ties(tmp_path):
  """From any step, with the weights that are there at it or after it."""
  values = [(0.9, 1.0), (1.0, 0.5), (1.0, 0.3), (1.0, 0.4), (1.0, 0.2)]
  rows = [
    {"step": i, "kind": "eval", "ema_top1": top1, "ema_loss": loss}
    for i, (top1, loss) in enumerate(values, start=1)
  ]
  lines = [json.dumps(row) + "\n" for row in rows]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  kept = tmp_path / "best.safetensors"
  for step in range(1, 6):  # Killed after it, at any later one.
    for killed_at in range(step, 6):
      best = {1: 1, 2: 2, 3: 3, 4: 3, 5: 5}[killed_at]
      pretrained.save(kept, _params(), _card()._replace(step=best))
      patience = Patience(tmp_path, 3, step=step)
      for row in rows[step:]:
        assert not patience.is_exhausted
        patience.add(row)
      assert patience.best["step"] == 5
      assert patience.is_exhausted
  # Of an earlier version, which kept the first.
  pretrained.save(kept, _params(), _card()._replace(step=2))
  patience = Patience(tmp_path, 3, step=5)
  assert patience.best["step"] == 2
  assert patience.is_exhausted


def _card():
  return cards.for_imagenet(models.make("nfnet_tiny"), "made up")


def _params():
  return draw_params(param_shapes(_card().make_model()))


@pytest.mark.parametrize("name", ["nfnet_l0", "timm_nf_resnet50"])
def test_weights_whose_classes_have_no_names_are_a_start(name, tmp_path):
  """As timm's for other sets than ImageNet's thousand.

  The arrays of some of its networks have the shapes of published ones.
  """
  _write_digits(tmp_path / "photos", (5, 6), slice(0, 10))
  model = models.make(name, 3)
  path = tmp_path / "timm.safetensors"
  params = draw_params(param_shapes(model))
  tensors = timm.from_ours(params, model, for_use_in_timm=False)
  pretrained.save_tensors(path, tensors)
  config = finetune.get_config("folder")
  config.init_from, config.data.dir = str(path), str(tmp_path / "photos")
  r = recipe.resolve(config)
  assert (r.model.name, r.model.num_classes) == (name, 2)
  published = cards.for_imagenet(models.make(name), "")
  for field in ("image_size", "crop", "margin", "mean", "std"):
    assert getattr(r.card, field) == getattr(published, field)
  title = export.convert(path, tmp_path / "ours.npz", folds_epsilon=False)
  assert title == f"{name}, 3 classes"


def test_any_key_may_be_left_open_but_the_network_must_be_known(tmp_path):
  config = base.get_config()
  config.model.name = None
  with pytest.raises(InputError, match=r"takes network and preprocessing from"):
    recipe.resolve(config)
