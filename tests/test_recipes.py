"""Recipes: the golden file of each holds what its config resolves to.

When a number moves on purpose, write the files anew and read the difference:
`python tests/test_recipes.py`.
"""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REFERENCE, SMALL

from configs import digits, finetune, nfnet_imagenet, nfnet_pretrain
from nfnets import card as cards
from nfnets import (
  devices,
  evaluate,
  main,
  models,
  optim,
  plots,
  progress,
  recipe,
  show_batch,
  steps,
  train,
)
from nfnets.data import batches, sources
from nfnets.data.source import Sizes
from nfnets.errors import InputError

RECIPES = {
  f"{name}_{variant}": (name, variant)
  for name, variants in {
    "digits": ["nfnet_tiny"],
    "finetune": finetune.VARIANTS,
    "nfnet_imagenet": nfnet_imagenet.VARIANTS,
    "nfnet_pretrain": nfnet_pretrain.EPOCHS,
  }.items()
  for variant in variants
}


def _resolved(name):
  module, variant = RECIPES[name]
  config = importlib.import_module(f"configs.{module}").get_config(variant)
  columns = config.model.to_dict()
  overrides = {k: v for k, v in columns.items() if v is not None}
  name_of_model = overrides.pop("name", None)  # Open in fine-tuning.
  row = models.variant(name_of_model or "nfnet_f0", **overrides)
  steps = config.train.epochs * 1_281_167 / config.train.batch_size
  return {
    "config": config.to_dict(),
    "variant": row._asdict(),
    "steps_of_imagenet": config.train.steps or int(steps),
    "peak_learning_rate": config.optim.lr_per_256
    * config.train.batch_size
    / 256,
  }


def _path(name):
  return REFERENCE / "recipes" / f"{name}.json"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_golden_file(name):
  ours = json.loads(json.dumps(_resolved(name)))
  assert ours == json.loads(_path(name).read_text())


def test_without_a_variant_a_recipe_has_its_usual_one():
  for module, variant in (
    (finetune, "folder"),
    (nfnet_imagenet, "F0"),
    (nfnet_pretrain, "F4"),
    (digits, "nfnet_tiny"),
  ):
    assert module.get_config() == module.get_config(variant)


def test_runs_of_two_variants_lie_apart(monkeypatch):
  monkeypatch.setenv("NFNETS_RUNS", "here")
  for given, expected in (
    (None, "digits"),
    ("mine/recipe.py", "recipe"),
    ("configs/nfnet_imagenet.py:F1", "nfnet_imagenet-F1"),
  ):
    assert main._default_workdir(given) == Path("here") / expected


def test_an_evaluation_is_never_less_than_a_step_away():
  config = digits.get_config()
  config.eval.every_epochs = 0.01
  assert recipe.resolve(config).eval_every_steps == 1


def test_the_papers_values():
  """Appendix A of 2102.06171, in its own words."""
  found = _resolved("nfnet_imagenet_F0")
  config = found["config"]
  assert found["steps_of_imagenet"] == 112_602
  assert config["train"]["epochs"] == 360
  assert config["train"]["batch_size"] == 4096
  assert config["train"]["label_smoothing"] == 0.1
  assert config["train"]["precision"] == "bfloat16"
  assert config["optim"] == {
    "lr_per_256": 0.1,
    "warmup_epochs": 5,
    "warmup_steps": None,
    "momentum": 0.9,
    "weight_decay": 2e-5,
    "agc_clipping": 0.01,
    "agc_eps": 1e-3,
    "ema_decay": 0.99999,
    "sam_rho": 0.0,
    "sam_share": 0.2,
    "frozen": "",
  }
  augment = config["augment"]
  assert augment["randaugment_layers"] == 4
  assert augment["mixup_alpha"] == 0.2
  assert augment["cutmix"]
  assert found["variant"]["stochdepth_rate"] == 0.25


def test_the_papers_fine_tuning():
  """Appendix A.5: 15,000 steps at 0.1, a third of them warm-up, with SAM."""
  found = _resolved("finetune_imagenet")
  assert found["steps_of_imagenet"] == 15_000
  assert found["peak_learning_rate"] == pytest.approx(0.1)
  optim = found["config"]["optim"]
  assert (optim["warmup_steps"], optim["weight_decay"]) == (5000, 1e-5)
  assert (optim["sam_rho"], optim["sam_share"]) == (0.05, 0.2)
  assert found["variant"]["drop_rate"] == 0.25
  assert found["variant"]["stochdepth_rate"] == 0.1


