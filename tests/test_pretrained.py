"""Weights in files: round trips, and files that are something else."""

import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
from conftest import SMALL, draw_params, param_shapes

from configs import digits
from nfnets import card, checkpoint, models, pretrained, recipe, steps
from nfnets.data import imagenet
from nfnets.errors import InputError

CARD = card.Card(
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
def test_arrays_that_lie_otherwise_in_memory_are_saved(
  tmp_path, params, ending
):
  path = tmp_path / f"weights.{ending}"
  lying_otherwise = jax.tree.map(lambda x: np.asarray(x, order="F"), params)
  pretrained.save(path, lying_otherwise, CARD)
  loaded = pretrained.load(path)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_bfloat16_is_read_again(tmp_path, params, ending):
  path = tmp_path / f"weights.{ending}"
  rounded = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
  pretrained.save(path, rounded, CARD)
  expected = jax.tree.map(lambda x: x.astype(np.float32), rounded)
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(path), expected)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("card", [CARD, None])
def test_int8_is_within_half_a_level(tmp_path, params, ending, card):
  path, full = tmp_path / f"weights.{ending}", tmp_path / f"full.{ending}"
  params = jax.tree.map(np.copy, params)
  next(v["w"] for v in params.values() if "gain" in v)[..., 0] = 0  # A channel.
  pretrained.save(path, params, card, is_int8=True)
  pretrained.save(full, params, card)
  loaded, loaded_card = pretrained.load_with_card(path)
  assert loaded_card == card
  for (where, old), new in zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(loaded), strict=True
  ):
    assert new.dtype == np.float32
    if old.ndim < 2:
      np.testing.assert_array_equal(old, new)
      continue
    level = np.max(np.abs(old), axis=tuple(range(old.ndim - 1))) / 127
    assert np.all(np.abs(new - old) <= 0.501 * level), where
    assert len(np.unique(new)) > 1
  assert path.stat().st_size < 0.7 * full.stat().st_size  # Names add up.


def test_int8_without_scales(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **{"NFNet/~/x/w": np.ones((2, 3), np.int8)})
  with pytest.raises(InputError, match="x/w is int8 without its scales"):
    pretrained.load(path)


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
  with pytest.raises(InputError, match=r"read from .safetensors, .npz or"):
    pretrained.load(tmp_path / "weights.bin")
  (tmp_path / "text.npz").write_text("not weights")
  with pytest.raises(InputError, match=r"no weights file: it begins with"):
    pretrained.load(tmp_path / "text.npz")
  with zipfile.ZipFile(tmp_path / "photos.npz", "w") as file:
    file.writestr("a.jpg", b"no array")
  np.savez(tmp_path / "words.npz", **{"NFNet/~/x/w": np.array(["a", "b"])})
  for name in ("photos.npz", "words.npz"):
    with pytest.raises(InputError, match=rf"{name} is damaged or no npz file"):
      pretrained.load(tmp_path / name)
  with pytest.raises(InputError, match=r"saved as .safetensors or .npz"):
    pretrained.save(tmp_path / "weights.bin", {})


@pytest.mark.parametrize("text", [b'{"model": ', b"\xff", b"3"])
def test_damaged_cards(tmp_path, params, text):
  path = tmp_path / "weights.npz"
  card = np.frombuffer(text, np.uint8)
  np.savez(path, nfnets=card, **pretrained._flatten(params))
  with pytest.raises(InputError, match=r"npz: its card (is no|has \[\])"):
    pretrained.load(path)


def test_a_card_of_a_newer_version():
  with pytest.raises(InputError, match=r"here: its card .* another version"):
    card.Card.from_dict(CARD._asdict() | {"new": 1}, "here")


def test_a_file_is_known_by_its_content(tmp_path, params):
  path = tmp_path / "weights.safetensors"
  pretrained.save(path, params, CARD)
  loaded, card = pretrained.load_with_card(path.rename(tmp_path / "w.npz"))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert card == CARD


def test_arrays_of_no_network_are_named(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **{"conv1.weight": np.zeros(3), "fc.weight": np.zeros(3)})
  with pytest.raises(InputError, match=r"conv1.weight, fc.weight, .* no card"):
    pretrained.load_with_known_card(path)


def test_a_network_without_its_classes_is_named(tmp_path):
  model = models.make("nfnet_l0", 3)
  path = tmp_path / "weights.npz"
  pretrained.save(path, draw_params(param_shapes(model)), card=None)
  with pytest.raises(
    InputError, match=r"is nfnet_l0 with 3 classes, of which it does not say"
  ):
    pretrained.load_with_known_card(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, params):
  with pytest.raises(InputError, match=r"w.npz could not be written: Is a dir"):
    (tmp_path / "w.npz").mkdir()
    pretrained.save(tmp_path / "w.npz", params, CARD)
  assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


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


def _transferred(params, old_names, new_names):
  model = models.make("nfnet_tiny", len(new_names), **SMALL)
  fresh = _fresh(draw_params(param_shapes(model)))
  return pretrained.transfer(
    params,
    fresh,
    model,
    old_names=old_names,
    new_names=new_names,
    origin="here",
  )


