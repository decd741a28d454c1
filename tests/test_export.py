"""Exports: other runtimes give what JAX gives; the command line's lines."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REFERENCE, SMALL, draw_params, param_shapes
from PIL import Image
from safetensors.numpy import load_file

from nfnets import card as cards
from nfnets import (
  devices,
  export,
  layers,
  models,
  onnx_graph,
  plots,
  predict,
  pretrained,
  timm,
)
from nfnets.augment import Normalization
from nfnets.data import images
from nfnets.errors import InputError
from nfnets.predict import Classifier, Prediction

CARD = cards.Card(
  model="nfnet_tiny",
  overrides=SMALL,
  class_names=("ant", "bee", "çat"),
  image_size=33,
  crop="resize",
  margin=8,
  mean=cards.IMAGENET_MEAN,
  std=cards.IMAGENET_STD,
  source="a test",
)


def _drawn(card):
  return draw_params(param_shapes(card.make_model()))


def _images(card, num=3):
  size = card.image_size
  rng = np.random.default_rng(num)
  return rng.integers(0, 256, (num, size, size, 3)).astype(np.uint8)


def _logits(card, params, images):
  model = card.make_model()

  def apply(params, images):
    images = Normalization(card.mean, card.std)(images, np.float32)
    return model.apply(params, {}, None, images)[0]["logits"]

  return np.asarray(jax.jit(apply)(params, images))


def _onnx_logits(card, params, images):
  import onnx
  import onnxruntime

  proto = onnx_graph.build(params, card)
  onnx.checker.check_model(proto, full_check=True)
  session = onnxruntime.InferenceSession(proto.SerializeToString())
  logits, probabilities = session.run(None, {"images": images})
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
  return logits


@pytest.mark.parametrize(
  ("name", "overrides", "size"),
  [
    ("nfnet_tiny", SMALL, 33),
    ("nfnet_tiny", SMALL | {"attention": "eca"}, 32),
    ("nfnet_tiny", SMALL | {"se_ratio": 0.0, "second_conv": False}, 32),
    ("nf_regnet_b0", {"depth": (1, 1), "width": (48, 104)}, 65),
    ("nf_resnet50", {"depth": (1, 1), "width": (64, 128)}, 65),
    ("nf_resnet50", {"depth": (1, 1), "width": (64, 128)}, 68),
    ("timm_nf_resnet50", {"depth": (1, 1), "width": (64, 128)}, 64),
  ],
)
def test_onnx_gives_the_logits_of_jax(name, overrides, size):
  card = CARD._replace(model=name, overrides=overrides, image_size=size)
  params, images = _drawn(card), _images(card)
  np.testing.assert_allclose(
    _onnx_logits(card, params, images),
    _logits(card, params, images),
    rtol=0,
    atol=1e-5,
  )


@pytest.mark.parametrize("activation", sorted(layers.ACTIVATIONS))
def test_onnx_has_every_activation(activation):
  card = CARD._replace(
    overrides=SMALL | {"activation": activation, "depth": (1, 1)}
  )
  model = card.make_model()
  graph = onnx_graph.build(_drawn(card), card).graph
  assert graph.node
  # The function itself, on numbers of both signs.
  import onnx
  import onnxruntime

  builder = onnx_graph._Graph(onnx, model.plan, {})
  builder.add("Identity", [builder.activate("x")], output="y")
  tensor = onnx.helper.make_tensor_value_info
  sides = [[tensor(n, onnx.TensorProto.FLOAT, ["N"])] for n in ("x", "y")]
  proto = onnx.helper.make_model(
    onnx.helper.make_graph(builder.nodes, "f", *sides, builder.constants),
    opset_imports=[onnx.helper.make_opsetid("", 20)],
    ir_version=9,
  )
  session = onnxruntime.InferenceSession(proto.SerializeToString())
  x = np.linspace(-8, 8, 101, dtype=np.float32)
  (ours,) = session.run(None, {"x": x})
  gain = layers.GAINS[activation]
  np.testing.assert_allclose(
    gain * ours, layers.ACTIVATIONS[activation](x), rtol=1e-5, atol=2e-6
  )


def _run_stablehlo(path, images, tmp_path):
  """In a process that has nothing of ours."""
  np.save(tmp_path / "images.npy", images)
  code = f"""
