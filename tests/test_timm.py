"""Weights in timm's form: the mapping, and (marked) timm itself."""

import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import draw_params, param_shapes

from nfnets import models, pretrained, timm
from nfnets.errors import InputError

ROOT = Path(__file__).parent.parent

# One of each kind: released, SE after or in the middle, ECA, none at all.
KINDS = ("nfnet_f0", "nfnet_l0", "eca_nfnet_l0")
KINDS += ("timm_nf_regnet_b1", "timm_nf_resnet50", "timm_nfnet_f0")


def _released(model):
  """Weights as timm's own networks would become: skip gains of one."""
  params = draw_params(param_shapes(model))
  for values in params.values():
    if "skip_gain" in values and timm.is_native(model):
      values["skip_gain"] = np.ones((), np.float32)
  return params


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name):
  """Equal where nothing is multiplied, else within two last bits."""
  model = models.make(name, 7)
  params = _released(model)
  tensors = timm.from_ours(params, model)
  assert all(x.dtype == np.float32 for x in tensors.values())
  back = timm.to_ours(tensors, model)
  if name == "nfnet_f0":
    jax.tree.map(np.testing.assert_array_equal, back, params)
    return
  gain = np.float32(2.5e-7)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=gain, atol=0),
    back,
    params,
  )
  multiplied = {"gain", "w"}
  for module, values in params.items():
    for leaf, value in values.items():
      if leaf not in multiplied or (
        leaf == "w" and not module.endswith("/~/linear")
      ):
        np.testing.assert_array_equal(back[module][leaf], value)


def test_published_to_ours_to_timm_to_ours_is_exact(tmp_path):
  model = models.make("nfnet_f0")
  params = draw_params(param_shapes(model))
  pretrained.save(tmp_path / "ours.safetensors", params)
  loaded = pretrained.load(tmp_path / "ours.safetensors")
  pretrained.save_tensors(
    tmp_path / "timm.safetensors", timm.from_ours(loaded, model)
  )
  back, card = pretrained.load_with_card(tmp_path / "timm.safetensors")
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert card.model == "nfnet_f0"


LIGHT = {"depth": (1, 1), "width": (64, 128), "group_width": (16, 16)}
LIGHT |= {"bottleneck_ratio": (0.25, 0.25)}


def _logits(model, params, images):
  apply = lambda params: model.apply(params, {}, None, images)[0]["logits"]
  return np.asarray(jax.jit(apply)(params))


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    ("nfnet_l0", LIGHT),
    ("eca_nfnet_l0", LIGHT),
    ("timm_nf_regnet_b0", {"depth": (1, 1), "width": (48, 104)}),
    ("timm_nf_resnet26", {"depth": (1, 1), "width": (64, 128)}),
  ],
)
def test_skip_gains_move_into_the_weights(name, overrides):
  """timm has none: what comes back has ones, and the same function."""
  model = models.make(name, 7, **overrides)
  params = draw_params(param_shapes(model))
  back = timm.to_ours(timm.from_ours(params, model), model)
  skips = [v["skip_gain"] for v in back.values() if "skip_gain" in v]
  assert len(skips) == 2
  assert all(skip == 1 for skip in skips)
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
  np.testing.assert_allclose(
    _logits(model, back, images), _logits(model, params, images), atol=2e-5
  )


def test_epsilons_are_folded_where_kernels_are_small():
  """A kernel of variance 1e-5 is divided by sqrt(2e-5) in timm."""
  model = models.make("nfnet_f0", 7)
  params = draw_params(param_shapes(model))
  path = "NFNet/~/nf_block/~/conv1"
  w = params[path]["w"]
  params[path]["w"] = w * np.sqrt(1e-5 / np.var(w, axis=(0, 1, 2)))
  before = params[path]["gain"].copy()
  tensors = timm.from_ours(params, model, for_use_in_timm=True)
  gain = tensors["stages.0.0.conv2.gain"].ravel()
  np.testing.assert_allclose(gain, before * np.sqrt(2), rtol=1e-5)
  back = timm.to_ours(tensors, model, trained_in_timm=True)
  np.testing.assert_allclose(back[path]["gain"], before, rtol=1e-6)
  raw = timm.from_ours(params, model)["stages.0.0.conv2.gain"].ravel()
  np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("name", KINDS)
def test_files_are_recognised_by_content(tmp_path, name):
  model = models.make(name, 1000)
  params = {
    module: {leaf: np.zeros(x.shape, np.float32) for leaf, x in values.items()}
    for module, values in param_shapes(model).items()
  }
  path = tmp_path / "model.safetensors"
  pretrained.save_tensors(path, timm.from_ours(params, model))
  _, card = pretrained.load_with_card(path)
  assert card.model == name
  assert card.class_names[207] == "golden retriever"
  assert card.image_size == model.variant.test_size
  assert card.source == "model.safetensors"