def test_what_follows_from_the_papers_recipe(monkeypatch):
  """With as many images as ImageNet has."""
  made = sources.load("synthetic", sizes=Sizes(8, 8, 0))
  monkeypatch.setattr(sources, "load", lambda *_, **__: made)
  r = recipe.resolve(nfnet_imagenet.get_config("F1"))
  assert (r.train_size, r.card.image_size, r.card.margin) == (224, 320, 32)
  assert (r.total_steps, r.warmup_steps) == (112_602, 1564)
  assert r.eval_every_steps == round(
    r.config.eval.every_epochs * 1_281_167 / 4096
  )
  assert r.peak_learning_rate == 1.6
  rates = [float(r.make_schedule()(step)) for step in (0, 782, 1564, 112_601)]
  assert rates == pytest.approx([0, 0.8, 1.6, 0], abs=1e-6)


def test_every_setting_reaches_what_computes(monkeypatch):
  """All of them have defaults there, which would hide one that does not."""
  given: dict = {}

  def watch(module, name):
    original = getattr(module, name)

    def call(*arguments, **options):
      given.update(options)
      return original(*arguments, **options)

    monkeypatch.setattr(module, name, call)

  watch(steps, "make_train_step")
  watch(optim, "make_optimizer")
  watch(recipe, "make_augment")
  config = digits.get_config()
  expected = {
    "augment.flip": ("flip", True),
    "augment.shift": ("shift", 0.25),
    "augment.mixup_alpha": ("mixup_alpha", 0.3),
    "augment.cutmix": ("cutmix", True),
    "augment.randaugment_layers": ("randaugment_layers", 2),
    "augment.randaugment_magnitude": ("randaugment_magnitude", 7),
    "augment.randaugment_quirks": ("randaugment_quirks", False),
    "train.accumulate": ("accumulate", 2),
    "train.precision": ("precision", "bfloat16"),
    "train.label_smoothing": ("label_smoothing", 0.2),
    "optim.momentum": ("momentum", 0.8),
    "optim.weight_decay": ("weight_decay", 1e-3),
    "optim.agc_clipping": ("clipping", 0.02),
    "optim.agc_eps": ("clipping_eps", 1e-2),
    "optim.ema_decay": ("ema_decay", 0.95),
    "optim.sam_rho": ("sam_rho", 0.05),
    "optim.sam_share": ("sam_share", 0.5),
    "seed": ("seed", 3),
  }
  # What has no such simple counterpart in the step.
  elsewhere = {
    "augment.partners", "optim.lr_per_256", "optim.warmup_epochs",
    "optim.warmup_steps", "optim.frozen",
  }  # fmt: skip
  sections = {key for key in expected if "." in key} | elsewhere
  for section in ("augment", "optim"):
    assert sections >= {f"{section}.{key}" for key in config[section]}
  config.update_from_flattened_dict({k: v for k, (_, v) in expected.items()})
  train._make_programs(recipe.resolve(config), devices.make_mesh(1))
  found = {key: given[name] for key, (name, _) in expected.items()}
  assert found == {key: value for key, (_, value) in expected.items()}


@pytest.mark.parametrize(
  ("options", "parts"),
  [
    ({}, 2),
    ({"train.batch_size": 16}, 1),
    ({"data.train_size": 64}, 1),
    ({"train.accumulate": 1}, 1),
    ({"train.accumulate": 4}, 4),
    ({"optim.sam_rho": 0.05}, 1),  # Each part would climb by itself.
  ],
)
def test_steps_are_divided_where_that_is_faster(monkeypatch, options, parts):
  given = {}
  make_train_step = steps.make_train_step

  def watch(*arguments, **others):
    given.update(others)
    return make_train_step(*arguments, **others)

  monkeypatch.setattr(steps, "make_train_step", watch)
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      "data.source": "synthetic",
      "data.train_size": 192,
      "train.batch_size": 64,
    }
    | options
  )
  r, mesh = recipe.resolve(config), devices.make_mesh(2)
  train._make_programs(r, mesh)
  assert given["accumulate"] == parts
  headline = train._headline(r, mesh, Path("w"), 0, is_over=False)
  assert (f" in {parts} parts on 2 x cpu" in headline) == (parts > 1)