import sys
import jax, numpy as np
program = jax.export.deserialize(bytearray(open({str(path)!r}, "rb").read()))
out = program.call(np.load({str(tmp_path / "images.npy")!r}))
np.save({str(tmp_path / "out.npy")!r}, out)
assert not {{"haiku", "nfnets", "optax"}} & set(sys.modules)
print(*program.platforms)
"""
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=True,
  )
  assert result.stdout.split() == ["cpu", "cuda", "tpu"]
  return np.load(tmp_path / "out.npy")


@pytest.mark.parametrize("num", [1, 5])
def test_stablehlo_runs_with_jax_alone_for_any_batch(tmp_path, num):
  params, images = _drawn(CARD), _images(CARD, num)
  path = tmp_path / "net.stablehlo"
  export.save_stablehlo(path, params, CARD)
  found = _run_stablehlo(path, images, tmp_path)
  expected = jax.nn.softmax(_logits(CARD, params, images))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "overrides",
  [{"depth": (1, 1, 1, 1)}, pytest.param({}, marks=pytest.mark.slow)],
  ids=["a block a stage", "whole"],
)
def test_f0_in_every_form(overrides, tmp_path):
  """Large layers, through the files that a user would write."""
  model = models.make("nfnet_f0", **overrides)
  card = cards.for_imagenet(model, "here")
  card = card._replace(overrides=overrides, image_size=96)
  params = draw_params(param_shapes(model))
  weights = tmp_path / "f0.safetensors"
  pretrained.save(weights, params, card)
  images = _images(card, 2)
  expected = _logits(card, params, images)

  for name in ("out.npz", "f0.stablehlo", "f0.onnx"):
    written = export.export(weights, tmp_path / name)
    assert written == [tmp_path / name, tmp_path / f"{name}.md"]
  loaded, loaded_card = pretrained.load_with_card(tmp_path / "out.npz")
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert loaded_card == card

  import onnxruntime

  session = onnxruntime.InferenceSession(tmp_path / "f0.onnx")
  logits, _ = session.run(None, {"images": images})
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  metadata = session.get_modelmeta().custom_metadata_map
  assert json.loads(metadata["nfnets"])["class_names"][207] == (
    "golden retriever"
  )
  found = _run_stablehlo(tmp_path / "f0.stablehlo", images, tmp_path)
  np.testing.assert_allclose(found, jax.nn.softmax(expected), atol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".stablehlo", ".onnx"])
@pytest.mark.parametrize("crop", ["resize", "padded"])
def test_the_script_on_the_model_card_classifies(suffix, crop, tmp_path):
  """A photo, as `nfnets predict` does it, but for how Pillow resizes."""
  names = ("ant", "bee", "çat```json```")  # As the page marks its parts.
  card = CARD._replace(crop=crop, class_names=names)
  weights = tmp_path / "w.safetensors"
  pretrained.save(weights, _drawn(card), card)
  export.export(weights, tmp_path / f"net{suffix}")
  with np.load(REFERENCE / "eval_preprocess.npz") as file:
    Image.fromarray(file["decoded"]).save(tmp_path / "photo.jpg")
  script = (tmp_path / f"net{suffix}.md").read_text().split("```python\n")[1]
  result = subprocess.run(
    [sys.executable, "-c", script.split("\n```\n")[0]],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  found = re.findall(r"([\d.]+)%  (\S+)", result.stdout)
  (prediction,) = Classifier(weights).predict([tmp_path / "photo.jpg"])
  assert [name for _, name in found] == [name for name, _ in prediction.classes]
  for (percent, _), (_, value) in zip(found, prediction.classes, strict=True):
    assert float(percent) == pytest.approx(100 * value, abs=3)


def test_a_name_with_quotes_is_no_other_script():
  for suffix in export.WRITERS:
    page = export.model_card(CARD, pathlib.Path(f'my "q" b\\n{suffix}'))
    script = page.split("```python\n")[1].split("\n```\n")[0]
    assert json.dumps(f'my "q" b\\n{suffix}') in script
    compile(script, "script", "exec")


def test_weights_are_not_replaced_by_what_is_made_of_them(tmp_path):
  path = tmp_path / "w.safetensors"
  pretrained.save(path, _drawn(CARD), CARD)
  before = path.read_bytes()
  for write in (
    lambda: export.export(path, path, is_int8=True),
    lambda: export.convert(path, path, to="timm", folds_epsilon=False),
  ):
    with pytest.raises(InputError, match="is read, and would be overwritten"):
      write()
  assert path.read_bytes() == before


def test_nor_are_those_of_a_run_or_of_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  rounds = tmp_path / "run" / "round_001"
  rounds.mkdir(parents=True)
  (rounds / "config.json").touch()
  for source, out in (
    ("~/w.safetensors", tmp_path / "w.safetensors"),
    (f"file://{tmp_path}/a%20b.npz", tmp_path / "a b.npz"),
    (tmp_path, tmp_path / "weights.safetensors"),
    (tmp_path / "run", rounds / "weights.safetensors"),
  ):
    out.write_bytes(b"kept")
    for write in (
      lambda s, o: export.export(s, o, is_int8=True),
      lambda s, o: export.convert(s, o, folds_epsilon=False),
    ):
      with pytest.raises(InputError, match="is read, and would be overwritten"):
        write(source, out)
    assert out.read_bytes() == b"kept"


def test_the_model_card_says_what_a_user_needs(tmp_path):
  weights = tmp_path / "w.safetensors"
  pretrained.save(weights, _drawn(CARD), CARD)
  export.export(weights, tmp_path / "net.onnx")
  text = (tmp_path / "net.onnx.md").read_text()
  for part in (
    "# nfnet_tiny",
    "| weights from | a test |",
    "resized to 41 x 41 px",
    "middle 33 x 33",
    "| mean of the colours | 123.675, 116.28, 103.53 (of 0 to 255) |",
    "| standard deviation | 58.395, 57.12, 57.375 |",
    f"| multiply-accumulates | {CARD.make_model().count_macs(33) / 1e9:.2f} b",
    "Pillow resizes by",
    "| classes | 3 |",
    'InferenceSession("net.onnx")',
  ):
    assert part in text, part
  details = json.loads(text.split("```json\n")[-1].split("\n```")[0])
  assert cards.Card.from_dict(details, "here") == CARD
  assert "Pillow" not in export.model_card(CARD, weights)  # Ours prepares.
  odd = export.model_card(CARD._replace(margin=7), pathlib.Path("net.onnx"))
  assert "pixels[4 : 4 + 33, 4 : 4 + 33]" in odd  # As `data.images` has it.


@pytest.mark.parametrize(
  ("arguments", "exit_code", "pattern"),
  [
    (["out.onnx"], 2, r"give either --workdir or --weights to export"),
    (
      ["out.pt", "--weights=w.npz"],
      1,
      r"its name must end in .safetensors, .npz, ",
    ),
    (["a/b.onnx", "--weights=w.npz"], 1, r"there is no folder .*/a"),
    (["b.onnx", "--weights=w.npz", "--int8"], 1, r"int8 is for files of weig"),
    (["b.stablehlo", "--weights=w.npz", "--int8"], 1, r"int8 is for files of"),
    (["b.onnx", "--weights=absent.npz"], 1, r"no such weights file"),
    (["b.onnx", "--weights=nfnet_f0"], 2, r"did you mean dm_nfnet_f0"),
    (["b.onnx", "--workdir=absent"], 1, r"absent does not exist"),
  ],
)
def test_what_cannot_be_exported(
  arguments, exit_code, pattern, nfnets, tmp_path
):
  result = nfnets("export", *arguments, cwd=tmp_path)
  assert result.returncode == exit_code, result.stderr
  assert "Traceback" not in result.stderr
  import re

  assert re.search(pattern, result.stderr), result.stderr
  assert list(tmp_path.iterdir()) == []


def test_weights_as_int8_through_the_command_line(nfnets, tmp_path):
  params, images = _drawn(CARD), _images(CARD)
  pretrained.save(tmp_path / "w.npz", params, CARD)
  result = nfnets(
    "export", "q.safetensors", "--weights=w.npz", "--int8", cwd=tmp_path
  )
  assert result.returncode == 0, result.stderr
  assert "as int8" in (tmp_path / "q.safetensors.md").read_text()
  loaded, card = pretrained.load_with_card(tmp_path / "q.safetensors")
  assert card == CARD
  expected, logits = (_logits(CARD, p, images) for p in (params, loaded))
  assert 0 < np.max(np.abs(logits - expected)) < 0.05 * np.std(expected)


def test_weights_without_a_card_are_not_exported(tmp_path):
  path = tmp_path / "w.npz"
  pretrained.save(path, _drawn(CARD))
  with pytest.raises(InputError, match=r"w.npz .NFNet.* has no card"):
    export.export(path, tmp_path / "out.onnx")


def test_weights_that_no_file_can_hold(tmp_path):
  card = cards.for_imagenet(models.make("nfnet_f7_plus"), "here")
  for save, what in (
    (export.save_stablehlo, "a program can hold 2"),
    (export.save_onnx, "an ONNX file holds 2"),
  ):
    with pytest.raises(InputError, match=rf"GiB of weights, {what}"):
      save(tmp_path / "out", {}, card)


def test_conversion_through_the_command_line(nfnets, tmp_path):
  """Published names -> timm's -> ours, and a picture of what came out."""
  model = models.make("nfnet_l0", 1000)
  params = draw_params(param_shapes(model))
  for values in params.values():
    if "skip_gain" in values:
      values["skip_gain"] = np.ones((), np.float32)
  first = tmp_path / "ours.npz"
  card = cards.for_imagenet(model, "here")
  # As fine-tuning leaves them: these columns are no part of the weights.
  tuned = card._replace(overrides={"drop_rate": 0.1, "stochdepth_rate": 0.2})
  pretrained.save(first, params, tuned)
  to_timm = nfnets("convert", first, tmp_path / "t.safetensors", "--to=timm")
  assert "timm's nfnet_l0, 1000 classes" in to_timm.stdout, to_timm.stderr
  back = nfnets("convert", tmp_path / "t.safetensors", tmp_path / "b.npz")
  assert "b.npz: nfnet_l0, 1000 classes" in back.stdout, back.stderr
  refused = nfnets("convert", first, tmp_path / "c.npz", "--fold_epsilon")
  assert refused.returncode == 1
  assert "--fold_epsilon is for dm_nfnet_f0 to f6" in refused.stderr
  other = tmp_path / "other.npz"
  pretrained.save(other, params, card._replace(overrides={"alpha": 0.5}))
  refused = nfnets("convert", other, tmp_path / "c.npz", "--to=timm")
  assert refused.returncode == 1
  assert "nfnet_l0 with other columns ({'alpha': 0.5})" in refused.stderr
  loaded, card = pretrained.load_with_card(tmp_path / "b.npz")
  assert card.image_size == 288
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7, atol=0),
    loaded,
    params,
  )


