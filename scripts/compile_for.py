"""Compiles the train step for accelerators that are not at hand.

XLA's compilers for GPUs and TPUs run on any x86-64 machine with Linux. What
they plan is the memory, and a GPU's kernels with the bytes that these read and
write; how long it takes only the device can tell.
"""

import argparse
import collections
import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import benchmark_jax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets import devices, models, steps
from nfnets.data.batch import Batch
from nfnets.errors import InputError

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}


class Gpu(NamedTuple):
  """What XLA asks of a GPU, from public data sheets."""

  name: str
  capability: tuple[int, int]
  cores: int  # Streaming multiprocessors.
  shared_memory: int  # Bytes of one.
  bandwidth: float  # Bytes per second.
  cache: int  # Bytes.
  clock: float  # GHz.
  memory: int  # GiB.


GPUS = {
  "a100": Gpu(
    "NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 2.04e12, 40 << 20, 1.41, 80
  ),
  "h100": Gpu(
    "NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 3.35e12, 50 << 20, 1.98, 80
  ),
  "h200": Gpu("NVIDIA H200", (9, 0), 132, 233472, 4.8e12, 50 << 20, 1.98, 141),
}

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
# Operations of a program that no kernel is started for.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


class Plan(NamedTuple):
  """What a compiler made of a train step, for one device."""

  compile_seconds: float
  kept_bytes: int  # Arguments: the state and a batch.
  temporary_bytes: int
  kernels: int  # A GPU's.
  moved: collections.Counter  # Bytes by kind of kernel, if no cache has any.
  cycles: int | None  # A TPU's, by its compiler's own estimate.


def compile_step(device: str, options: argparse.Namespace, name: str) -> Plan:
  """Compiles a train step of `options.batch` images on each device."""
  topology = _topology(device)
  if options.num_devices > len(topology.devices):
    raise InputError(
      f"--num_devices={options.num_devices}: {len(topology.devices)} are "
      f"compiled for at most with --device={device}"
    )
  mesh = Mesh(np.array(topology.devices[: options.num_devices]), devices.AXIS)
  # Whatever chooses by the platform sees the one that is compiled for.
  platform = "gpu" if device in GPUS else "tpu"
  with mock.patch.object(jax, "default_backend", lambda: platform):
    function, arguments = _train_step(mesh, options, name)
    lowered = function.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  moved, kernels = _count(text)
  cycles = None
  if platform == "tpu" and not options.scan:  # It counts one turn of a loop.
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
  return Plan(
    seconds,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    kernels,
    moved,
    cycles,
  )


def _train_step(
  mesh: Mesh, options: argparse.Namespace, name: str
) -> tuple[Any, tuple[Any, Any]]:
  """The function, and the shapes of a state and a batch."""
  model = models.make(
    name,
    remat=options.remat,
    is_scanned=options.scan,
    is_packed=options.packed,
  )
  size = options.size or model.variant.train_size
  optimizer, train_step = benchmark_jax.make_train_step(
    model, mesh, options.precision, accumulate=options.accumulate
  )
  state = jax.eval_shape(
    lambda: steps.init_state(model, optimizer, image_size=size, seed=0)
  )
  # Zeros that take no memory: only their shapes count.
  zeros = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)
  state = model.stack(jax.tree.map(zeros, state))
  num = options.batch * mesh.size
  labels = zeros(jax.ShapeDtypeStruct((num,), np.int32))
  images = zeros(jax.ShapeDtypeStruct((num, size, size, 3), np.uint8))
  batch = Batch(
    images,
    labels,
    labels.astype(jnp.float32),
    partner_images=None,
    partner_labels=labels,
  )
  shaped = lambda tree, *axes: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    ),
    tree,
  )
  return train_step, (shaped(state), shaped(batch, devices.AXIS))


def _topology(device: str) -> Any:
  if device in TPUS:
    with _silent():  # It complains that this is no TPU.
      return topologies.get_topology_desc(
        platform="tpu", topology_name=TPUS[device]
      )
  gpu = GPUS[device]
  major, minor = gpu.capability
  config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_memory}
      shared_memory_per_block_optin: {gpu.shared_memory - 1024}
      threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.cache}
      clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory << 30}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{gpu.name}"
  """
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="1x1x1",
    topology="1x1x1",
    target_config=config,
  )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Drops what a library writes to the process's own stderr."""
  kept = os.dup(2)
  with open(os.devnull, "w") as nothing:
    os.dup2(nothing.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


_OPERATION = re.compile(
  r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)"
)


def _count(text: str) -> tuple[collections.Counter, int]:
  """Of a program for a GPU: bytes by kind of kernel, and how many these are."""
  bodies = {
    name: body.splitlines()
    for name, body in re.findall(
      r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.M | re.S
    )
  }
  entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.M)[1]
  return _count_in(bodies, entry)


