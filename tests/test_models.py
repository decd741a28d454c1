"""The networks: published sizes, names and outputs; signal propagation."""

import functools
import math
import pickle

import haiku as hk
import hypothesis
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
  ONE_BLOCK_ROW,
  REFERENCE,
  SMALL,
  draw_params,
  load_json,
  param_shapes,
)
from hypothesis import strategies
from jax.sharding import PartitionSpec as P

from nfnets import agc, layers, models
from nfnets.errors import InputError
from nfnets.models import network, packed, stacked
from nfnets.models import plan as plans
from nfnets.models.network import Drawn, Execution, NFBlock

SIZES = load_json("sizes.json")


@pytest.mark.parametrize("name", SIZES)
def test_every_row_has_its_published_size(name):
  model = models.make(name)
  assert model.count_params() == SIZES[name]["parameters"]
  for size, macs in SIZES[name]["macs"].items():
    assert round(model.count_macs(int(size)) / 1e9, 3) == macs, size


def test_all_published_sizes_but_those_of_our_own_rows_are_tested():
  ours = {"nfnet_f2_plus", "nfnet_f4_plus", "nfnet_f5_plus", "nfnet_f6_plus"}
  ours |= {"nfnet_tiny"}
  timms = {n for n in models.VARIANTS if n.startswith(("timm_", "eca_"))}
  assert models.VARIANTS.keys() - SIZES.keys() == ours | timms | {"nfnet_l0"}


# Of PyTorch Image Models 1.0.31.
TIMM_SIZES = {
  "nfnet_l0": 35_074_488,
  "eca_nfnet_l0": 24_143_924,
  "eca_nfnet_l1": 41_407_728,
  "eca_nfnet_l2": 56_722_348,
  "timm_nf_resnet50": 25_557_032,
  "timm_nf_regnet_b1": 10_223_984,
}


@pytest.mark.parametrize("name", TIMM_SIZES)
def test_rows_of_timm_have_its_sizes_and_a_skip_gain_per_block(name):
  model = models.make(name)
  assert model.count_params() == TIMM_SIZES[name] + len(model.plan.blocks)


def _real_shapes(model):
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), image)
  assert state == {}
  return {m: {n: x.shape for n, x in v.items()} for m, v in params.items()}


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    ("nfnet_tiny", SMALL),
    ("nfnet_tiny", SMALL | {"second_conv": False}),
    ("nfnet_tiny", SMALL | {"se_ratio": 0.0}),
    ("nfnet_tiny", SMALL | {"se_ratio": 0.25, "final_conv_ratio": 1.5}),
    ("nfnet_tiny", SMALL | {"attention": "eca"}),
    (
      "nfnet_tiny",
      SMALL | {"bottleneck_ratio": (0.5, 1.0), "stem_width": (8,)},
    ),
    ("nf_regnet_b0", {"depth": (1, 1, 2, 1)}),
    ("timm_nf_regnet_b0", {"depth": (1, 1, 1, 1)}),
    ("nf_resnet50", {"depth": (1, 1, 2, 1), "se_ratio": 0.5}),
    ("timm_nf_resnet26", {"depth": (1, 1, 1, 1)}),
    ("nfnet_f0_plus", {}),
  ],
)
def test_the_plan_has_the_shapes_that_the_network_makes(name, overrides):
  model = models.make(name, 7, **overrides)
  assert plans.shapes(model.plan, 7) == _real_shapes(model)
  params, _ = model.shapes()
  num = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
  assert model.count_params() == num


def test_f4_plus_of_the_paper_is_one_override():
  model = models.make("nfnet_f4_plus", group_width=(192, 128, 128, 128))
  assert round(model.count_params() / 1e6) == 527
  assert round(model.count_macs(512) / 1e9) == 367


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_regnet_b0", "nf_resnet50"])
def test_published_names_and_shapes(name):
  tree = {
    m: {n: list(shape) for n, shape in v.items()}
    for m, v in _real_shapes(models.make(name)).items()
  }
  assert tree == load_json(f"tree_{name}.json")


@functools.cache
def _drawn(name):
  model = models.make(name)
  apply = lambda params, images: model.apply(
    params, {}, None, images, return_metrics=True
  )[0]
  return draw_params(param_shapes(model)), jax.jit(apply)


def _f0():
  return _drawn("nfnet_f0")


@pytest.mark.parametrize(
  ("model", "size", "num_blocks"),
  [
    ("nfnet_f0", 64, 12),
    ("nfnet_f0", 97, 12),
    ("nf_regnet_b0", 64, 16),
    ("nf_resnet50", 64, 16),
  ],
)
def test_outputs_are_those_of_the_original_code(model, size, num_blocks):
  expected = np.load(REFERENCE / "forward.npz")
  rng = np.random.default_rng(2 * 1000 + size)
  images = rng.standard_normal((2, size, size, 3), dtype=np.float32)
  params, apply = _drawn(model)
  outputs = apply(params, images)
  prefix = f"{model}/{size}/"
  names = [k.removeprefix(prefix) for k in expected if k.startswith(prefix)]
  # logits, pool; stem and blocks.
  assert len(names) == 2 + 2 * (num_blocks + 1) + num_blocks
  for name in names:
    theirs = expected[prefix + name]
    error = np.max(np.abs(outputs[name] - theirs)) / np.max(np.abs(theirs))
    assert error < 1e-4, (name, error)