def test_without_averages_weights_are_evaluated_once(monkeypatch):
  kinds = []

  def over_split(eval_step, weights, *_, **__):
    kinds.append(list(weights))
    return dict.fromkeys(weights, evaluate.Result(1.0, 0.5, 0.9, 10))

  monkeypatch.setattr(evaluate, "over_split", over_split)
  state = steps.TrainState(1, *[None] * (len(steps.TrainState._fields) - 1))
  bar = progress.TrainProgress(start=0, total=1, batch_size=1, is_shown=False)
  for decay in (0.0, 0.99):
    config = digits.get_config()
    config.optim.ema_decay = decay
    r = recipe.resolve(config)
    result = train._evaluate(r, None, state, None, bar, log=None)
    assert result.top1 == 0.5
  assert kinds == [["raw"], ["raw", "EMA"]]


def test_a_workdir_belongs_to_what_the_readme_says(tmp_path):
  """Each key by itself; of those that a run may change, one."""
  r = recipe.resolve(digits.get_config())
  recipe.save(r, tmp_path, num_devices=1)
  assert recipe.changes_since(r, tmp_path) == []
  others = {
    "data.eval_crop": "padded",
    "data.eval_margin": 4,
    "data.held_out_share": 0.3,
    "data.min_area": 0.5,
    "data.mean": (1.0, 2.0, 3.0),
    "data.source": "synthetic",
    "data.std": (1.0, 2.0, 3.0),
    "data.test_size": 40,
    "data.test_split": "valid",
    "data.tfds_name": "insects",
    "data.train_size": 40,
    "data.train_split": "train",
    "init_from": "weights.npz",
    "seed": 1,
    "train.batch_size": 32,
    "model.drop_rate": 0.5,
  }
  made = {"classes", "images", "with AGC"}  # Of others.
  assert set(others) == set(recipe._FIXED) - made | {"model.drop_rate"}
  for key, value in others.items():
    config = digits.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=rf"another run \(.*{key}: "):
      recipe.changes_since(r._replace(config=config), tmp_path)
  config = digits.get_config()
  config.optim.lr_per_256 = 1.0
  changes = recipe.changes_since(r._replace(config=config), tmp_path)
  assert changes == ["optim.lr_per_256: 2.0 -> 1.0"]


def test_values_that_are_left_open_on_the_command_line():
  config = main._load_config(
    "configs/finetune.py:imagenet",
    [
      "--config.train.steps=None",
      "--config.train.epochs=2",
      "--config.data.eval_crop=None",
    ],
  )
  assert (config.train.steps, config.train.epochs) == (None, 2.0)
  assert config.data.eval_crop is None
  assert config.optim.warmup_steps == 5000


@pytest.mark.parametrize(
  ("model", "columns"),
  [
    ("nfnet_tiny", {"group_width": (4, 4, 8, 8), "stem_width": (4, 8, 16)}),
    ("nf_regnet_b0", {"group_width": 16}),
    ("nf_resnet50", {"bottleneck_ratio": 0.5, "stem_width": 32}),
  ],
)
def test_columns_of_all_families_can_be_given_and_kept(
  model, columns, tmp_path
):
  options = [
    f"--config.model.{name}={str(value).replace(' ', '').strip('()')}"
    for name, value in columns.items()
  ]
  config = main._load_config(f"configs/digits.py:{model}", options)
  r = recipe.resolve(config)
  assert r.card.overrides == columns
  recipe.save(r, tmp_path, num_devices=1)
  again = recipe.resolve(recipe.load_config(tmp_path))
  assert recipe.changes_since(again, tmp_path) == []
  assert again.model.variant == r.model.variant


@pytest.mark.parametrize("source", sources.IN_MEMORY)
def test_images_that_come_in_their_size_are_not_cropped(source):
  """Not in training's evaluation, so not in the predictions of its weights."""
  config = digits.get_config()
  config.data.source = source
  config.data.eval_crop, config.data.eval_margin = "padded", 16
  card = recipe.resolve(config).card
  assert (card.crop, card.margin) == ("resize", 0)


def test_every_recipe_has_a_golden_file_and_each_file_a_recipe():
  files = {path.stem for path in _path("").parent.glob("*.json")}
  assert files == set(RECIPES)


@pytest.fixture
def load(monkeypatch):
  made = sources.load("synthetic", sizes=Sizes(8, 8, 0))
  given = {}

  def call(name, **options):
    given.update(options, name=name)
    return made

  monkeypatch.setattr(sources, "load", call)
  return given


