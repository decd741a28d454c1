"""Recipes: the golden file of each holds what its config resolves to.

When a number moves on purpose, write the files anew and read the difference:
`python tests/test_recipes.py`.
"""

import importlib
import json

import pytest
from conftest import REFERENCE

from configs import finetune, nfnet_imagenet, nfnet_pretrain
from nfnets import models

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


def test_every_recipe_has_a_golden_file_and_each_file_a_recipe():
  files = {path.stem for path in _path("").parent.glob("*.json")}
  assert files == set(RECIPES)


if __name__ == "__main__":
  for recipe in RECIPES:
    _path(recipe).parent.mkdir(exist_ok=True)
    text = json.dumps(_resolved(recipe), indent=2, sort_keys=True)
    _path(recipe).write_text(text + "\n")