def test_bfloat16_images_give_float32_logits_near_the_exact_ones():
  params, apply = _f0()
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, 64, 64, 3), dtype=np.float32)
  exact = apply(params, images)["logits"]
  rough = apply(params, images.astype(jnp.bfloat16))["logits"]
  assert rough.dtype == jnp.float32
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  # 8 bits of mantissa; about 60 rounded layers in a row.
  assert 1e-4 < error < 0.05


# Blocks 5 to 8 and 11 differ from the ones before in beta alone.
@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 9, 10])
def test_each_block_of_f0_propagates_the_predicted_variance(index):
  """At initialisation with skip gains of one (2101.08692 section 3).

  The input is noise of the analytic variance 1 / beta². A block adds alpha²; a
  transition resets the shortcut to 1, and where it averages four independent
  pixels to 1/4.
  """
  plan = models.make("nfnet_f0").plan
  block = plan.blocks[index]

  def forward(x):
    drawn = Drawn(block.beta, keep=None)
    return NFBlock(block, plan, Execution())(x, drawn)

  network = hk.without_apply_rng(hk.transform(forward))
  rng = np.random.default_rng(index)
  shape = (1, 32, 32, block.in_channels)
  x = rng.standard_normal(shape, dtype=np.float32) / block.beta
  params = jax.jit(network.init)(jax.random.key(index), x)
  params = hk.data_structures.map(
    lambda _, name, v: np.float32(1) if name == "skip_gain" else v, params
  )
  out, residual = jax.jit(network.apply)(params, x)

  shortcut = 1 / block.stride**2 if block.shortcut else 1 / block.beta**2
  variance = float(jnp.mean(jnp.var(out, (0, 1, 2))))
  np.testing.assert_allclose(variance, shortcut + plan.alpha**2, rtol=0.06)
  if block.shortcut is None:  # Of the branch by itself.
    branch = jnp.mean(jnp.var(out - x, (0, 1, 2)))
    np.testing.assert_allclose(branch, plan.alpha**2 * residual, rtol=1e-3)
  # SAME padding takes up to a tenth; the gate is only near 1/2.
  np.testing.assert_allclose(residual, 1, rtol=0.25)


def test_signal_through_all_of_f0_grows_by_alpha_squared_per_block():
  """The residual branch and its shortcut are independent, block after block."""
  params, apply = _f0()
  plan = models.make("nfnet_f0").plan
  params = {
    module: {
      name: {"skip_gain": np.float32(1), "gain": np.ones_like(v)}.get(
        name, np.zeros_like(v) if name in ("bias", "b") else v
      )
      for name, v in values.items()
    }
    for module, values in params.items()
  }
  rng = np.random.default_rng(1)
  images = rng.standard_normal((2, 64, 64, 3), dtype=np.float32)
  signal = apply(params, images)
  for i, block in enumerate(plan.blocks):
    before, after = signal[f"avg_var_{i}"], signal[f"avg_var_{i + 1}"]
    residual = plan.alpha**2 * signal[f"res_avg_var_{i}"]
    if block.shortcut is None:
      np.testing.assert_allclose(after, before + residual, rtol=0.02)
    assert 0 < residual < 0.06