def test_an_image_to_prepare_is_one_of_three_colours(tmp_path):
  path = tmp_path / "w.npz"
  pretrained.save(path, _drawn(CARD), CARD)
  classifier = Classifier(path)
  for shape in ((2, 8, 8, 3), (8, 8, 4), (8, 8)):
    with pytest.raises(InputError, match=r"one at a time, red, green and blue"):
      classifier.prepare(np.zeros(shape, np.uint8))
  image = _images(CARD, 1)[0]
  expected = classifier.prepare(image)
  found = classifier.prepare(Image.fromarray(image))
  np.testing.assert_array_equal(found, expected)


def test_paths_may_be_strings(tmp_path):
  path = str(tmp_path / "w.npz")
  pretrained.save(path, _drawn(CARD), CARD)
  written = export.export(path, str(tmp_path / "x.onnx"))
  assert [p.name for p in written] == ["x.onnx", "x.onnx.md"]
  export.convert(path, str(tmp_path / "y.npz"), folds_epsilon=False)
  assert pretrained.load_file(str(tmp_path / "y.npz"))[1] == CARD
  # Again, over the first ones.
  export.convert(path, str(tmp_path / "y.npz"), folds_epsilon=False)
  export.export(path, str(tmp_path / "x.onnx"))


def test_a_prediction_prepares_images_as_its_card_says(tmp_path):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)
  params = draw_params(param_shapes(CARD.make_model()))
  side = int(70 / 41 * 33)
  top, left = (70 - side + 1) // 2, (90 - side + 1) // 2
  for crop, expected in (
    ("resize", images.resize(image, 41)[4:37, 4:37]),
    ("padded", images.resize(image[top : top + side, left : left + side], 33)),
  ):
    path = tmp_path / f"{crop}.npz"
    pretrained.save(path, params, CARD._replace(crop=crop))
    np.testing.assert_allclose(
      Classifier(path).prepare(image), expected, atol=1e-3
    )


