"""Weights in files: round trips, and files that are something else."""

import pickle

import jax
import numpy as np
import pytest
from conftest import SMALL, draw_params, param_shapes

from nfnets import models, pretrained
from nfnets.errors import InputError

CARD = pretrained.Card(
  model="nfnet_tiny",
  overrides=SMALL,
  class_names=("ant", "bee", "çat"),
  image_size=32,
  crop="resize",
  margin=0,
  mean=(1.0, 2.0, 3.0),
  std=(4.0, 5.0, 6.0),
)


@pytest.fixture(scope="module")
def params():
  return draw_params(param_shapes(CARD.make_model()))


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("card", [CARD, None])
def test_round_trip(tmp_path, params, ending, card):
  path = tmp_path / f"weights.{ending}"
  pretrained.save(path, params, card)
  loaded, loaded_card = pretrained.load_with_card(path)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded))
  assert loaded_card == card
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_files_cut_short(tmp_path, params, ending, share):
  path = tmp_path / f"weights.{ending}"
  pretrained.save(path, params, CARD)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * share)])
  with pytest.raises(InputError, match=r"weights.* is damaged or no"):
    pretrained.load(path)


def test_pickles_are_not_executed(tmp_path):
  class Evil:
    def __reduce__(self):
      return (tmp_path.joinpath("touched").touch, ())

  path = tmp_path / "weights.npz"
  path.write_bytes(pickle.dumps(Evil()))
  with pytest.raises(InputError, match="asks for"):
    pretrained.load(path)
  assert not (tmp_path / "touched").exists()


def test_other_files(tmp_path):
  with pytest.raises(InputError, match=r"there is no such weights file"):
    pretrained.load(tmp_path / "absent.npz")
  (tmp_path / "weights.bin").touch()
  with pytest.raises(InputError, match=r"read from .safetensors or .npz"):
    pretrained.load(tmp_path / "weights.bin")
  with pytest.raises(InputError, match=r"saved as .safetensors or .npz"):
    pretrained.save(tmp_path / "weights.bin", {})


def test_weights_of_another_model_name_both_sides(params):
  other = models.make("nfnet_tiny", 10, **SMALL)
  with pytest.raises(
    InputError,
    match=r"here does not hold weights of nfnet_tiny with 10 classes: "
    r"NFNet/~/linear/b: \(3,\) in the file, \(10,\) in nfnet_tiny",
  ):
    pretrained.check(params, other, "here")
  pretrained.check(params, CARD.make_model(), "here")


def _fresh(params):
  return {
    module: {name: np.full_like(value, 7) for name, value in values.items()}
    for module, values in params.items()
  }


@pytest.mark.parametrize("keeps", [True, None])
def test_a_start_from_weights_keeps_a_classifier_of_the_same_classes(
  params, keeps
):
  model = CARD.make_model()
  found = pretrained.transfer(
    params, _fresh(params), model, keeps_classifier=keeps, origin="here"
  )
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_a_start_from_weights_of_other_classes_has_a_fresh_one(
  params, num_classes
):
  """Of another number of classes, or of as many with other names."""
  model = models.make("nfnet_tiny", num_classes, **SMALL)
  fresh = _fresh(draw_params(param_shapes(model)))
  options = {"keeps_classifier": False, "origin": "here"}
  found = pretrained.transfer(params, fresh, model, **options)
  for module, values in found.items():
    is_head = module == "NFNet/~/linear"
    for name, value in values.items():
      expected = fresh if is_head else params
      np.testing.assert_array_equal(value, expected[module][name])
  with pytest.raises(InputError, match=r"stem_conv0/gain: missing in the file"):
    rest = {m: v for m, v in params.items() if m != "NFNet/~/stem_conv0"}
    pretrained.transfer(rest, fresh, model, **options)