def test_blocks_start_as_their_shortcut():
  model = models.make("nfnet_tiny", 10, **SMALL | {"depth": (1, 2)})
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
  params, state = jax.jit(model.init)(jax.random.key(0), images)
  apply = jax.jit(functools.partial(model.apply, return_metrics=True))
  outputs, _ = apply(params, state, None, images)
  for name in ("avg_var", "avg_sq_mean"):  # The last block has no projection.
    before, after = outputs[f"{name}_2"], outputs[f"{name}_3"]
    np.testing.assert_allclose(before, after, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "overrides"),
  [
    ("nfnet_tiny", SMALL),
    ("nf_regnet_b0", {"depth": (1, 1), "width": (48, 104)}),
    ("nf_resnet50", {"depth": (1, 1), "width": (64, 128)}),
  ],
)
def test_folded_weights_give_the_same_outputs(name, overrides):
  model = models.make(name, 10, **overrides)
  params = draw_params(param_shapes(model))
  images = np.random.default_rng(5).standard_normal((2, 64, 64, 3), np.float32)
  folded, weights = models.fold(model, params)
  expected, _ = folded.shapes()
  jax.tree.map(lambda x, y: np.broadcast_to(x, y.shape), weights, expected)
  assert not any("gain" in values for values in weights.values())

  def logits(model, params):
    apply = lambda params: model.apply(params, {}, None, images)[0]["logits"]
    return jax.jit(apply)(params)

  found = logits(folded, weights)
  np.testing.assert_allclose(found, logits(model, params), rtol=0, atol=1e-5)
  assert folded.lay_out(weights, np.float32) is weights
  for_gpus = models.folded(models.make(name, 10, **overrides, is_packed=True))
  laid_out = for_gpus.lay_out(weights, np.float32)
  np.testing.assert_allclose(logits(for_gpus, laid_out), found, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "channels", "strides"),
  [
    ("nfnet_tiny", (8, 16, 32, 64), (4, 4, 8, 8)),
    ("nf_resnet50", (64, 256, 512, 512), (4, 4, 8, 8)),
  ],
)
def test_features_of_each_part(name, channels, strides):
  overrides = (
    SMALL if name == "nfnet_tiny" else {"depth": (1, 1), "width": (256, 512)}
  )
  model = models.make(name, 10, **overrides)
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
  params = draw_params(param_shapes(model))
  found = jax.jit(model.features)(params, {}, images)
  assert list(found) == ["final", "pool", "stage1", "stage2", "stem"]
  parts = ("stem", "stage1", "stage2", "final")
  for part, channel, stride in zip(parts, channels, strides, strict=True):
    assert found[part].shape == (2, 64 // stride, 64 // stride, channel), part
  np.testing.assert_allclose(
    found["pool"], found["final"].mean((1, 2)), rtol=1e-4, atol=1e-5
  )


def test_features_of_f0_have_the_shapes_of_the_readme():
  model = models.make("nfnet_f0")
  images = jax.ShapeDtypeStruct((2, 192, 192, 3), np.float32)
  found = jax.eval_shape(model.features, *model.shapes(), images)
  assert found["pool"].shape == (2, 3072)
  assert found["stage3"].shape == (2, 12, 12, 1536)


def test_a_dropped_branch_leaves_the_shortcut_and_others_are_not_rescaled():
  plan = models.make("nfnet_tiny").plan
  block = plan.blocks[0]
  shape = (3, 8, 8, block.in_channels)
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  network = hk.without_apply_rng(
    hk.transform(
      lambda keep: NFBlock(block, plan, Execution())(x, Drawn(block.beta, keep))
    )
  )

  drawn = jax.jit(network.init)(jax.random.key(0), None)

  def out(skip_gain, keep):
    params = {k: dict(v) for k, v in drawn.items()}
    params[block.kind]["skip_gain"] = jnp.float32(skip_gain)
    return network.apply(params, keep)[0]

  kept, dropped = out(0.7, None), out(0.0, None)
  found = out(0.7, jnp.array([1.0, 0.0, 1.0]))
  np.testing.assert_array_equal(found[1], dropped[1])
  np.testing.assert_array_equal(found[::2], kept[::2])
  assert (kept != dropped).all()


@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_regnet_b0"])
def test_of_bfloat16_neither_beta_nor_a_gate_is_rounded(name):
  """What convolutions see is: the first, and one after a gate in the middle."""
  plan = models.make(name).plan
  block = plan.blocks[1]
  assert block.beta != float(jnp.bfloat16(block.beta))
  shape = (2, 8, 8, block.in_channels)
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  x = jnp.asarray(x, jnp.bfloat16)
  found = {}

  def look(call, args, kwargs, context):
    result = call(*args, **kwargs)
    found[context.module.name] = args[0], result
    return result

  def apply(x):
    with hk.intercept_methods(look):
      return NFBlock(block, plan, Execution())(x, Drawn(block.beta, None))

  network = hk.transform(apply)
  params = jax.jit(network.init)(jax.random.key(0), x)
  found.clear()
  out, _ = network.apply(params, None, x)
  assert out.dtype == jnp.bfloat16
  act = layers.ACTIVATIONS[plan.activation]
  names = [conv.name for conv in block.convs]
  exact = act(x).astype(jnp.float32) * block.beta
  np.testing.assert_array_equal(found[names[0]][0], exact.astype(jnp.bfloat16))
  if block.attention.is_in_middle:
    gate = found["squeeze_excite"][1] * 2
    exact = found[names[-2]][1].astype(jnp.float32) * gate
    np.testing.assert_array_equal(
      found[names[-1]][0], act(exact.astype(jnp.bfloat16))
    )


def test_later_blocks_are_dropped_more_often():
  blocks = models.make("nfnet_f0").plan.blocks
  expected = [0.25 * i / 12 for i in range(12)]
  assert [b.stochdepth_rate for b in blocks] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["drop_rate", "stochdepth_rate"])
def test_training_uses_its_randomness_and_evaluation_none(kind):
  rates = {"drop_rate": 0.0, "stochdepth_rate": 0.0} | {kind: 0.5}
  model = models.make("nfnet_tiny", 10, **SMALL, **rates)
  images = np.random.default_rng(0).standard_normal((8, 32, 32, 3), np.float32)
  params = draw_params(param_shapes(model))

  @functools.partial(jax.jit, static_argnames="is_training")
  def apply(key, is_training):
    outputs, _ = model.apply(params, {}, key, images, is_training=is_training)
    return outputs["logits"], outputs["pool"]

  def run(seed, is_training):
    return apply(None if seed is None else jax.random.key(seed), is_training)

  (logits, pool), (other_logits, other_pool) = run(0, True), run(1, True)
  assert (logits == run(0, True)[0]).all()
  assert (logits != other_logits).any()
  # Dropout comes after.
  assert (pool == other_pool).all() == (kind == "drop_rate")
  assert (run(None, False)[0] == run(1, False)[0]).all()


