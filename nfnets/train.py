"""The story of a training run, from a config to weights and curves.

A run is a workdir. Started again with the same one it goes on from its newest
checkpoint, bit for bit as if it had never stopped.
"""

import collections
import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfnets import (
  checkpoint,
  devices,
  evaluate,
  files,
  hosts,
  metrics,
  plots,
  pretrained,
  progress,
  recipe,
  rounds,
  runs,
  sam,
  steps,
  stops,
)
from nfnets.card import Card
from nfnets.data import batches
from nfnets.errors import InputError, StoppedError, is_out_of_memory
from nfnets.patience import Patience

# Steps given to the devices before the oldest must have finished: enough to
# keep them busy while the host prepares the next batch.
_MAX_IN_FLIGHT = 2

_SECONDS_BETWEEN_CURVES = 60.0


class DivergedError(InputError):
  """Loss, gradient or weights are not finite."""


def train(config: ConfigDict, workdir: Path) -> evaluate.Result:
  """Trains to the last epoch; returns the EMA weights' test result.

  Writes to the workdir: `config.json`, `metrics.jsonl`, `tensorboard/`,
  `checkpoints/`, `curves.png`, and at the end `weights.safetensors` (EMA).

  Raises:
    InputError: for a config that cannot run, a workdir of another run, a
      damaged checkpoint, or (`DivergedError`) numbers that are not finite;
      `StoppedError` after Ctrl-C, SIGTERM or SIGHUP.
  """
  recipe.check(config)
  with stops.on_signal() as stop:
    # Once: a folder may have more images, and classes, when the run ends.
    r, folder = hosts.on_all_hosts(lambda: _choose(config, Path(workdir)))
    result = _train(r, folder, stop)
    if r.config.data.grows:
      rounds.report(r, folder)
    return result


def _choose(config: ConfigDict, workdir: Path) -> tuple[recipe.Recipe, Path]:
  """The run, and its folder: the workdir, or that of one of its rounds."""
  recipe.check_apart(config, workdir)
  if config.data.grows:
    config, workdir = rounds.choose(config, workdir)
  elif found := runs.rounds_of(workdir):
    raise InputError(
      f"{workdir} holds {found[-1].name} of images that are added to: "
      "choose another --workdir for a run without rounds"
    )
  return recipe.resolve(config), workdir


