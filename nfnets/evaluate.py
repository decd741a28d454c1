"""The story of an evaluation: every example exactly once."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfnets import checkpoint, devices, pretrained, recipe, steps
from nfnets.data import batches
from nfnets.data.source import Split
from nfnets.errors import InputError, UsageError


class Result(NamedTuple):
  """Means over a split."""

  loss: float  # Cross-entropy, nats.
  top1: float  # Shares, 0 to 1.
  top5: float
  num_examples: int

  def __str__(self) -> str:
    return (
      f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  loss {self.loss:.4f}  "
      f"({self.num_examples:,} images)"
    )


def over_split(
  eval_step: Any,
  params: Any,
  state: Any,
  split: Split,
  *,
  batch_size: int,
  mesh: Mesh,
) -> Result:
  """Evaluates weights that are on the devices already.

  Args:
    eval_step: From `steps.make_eval_step`.
    params, state: The network's.
    split: What to evaluate on.
    batch_size: Over all devices; rounded up to a multiple of their number.
    mesh: The devices.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size
  total: dict[str, float] = {}
  pending = None
  for batch in batches.eval_batches(
    split,
    batch_size=batch_size,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  ):
    sums = eval_step(params, state, devices.shard_batch(batch, mesh))
    if pending is not None:  # One step ahead of the one that is read.
      _add(total, pending)
    pending = sums
  _add(total, pending)
  count = total.pop("count")
  return Result(
    **{name: value / count for name, value in total.items()},
    num_examples=round(count),
  )


def _add(total: dict[str, float], sums: Any) -> None:
  for name, value in jax.device_get(sums).items():
    total[name] = total.get(name, 0.0) + float(value)


def evaluate(
  config: ConfigDict | None, *, workdir: Path | None, weights: Path | None
) -> dict[str, Result]:
  """Evaluates a run's newest checkpoint, or a weights file, on the test split.

  Args:
    config: None: the one of the workdir.
    workdir: A run; its raw and averaged weights are evaluated.
    weights: Or a weights file, which needs a config.

  Returns:
    Results by kind of weights: `raw` and `ema`, or `weights`.

  Raises:
    InputError: see `recipe.resolve`, `checkpoint` and `pretrained`.
  """
  if (workdir is None) == (weights is None):
    raise UsageError("give either a workdir or weights to evaluate")
  if config is None:
    if workdir is None:
      raise UsageError("weights also need a config to know the data")
    config = recipe.load_config(workdir)
  r = recipe.resolve(config)
  if workdir is not None:
    recipe.changes_since(r, workdir)  # Raises for another model or data set.
  mesh = devices.make_mesh(config.train.num_devices)
  eval_step = steps.make_eval_step(r.model, mesh, normalization=r.normalization)

  def run(params, state):
    return over_split(
      eval_step,
      params,
      state,
      r.source.test,
      batch_size=config.eval.batch_size,
      mesh=mesh,
    )

  if weights is not None:
    params = pretrained.load(weights)
    pretrained.check(params, r.model, str(weights))
    return {"weights": run(devices.replicate(params, mesh), {})}
  found = load_workdir(workdir, r.model, mesh)
  return {
    "raw": run(found["params"], found["state"]),
    "ema": run(found["ema_params"], found["ema_state"]),
  }


def load_workdir(workdir: Path, model: Any, mesh: Mesh) -> dict[str, Any]:
  """Weights of a run's newest checkpoint, on the devices.

  Returns:
    `params`, `state`, and their averages `ema_params`, `ema_state`.

  Raises:
    InputError: when there is no checkpoint or it cannot be read.
  """
  params, state = model.shapes()
  like = {
    "params": params,
    "state": state,
    "ema_params": params,
    "ema_state": state,
  }
  with checkpoint.Checkpoints(workdir) as checkpoints:
    if checkpoints.latest_step() is None:
      raise InputError(
        f"{workdir} has no checkpoint yet: train it with `nfnets train`"
      )
    return checkpoints.restore_weights(like, mesh)
