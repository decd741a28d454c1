"""Recipes: the golden file of each holds what its config resolves to.

When a number moves on purpose, write the files anew and read the difference:
`python tests/test_recipes.py`.
"""

import importlib
import json

import pytest
from conftest import REFERENCE

from nfnets import models

RECIPES = {
  "digits": ("digits", "nfnet_tiny"),
  "nfnet_imagenet_F0": ("nfnet_imagenet", "F0"),
  "nfnet_imagenet_F5": ("nfnet_imagenet", "F5"),
  "nfnet_imagenet_F4_plus": ("nfnet_imagenet", "F4_plus"),
}


def _resolved(name):
  module, variant = RECIPES[name]
  config = importlib.import_module(f"configs.{module}").get_config(variant)
  row = models.variant(config.model.name)
  return {
    "config": config.to_dict(),
    "variant": row._asdict(),
    "steps_of_imagenet": int(
      config.train.epochs * 1_281_167 / config.train.batch_size
    ),
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
    "momentum": 0.9,
    "weight_decay": 2e-5,
    "agc_clipping": 0.01,
    "agc_eps": 1e-3,
    "ema_decay": 0.99999,
  }
  augment = config["augment"]
  assert augment["randaugment_layers"] == 4
  assert augment["mixup_alpha"] == 0.2
  assert augment["cutmix"]
  assert found["variant"]["stochdepth_rate"] == 0.25


if __name__ == "__main__":
  for recipe in RECIPES:
    _path(recipe).parent.mkdir(exist_ok=True)
    text = json.dumps(_resolved(recipe), indent=2, sort_keys=True)
    _path(recipe).write_text(text + "\n")
