"""A worker of the benchmark for our networks; see benchmark_worker.py.

benchmark_jax.py --describe      what JAX runs on, as JSON
benchmark_jax.py JOB             answers requests
"""

import importlib.metadata
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_worker
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from benchmark_worker import Job, Prepared
from jax.sharding import Mesh

from nfnets import augment, devices, losses, models, optim, steps
from nfnets.data.batch import Batch

# Options of `models.make` for contestants that are not the default network.
OPTIONS = {
  "xla": {"convolution": "xla", "is_packed": False},
  "scanned": {"is_scanned": True},
  "remat_blocks": {"remat": "blocks"},
  "remat_stages": {"remat": "stages"},
}

# ImageNet's, in grey levels.
NORMALIZATION = augment.Normalization(
  mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)

PROFILED_CALLS = 3


def describe() -> dict:
  """The default device and the versions."""
  device = jax.devices()[0]
  versions = {
    name: importlib.metadata.version(name)
    for name in ("jax", "jaxlib", "dm-haiku", "optax")
  }
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return {
    "backend": jax.default_backend(),
    "device": device.device_kind,
    "device_bytes": limit,
    "versions": versions,
  }


def _matmul(job: Job) -> Prepared:
  """The product of two large square matrices: what the device can do."""
  num = 2048 if job.device == "cpu" else 8192
  dtype = steps.compute_dtype(job.precision)
  a, b = jax.random.normal(jax.random.key(0), (2, num, num), dtype)
  compiled, facts = _compile(jax.jit(jnp.dot), a, b)
  facts["flops"] = 2 * num**3
  return _prepared({"seconds": lambda: compiled(a, b)}, facts)


def _forward(job: Job) -> Prepared:
  """Logits in evaluation."""
  model = _make_model(job)
  images, _ = _float_images(job)
  params = _init(model)
  if job.contestant == "folded":
    model, params = models.fold(model, jax.device_get(params))
    params = jax.device_put(model.lay_out(params, images.dtype))

  def forward(params, images):
    outputs, _ = model.apply(params, {}, None, images)
    return outputs["logits"]

  compiled, facts = _compile(jax.jit(forward), params, images)
  return _prepared(
    {"seconds": lambda: compiled(params, images)}, facts, compiled
  )


def _gradient(job: Job) -> Prepared:
  """Of the mean cross-entropy, in training, for all parameters."""
  model = _make_model(job)
  params = _init(model)
  images, labels = _float_images(job)

  def loss_fn(params, images, labels, key):
    outputs, _ = model.apply(params, {}, key, images, is_training=True)
    targets = jax.nn.one_hot(labels, model.num_classes)
    return jnp.mean(losses.cross_entropy(outputs["logits"], targets))

  inputs = (params, images, labels, jax.random.key(1))
  compiled, facts = _compile(jax.jit(jax.value_and_grad(loss_fn)), *inputs)
  return _prepared({"seconds": lambda: compiled(*inputs)[0]}, facts, compiled)


def _step(job: Job) -> Prepared:
  """The train step as `nfnets train` runs it, without augmentation."""
  model = _make_model(job)
  mesh = devices.make_mesh(1)
  optimizer, train_step = make_train_step(
    model,
    mesh,
    job.precision,
    accumulate=devices.micro_batches(job.batch, job.size),
  )

  def init():
    state = steps.init_state(model, optimizer, image_size=job.size, seed=0)
    params = _awaken(state.params)
    return state._replace(params=params, ema_params=params)

  state = model.stack(jax.device_get(devices.create(init, mesh)))
  state = devices.replicate(state, mesh)
  images, labels = _grey_images(job)
  share = jnp.ones(job.batch)
  batch = devices.shard_batch(
    Batch(images, labels, share, partner_images=None, partner_labels=labels),
    mesh,
  )
  compiled, facts = _compile(train_step, state, batch)

  def call():
    nonlocal state
    state, metrics = compiled(state, batch)
    return metrics["loss"]

  return _prepared({"seconds": call}, facts, compiled)