def _train(
  r: recipe.Recipe, workdir: Path, stop: stops.Stop
) -> evaluate.Result:
  config = r.config
  mesh = devices.make_mesh(config.train.num_devices)
  batch_size = config.train.batch_size
  devices.check_batch_size(batch_size, mesh, config.train.accumulate or 1)
  hosts.check_agreement(r.identity() | {"--workdir": workdir.name})
  programs = _make_programs(r, mesh)

  is_first_host = hosts.is_first_host()
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"{workdir} is a file: --workdir is a folder")
  hosts.on_all_hosts(
    lambda: is_first_host and files.make_writable(workdir, "--workdir")
  )
  hosts.check_shared(workdir)
  changes = hosts.on_all_hosts(lambda: _check_workdir(r, workdir))
  with contextlib.ExitStack() as stack:
    lock = contextlib.nullcontext()
    if is_first_host:
      lock = checkpoint.locked(workdir)
    hosts.on_all_hosts(lambda: stack.enter_context(lock))
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    )
    # A list of files may be old on a network.
    hosts.check_agreement({"newest checkpoint": checkpoints.latest_step()})
    state, position = _begin(r, checkpoints, programs.init, mesh)
    start = int(state.step)
    patience = None
    if config.train.patience is not None:
      patience = Patience(workdir, config.train.patience, step=start)
    length = "epochs" if config.train.steps is None else "steps"
    limits = {  # Whether each is reached.
      f"config.train.{length}": start >= r.total_steps,
      "config.train.patience": patience is not None and patience.is_exhausted,
    }
    is_over = any(limits.values())
    # How a step is computed is no other run; older versions wrote 1 for None.
    others = [x for x in changes if not x.startswith("train.accumulate: ")]
    if is_over and others:
      reached = " and ".join(key for key, is_met in limits.items() if is_met)
      raise InputError(
        f"{workdir} is complete after {start} steps, and this config differs "
        f"({', '.join(others)}): choose another --workdir for a new run, or "
        f"raise {reached} to train this one for longer"
      )
    # All have read the files of the run, before one moves them.
    hosts.check_agreement(
      {f"whether {key} is reached": is_met for key, is_met in limits.items()}
      | {"best evaluation": patience and patience.best}
    )
    if is_first_host:
      if start:
        changes += _changes_of_draws(r, workdir, mesh)
      recipe.save(r, workdir, num_devices=mesh.size)
      if not is_over:  # No weights but those of a run that is complete.
        if patience is not None:
          patience.go_on()
        _remove_weights(workdir, start)
    bar = stack.enter_context(
      progress.TrainProgress(
        start=start,
        total=r.total_steps,
        batch_size=batch_size,
        is_shown=is_first_host,
      )
    )
    log = stack.enter_context(
      contextlib.closing(
        metrics.Log(workdir, step=start, is_writer=is_first_host)
      )
    )
    bar.say(_headline(r, mesh, workdir, start, is_over=is_over))
    if config.optim.sam_rho:
      num = batch_size // mesh.size // r.micro_batches(mesh.size)
      part = sam.size_of_part(num, config.optim.sam_share)
      bar.say(
        f"SAM: each device climbs by {part} of its {num} images at a time, in "
        "the paper by 6 of 32"
      )
    for change in changes:
      bar.say(f"changed since the last start: {change}")
    num_images = r.source.train.num_examples
    if batch_size > num_images and not is_over:
      bar.say(
        f"a batch of {batch_size:,} is more than the {num_images:,} images "
        "there are: a smaller --config.train.batch_size gives more steps"
      )
    if r.warmup_steps >= r.total_steps and not is_over:
      highest = r.make_schedule()(r.total_steps - 1)
      bar.say(
        f"the warm-up of {r.warmup_steps:,} steps is not over when the run is: "
        f"the learning rate rises to {highest:.3g} instead of "
        f"{r.peak_learning_rate:.3g}, and does not fall"
      )

    data = stack.enter_context(
      batches.ReadAhead(
        batches.TrainBatches(
          r.source.train,
          batch_size=batch_size,
          seed=config.seed,
          position=position,
          host=jax.process_index(),
          num_hosts=jax.process_count(),
          with_partners=r.needs_partners,
        )
      )
    )
    curves = stack.enter_context(_Curves(r, workdir))
    in_flight = _InFlight(r, checkpoints, bar, log)
    result = None
    if not is_over:
      bar.say("compiling the train step; of large networks that takes minutes")
    last = start if is_over else r.total_steps
    for step in range(start + 1, last + 1):
      with bar.waiting_for_data():
        batch = next(data)
      batch = devices.shard_batch(batch, mesh)
      state, values = programs.train_step(state, batch)
      in_flight.add(step, values)
      if step == start + 1:
        in_flight.land_all()
        bar.restart_clock()  # The first step compiles.

      is_last = step == r.total_steps
      is_eval_due = step % r.eval_every_steps == 0 or is_last
      is_stop_due = stop.is_due(step) and not is_last
      is_save_due = (
        step % config.checkpoint_every_steps == 0 or is_last or is_stop_due
      )
      if is_eval_due or is_save_due:
        in_flight.land_all()  # Nothing that diverged is saved.
      if is_eval_due:
        result = _evaluate(r, programs.eval_step, state, mesh, bar, log)
        curves.draw_if_old()
        if patience is not None:
          if patience.add(_as_row(step, "ema", result)) and is_first_host:
            patience.save(*_ema_weights(state, r))
          if patience.is_exhausted and not is_last:
            is_last = is_save_due = True
            bar.say(
              f"no better in {config.train.patience} evaluations: the best is "
              f"that of step {patience.best['step']}"
            )
        bar.restart_clock()
      if is_save_due:
        saved = state
        if r.model.has_own_arrays:  # The same for other ways to compute.
          saved = r.model.unstack(jax.device_get(state))
        checkpoints.save(saved, position=data.position)
      if is_stop_due and not is_last:
        checkpoints.wait()
        raise StoppedError(
          f"stopped by {stop.reason} after step {step} of "
          f"{r.total_steps}; the same command goes on from there"
        )
      if is_last:
        break

    if patience is not None and patience.best is not None:
      result = _as_result(patience.best, r.source.test.num_examples)
    elif result is None:  # The run was complete already, its record too.
      result = _evaluate(r, programs.eval_step, state, mesh, bar, log=None)
    checkpoints.wait()
    if is_first_host and (patience is None or not patience.finish()):
      path = workdir / "weights.safetensors"
      pretrained.save(path, *_ema_weights(state, r))
  return result


