"""The train step: the original's trajectory, any number of devices, its HLO."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  ONE_BLOCK_ROW,
  PATIENCE,
  SMALL,
  draw_params,
  load_json,
  param_shapes,
)

from nfnets import (
  agc,
  augment,
  checkpoint,
  devices,
  evaluate,
  models,
  optim,
  sam,
  steps,
)
from nfnets.data.batch import Batch
from nfnets.data.source import Examples, Split
from nfnets.errors import InputError

SMALL_MODEL = models.make("nfnet_tiny", 10, **SMALL)
ONE_BLOCK = models.make("nfnet_tiny", 10, **ONE_BLOCK_ROW)
DEEP = SMALL | {"depth": (1, 3)}
SAM = {"sam_rho": 0.5, "sam_share": 0.25}
SHIFT = augment.make_augment(shift=0.125)
IDENTITY = augment.Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _batches(seed, num, batch_size, size=32):
  rng = np.random.default_rng(seed)
  shape = (num, batch_size, size, size, 3)
  images = rng.standard_normal(shape, dtype=np.float32)
  labels = rng.integers(0, 10, (num, batch_size)).astype(np.int32)
  mask = np.ones(batch_size, np.float32)
  return [Batch(x, y, mask) for x, y in zip(images, labels, strict=True)]


@functools.cache
def _setup(model, num_devices, **options):
  """(state with the reference's parameters, compiled step, mesh)."""
  mesh = devices.make_mesh(num_devices)
  schedule = options.pop("schedule", 0.1)
  optimizer = optim.make_optimizer(
    schedule, stage_of=model.stage_of, unit_axes=model.unit_axes
  )
  params = draw_params(param_shapes(model))
  state = steps.TrainState(
    step=np.zeros((), np.int32),
    params=params,
    state={},
    opt_state=jax.device_get(optimizer.init(params)),
    ema_params=params,
    ema_state={},
  )
  defaults = {
    "normalization": IDENTITY,
    "label_smoothing": 0.1,
    "ema_decay": 0.99999,
    "seed": 0,
  }
  step = steps.make_train_step(model, optimizer, mesh, **defaults | options)
  return model.stack(state), step, mesh


def _run(model, num_devices, batches, **options):
  state, step, mesh = _setup(model, num_devices, **options)
  state = devices.replicate(state, mesh)
  metrics = []
  for batch in batches:
    state, values = step(state, devices.shard_batch(batch, mesh))
    metrics.append({k: float(v) for k, v in values.items()})
  return model.unstack(jax.device_get(state)), metrics


def _norms(params):
  return {
    f"{module}/{name}": float(np.linalg.norm(value))
    for module, values in params.items()
    for name, value in values.items()
  }


def test_six_steps_are_those_of_the_original_code():
  expected = load_json("train_tiny.json")
  state, metrics = _run(
    models.make("nfnet_tiny", 10),
    1,
    _batches(3, 6, 8),
    schedule=optim.make_schedule(peak=0.2, warmup_steps=2, total_steps=20),
  )
  for name, ours in (("losses", "loss"), ("grad_norms", "grad_norm")):
    np.testing.assert_allclose(
      [values[ours] for values in metrics], expected[name], rtol=1e-4
    )
  for name, params in (
    ("param_norms", state.params),
    ("ema_norms", state.ema_params),
  ):
    norms = _norms(params)
    assert norms.keys() == expected[name].keys()
    for key, norm in norms.items():
      np.testing.assert_allclose(norm, expected[name][key], 1e-5, err_msg=key)
  assert int(state.step) == 6


@functools.cache
def _one_device():
  return _run(ONE_BLOCK, 1, _batches(0, 4, 16))


def _assert_same_run(run, other):
  (state, metrics), (other_state, other_metrics) = run, other
  for values, expected in zip(metrics, other_metrics, strict=True):
    assert values.keys() == expected.keys()
    for name, value in values.items():
      np.testing.assert_allclose(value, expected[name], 2e-4, err_msg=name)
  for module, values in other_state.params.items():
    for name, expected in values.items():
      value = state.params[module][name]
      np.testing.assert_allclose(
        value, expected, rtol=1e-5, atol=2e-6, err_msg=f"{module}/{name}"
      )


@pytest.mark.parametrize(
  "num_devices",
  [
    pytest.param(2, marks=pytest.mark.slow),
    pytest.param(4, marks=pytest.mark.slow),
    8,
  ],
)
def test_n_devices_equal_one_device(num_devices):
  run = _run(ONE_BLOCK, num_devices, _batches(0, 4, 16))
  _assert_same_run(run, _one_device())


def test_accumulated_micro_batches_equal_one_batch():
  """Clipping happens once, on the mean: per micro-batch it would differ."""
  run = _run(ONE_BLOCK, 2, _batches(0, 4, 16), accumulate=4)
  _assert_same_run(run, _one_device())
  assert run[1][0]["clipped/all"] > 0.01


@functools.cache
def _in_turn():
  return _run(models.make("nfnet_tiny", 10, **DEEP), 1, _batches(0, 4, 16))


@pytest.mark.parametrize(
  ("execution", "accumulate"),
  [
    ("is_scanned", 1),
    pytest.param("is_scanned", 2, marks=pytest.mark.slow),
    pytest.param("is_packed", 1, marks=pytest.mark.slow),
    ("is_packed", 2),
  ],
)
def test_other_arrays_are_trained_alike(execution, accumulate):
  """Of parameters put together each has its own units to be clipped."""
  model = models.make("nfnet_tiny", 10, **DEEP, **{execution: True})
  run = _run(model, 2, _batches(0, 4, 16), accumulate=accumulate)
  expected = _in_turn()
  _assert_same_run(run, expected)
  assert 0.01 < run[1][0]["clipped/stage2"] < 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    run[0].opt_state,
    expected[0].opt_state,
  )