def test_files_of_another_network_name_both_sides(tmp_path):
  model = models.make("nfnet_l0", 10)
  tensors = timm.from_ours(_released(model), model)
  tensors["stages.0.0.conv2.weight"] = np.zeros((64, 64, 5, 5), np.float32)
  del tensors["final_conv.bias"]
  path = tmp_path / "model.safetensors"
  pretrained.save_tensors(path, tensors)
  with pytest.raises(
    InputError,
    match=r"not hold weights of timm's nfnet_l0 with 10 classes: "
    r"final_conv.bias: missing in the file, \(2304,\) in nfnet_l0; "
    r"stages.0.0.conv2.weight: \(64, 64, 5, 5\) in the file, \(64, 64, 3, 3\)",
  ):
    pretrained.load(path)


def test_what_timm_does_not_have():
  model = models.make("nf_regnet_b0", 10)
  with pytest.raises(InputError, match="timm has no network like nf_regnet_b0"):
    timm.from_ours(_released(model), model)


@pytest.fixture(scope="module")
def run_timm(tmp_path_factory):
  """Runs a network of timm; its weights, images and logits."""

  def run(*arguments):
    out = tmp_path_factory.mktemp("timm")
    script = ROOT / "scripts" / "timm_reference.py"
    subprocess.run(
      [ROOT / "scripts" / "timm.sh", script, *arguments, f"--out={out}"],
      check=True,
    )
    images, logits = (np.load(out / f"{x}.npy") for x in ("images", "logits"))
    return out / "weights.safetensors", images, logits

  return run


@pytest.mark.timm
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_timm(name, run_timm, tmp_path):
  """Weights drawn there, converted; and ours, converted and run there."""
  theirs = timm.name_of(models.make(name))
  # The released networks differ from timm's copies in GELU and epsilon.
  options = ["--align"] if name == "nfnet_f0" else []
  weights, images, logits = run_timm(f"--model={theirs}", *options)
  params, card = pretrained.load_with_card(weights)
  model = card.make_model()
  assert model.name == name
  ours = _logits(model, params, images)
  assert np.std(logits) > 0.2
  np.testing.assert_allclose(ours, logits, atol=1.5e-5)

  path = tmp_path / "weights.safetensors"
  pretrained.save_tensors(path, timm.from_ours(params, model))
  _, _, again = run_timm(f"--model={theirs}", *options, f"--weights={path}")
  np.testing.assert_allclose(again, ours, atol=1.5e-5)


@pytest.mark.timm
def test_released_weights_in_timm_as_it_is(run_timm, tmp_path):
  """Raw, its epsilon moves the logits; folded, only its GELU does."""
  weights, images, logits = run_timm("--model=dm_nfnet_f0")
  params, card = pretrained.load_with_card(weights)
  model = card.make_model()
  ours = _logits(model, params, images)
  assert 1e-3 < np.max(np.abs(ours - logits)) < 3e-2
  path = tmp_path / "weights.safetensors"
  tensors = timm.from_ours(params, model, for_use_in_timm=True)
  pretrained.save_tensors(path, tensors)
  _, _, folded = run_timm("--model=dm_nfnet_f0", f"--weights={path}")
  assert np.max(np.abs(ours - folded)) < 3e-4


def test_names_of_timm():
  """Of a first block, as its networks have them."""
  f0 = timm.shapes(models.make("nfnet_f0"))
  first = {k: s for k, s in f0.items() if k.startswith("stages.0.0.")}
  assert {k[11:]: s for k, s in first.items() if k.endswith("weight")} == {
    "conv1.weight": (128, 128, 1, 1),
    "conv2.weight": (128, 128, 3, 3),
    "conv2b.weight": (128, 128, 3, 3),
    "conv3.weight": (256, 128, 1, 1),
    "downsample.conv.weight": (256, 128, 1, 1),
    "attn_last.fc1.weight": (128, 256, 1, 1),
    "attn_last.fc2.weight": (256, 128, 1, 1),
  }
  assert first["stages.0.0.skipinit_gain"] == ()
  assert first["stages.0.0.conv1.gain"] == (128, 1, 1, 1)
  regnet = timm.shapes(models.make("timm_nf_regnet_b1"))
  assert "stages.0.0.attn.fc1.weight" in regnet
  eca = timm.shapes(models.make("eca_nfnet_l0"))
  assert eca["stages.0.0.attn_last.conv.weight"] == (1, 1, 5)