class _Programs(NamedTuple):
  """What runs on the devices; each compiles at its first call."""

  init: Callable[[], steps.TrainState]
  train_step: Callable[..., Any]
  eval_step: Callable[..., Any]


def _make_programs(r: recipe.Recipe, mesh: Mesh) -> _Programs:
  config, optimizer = r.config, r.make_optimizer()
  init = functools.partial(
    steps.init_state,
    r.model,
    optimizer,
    image_size=r.train_size,
    seed=config.seed,
  )
  train_step = steps.make_train_step(
    r.model,
    optimizer,
    mesh,
    normalization=r.normalization,
    label_smoothing=config.train.label_smoothing,
    ema_decay=config.optim.ema_decay,
    seed=config.seed,
    augment=r.make_augment(),
    precision=config.train.precision,
    accumulate=r.micro_batches(mesh.size),
    sam_rho=config.optim.sam_rho,
    sam_share=config.optim.sam_share,
    is_frozen=r.is_frozen if config.optim.frozen else None,
  )
  eval_step = steps.make_eval_step(r.model, mesh, normalization=r.normalization)
  return _Programs(init, train_step, eval_step)


def _begin(
  r: recipe.Recipe,
  checkpoints: checkpoint.Checkpoints,
  init: Callable[[], steps.TrainState],
  mesh: Mesh,
) -> tuple[steps.TrainState, int]:
  """The newest state, or a fresh one, and its position in the data."""
  if checkpoints.latest_step() is not None:
    state, position = checkpoints.restore(jax.eval_shape(init), mesh)
  else:
    state, position = devices.create(init, mesh), 0
    if r.config.init_from is not None:
      state = _start_from(r.config.init_from, state, r, mesh)
  if r.model.has_own_arrays:
    state = r.model.stack(jax.device_get(state))
    state = devices.replicate(state, mesh)
  return state, position


def _start_from(
  source: str, state: steps.TrainState, r: recipe.Recipe, mesh: Mesh
) -> steps.TrainState:
  """A fresh state with other weights."""
  load = lambda: pretrained.load_with_card(source)
  params, card = hosts.on_all_hosts(load)
  params = pretrained.transfer(
    params,
    jax.device_get(state.params),
    r.model,
    old_names=None if card is None else card.class_names,
    new_names=r.card.class_names,
    origin=source,
  )
  return state._replace(
    params=devices.replicate(params, mesh),
    ema_params=devices.replicate(params, mesh),
  )


def _ema_weights(state: steps.TrainState, r: recipe.Recipe) -> tuple[Any, Card]:
  """The averaged weights, with the published names, and what they are."""
  params = r.model.unstack(jax.device_get(state.ema_params))
  return params, r.card._replace(step=int(state.step))


def _check_workdir(r: recipe.Recipe, workdir: Path) -> list[str]:
  """What changed since the run was last started; raises for another's."""
  checkpoints = workdir / "checkpoints"
  if checkpoints.is_dir() and any(checkpoints.iterdir()):
    return recipe.changes_since(r, workdir)
  _check_place_of_weights(workdir, r.config.init_from)
  return []