@pytest.mark.parametrize(
  "execution",
  [
    {"convolution": "products"},
    {"is_scanned": True},
    {"remat": "blocks"},
    pytest.param({"remat": "stages"}, marks=pytest.mark.slow),
    {"remat": "blocks", "is_scanned": True},
    pytest.param(
      {"remat": "stages", "is_scanned": True}, marks=pytest.mark.slow
    ),
    pytest.param(
      {"remat": "blocks", "is_packed": True}, marks=pytest.mark.slow
    ),
    {"remat": "stages", "is_packed": True},
  ],
  ids=str,
)
def test_all_ways_to_compute_a_network_are_equal(execution):
  """Losses and gradients in training, with dropped branches and features."""
  _assert_all_close(
    _loss_and_gradient(**execution), _loss_and_gradient(convolution="xla")
  )


def _assert_all_close(found, expected):
  """Trees; relative to the largest of each array, if it is above 1."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-5 * max(1, abs(b).max())
    ),
    *jax.device_get((found, expected)),
  )


@functools.cache
def _loss_and_gradient(**execution):
  row = SMALL | {"depth": (1, 3), "drop_rate": 0.2, "stochdepth_rate": 0.5}
  model = models.make("nfnet_tiny", 10, **row, **execution)
  params = draw_params(param_shapes(model))
  images = np.random.default_rng(0).standard_normal((4, 24, 24, 3), np.float32)

  def loss(params):
    key = jax.random.key(2)
    outputs, _ = model.apply(params, {}, key, images, is_training=True)
    return jnp.sum(outputs["logits"] ** 2)

  if execution.get("is_packed"):
    params = model.stack(params)
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  return value, model.unstack(jax.device_get(grads))


@pytest.mark.parametrize(
  "execution",
  [
    {"is_folded": True},
    pytest.param({"remat": "stages"}, marks=pytest.mark.slow),
    {"remat": "blocks", "is_scanned": True},
  ],
  ids=str,
)
def test_some_images_at_a_time_give_what_all_do(execution, monkeypatch):
  """Features of an evaluation, and gradients of the weights."""
  row = SMALL | {"depth": (1, 3)}
  model = models.make("nfnet_tiny", 10, **row, **execution)
  params = draw_params(model.shapes()[0])
  images = np.random.default_rng(0).standard_normal((7, 24, 24, 3), np.float32)

  def run(params):
    outputs = model.features(params, {}, images)
    return jnp.sum(outputs["pool"] ** 2), outputs

  def evaluate():
    compiled = jax.value_and_grad(run, has_aux=True)
    return jax.device_get(jax.jit(compiled)(params))

  expected = evaluate()
  monkeypatch.setattr(network, "_NUMBERS_AT_ONCE", 1000)
  _assert_all_close(evaluate(), expected)


@pytest.mark.parametrize(
  "loops, is_training, form, backend",
  [
    (3, False, None, "cpu"),  # Stem and two stages.
    (0, True, None, "cpu"),
    (0, False, "xla", "cpu"),
    (0, False, None, "gpu"),
  ],
)
def test_images_are_cut_in_evaluations_on_a_cpu(
  loops, is_training, form, backend, monkeypatch
):
  model = models.make("nfnet_tiny", 10, **SMALL, convolution=form)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)

  def count():
    images = jax.ShapeDtypeStruct((7, 24, 24, 3), jnp.float32)
    apply = functools.partial(model.apply, is_training=is_training)
    arguments = model.shapes()[0], {}, jax.random.key(0), images
    return str(jax.make_jaxpr(apply)(*arguments)).count("= scan[")

  at_once = count()
  monkeypatch.setattr(network, "_NUMBERS_AT_ONCE", 1000)
  assert count() == at_once + loops


@pytest.mark.parametrize(
  "execution, is_training",
  [
    ({}, True),
    pytest.param({"remat": "blocks"}, True, marks=pytest.mark.slow),
    pytest.param({"remat": "stages"}, True, marks=pytest.mark.slow),
    ({"is_folded": True}, False),
  ],
  ids=str,
)
def test_blocks_compiled_once_give_what_each_by_itself_does(
  execution, is_training, monkeypatch
):
  """Logits, and gradients of weights and images."""
  row = SMALL | {"depth": (1, 4), "drop_rate": 0.0, "stochdepth_rate": 0.5}
  model = models.make("nfnet_tiny", 10, **row, **execution)
  params = draw_params(model.shapes()[0])
  images = np.random.default_rng(0).standard_normal((4, 24, 24, 3), np.float32)

  def run(params, images):
    key = jax.random.key(2)
    outputs, _ = model.apply(params, {}, key, images, is_training=is_training)
    return jnp.sum(outputs["logits"] ** 2), outputs["logits"]

  def compute(is_once):
    monkeypatch.setattr(
      network.Network, "_is_better_compiled_once", lambda *_: is_once
    )
    gradient = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    compiled = gradient.lower(params, images).compile()
    calls = compiled.as_text().count(" call(")  # XLA has others, too.
    return jax.device_get(compiled(params, images)), calls

  found, calls = compute(True)
  expected, other_calls = compute(False)
  assert calls >= other_calls + 6  # Three blocks, there and back.
  assert all(np.abs(array).max() > 0 for array in jax.tree.leaves(found))
  _assert_all_close(found, expected)


@pytest.mark.parametrize(
  "num_calls, is_deep, is_training, form, backend",
  [
    (3, False, False, None, "cpu"),
    (0, False, True, None, "cpu"),
    (3, True, True, None, "cpu"),
    (0, True, False, "xla", "cpu"),
    (0, True, False, None, "gpu"),
  ],
)
def test_equal_blocks_are_calls_of_one_function_on_a_cpu(
  num_calls, is_deep, is_training, form, backend, monkeypatch
):
  row = SMALL | {"depth": (1, 4)}
  model = models.make("nfnet_tiny", 10, **row, convolution=form)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(network, "_BLOCKS_OF_DEEP", 5 if is_deep else 6)

  def loss(params, images):
    key = jax.random.key(0)
    outputs, _ = model.apply(params, {}, key, images, is_training=is_training)
    return jnp.sum(outputs["logits"])

  def calls_of(function):
    images = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.float32)
    text = jax.jit(function).lower(model.shapes()[0], images).as_text()
    return [
      line.split("call @")[1].split("(")[0]
      for line in text.splitlines()
      if "compilation_unit" in line
    ]

  forward, gradient = calls_of(loss), calls_of(jax.grad(loss))
  assert len(forward) == num_calls and len({*forward}) == min(num_calls, 1)
  assert len(gradient) == 2 * num_calls
  assert len({*gradient}) == 2 * min(num_calls, 1)  # There and back.


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="they are units on a CPU alone"
)
def test_blocks_that_are_computed_again_take_less_memory():
  def temporary_bytes(remat):
    row = SMALL | {"depth": (1, 8)}
    model = models.make("nfnet_tiny", 10, **row, remat=remat)

    def loss(params, images):
      key = jax.random.key(0)
      outputs, _ = model.apply(params, {}, key, images, is_training=True)
      return jnp.sum(outputs["logits"])

    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    lowered = jax.jit(jax.grad(loss)).lower(model.shapes()[0], images)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes("blocks") < 0.8 * temporary_bytes("none")


@pytest.mark.parametrize(
  "name, is_training, remat, is_once",
  [
    ("nfnet_f0", False, "none", True),
    ("nfnet_f0", True, "blocks", True),
    ("nfnet_f0", True, "stages", False),
    ("nfnet_f1", True, "none", False),
    ("nfnet_f2", True, "none", True),
  ],
)
def test_only_within_a_program_blocks_are_compiled_once(
  name, is_training, remat, is_once
):
  """Elsewhere each call would be compiled anew."""
  plan = models.make(name).plan
  found = []

  def ask(x):
    net = network.Network(plan, 10, Execution(remat=remat))
    found.append(net._is_better_compiled_once(is_training))
    return x

  ask = functools.partial(hk.transform(ask).apply, {}, None)
  ask(1.0)
  jax.grad(ask)(1.0)
  assert found == [False, False]
  jax.jit(ask)(1.0)
  jax.eval_shape(jax.grad(ask), 1.0)
  assert found[2:] == [is_once, is_once]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  num=strategies.integers(1, 40), most=strategies.integers(1, 12)
)
def test_parts_hold_each_image_once_and_few_zeros(num, most):
  images = np.arange(num * 32.0, dtype=np.float32).reshape(num, 4, 4, 2)
  conv = plans.Conv("conv", 2, channels=6, kernel_size=3, stride=2)
  sizes = []

  def run(x):
    sizes.append(len(x))
    return x[:, ::2, ::2].sum(3)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(network, "_NUMBERS_AT_ONCE", most * 4 * 6)
    out = network._some_at_a_time(run, [conv])(images)
  np.testing.assert_array_equal(out, images[:, ::2, ::2].sum(3))
  (size,) = {*sizes}
  if num <= most:
    assert size == num
  else:
    large = range(most // 2 + 1, most + 1)
    assert size in large
    assert -num % size == min(-num % other for other in large)


def test_any_number_of_images_is_one_part():
  (num,) = jax.export.symbolic_shape("n")
  run = network._some_at_a_time(lambda x: 2 * x, [plans.Conv("conv", 2, 2)])
  images = jax.ShapeDtypeStruct((num, 999, 999, 3), jnp.float32)
  exported = jax.export.export(jax.jit(run))(images)
  assert "while" not in exported.mlir_module()


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_as_it_is_computed_elsewhere_it_is_the_same(backend, monkeypatch):
  """What is written otherwise for GPUs and TPUs, run here."""
  expected = _loss_and_gradient(convolution="xla")
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  _assert_all_close(_loss_and_gradient.__wrapped__(), expected)


@pytest.mark.parametrize(
  "name, height, backend, form, kernels",
  [
    (
      *("nfnet_f0", 32, "tpu", None),
      [(2, 2, 48, 64), (3, 3, 64, 128), (3, 3, 128, 256), (2, 2, 256, 128)],
    ),
    ("nfnet_f0", 34, "tpu", None, [(3, 3, 3, 16)]),  # 34 / 4 is not whole.
    ("nfnet_f0", 32, "tpu", "xla", [(3, 3, 3, 16)]),
    ("nfnet_f0", 32, "gpu", None, [(2, 2, 16, 16), (3, 3, 16, 32)]),
    (
      *("nfnet_l0", 32, "tpu", None),  # Padded as by PyTorch.
      [(2, 2, 48, 64), (3, 3, 64, 128), (3, 3, 128, 256), (2, 2, 256, 128)],
    ),
    ("nf_regnet_b0", 30, "tpu", None, [(2, 2, 12, 36)]),
    ("nf_resnet50", 30, "tpu", None, [(4, 4, 12, 64)]),
  ],
)
def test_the_stem_takes_squares_of_pixels_on_a_tpu(
  name, height, backend, form, kernels, monkeypatch
):
  depth = len(models.VARIANTS[name].depth) * (1,)
  model = models.make(name, 10, depth=depth, convolution=form)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  stem = lambda *arguments: model.features(*arguments)["stem"]
  params, _ = model.shapes()
  images = jax.ShapeDtypeStruct((2, height, 16, 3), jnp.bfloat16)
  found = [
    equation.invars[1].aval.shape
    for equation in jax.make_jaxpr(stem)(params, {}, images).eqns
    if equation.primitive.name == "conv_general_dilated"
  ]
  assert found[: len(kernels)] == kernels


@pytest.mark.parametrize(
  "name, row, execution",
  [
    ("nfnet_tiny", SMALL | {"depth": (1, 3)}, "is_scanned"),
    pytest.param(
      *("nf_regnet_b0", {"depth": (3, 1), "width": (16, 32)}, "is_scanned"),
      marks=pytest.mark.slow,
    ),
    ("nf_regnet_b0", {"width": (16, 32), "depth": (1, 1)}, "is_packed"),
    ("nfnet_tiny", SMALL | {"attention": "eca"}, "is_packed"),
  ],
)
def test_stacked_parameters_give_the_same_and_come_back(name, row, execution):
  """Outputs, gradients by the published names, and norms of AGC's units."""
  model = models.make(name, 10, **row, **{execution: True})
  params = draw_params(param_shapes(model))
  stacked = model.stack({"a": params, "b": np.float32(1)})["a"]
  if execution == "is_scanned":  # Packed, there are modules of their own.
    assert len(stacked) < len(params)
  assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))
  assert jax.tree.leaves(model.unit_axes(stacked))
  jax.tree.map(np.testing.assert_array_equal, model.unstack(stacked), params)
  in_other_order = model.stack(
    {k: dict(reversed(v.items())) for k, v in reversed(params.items())}
  )
  jax.tree.map(np.testing.assert_array_equal, in_other_order, stacked)
  jax.tree.map(np.testing.assert_array_equal, model.stack(stacked), stacked)
  jax.tree.map(np.testing.assert_array_equal, model.unstack(params), params)
  assert not jax.tree.leaves(model.unit_axes(params))
  norms, expected = (
    np.sort(np.concatenate([norm.ravel() for norm in found]))
    for found in (
      agc.unitwise_norms(stacked, model.unit_axes(stacked)),
      agc.unitwise_norms(params, model.unit_axes(params)),
    )
  )
  np.testing.assert_allclose(norms, expected, rtol=1e-5)

  folded, expected = (models.fold(model, p)[1] for p in (stacked, params))
  jax.tree.map(np.testing.assert_array_equal, folded, expected)

  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    logits = model.apply(params, {}, None, images)[0]["logits"]
    return jnp.sum(logits**2), logits

  (_, logits), grads = jax.device_get(run(stacked))
  (_, expected), expected_grads = run(params)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  _assert_all_close(model.unstack(grads), expected_grads)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 1, 1, 8), (1, 1, 8, 1)])
