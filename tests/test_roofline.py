"""The floors: their counts agree with the models', and the page is theirs."""

import importlib.util
import pathlib
import sys

import pytest

from nfnets import models

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def roofline():
  spec = importlib.util.spec_from_file_location(
    "roofline", FOLDER / "roofline.py"
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules["roofline"] = module
  spec.loader.exec_module(module)
  return module


def test_the_page_is_up_to_date(roofline):
  """If not: python experiments/roofline.py."""
  page = (FOLDER / "roofline.md").read_text()
  assert roofline.fill_in(page, roofline.make_tables()) == page
  with pytest.raises(ValueError, match=r"has 0 markers for speed"):
    roofline.fill_in(page, {"speed": ""})


def test_operations_are_those_of_the_models(roofline):
  for name in roofline.NAMES:
    network, model = roofline.work_out(name), models.make(name)
    assert network.macs == model.count_macs(model.variant.train_size)
    assert network.params == model.count_params()
  f0 = roofline.work_out("nfnet_f0")
  assert f0.flops(1) / 3 == pytest.approx(2 * 6.98e9, rel=1e-3)


def test_bytes_of_the_first_layers_by_hand(roofline):
  """3 -> 16 channels, 192 -> 96 px; then 16 -> 32."""
  first, second, *_ = roofline.work_out("nfnet_f0").layers
  image, out = 2 * 3 * 192**2, 2 * 16 * 96**2
  assert first.forward == image + out
  assert first.backward == image + out  # An image needs no gradient.
  assert first.weights_forward == 8 * 3 * 9 * 16
  assert first.kept == image
  assert second.kept == out
  assert second.forward == 3 * out


def test_floors_are_ordered(roofline):
  for name in roofline.NAMES:
    network = roofline.work_out(name)
    for device in roofline.DEVICES.values():
      floor = network.floor(device, 32)
      assert floor >= network.simple_floor(device, 32)
      assert network.floor(device, 64) < 2 * floor  # Weights are shared.


def test_recomputing_keeps_less(roofline):
  for name in roofline.NAMES:
    network = roofline.work_out(name)
    everything = network.activations()
    assert network.activations("blocks") < everything
    assert network.activations("stages") < everything
    most = network.largest_batch(80)
    used = network.fixed_bytes() + most * everything
    assert used <= 0.9 * 80 * 2**30 < used + everything
    assert network.largest_batch(1) == 0 or name == "nfnet_f0"
