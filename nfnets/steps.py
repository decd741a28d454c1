"""The train step and the evaluation step: one device's program, mapped.

Read `make_train_step` from top to bottom: it is the whole of training. The
other devices appear in one line, the mean.

Shapes: N images per device, K classes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nfnets import agc, devices, losses, models, optim, sam
from nfnets.augment import Augment, Augmented, Normalization, make_augment
from nfnets.data.batch import Batch
from nfnets.errors import unknown
from nfnets.models import Model

Metrics = dict[str, jax.Array]

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class TrainState(NamedTuple):
  """Everything that a step changes; float32, but for int32 counts."""

  step: jax.Array  # int32, updates made so far.
  params: hk.Params
  state: hk.State  # Haiku's state, empty for normalizer-free networks.
  opt_state: Any
  ema_params: hk.Params
  ema_state: hk.State


def compute_dtype(precision: str) -> Any:
  """The dtype of activations for `float32` or `bfloat16`."""
  if precision not in PRECISIONS:
    raise unknown("precision", precision, PRECISIONS)
  return PRECISIONS[precision]


def init_state(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  image_size: int,
  seed: int,
) -> TrainState:
  """A fresh state; a pure function, to be compiled or only shaped.

  `devices.create` makes it on the devices, `jax.eval_shape` tells its shapes.
  """
  images = jnp.zeros((1, image_size, image_size, 3))
  params, state = model.init(jax.random.key(seed), images)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    state=state,
    opt_state=optimizer.init(params),
    ema_params=jax.tree.map(jnp.copy, params),  # Both are donated.
    ema_state=state,
  )


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  normalization: Normalization,
  label_smoothing: float,
  ema_decay: float,
  seed: int,
  augment: Augment | None = None,
  precision: str = "float32",
  accumulate: int = 1,
  sam_rho: float = 0.0,
  sam_share: float = 0.2,
  is_frozen: Callable[[str], bool] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Compiles `(state, batch) -> (state, metrics)`; the old state is consumed.

  (Its arrays are donated, so that none may be in it twice: averages that begin
  as the parameters are copies of them.)

  Args:
    model, optimizer, mesh: What to train, how, and where.
    normalization: Of the images, inside the step.
    label_smoothing: Share of the target spread over all classes.
    ema_decay: Of the averaged weights, after its warm-up.
    seed: Of dropout, stochastic depth and augmentation; drawn anew each step.
    augment: From `augment.make_augment`; None: images and labels as they are.
    precision: Of activations: `float32` or `bfloat16`.
    accumulate: Micro-batches per step; gradients are averaged over them first,
      so clipping happens once, on the mean.
    sam_rho: Radius of sharpness-aware minimisation (`nfnets.sam`); 0: none.
      Each device climbs by its own images, and by each micro-batch anew.
    sam_share: Of the images, for the climb.
    is_frozen: Modules that no gradient goes to; the optimiser must leave them
      alone too.

  Returns:
    The step. Metrics are scalars: loss and accuracy (with SAM, after the
    climb), grad_norm (before clipping), param_norm (after the update), and for
    AGC `clipped/<part>`, `max_ratio/<part>`.
  """
  dtype = compute_dtype(precision)
  augment = augment or make_augment()
  # Micro-batches share their weights, unless each climbs to its own.
  is_shared = accumulate > 1 and not sam_rho
  network = models.folded(model) if is_shared else model

  def loss_fn(params, state, batch: Augmented, key):
    if is_frozen is not None:
      params = hk.data_structures.map(
        lambda module, _, value: (
          jax.lax.stop_gradient(value) if is_frozen(module) else value
        ),
        params,
      )
    images = normalization(batch.images, dtype)
    outputs, state = network.apply(params, state, key, images, is_training=True)
    logits = outputs["logits"]  # [N, K]
    own, partner = (
      jax.nn.one_hot(labels, model.num_classes)
      for labels in (batch.labels, batch.partner_labels)
    )
    share = batch.share[:, None]
    targets = share * own + (1 - share) * partner
    targets = losses.smooth(targets, label_smoothing)
    loss = jnp.mean(losses.cross_entropy(logits, targets))
    accuracy = jnp.mean(losses.is_in_top(logits, batch.labels, 1))
    return loss, (state, {"loss": loss, "accuracy": accuracy})

  def grad_fn(params, state, batch: Augmented, key):
    """-> gradient, (state, metrics): of the loss, or of the worst nearby."""
    gradient = jax.grad(loss_fn, has_aux=True)
    if sam_rho:
      ascent_key, key = jax.random.split(key)
      part = sam.part_of(batch, sam_share)
      uphill, _ = gradient(params, state, part, ascent_key)
      params = sam.ascend(params, uphill, rho=sam_rho)
    return gradient(params, state, batch, key)

  def mean_gradient(train_state: TrainState, batch: Augmented, key):
    """This device's gradient: the mean over its micro-batches."""
    params = train_state.params
    if accumulate == 1:
      return grad_fn(params, train_state.state, batch, key)
    if is_shared:  # Standardised once a step, in both directions.
      standardize = functools.partial(models.standardize, model)
      params, pull_back = jax.vjp(standardize, params)

    def micro_step(carry, inputs):
      state, sums = carry
      micro_batch, micro_key = inputs
      grads, (state, metrics) = grad_fn(params, state, micro_batch, micro_key)
      return (state, jax.tree.map(jnp.add, sums, (grads, metrics))), None

    micro_batches = jax.tree.map(
      lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch
    )
    zero = jnp.zeros(())
    sums = (
      jax.tree.map(jnp.zeros_like, params),
      {"loss": zero, "accuracy": zero},
    )
    (state, sums), _ = jax.lax.scan(
      micro_step,
      (train_state.state, sums),
      (micro_batches, jax.random.split(key, accumulate)),
    )
    grads, metrics = jax.tree.map(lambda x: x / accumulate, sums)
    if is_shared:
      (grads,) = pull_back(grads)
    return grads, (state, metrics)

  def train_step(train_state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), train_state.step)
    augment_key, model_key = jax.random.split(key)
    device, num = jax.lax.axis_index(devices.AXIS), len(batch.labels)
    augmented = augment(augment_key, device * num + jnp.arange(num), batch)

    model_key = jax.random.fold_in(model_key, device)
    results = mean_gradient(train_state, augmented, model_key)
    grads, (state, metrics) = devices.mean(results)

    updates, opt_state = optimizer.update(
      grads, train_state.opt_state, train_state.params
    )
    params = optax.apply_updates(train_state.params, updates)

    # From what clipping computes too, which XLA then does once.
    metrics["grad_norm"] = optax.tree.norm(
      agc.unitwise_norms(grads, model.unit_axes(grads))
    )
    metrics["param_norm"] = optax.tree.norm(params)
    clipping = agc.find_state(opt_state)
    for part, values in clipping.statistics.items() if clipping else ():
      metrics[f"clipped/{part}"] = values.clipped
      metrics[f"max_ratio/{part}"] = values.max_ratio

    def average(old, new):
      return optim.update_ema(old, new, decay=ema_decay, step=train_state.step)

    new_state = TrainState(
      step=train_state.step + 1,
      params=params,
      state=state,
      opt_state=opt_state,
      ema_params=average(train_state.ema_params, params),
      ema_state=average(train_state.ema_state, state),
    )
    return new_state, metrics

  return devices.data_parallel(
    train_step, mesh, in_batch=(False, True), donate_argnums=(0,)
  )