def test_units_of_packed_kernels_are_those_of_published_ones(shape):
  kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
  turned = kernel.transpose(3, 0, 1, 2)
  norm = agc.unitwise_norm(turned, packed.unit_axes("conv", turned))
  np.testing.assert_allclose(
    norm.ravel(), agc.unitwise_norm(kernel).ravel(), rtol=1e-6
  )


def test_nothing_is_stacked_unless_wanted():
  model = models.make("nfnet_tiny", 10, depth=(1, 3, 1, 1), is_packed=False)
  params = draw_params(param_shapes(model))
  assert model.stack(params) is params
  assert model.unstack(params) is params


def test_computing_again_keeps_less_for_the_gradient():
  def kept_bytes(**execution):
    row = SMALL | {"depth": (1, 6), "stochdepth_rate": 0.0}
    model = models.make("nfnet_tiny", 10, **row, **execution)
    images = jax.ShapeDtypeStruct((16, 64, 64, 3), jnp.float32)

    def residuals(params, images):
      apply = lambda p: model.apply(p, {}, None, images)[0]["logits"]
      return jax.vjp(apply, params)[1]

    kept = jax.eval_shape(residuals, param_shapes(model), images)
    return sum(4 * x.size for x in jax.tree.leaves(kept))

  everything = kept_bytes()
  blocks = kept_bytes(remat="blocks")
  assert blocks < 0.4 * everything
  assert kept_bytes(remat="blocks", is_scanned=True) < 0.4 * everything
  assert kept_bytes(remat="stages") < blocks