def _count_in(
  bodies: dict[str, list[str]], name: str
) -> tuple[collections.Counter, int]:
  """The same of one part of a program, with the loops in it.

  What a loop updates in place counts as a whole at every turn.
  """
  shapes: dict[str, int] = {}
  moved: collections.Counter = collections.Counter()
  kernels = 0
  for line in bodies[name]:
    if not (match := _OPERATION.match(line)):
      continue
    result, shape, operation, rest = match.groups()
    shapes[result] = _size(shape)
    if operation in _FREE:
      continue
    if operation == "while":
      turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
      turns = int(turns[1]) if turns else 1
      body = re.search(r"body=%([\w.\-]+)", line)[1]
      moved_by_one, kernels_of_one = _count_in(bodies, body)
      for kind, size in moved_by_one.items():
        moved[kind] += turns * size
      kernels += turns * kernels_of_one
      continue
    operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    sizes = [shapes.get(operand, 0) for operand in operands]
    if called := re.search(r"calls=%([\w.\-]+)", line):
      cuts = _cuts(bodies[called[1]])
      sizes = [cuts.get(i, size) for i, size in enumerate(sizes)]
    moved[re.sub(r"[.\d]+$", "", result)] += shapes[result] + sum(sizes)
    kernels += 1
  return moved, kernels


def _cuts(body: list[str]) -> dict[int, int]:
  """Bytes that a kernel reads of those operands that it takes cuts of alone."""
  found: dict[int, int] = {}
  numbers: dict[str, int] = {}
  whole: set[int] = set()
  for line in body:
    if not (match := _OPERATION.match(line)):
      continue
    result, shape, operation, rest = match.groups()
    if operation == "parameter":
      numbers[result] = int(rest.split(")")[0])
      continue
    for operand in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]):
      if operand in numbers and operation in ("slice", "dynamic-slice"):
        number = numbers[operand]
        found[number] = found.get(number, 0) + _size(shape)
      elif operand in numbers:
        whole.add(numbers[operand])
  return {i: size for i, size in found.items() if i not in whole}


def _size(shape: str) -> int:
  """Bytes of `f32[2,3]{1,0}` or of a tuple of such."""
  return sum(
    _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  )


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="scripts/compile_for.sh",
    description="Compiles the train step (without augmentation) for "
    "accelerators that are not at hand and prints what the compiler plans: "
    "memory; for GPUs kernels and the bytes that they move; for TPUs, which "
    "takes minutes, its own estimate of cycles.",
  )
  words = lambda text: text.split(",")

  def positive(text: str) -> int:
    if (number := int(text)) < 1:
      raise ValueError
    return number

  parser.add_argument(
    "--device", type=words, default=["h100"], help=", ".join([*GPUS, *TPUS])
  )
  parser.add_argument("--model", type=words, default=["nfnet_f0"])
  number = {"type": positive, "metavar": "N"}
  parser.add_argument("--batch", default=32, help="on each device", **number)
  parser.add_argument("--size", help="pixels; default: the model's", **number)
  parser.add_argument("--num_devices", default=1, help="TPUs: to 4", **number)
  parser.add_argument("--accumulate", default=1, help="parts of it", **number)
  parser.add_argument("--precision", default="bfloat16")
  parser.add_argument("--remat", default="none", help="none, blocks, stages")
  parser.add_argument(
    "--scan",
    action="store_true",
    help="blocks as a loop, whose cycles on a TPU are not known",
  )
  parser.add_argument(
    "--packed",
    action=argparse.BooleanOptionalAction,
    help="parameters in few arrays; default: on GPUs",
  )
  parser.add_argument(
    "--kinds", type=int, default=0, help="list so many kinds of kernels"
  )
  options = parser.parse_args()
  if options.scan and options.packed:
    parser.error("--packed: with --scan equal blocks' parameters are stacked")
  if options.batch % options.accumulate:
    parser.error(
      f"--accumulate: {options.batch} images do not divide into "
      f"{options.accumulate} equal parts"
    )
  if unknown := set(options.device) - {*GPUS, *TPUS}:
    parser.error(
      f"--device: {', '.join(sorted(unknown))} is none of "
      f"{', '.join([*GPUS, *TPUS])}"
    )
  return options


def main() -> None:
  options = _parse()
  if spec := importlib.util.find_spec("nvidia"):
    (folder,) = spec.submodule_search_locations
    # Timing alternatives takes a GPU.
    os.environ["XLA_FLAGS"] = (
      f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 "
      f"--xla_gpu_cuda_data_dir={Path(folder) / 'cuda_nvcc'}"
    )
  print(
    "| device | network | images | GB kept | GB temporary | kernels | "
    "GB moved | million cycles | compiled in |\n| --- " + "| --- " * 8 + "|"
  )
  for device in options.device:
    for name in options.model:
      try:
        plan = compile_step(device, options, name)
      except InputError as error:
        raise SystemExit(f"error: {error}") from None
      moved = sum(plan.moved.values()) / 1e9
      of_gpu = f"{plan.kernels} | {moved:.2f} | "
      of_tpu = f"| | {plan.cycles / 1e6:.1f}" if plan.cycles else "| | "
      print(
        f"| {device} | {name} | {options.batch} | {plan.kept_bytes / 1e9:.2f} "
        f"| {plan.temporary_bytes / 1e9:.2f} "
        f"| {of_gpu if device in GPUS else of_tpu} "
        f"| {plan.compile_seconds:.0f} s |",
        flush=True,
      )
      kinds = plan.moved.most_common(options.kinds if device in GPUS else 0)
      for kind, size in kinds:
        print(f"  {size / 1e9:6.2f} GB  {kind}")


if __name__ == "__main__":
  main()