def test_every_setting_of_the_data_reaches_it(load):
  config = digits.get_config()
  values = {
    "source": "tfds",
    "dir": "/data",
    "tfds_name": "insects",
    "train_split": "train",
    "test_split": "valid",
    "held_out_share": 0.3,
    "max_broken": 7,
    "num_threads": 3,
    "train_size": 40,
    "test_size": 48,
    "eval_margin": 5,
    "eval_crop": "padded",
    "min_area": 0.35,
  }
  config.data.update(values)
  others = {"grows", "mean", "std"}
  assert set(config.data) == set(values) | others
  recipe.resolve(config)
  assert load.pop("sizes") == Sizes(40, 48, 5, "padded", 0.35)
  assert load.pop("name") == "tfds"
  assert load.pop("directory") == "/data"
  assert load == {name: values[name] for name in load}
  assert len(load) == 6


def test_settings_of_the_network_and_its_images_reach_them(load, monkeypatch):
  config = nfnet_imagenet.get_config("F1")
  config.train.remat, config.train.scan = "blocks", True
  config.train.packed = False
  r = recipe.resolve(config)
  found = r.model.execution
  assert (found.remat, found.is_scanned) == ("blocks", True)
  assert not found.is_packed
  given = {}
  monkeypatch.setattr(recipe, "make_augment", lambda **kw: given.update(kw))
  r.make_augment()
  assert given["randaugment_magnitude"] == 10  # F1's, in Table 1.
  config.augment.randaugment_magnitude = 0  # Harsh, but asked for.
  recipe.resolve(config).make_augment()
  assert given["randaugment_magnitude"] == 0


def test_a_batch_is_shown_as_the_first_step_sees_it(monkeypatch, tmp_path):
  config = digits.get_config()
  config.model.update(SMALL)
  config.train.batch_size = 16
  config.seed = 7
  config.augment.update({"mixup_alpha": 0.5, "cutmix": True, "shift": 0.2})
  augment, seen, shown = recipe.make_augment, [], []

  def make_augment(**options):
    made = augment(**options)

    def watched(*arguments):
      drawn = made(*arguments)
      jax.debug.callback(seen.append, drawn)
      return drawn

    return watched

  monkeypatch.setattr(recipe, "make_augment", make_augment)
  monkeypatch.setattr(plots, "save_grid", lambda *args, **_: shown.extend(args))
  show_batch.show_batch(config, tmp_path / "x.png", num_images=16)
  r, mesh = recipe.resolve(config), devices.make_mesh(1)
  programs = train._make_programs(r, mesh)
  batch = next(
    batches.TrainBatches(
      r.source.train,
      batch_size=16,
      seed=config.seed,
      with_partners=r.needs_partners,
    )
  )
  state = devices.create(programs.init, mesh)
  programs.train_step(state, devices.shard_batch(batch, mesh))
  jax.effects_barrier()
  ours, theirs = seen
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3)
  pictures, captions, _ = shown
  assert np.abs(np.stack(pictures) - theirs.images).max() <= 0.501
  mixed = 0
  for label, other, share, text in zip(
    theirs.labels, theirs.partner_labels, theirs.share, captions, strict=True
  ):
    if "\n" in text:
      mixed += 1
      assert text == f"{share:.0%} {label}\n{1 - share:.0%} {other}"
    else:
      assert text == str(label)
      assert share > 0.99 or label == other
  assert mixed > 4


def test_weights_of_the_usual_sizes_leave_them_to_the_network():
  model = models.make("nfnet_f0")
  usual = cards.for_imagenet(model, "here")
  config = recipe.fill(finetune.get_config("folder"), usual).data
  assert (config.train_size, config.test_size) == (None, 256)
  other = usual._replace(image_size=192)
  config = recipe.fill(finetune.get_config("folder"), other).data
  assert (config.train_size, config.test_size) == (192, 192)


@pytest.mark.parametrize(
  ("partners", "alpha", "cutmix", "expected"),
  [
    ("fresh", 0.2, True, True),
    ("fresh", 0.0, True, True),
    ("fresh", 0.2, False, True),
    ("fresh", 0.0, False, False),
    ("roll", 0.2, True, False),
  ],
)
def test_partners_are_read_where_images_are_mixed_with_fresh_ones(
  partners, alpha, cutmix, expected
):
  config = digits.get_config()
  config.augment.update(
    {"partners": partners, "mixup_alpha": alpha, "cutmix": cutmix}
  )
  assert recipe.resolve(config).needs_partners == expected


if __name__ == "__main__":
  for given in RECIPES:
    _path(given).parent.mkdir(exist_ok=True)
    text = json.dumps(_resolved(given), indent=2, sort_keys=True)
    _path(given).write_text(text + "\n")