def make_eval_step(
  model: Model,
  mesh: Mesh,
  *,
  normalization: Normalization,
  with_confusion: bool = False,
) -> Callable[[hk.Params, hk.State, Batch], Metrics]:
  """Compiles `(params, state, batch) -> sums over the unmasked examples`.

  Always in float32, as published. The sums are float32 scalars: loss (nats, no
  smoothing), top1, top5, count; and on request confusion [K, K], how many
  examples of each class (row) were taken for each (column).
  """

  def eval_step(params, state, batch: Batch):
    images = normalization(batch.images, jnp.float32)
    outputs, _ = model.apply(params, state, None, images)
    logits = outputs["logits"]
    targets = jax.nn.one_hot(batch.labels, model.num_classes)
    each = {
      "loss": losses.cross_entropy(logits, targets),
      "top1": losses.is_in_top(logits, batch.labels, 1),
      "top5": losses.is_in_top(logits, batch.labels, 5),
      "count": jnp.ones_like(batch.mask),
    }
    # where, not *: a padded example may be anything, even not finite.
    sums = {
      name: jnp.sum(jnp.where(batch.mask > 0, values, 0))
      for name, values in each.items()
    }
    if with_confusion:
      counts = jnp.zeros((model.num_classes, model.num_classes))
      predicted = jnp.argmax(logits, axis=-1)
      sums["confusion"] = counts.at[batch.labels, predicted].add(batch.mask)
    return jax.lax.psum(sums, devices.AXIS)

  return devices.data_parallel(eval_step, mesh, in_batch=(False, False, True))