def test_stages_of_modules():
  model = models.make("nfnet_f0")
  expected = {
    "NFNet/~/stem_conv0": "stem",
    "NFNet/~/nf_block": "stage1",
    "NFNet/~/nf_block/~/conv0": "stage1",
    "NFNet/~/nf_block_1/~/squeeze_excite/~/linear": "stage2",
    "NFNet/~/nf_block_3/~/conv1b": "stage3",
    "NFNet/~/nf_block_11": "stage4",
    "NFNet/~/final_conv": "head",
    "NFNet/~/linear": "head",
  }
  assert {name: model.stage_of(name) for name in expected} == expected


@pytest.mark.parametrize(
  ("name", "overrides", "message"),
  [
    ("nfnet_f9", {}, r"unknown model 'nfnet_f9': did you mean nfnet_f"),
    ("nfnet_f0", {"depht": (1,)}, r"'depht': did you mean depth"),
    ("nfnet_f0", {"depth": (1, 2)}, r"width=.* has 4 entries, but depth"),
    ("nfnet_f0", {"depth": 3}, r"depth=3 is a int, but .* tuple"),
    ("nfnet_f0", {"depth": (0, 1, 1, 1)}, r"needs at least one block"),
    ("nfnet_f0", {"drop_rate": 1.0}, r"drop_rate=1.0 is not in \[0, 1\)"),
    ("nfnet_f0", {"activation": "gleu"}, r"did you mean gelu"),
    ("nfnet_f0", {"group_width": (256,) * 4}, r"stage 1: a bottleneck of 128"),
    ("nfnet_f0", {"second_conv": 1}, r"second_conv=1 is a int"),
    ("nfnet_f0", {"se_ratio": -1}, r"se_ratio=-1.0 is negative"),
    ("eca_nfnet_l0", {"se_ratio": 0.0}, r"l0 has no squeeze-excite, .*\(eca\)"),
    ("nfnet_f0", {"padding": "valid"}, r"unknown padding 'valid'"),
    ("nfnet_f0", {"attention": "sea"}, r"unknown attention 'sea'"),
    ("nf_regnet_b0", {"width": (1, 2)}, r"width=.* has 2 entries, but depth"),
    ("nf_regnet_b0", {"group_width": 0}, r"group_width=0 is not positive"),
    ("nf_regnet_b0", {"group_width": 99}, r"stage 1: .* no room for one group"),
    ("nf_regnet_b0", {"expansion": 0.1}, r"stage 2: a bottleneck of 3 channel"),
    (
      *("nf_regnet_b0", {"width": (48, 104, 2, 440)}),
      r"stage 3: a bottleneck of 2 channels, of 1 that come in, has no room",
    ),
    ("nf_regnet_b0", {"se_ratio": math.nan}, r"se_ratio=nan is not finite"),
    ("nfnet_f0", {"final_conv_ratio": math.inf}, r"ratio=inf is not finite"),
    ("nfnet_f0", {"final_conv_ratio": 1e-4}, r"no channels are left"),
    ("nfnet_f0", {"bottleneck_ratio": (math.inf,) * 4}, r"inf is not finite"),
    ("nfnet_f0", {"num_classes": "ten"}, r"num_classes='ten' is no whole numb"),
    ("nfnet_f0", {"num_classes": 2.5}, r"num_classes=2.5 is no whole number"),
    ("nfnet_f0", {"num_classes": 0}, r"num_classes=0: at least 1"),
    ("nfnet_f0", {"remat": None}, r"unknown remat None: did you mean none"),
    (["nfnet_f0"], {}, r"unknown model \['nfnet_f0'\]"),
    ("nfnet_f0", {"remat": "all"}, r"unknown remat 'all'.*blocks"),
    ("nfnet_f0", {"convolution": "fft"}, r"unknown form of convolution 'fft'"),
    ("nf_resnet50", {"bottleneck_ratio": 0.001}, r"no channels are left"),
    ("nfnet_f0", {"test_size": 0}, r"test_size=0 is not positive"),
    ("nf_resnet50", {"stochdepth_rate": 1.5}, r"rate=1.5 is not in \[0, 1\)"),
  ],
)
def test_wrong_rows_are_one_clear_line(name, overrides, message):
  with pytest.raises(InputError, match=message) as error:
    models.make(name, **overrides)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((2, 32, 32, 3), np.uint8),
    ((2, 32, 32, 3), np.int32),
    ((2, 32, 32, 1), np.float32),
    ((32, 32, 3), np.float32),
    ((0, 32, 32, 3), np.float32),
  ],
)
def test_images_that_no_network_takes_are_one_clear_line(shape, dtype):
  model = models.make("nfnet_tiny", 10, **SMALL)
  params = draw_params(param_shapes(model))
  images = np.ones(shape, dtype)
  for use in (
    lambda: model.init(jax.random.key(0), images),
    lambda: model.apply(params, {}, None, images),
    lambda: model.features(params, {}, images),
  ):
    with pytest.raises(InputError, match=r"networks take \[N, H, W, 3\]") as e:
      use()
    assert "\n" not in str(e.value)