@pytest.mark.parametrize("old_names", [CARD.class_names, None])
def test_a_start_from_weights_keeps_a_classifier_of_the_same_classes(
  params, old_names
):
  """Without their names too, where it fits."""
  found = _transferred(params, old_names, CARD.class_names)
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
  ("old_names", "new_names", "kept"),
  [
    (CARD.class_names, ("cow", "dog", "emu"), {}),  # As many, but others.
    (CARD.class_names, tuple("abcdefg"), {}),
    (None, tuple("abcdefg"), {}),
    (CARD.class_names, ("ant", "asp", "bee", "dog"), {0: 0, 2: 1}),
    (CARD.class_names, ("çat", "ant"), {0: 2, 1: 0}),
  ],
)
def test_a_start_from_weights_keeps_the_rows_of_known_classes(
  params, old_names, new_names, kept
):
  found = _transferred(params, old_names, new_names)
  head = found.pop("NFNet/~/linear")
  old = params["NFNet/~/linear"]
  for i in range(len(new_names)):
    for name in ("w", "b"):
      expected = old[name][..., kept[i]] if i in kept else 7
      np.testing.assert_array_equal(head[name][..., i], expected)
  for module, values in found.items():
    for name, value in values.items():
      np.testing.assert_array_equal(value, params[module][name])


def test_a_start_from_weights_of_another_network(params):
  rest = {m: v for m, v in params.items() if m != "NFNet/~/stem_conv0"}
  with pytest.raises(InputError, match=r"stem_conv0/bias: missing in the file"):
    _transferred(rest, CARD.class_names, tuple("abcdefg"))


def test_plain_files_are_known_by_their_shapes(tmp_path):
  """Of ImageNet's thousand classes; others must say what they are."""
  for num_classes in (1000, 10):
    model = models.make("nf_regnet_b0", num_classes)
    params = draw_params(param_shapes(model))
    path = tmp_path / f"{num_classes}.npz"
    pretrained.save(path, params)
    loaded, card = pretrained.load_with_card(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert pretrained.recognize(loaded, "here").name == "nf_regnet_b0"
    if num_classes == 10:
      assert card is None
    else:
      assert card.model == "nf_regnet_b0"
      assert (card.image_size, card.crop) == (224, "padded")


def test_a_card_and_weights_that_do_not_belong_together(tmp_path, params):
  path = tmp_path / "weights.npz"
  other = CARD._replace(class_names=("ant", "bee"))
  flat = pretrained._flatten(params)
  pretrained.save_tensors(path, flat, json.dumps(other._asdict()))
  with pytest.raises(InputError, match=r"linear/b: \(3,\) in the file, \(2,\)"):
    pretrained.load(path)


def test_cards_for_imagenet():
  """timm's share of the image, as a margin around what is kept."""
  colors = 255 * np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
  for name, size, crop, margin in (
    ("nfnet_f4", 512, "resize", 32),
    ("nf_resnet50", 224, "padded", 32),
    ("eca_nfnet_l1", 320, "padded", 0),
    ("timm_nf_regnet_b1", 288, "padded", 32),
    ("timm_nf_resnet50", 288, "padded", 18),
    ("timm_nfnet_f0", 256, "padded", 28),
  ):
    found = card.for_imagenet(models.make(name), "here")
    assert (found.image_size, found.crop, found.margin) == (size, crop, margin)
    assert len(set(found.class_names)) == 1000
    np.testing.assert_allclose((found.mean, found.std), colors)


def test_names_of_imagenet_in_words():
  assert imagenet.readable(["n02099601", "n01440764"]) == (
    "golden retriever",
    "tench",
  )
  assert imagenet.readable(["n02099601", "dog"]) == ("n02099601", "dog")


def test_weights_that_could_not_be_read_again_are_not_saved(tmp_path, params):
  """Folded ones, other classes; and what a card holds may be NumPy's."""
  path = tmp_path / "w.npz"
  model = CARD.make_model()
  _, folded = models.fold(model, params)
  for given, of in (
    (folded, CARD),
    (params, CARD._replace(class_names=("ant", "bee"))),
  ):
    with pytest.raises(InputError, match=r"w.npz does not hold weights of"):
      pretrained.save(path, given, of)
  assert not path.exists()
  values = {"mean": np.array(CARD.mean), "image_size": np.int64(32)}
  pretrained.save(path, params, CARD._replace(**values))
  assert pretrained.load_with_card(path)[1] == CARD


def test_what_is_not_finite_has_no_int8(tmp_path):
  with pytest.raises(InputError, match=r"conv/w has numbers that are not fin"):
    pretrained.save(
      tmp_path / "w.npz", {"conv": {"w": np.full((2, 2), np.nan)}}, is_int8=True
    )


def test_a_card_makes_a_network_for_other_classes(params):
  model = CARD.make_model(7, depth=(2, 1))
  assert (model.num_classes, model.variant.depth) == (7, (2, 1))
  model = CARD.make_model(2)
  fresh = draw_params(param_shapes(model))
  names = {"old_names": CARD.class_names, "new_names": ("a", "b", "c")}
  with pytest.raises(
    InputError, match=r"3 names for a classifier of 2 classes"
  ):
    pretrained.transfer(params, fresh, model, **names, origin="x")


def test_a_run_that_is_not_over_means_its_averages(tmp_path):
  config = digits.get_config()
  config.model.update(SMALL)
  r = recipe.resolve(config)
  recipe.save(r, tmp_path, num_devices=1)
  params = draw_params(param_shapes(r.model))
  average = jax.tree.map(lambda x: x + 1, params)
  state = steps.TrainState(np.int32(3), params, {}, (np.zeros(1),), average, {})
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(state, position=0)
  found = pretrained.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, average)