def _update(job: Job) -> Prepared:
  """Optimiser and averaged weights alone; beside it, one pass over as much.

  Read at least once are parameters, gradients, momentum and averages, written
  all but the gradients: 28 bytes for each parameter. The pass reads and writes
  14 of each.
  """
  model = _make_model(job)
  optimizer = _make_optimizer(model)
  params = _init(model)
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  grads = jax.tree.map(
    lambda x: 1e-3 * jax.random.normal(next(keys), x.shape), params
  )
  copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
  opt_state, average = jax.jit(optimizer.init)(params), copy(params)

  def update(carry, grads):
    params, opt_state, average, step = carry
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = optim.update_ema(average, params, decay=0.99999, step=step)
    return (params, opt_state, average, step + 1), jnp.copy(step)

  carry = (params, opt_state, average, jnp.zeros((), jnp.int32))
  compiled, facts = _compile(jax.jit(update, donate_argnums=0), carry, grads)
  values = jnp.ones(model.count_params() * 14 // 4)
  scale, _ = _compile(jax.jit(lambda x: 0.999 * x, donate_argnums=0), values)

  def call():
    nonlocal carry
    carry, step = compiled(carry, grads)
    return step

  def pass_over():
    nonlocal values
    values = scale(values)
    return values[:1]

  programs = {"seconds": call, "pass_seconds": pass_over}
  return _prepared(programs, facts, compiled)


TASKS = {
  "matmul": _matmul,
  "forward": _forward,
  "gradient": _gradient,
  "step": _step,
  "update": _update,
}


def _make_model(job: Job) -> models.Model:
  columns = {"depth": job.depth} if job.depth else {}
  return models.make(job.model, **columns, **OPTIONS.get(job.contestant, {}))


def make_train_step(
  model: models.Model, mesh: Mesh, precision: str, *, accumulate: int
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
  """The step, without augmentation, and its optimiser."""
  optimizer = _make_optimizer(model)
  step = steps.make_train_step(
    model,
    optimizer,
    mesh,
    normalization=NORMALIZATION,
    label_smoothing=0.1,
    ema_decay=0.99999,
    seed=0,
    precision=precision,
    accumulate=accumulate,
  )
  return optimizer, step


def _make_optimizer(model: models.Model) -> optax.GradientTransformation:
  return optim.make_optimizer(
    0.1, stage_of=model.stage_of, unit_axes=model.unit_axes
  )


def _init(model: models.Model) -> hk.Params:
  init = lambda key: _awaken(model.init(key, jnp.zeros((1, 64, 64, 3)))[0])
  params = jax.jit(init)(jax.random.key(0))
  return jax.device_put(model.stack(jax.device_get(params)))


def _awaken(params: hk.Params) -> hk.Params:
  """Skip gains as after some training: at zero, gradients would be zeros."""
  return hk.data_structures.map(
    lambda _, name, x: jnp.full_like(x, 0.5) if name == "skip_gain" else x,
    params,
  )


def _float_images(job: Job) -> tuple[jax.Array, jax.Array]:
  """Normalised images and their labels."""
  shape = (job.batch, job.size, job.size, 3)
  dtype = steps.compute_dtype(job.precision)
  images = jax.random.normal(jax.random.key(2), shape, dtype)
  return images, jax.random.randint(jax.random.key(3), shape[:1], 0, 1000)


def _grey_images(job: Job) -> tuple[jax.Array, jax.Array]:
  """Images as they come from the host, and their labels."""
  shape = (job.batch, job.size, job.size, 3)
  images = jax.random.randint(jax.random.key(2), shape, 0, 256, jnp.uint8)
  return images, jax.random.randint(jax.random.key(3), shape[:1], 0, 1000)


def _compile(function: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
  """The compiled program, and the seconds of its two halves."""
  start = time.perf_counter()
  lowered = function.lower(*arguments)
  middle = time.perf_counter()
  compiled = lowered.compile()
  return compiled, {
    "trace_seconds": middle - start,
    "compile_seconds": time.perf_counter() - middle,
  }


def _prepared(
  programs: dict[str, Callable[[], Any]],
  facts: dict[str, float],
  compiled: Any = None,
) -> Prepared:
  device = jax.devices()[0]
  memory = lambda: device.memory_stats()["peak_bytes_in_use"]
  return Prepared(
    programs,
    jax.block_until_ready,
    facts,
    device_memory=memory if device.memory_stats() else None,
    profile=lambda: _find_costliest(programs["seconds"], compiled),
  )


def _find_costliest(call: Callable[[], Any], compiled: Any) -> list[dict]:
  """The ten kernels that take longest, all their runs in one call together."""
  with tempfile.TemporaryDirectory() as folder:
    jax.block_until_ready(call())
    with jax.profiler.trace(folder):
      for _ in range(PROFILED_CALLS):
        jax.block_until_ready(call())
    (path,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
  # What a kernel computes, from the program's own annotations; the names of
  # kernels have no dots.
  sources = dict(
    re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', compiled.as_text())
  )
  of_kernels = {re.sub(r"\W", "_", name): name for name in sources}
  seconds: Counter[str] = Counter()
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        if name := dict(event.stats).get("hlo_op"):
          # A graph of kernels is one operation: each by its own name.
          name = of_kernels.get(event.name, name)
          name = name if name in sources else event.name
          seconds[name] += event.duration_ns * 1e-9 / PROFILED_CALLS
  if not seconds:
    raise ValueError("the profiler recorded no kernels")
  total = sum(seconds.values())
  return [
    {
      "kernel": name,
      "seconds": value,
      "share": value / total,
      "source": sources.get(name, ""),
    }
    for name, value in seconds.most_common(10)
  ]


if __name__ == "__main__":
  benchmark_worker.main(describe, TASKS)