def test_float32_images_give_the_same_where_jax_has_64_bits():
  model = models.make("nfnet_tiny", 10, **SMALL)
  params = draw_params(param_shapes(model))
  images = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)

  def run():
    apply = lambda p, x: model.apply(p, {}, None, x)[0]["logits"]
    return jax.jit(apply)(params, images)

  expected = run()
  with jax.enable_x64(True):
    logits = run()
    assert logits.dtype == np.float32
    jax.eval_shape(model.init, jax.random.key(0), images)
  np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_weights_that_are_not_folded_are_refused_where_they_must_be():
  model = models.make("nfnet_tiny", 3, **SMALL)
  params = draw_params(param_shapes(model))
  images = np.ones((1, 32, 32, 3), np.float32)
  folded, _ = models.fold(model, params)
  with pytest.raises(InputError, match=r"have gains, which a folded network"):
    folded.apply(params, {}, None, images)


def test_a_network_goes_to_other_processes():
  model = models.make("nfnet_tiny", 3, **ONE_BLOCK_ROW, remat="blocks")
  copy = pickle.loads(pickle.dumps(model))
  assert copy[:5] == model[:5]
  params = draw_params(param_shapes(model))
  images = np.ones((1, 32, 32, 3), np.float32)
  outputs = [
    jax.jit(m.apply)(params, {}, None, images)[0] for m in (copy, model)
  ]
  np.testing.assert_array_equal(*(o["logits"] for o in outputs))


