"""A worker of the benchmark for timm on PyTorch; see benchmark_worker.py.

    benchmark_timm.py --describe     what PyTorch runs on, as JSON
    benchmark_timm.py JOB            answers requests

Contestants are `timm_nchw` and `timm_channels_last`, by the layout of images
and weights; with `_compiled` the model goes through `torch.compile`.
"""

import importlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import benchmark_worker
import timm_reference
import torch
from benchmark_worker import Job, Prepared

timm = timm_reference.import_timm()
for module in ("timm.optim", "timm.utils"):
  importlib.import_module(module)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def describe() -> dict:
  """The devices that PyTorch sees, and the versions."""
  has_cuda = torch.cuda.is_available()
  return {
    "has_cuda": has_cuda,
    "device": torch.cuda.get_device_name() if has_cuda else "cpu",
    "num_threads": torch.get_num_threads(),
    "versions": {"torch": torch.__version__, "timm": timm.__version__},
  }


def _matmul(job: Job) -> Prepared:
  """The product of two large square matrices: what the device can do."""
  num = 2048 if job.device == "cpu" else 8192
  dtype = getattr(torch, job.precision)
  a, b = torch.randn(2, num, num, device=_device(job)).to(dtype)
  call = lambda: torch.mm(a, b)
  return _prepared(job, call, {"flops": 2 * num**3})


def _forward(job: Job) -> Prepared:
  """Logits in evaluation."""
  model = _make_model(job).eval()
  run = _as_asked(job, model)
  images, _ = _float_images(job)

  def call():
    with torch.inference_mode(), _autocast(job):
      return run(images)

  return _prepared(job, call, _first_call(job, call))


def _gradient(job: Job) -> Prepared:
  """Of the mean cross-entropy, in training, for all parameters."""
  model = _make_model(job).train()
  run = _as_asked(job, model)
  images, labels = _float_images(job)

  def call():
    model.zero_grad(set_to_none=True)
    with _autocast(job):
      logits = run(images)
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    return loss

  return _prepared(job, call, _first_call(job, call))


def _step(job: Job) -> Prepared:
  """A train step: normalise, gradient, AGC, Nesterov momentum, average."""
  model = _make_model(job).train()
  run, update = _as_asked(job, model), _make_update(model)
  images, labels = _grey_images(job)
  mean, std = (
    torch.tensor(x, device=_device(job)).view(1, 3, 1, 1) for x in (MEAN, STD)
  )

  def call():
    model.zero_grad(set_to_none=True)
    with _autocast(job):
      logits = run((images.float() - mean) / std)
    loss = torch.nn.functional.cross_entropy(
      logits.float(), labels, label_smoothing=0.1
    )
    loss.backward()
    update()
    return loss

  return _prepared(job, call, _first_call(job, call))


def _update(job: Job) -> Prepared:
  """Clipping, momentum and averaged weights alone, on random gradients.

  Clipping is in place and computes the same whether or not it changes anything.
  """
  model = _make_model(job).train()
  update = _make_update(model)
  for parameter in model.parameters():
    parameter.grad = 1e-3 * torch.randn_like(parameter)
  return _prepared(job, update, {})


TASKS = {
  "matmul": _matmul,
  "forward": _forward,
  "gradient": _gradient,
  "step": _step,
  "update": _update,
}


def _device(job: Job) -> torch.device:
  return torch.device("cuda" if job.device == "gpu" else job.device)


def _layout(job: Job) -> torch.memory_format:
  if "channels_last" in job.contestant:
    return torch.channels_last
  return torch.contiguous_format


def _autocast(job: Job):
  """Mixed precision as timm trains with it; nothing in float32."""
  if job.precision == "float32":
    return nullcontext()
  return torch.autocast(_device(job).type, getattr(torch, job.precision))


def _make_model(job: Job) -> torch.nn.Module:
  """timm's network, with dropout and stochastic depth as ours."""
  from nfnets import models
  from nfnets import timm as names

  columns = {"depth": job.depth} if job.depth else {}
  ours = models.make(job.model, **columns)
  name = names.name_of(ours)
  if name is None or not timm.is_model(name):
    raise ValueError(f"timm has no network like {job.model}")
  model = timm.create_model(
    name,
    drop_rate=ours.variant.drop_rate,
    drop_path_rate=ours.variant.stochdepth_rate,
    depths=tuple(ours.variant.depth),
  )
  for name, parameter in model.named_parameters():
    if name.endswith("skipinit_gain"):  # At zero, gradients would be zeros.
      torch.nn.init.constant_(parameter, 0.5)
  return model.to(_device(job), memory_format=_layout(job))


def _as_asked(job: Job, model: torch.nn.Module) -> Callable[..., Any]:
  if not job.contestant.endswith("_compiled"):
    return model
  return torch.compile(model)


def _make_update(model: torch.nn.Module) -> Callable[[], None]:
  """AGC without the classifier, Nesterov momentum, averaged weights."""
  groups = timm.optim.param_groups_weight_decay(model, weight_decay=2e-5)
  sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
  average = timm.utils.ModelEmaV3(model, decay=0.99999, exclude_buffers=True)
  # As timm's own training excludes the head: all but the last two.
  clipped = list(model.parameters())[:-2]

  def update():
    timm.utils.dispatch_clip_grad(clipped, 0.01, mode="agc")
    sgd.step()
    average.update(model)

  return update


def _float_images(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
  """Normalised images, in the precision that ours get, and their labels."""
  images = torch.randn(job.batch, 3, job.size, job.size, device=_device(job))
  dtype = getattr(torch, job.precision)
  return images.to(dtype, memory_format=_layout(job)), _labels(job)


def _grey_images(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
  """Images as they come from the host, and their labels."""
  shape = (job.batch, 3, job.size, job.size)
  images = torch.randint(256, shape, dtype=torch.uint8, device=_device(job))
  return images.to(memory_format=_layout(job)), _labels(job)


def _labels(job: Job) -> torch.Tensor:
  return torch.randint(1000, (job.batch,), device=_device(job))


def _first_call(job: Job, call: Callable[[], Any]) -> dict[str, float]:
  """Seconds that the first call takes longer than the second, if compiled."""
  if not job.contestant.endswith("_compiled"):
    return {}
  times = [time.perf_counter()]
  for _ in range(2):
    call()
    if job.device == "gpu":
      torch.cuda.synchronize()
    times.append(time.perf_counter())
  start, middle, end = times
  return {"compile_seconds": (middle - start) - (end - middle)}


def _prepared(
  job: Job, call: Callable[[], Any], facts: dict[str, float]
) -> Prepared:
  if job.device != "gpu":
    return Prepared({"seconds": call}, lambda _: None, facts)

  def call_and_mark():
    call()
    event = torch.cuda.Event()
    event.record()
    return event

  return Prepared(
    {"seconds": call_and_mark},
    lambda event: event.synchronize(),
    facts,
    device_memory=torch.cuda.max_memory_allocated,
    forget_peak=torch.cuda.reset_peak_memory_stats,
    rest=torch.cuda.empty_cache,
  )


if __name__ == "__main__":
  # As XLA does: convolutions are tried out, and float32 may round to TF32.
  torch.backends.cudnn.benchmark = True
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.manual_seed(0)
  benchmark_worker.main(describe, TASKS)