def test_few_programs_are_compiled_for_any_number_of_files(
  monkeypatch, tmp_path
):
  # As of 256 px, on a CPU.
  monkeypatch.setattr(devices, "_CPU_PIXELS", 9 * CARD.image_size**2)
  params = draw_params(param_shapes(CARD.make_model()))
  pretrained.save(tmp_path / "w.npz", params, CARD)
  classifier = Classifier(tmp_path / "w.npz")
  paths = [tmp_path / f"{i}.png" for i in range(17)]
  for i, image in enumerate(_images(CARD, 17)):
    Image.fromarray(image).save(paths[i])
  found = [list(classifier.predict(paths[:num])) for num in range(1, 18)]
  assert classifier._probabilities._cache_size() == 4  # Of 1, 2, 4, 8 images.
  assert [len(predictions) for predictions in found] == list(range(1, 18))
  monkeypatch.undo()  # More where they are small.
  assert len(list(classifier.predict(paths))) == 17
  assert classifier._probabilities._cache_size() == 5
  for predictions in found:
    for one, expected in zip(predictions, found[-1], strict=False):
      assert one.path == expected.path
      values = [[value for _, value in p.classes] for p in (one, expected)]
      np.testing.assert_allclose(*values, rtol=1e-5)


def test_arrays_are_classified_in_parts_on_a_cpu(monkeypatch, tmp_path):
  pretrained.save(
    tmp_path / "w.npz", draw_params(param_shapes(CARD.make_model())), CARD
  )
  classifier = Classifier(tmp_path / "w.npz")
  batch = np.stack([classifier.prepare(x) for x in _images(CARD, 7)])
  at_once = classifier.probabilities(batch)
  assert at_once.shape == (7, len(CARD.class_names))
  monkeypatch.setattr(devices, "_CPU_PIXELS", 3 * CARD.image_size**2)
  sizes, compute = [], classifier._probabilities

  def watch(params, part):
    sizes.append(len(part))
    return compute(params, part)

  monkeypatch.setattr(classifier, "_probabilities", watch)
  found = classifier.probabilities(batch)
  np.testing.assert_allclose(found, at_once, rtol=1e-5)
  assert sizes == [3, 2, 2]