def test_frozen_parts_keep_their_weights_in_other_arrays():
  model = models.make("nfnet_tiny", 10, **SMALL, is_packed=True)
  is_frozen = lambda module: model.stage_of(module) in ("stem", "stage1")
  optimizer = optim.make_optimizer(
    0.1,
    stage_of=model.stage_of,
    unit_axes=model.unit_axes,
    is_frozen=is_frozen,
  )
  mesh = devices.make_mesh(1)
  init = lambda: steps.init_state(model, optimizer, image_size=32, seed=0)
  before = jax.device_get(devices.create(init, mesh))
  step = steps.make_train_step(
    model,
    optimizer,
    mesh,
    normalization=IDENTITY,
    label_smoothing=0.1,
    ema_decay=0.9,
    seed=0,
    is_frozen=is_frozen,
  )
  (batch,) = _batches(0, 1, 8)
  batch = devices.shard_batch(batch, mesh)
  given = devices.replicate(model.stack(before), mesh)
  state, metrics = step(given, batch)
  # No gradient goes there, and the memory of what was given is used again.
  assert metrics["max_ratio/stem"] == metrics["max_ratio/stage1"] == 0
  assert metrics["max_ratio/stage2"] > 0
  arrays = jax.tree.leaves((given.params, given.ema_params))
  assert all(x.is_deleted() for x in arrays)
  after = model.unstack(jax.device_get(state))
  for module, values in after.params.items():
    for name, value in values.items():
      is_same = np.array_equal(value, before.params[module][name])
      assert is_same or not is_frozen(module), (module, name)
      if name == "w" and module.endswith("linear"):
        assert not is_same or is_frozen(module)