def _changes_of_draws(r: recipe.Recipe, workdir: Path, mesh: Mesh) -> list[str]:
  """What is said of a run that goes on with other devices."""
  old = runs.read_config(workdir).get("derived", {})
  return [
    f"{name}: {old[name]} -> {value} (dropout and the like draw otherwise)"
    for name, value in recipe.drawn_by(r, mesh.size).items()
    if old.get(name, value) != value  # Older versions did not write it.
  ]


def _check_place_of_weights(workdir: Path, init_from: str | None) -> None:
  """Raises for weights that are not the run's, where it puts its own."""
  path = workdir / "weights.safetensors"
  is_start = (
    init_from is not None and path.resolve() == Path(init_from).resolve()
  )
  if path.is_file() and (is_start or pretrained.step_of(path) is None):
    raise InputError(
      f"{path} is not of this run, which puts its own weights there: move it, "
      "or choose another --workdir"
    )


def _remove_weights(workdir: Path, start: int) -> None:
  """Removes `weights.safetensors` of a run that goes on from step `start`.

  Weights of another step, which no checkpoint has (such as the best ones, of a
  run that ended early), are kept as `weights_STEP.safetensors`.
  """
  path = workdir / "weights.safetensors"
  step = pretrained.step_of(path)
  if step not in (None, start):
    path.replace(path.with_name(f"weights_{step}.safetensors"))
  path.unlink(missing_ok=True)


class _Curves:
  """Draws `curves.png` now and then, and however the run ends."""

  def __init__(self, r: recipe.Recipe, workdir: Path):
    self._title = f"{r.model.name} on {r.config.data.source}"
    self._workdir = workdir
    self._drawn = time.monotonic()

  def __enter__(self) -> "_Curves":
    return self

  def __exit__(self, *exception: Any) -> None:
    self._draw()

  def draw_if_old(self) -> None:
    if time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES:
      self._draw()

  def _draw(self) -> None:
    self._drawn = time.monotonic()
    if not hosts.is_first_host():
      return
    path = self._workdir / "curves.png"
    try:
      plots.save_curves(self._workdir, path, title=self._title)
    except Exception as error:  # No picture is worth a run.
      warnings.warn(f"no new picture: {error}", stacklevel=2)


class _InFlight:
  """Steps that were given to the devices and whose numbers were not read yet.

  Adding one waits for the oldest when there are too many, so that the host
  never runs far ahead; each is checked, shown and logged as it lands.
  """

  def __init__(
    self,
    r: recipe.Recipe,
    checkpoints: checkpoint.Checkpoints,
    bar: progress.TrainProgress,
    log: metrics.Log,
  ):
    self._recipe, self._checkpoints = r, checkpoints
    self._bar, self._log = bar, log
    # Compiled: operation by operation it takes 30 ms.
    self._schedule = jax.jit(r.make_schedule())
    self._steps: collections.deque[tuple[int, Any]] = collections.deque()

  def add(self, step: int, values: Any) -> None:
    if self._is_logged(step):
      # Given to the device now: later it would wait for the steps in flight.
      values = values | {"learning_rate": self._schedule(step - 1)}
    self._steps.append((step, values))
    if len(self._steps) > _MAX_IN_FLIGHT:
      self._land_oldest()

  def land_all(self) -> None:
    while self._steps:
      self._land_oldest()

  def _land_oldest(self) -> None:
    step, values = self._steps.popleft()
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not all(
      math.isfinite(values[name])
      for name in ("loss", "grad_norm", "param_norm")
    ):
      self._checkpoints.wait()
      config = self._recipe.config
      raise DivergedError(_advice(step, values, self._checkpoints, config))
    self._bar.update(step, values)
    if self._is_logged(step):
      self._log.write(step, "train", values)

  def _is_logged(self, step: int) -> bool:
    every = self._recipe.config.log_every_steps
    return step % every == 0 or step == self._recipe.total_steps