def test_a_picture_of_predictions_names_the_likeliest(monkeypatch, tmp_path):
  Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png")
  given = []
  monkeypatch.setattr(plots, "save_grid", lambda *args: given.extend(args))
  found = Prediction(tmp_path / "a.png", (("cat", 0.875), ("dog", 0.1)))
  predict.save_grid([found], tmp_path / "grid.png")
  (picture,), captions, _ = given
  assert captions == ["cat\n87.5%"]
  assert picture.shape == (267, 400, 3)


def test_weights_that_are_not_finite_classify_nothing(tmp_path):
  params = draw_params(param_shapes(CARD.make_model()))
  params["NFNet/~/linear"]["w"][0, 0] = np.nan
  pretrained.save(tmp_path / "w.npz", params, CARD)
  Image.new("RGB", (33, 33)).save(tmp_path / "x.png")
  (failure,) = Classifier(tmp_path / "w.npz").predict(tmp_path / "x.png")
  assert re.fullmatch(r".*x.png: its probabilities are no.*", failure.reason)


def test_a_conversion_folds_epsilon_both_ways(tmp_path):
  model = models.make("nfnet_f0", 10)
  params = draw_params(param_shapes(model))
  ours, theirs, back = (tmp_path / f"{n}.safetensors" for n in "abc")
  pretrained.save(ours, params)
  export.convert(ours, theirs, to="timm", folds_epsilon=True)
  expected = timm.from_ours(params, model, for_use_in_timm=True)
  jax.tree.map(np.testing.assert_array_equal, load_file(theirs), expected)
  export.convert(theirs, back, folds_epsilon=True)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    pretrained.load(back),
    params,
  )