def test_numbers_of_numpy_are_columns():
  row = models.variant(
    "nfnet_f0", depth=np.array([1, 2, 6, 3]), stochdepth_rate=np.float64(0.1)
  )
  assert (row.depth, row.stochdepth_rate) == ((1, 2, 6, 3), 0.1)


@pytest.mark.parametrize(
  "execution",
  [
    {},
    pytest.param({"remat": "blocks"}, marks=pytest.mark.slow),
    {"remat": "blocks", "is_scanned": True},
  ],
)
def test_gradients_within_a_shard_map_are_summed(execution):
  """With JAX's default, which tells what varies between devices."""
  columns = SMALL | {"depth": (1, 3)}
  model = models.make("nfnet_tiny", 3, **columns, **execution)
  params = draw_params(param_shapes(model))
  images = np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32)

  def loss(params, images):
    return jnp.mean(model.apply(params, {}, None, images)[0]["logits"] ** 2)

  def of_part(params, images):
    return jax.grad(lambda p: jax.lax.pmean(loss(p, images), "i"))(params)

  mapped = jax.shard_map(
    of_part,
    mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), ("i",)),
    in_specs=(P(), P("i")),
    out_specs=P(),
  )
  found, expected = (
    jax.jit(mapped)(params, images),
    jax.jit(jax.grad(loss))(params, images),
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    found,
    expected,
  )


def test_blocks_are_stacked_by_their_whole_numbers():
  """The second is no part of the twentieth."""
  model = models.make("nfnet_tiny", 10, **SMALL | {"depth": (3, 18)})
  params = draw_params(param_shapes(model))
  found = stacked.unstack(model.plan, stacked.stack(model.plan, params))
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_resnet_has_its_published_multiply_accumulates():
  """A ResNet-50's, whose form it has."""
  assert round(models.make("nf_resnet50").count_macs(224) / 1e9, 1) == 4.1


def test_nothing_leaks_from_a_trace():
  model = models.make("nfnet_tiny", 3, **ONE_BLOCK_ROW)
  params = draw_params(param_shapes(model))
  images = np.ones((1, 32, 32, 3), np.float32)
  loss = lambda p: jnp.sum(model.apply(p, {}, None, images)[0]["logits"])
  with jax.checking_leaks():
    jax.eval_shape(jax.grad(loss), params)


@pytest.mark.parametrize("kind", ["drop_rate", "stochdepth_rate"])
def test_what_is_hardly_ever_dropped_changes_nothing(kind):
  rates = {"drop_rate": 0.0, "stochdepth_rate": 0.0} | {kind: 1e-6}
  model = models.make("nfnet_tiny", 10, **SMALL, **rates)
  x = np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32)
  params = draw_params(param_shapes(model))
  apply = jax.jit(model.apply, static_argnames="is_training")
  trained, evaluated = (
    apply(params, {}, jax.random.key(0), x, is_training=flag)[0]["logits"]
    for flag in (True, False)
  )
  np.testing.assert_allclose(trained, evaluated, rtol=1e-4, atol=1e-5)


def test_branches_are_kept_at_the_rates_of_their_blocks(monkeypatch):
  seen, original = [], layers.stochastic_depth

  def watch(key, keep_rates, num):
    seen.append((list(keep_rates), num))
    return original(key, keep_rates, num)

  monkeypatch.setattr(layers, "stochastic_depth", watch)
  row = SMALL | {"depth": (1, 3), "stochdepth_rate": 0.4}
  model = models.make("nfnet_tiny", 10, **row)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
  train = functools.partial(model.apply, is_training=True)
  jax.eval_shape(train, *model.shapes(), jax.random.key(0), images)
  ((rates, num),) = seen
  assert rates == pytest.approx([1, 0.9, 0.8, 0.7])
  assert num == 2