def _evaluate(
  r: recipe.Recipe,
  eval_step: Any,
  state: steps.TrainState,
  mesh: Mesh,
  bar: progress.TrainProgress,
  log: metrics.Log | None,
) -> evaluate.Result:
  """Raw and averaged weights on the test split; returns the latter's result."""
  weights = {"raw": (state.params, state.state)}
  if r.config.optim.ema_decay:  # Else the averages are the weights.
    weights["EMA"] = (state.ema_params, state.ema_state)
  try:
    results = evaluate.over_split(
      eval_step,
      weights,
      r.source.test,
      batch_size=r.config.eval.batch_size,
      image_size=r.card.image_size,
      mesh=mesh,
      tell=bar.evaluating,
    )
  except RuntimeError as error:
    if not is_out_of_memory(error):
      raise
    raise InputError(
      "an evaluation does not fit into the device's memory beside the run: go "
      "on with a smaller --config.eval.batch_size (now "
      f"{r.config.eval.batch_size})"
    ) from error
  raw = results["raw"]
  ema = results.get("EMA", raw)
  step = int(state.step)
  if log is not None:
    values = _as_row(step, "raw", raw) | _as_row(step, "ema", ema)
    del values["step"]
    log.write(step, "eval", values)
  bar.say(
    f"epoch {step / r.steps_per_epoch:.1f}  step {step}  test: "
    f"raw {raw.top1:.2%}, EMA {ema.top1:.2%}"
  )
  return ema


def _as_row(step: int, kind: str, result: evaluate.Result) -> metrics.Row:
  names = ("loss", "top1", "top5")
  return {"step": step} | {f"{kind}_{n}": getattr(result, n) for n in names}


def _as_result(row: metrics.Row, num_examples: int) -> evaluate.Result:
  names = ("loss", "top1", "top5")
  return evaluate.Result(*(row[f"ema_{n}"] for n in names), num_examples)


def _headline(
  r: recipe.Recipe, mesh: Mesh, workdir: Path, start: int, *, is_over: bool
) -> str:
  c = r.config
  device = mesh.devices.flat[0].device_kind
  what = f"from step {start}" if start else f"from {c.init_from or 'scratch'}"
  if is_over:
    what = "is complete"
  parts = r.micro_batches(mesh.size)
  in_parts = f" in {parts} parts" if parts > 1 else ""
  return (
    f"{r.model.name} ({r.model.count_params() / 1e6:.2f}M parameters) on "
    f"{c.data.source}: {r.source.train.num_examples:,} images of "
    f"{r.train_size} px, {r.total_steps:,} steps of {c.train.batch_size}"
    f"{in_parts} on {mesh.size} x {device}; {workdir} {what}"
  )


def _advice(
  step: int,
  values: dict[str, float],
  checkpoints: checkpoint.Checkpoints,
  config: ConfigDict,
) -> str:
  """What to tell the user of a run that diverged."""
  last = checkpoints.latest_step()
  kept = (
    f"the last good checkpoint is step {last} ({checkpoints.folder(last)}), "
    "and the same --workdir goes on from it"
    if last is not None
    else "there is no checkpoint yet"
  )
  optim = config.optim
  warmup = "epochs" if optim.warmup_steps is None else "steps"
  clipping = "a lower" if optim.agc_clipping else "some"
  return (
    f"step {step}: loss {values['loss']:g}, gradient norm "
    f"{values['grad_norm']:g}, weight norm {values['param_norm']:g} are not "
    f"finite; {kept}; try a lower --config.optim.lr_per_256 (now "
    f"{optim.lr_per_256:g}), {clipping} --config.optim.agc_clipping (now "
    f"{optim.agc_clipping:g}), or more --config.optim.warmup_{warmup} (now "
    f"{optim[f'warmup_{warmup}']:g})"
  )