def _primitives(jaxpr, in_loop=False):
  """(name, whether it is inside of a loop) of every operation."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    yield name, in_loop
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _primitives(inner, in_loop or name == "scan")


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_micro_batches_share_standardised_weights(sam_rho):
  """With SAM each climbs to its own."""
  state, step, mesh = _setup(SMALL_MODEL, 1, accumulate=4, sam_rho=sam_rho)
  batch = devices.shard_batch(_batches(0, 1, 16)[0], mesh)
  program = jax.make_jaxpr(step)(devices.replicate(state, mesh), batch)
  found = [
    in_loop for name, in_loop in _primitives(program.jaxpr) if name == "rsqrt"
  ]
  assert found
  assert any(found) == bool(sam_rho)


@pytest.mark.parametrize(("num_devices", "options"), [(8, {}), (2, SAM)])
def test_the_step_crosses_devices_only_for_gradients_and_metrics(
  num_devices, options
):
  """SAM's climb is each device's own: it adds nothing."""
  state, step, mesh = _setup(ONE_BLOCK, num_devices, **options)
  state = devices.replicate(state, mesh)
  batch = devices.shard_batch(_batches(0, 1, 16)[0], mesh)
  hlo = step.lower(state, batch).compile().as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert not re.search(rf"= .*\b{collective}(-start)?\(", hlo), collective
  reduced = re.findall(r"= (.*) all-reduce(?:-start)?\(", hlo)
  assert reduced
  shapes = [s for line in reduced for s in re.findall(r"f32\[([\d,]*)\]", line)]
  assert not re.search(r"(bf16|f16|f64)\[", " ".join(reduced))
  num_values = sum(
    int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes
  )
  num_metrics = 2  # The loss and the accuracy.
  assert num_values == ONE_BLOCK.count_params() + num_metrics


def test_sam_climbs_by_each_devices_own_images():
  """Two devices are two micro-batches on one, and not one batch on one."""
  batches = _batches(0, 3, 16)
  alone = _run(ONE_BLOCK, 1, batches, **SAM)
  together = _run(ONE_BLOCK, 2, batches, **SAM)
  in_turn = _run(ONE_BLOCK, 1, batches, accumulate=2, **SAM)
  _assert_same_run(together, in_turn)
  losses = [
    [values["loss"] for values in metrics] for _, metrics in (alone, together)
  ]
  assert not np.allclose(*losses, rtol=1e-3)


def test_sam_is_descent_from_where_the_climb_ended():
  """One step against the same with gradients by hand, outside the step."""
  (batch,) = _batches(1, 1, 16)
  state, metrics = _run(ONE_BLOCK, 1, [batch], **SAM)
  params = draw_params(param_shapes(ONE_BLOCK))

  def loss_fn(params, num):
    logits = ONE_BLOCK.apply(
      params, {}, None, batch.images[:num], is_training=True
    )[0]["logits"]
    targets = 0.9 * jax.nn.one_hot(batch.labels[:num], 10) + 0.1 / 10
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

  grad = jax.jit(jax.value_and_grad(loss_fn), static_argnums=1)
  there = sam.ascend(params, grad(params, 4)[1], rho=0.5)
  loss, gradient = grad(there, 16)
  np.testing.assert_allclose(metrics[0]["loss"], loss, rtol=1e-5)
  optimizer = optim.make_optimizer(0.1)
  updates, _ = jax.jit(optimizer.update)(
    gradient, optimizer.init(params), params
  )
  expected = optax.apply_updates(params, updates)
  for module, values in expected.items():
    for name, value in values.items():
      np.testing.assert_allclose(
        state.params[module][name],
        value,
        1e-5,
        1e-6,
        err_msg=f"{module}/{name}",
      )


def test_bfloat16_step_keeps_float32_state_and_learns_about_the_same():
  state, metrics = _run(ONE_BLOCK, 2, _batches(0, 4, 16), precision="bfloat16")
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  exact = _one_device()[1]
  for values, expected in zip(metrics, exact, strict=True):
    for name in ("loss", "grad_norm"):
      np.testing.assert_allclose(values[name], expected[name], rtol=0.02)
  assert metrics[0]["loss"] != exact[0]["loss"]


def test_randomness_depends_on_seed_and_step_alone():
  model = models.make("nfnet_tiny", 10, **ONE_BLOCK_ROW, drop_rate=0.3)
  batches = _batches(0, 1, 8) * 2  # The same examples in both steps.
  options = {"augment": SHIFT, "schedule": 0.0}
  first = _run(model, 2, batches, **options)[1]
  again = _run(model, 2, batches, **options)[1]
  other = _run(model, 2, batches, seed=1, **options)[1]
  assert first == again
  # The weights stay as they are, so the losses differ by their draws alone.
  assert first[0]["loss"] != first[1]["loss"]
  assert first[0]["loss"] != other[0]["loss"]


def test_statistics_name_every_part():
  metrics = _in_turn()[1][0]
  parts = {k.partition("/")[2] for k in metrics if k.startswith("clipped/")}
  assert parts == {"all", "stem", "stage1", "stage2", "head"}


def test_without_agc_there_are_no_statistics():
  optimizer = optim.make_optimizer(0.1, clipping=None)
  params = {"net/conv": {"w": jnp.ones((2, 2))}}
  assert agc.find_state(optimizer.init(params)) is None


@pytest.mark.parametrize("num_devices", [1, 4])
def test_evaluation_ignores_padding(num_devices):
  model = SMALL_MODEL
  mesh = devices.make_mesh(num_devices)
  params = draw_params(param_shapes(model))
  eval_step = steps.make_eval_step(model, mesh, normalization=IDENTITY)
  (batch,) = _batches(0, 1, 8)
  mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
  spoiled = batch.images.copy()
  spoiled[5:] = np.nan
  sums = eval_step(params, {}, Batch(spoiled, batch.labels, mask))

  logits = jax.jit(model.apply)(params, {}, None, batch.images[:5])[0]
  logits = logits["logits"]
  labels = batch.labels[:5]
  order = np.argsort(-np.asarray(logits), axis=-1)
  assert float(sums["count"]) == 5
  assert float(sums["top1"]) == np.sum(order[:, 0] == labels)
  assert float(sums["top5"]) == np.sum(order[:, :5] == labels[:, None])
  log_probs = jax.nn.log_softmax(logits)[np.arange(5), labels]
  np.testing.assert_allclose(sums["loss"], -jnp.sum(log_probs), rtol=1e-5)


def test_every_example_counts_once_on_any_number_of_devices():
  """Of 13 in batches of 5, which eight devices cannot share."""
  (batch,) = _batches(0, 1, 13)
  starts, results = [], []

  def read(indices, _):
    starts.append(int(indices[0]))
    good = np.ones(len(indices), bool)
    return Examples(batch.images[indices], batch.labels[indices], good)

  drawn = draw_params(param_shapes(ONE_BLOCK))
  weights = {"a": drawn, "b": jax.tree.map(lambda x: 0.5 * x, drawn)}

  def evaluate_on(num_devices, *kinds, image_size=33):
    mesh = devices.make_mesh(num_devices)
    told = []
    starts.clear()
    found = evaluate.over_split(
      steps.make_eval_step(
        ONE_BLOCK, mesh, normalization=IDENTITY, with_confusion=True
      ),
      {kind: (devices.replicate(weights[kind], mesh), {}) for kind in kinds},
      Split(13, read),
      batch_size=5,
      image_size=image_size,
      mesh=mesh,
      tell=lambda *numbers: told.append(numbers),
    )
    assert list(found) == list(kinds)
    return found, told

  for num_devices in (1, 8):
    found, told = evaluate_on(num_devices, "a")
    ends = {1: [5, 10], 8: [8]}[num_devices]
    assert told == [(end, 13) for end in ends]
    results.append(found["a"])
  one, eight = results
  assert one.num_examples == eight.num_examples == 13
  np.testing.assert_array_equal(one.confusion, eight.confusion)
  assert (
    one.confusion.sum(1).tolist()
    == np.bincount(batch.labels, minlength=10).tolist()
  )
  np.testing.assert_allclose(one[:3], eight[:3], rtol=1e-5)

  # A CPU takes no more at once than it is fast with: 3 of 400 px.
  few, told = evaluate_on(1, "a", image_size=400)
  assert starts == [0, 3, 6, 9, 12]
  np.testing.assert_allclose(few["a"][:3], one[:3], rtol=1e-5)

  # Of several weights each has the numbers that it has alone.
  both, _ = evaluate_on(1, "a", "b")
  assert starts == [0, 5, 10]  # Each batch was read once.
  alone, _ = evaluate_on(1, "b")
  for found, expected in ((both["a"], one), (both["b"], alone["b"])):
    assert found[:4] == expected[:4]
    np.testing.assert_array_equal(found.confusion, expected.confusion)
  assert both["a"].loss != both["b"].loss


def test_what_a_kill_left_half_written_is_removed(tmp_path):
  left = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
  left.mkdir(parents=True)
  with checkpoint.Checkpoints(tmp_path):
    pass
  assert left.exists()  # Who only reads leaves it.
  with checkpoint.Checkpoints(tmp_path, keep=2):
    start = time.monotonic()
    while left.exists() and time.monotonic() - start < PATIENCE:
      time.sleep(0.01)  # In a thread of Orbax's, which a save waits for.
  assert not left.exists()


def test_a_fresh_state_depends_on_its_seed():
  draw = lambda key, _: ({"m": {"w": jax.random.normal(key, (2,))}}, {})
  model = SMALL_MODEL._replace(init=draw)
  a, b = (
    steps.init_state(model, optax.identity(), image_size=32, seed=seed)
    for seed in (0, 1)
  )
  assert np.all(a.params["m"]["w"] != b.params["m"]["w"])


def test_a_checkpoint_of_another_structure_is_not_called_damaged(tmp_path):
  state, _, mesh = _setup(ONE_BLOCK, 1)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(state._replace(step=np.int32(step)), position=step)
    checkpoints.wait()
    other = state._replace(opt_state=(state.opt_state, np.zeros(3)))
    with pytest.raises(InputError, match=r"2 is of another model, or of anoth"):
      checkpoints.restore(other, mesh)
    restored, position = checkpoints.restore(state, mesh)
  assert (int(restored.step), position) == (2, 2)


def test_unknown_precision_is_an_error():
  with pytest.raises(InputError, match="known: float32, bfloat16"):
    steps.compute_dtype("float61")


def test_mixed_labels_sum_to_one_and_follow_the_shares():
  """A step on a batch mixed by hand has the loss of its mixed targets."""
  fixed = np.linspace(0, 1, 8, dtype=np.float32)  # Another at each place.

  def mix(key, places, batch):
    del key
    partner = (batch.labels + 1) % 10
    share = jnp.asarray(fixed)[places]
    return augment.Augmented(batch.images, batch.labels, partner, share)

  model = ONE_BLOCK
  (batch,) = _batches(0, 1, 8)
  params = draw_params(param_shapes(model))
  logits = jax.jit(model.apply)(params, {}, None, batch.images)[0]["logits"]
  # Three are right, the others second best; what partners are counts not.
  first, second = np.argsort(-np.asarray(logits), -1)[:, :2].T
  labels = np.where(np.arange(8) < 3, first, second).astype(np.int32)
  batch = batch._replace(labels=labels)
  state, metrics = _run(model, 2, [batch], augment=mix)
  targets = np.zeros((8, 10))
  targets[np.arange(8), batch.labels] += fixed
  targets[np.arange(8), (batch.labels + 1) % 10] += 1 - fixed
  targets = 0.9 * targets + 0.1 / 10
  np.testing.assert_allclose(targets.sum(-1), 1)
  expected = -np.mean(np.sum(targets * jax.nn.log_softmax(logits), -1))
  np.testing.assert_allclose(metrics[0]["loss"], expected, rtol=1e-5)
  assert metrics[0]["accuracy"] == pytest.approx(3 / 8)
  norm = float(optax.tree.norm(state.params))
  assert metrics[0]["param_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_every_device_and_micro_batch_draws_anew(sam_rho, monkeypatch):
  seen = set()

  def apply(params, state, key, images, is_training):
    del is_training
    jax.debug.callback(
      lambda data: seen.add(np.asarray(data).tobytes()),
      jax.random.key_data(key),
    )
    w = params["NFNet/~/linear"]["w"]
    return {"logits": jnp.mean(images, (1, 2)) @ w[:3]}, state

  monkeypatch.setattr(models, "folded", lambda model: model)
  monkeypatch.setattr(models, "standardize", lambda model, params: params)
  model = ONE_BLOCK._replace(apply=apply)
  _run(model, 2, _batches(0, 1, 16) * 2, accumulate=2, sam_rho=sam_rho)
  jax.effects_barrier()
  num = 2 * 2 * 2  # Steps, devices, micro-batches.
  assert len(seen) == num * (2 if sam_rho else 1)


def test_a_fresh_state_holds_no_array_twice():
  """Compiled or not: a step donates them all."""
  state = steps.init_state(ONE_BLOCK, optax.identity(), image_size=32, seed=0)
  places = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
  assert len(places) == len(set(places))
