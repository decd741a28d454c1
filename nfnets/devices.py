"""Devices: the mesh, the per-device program over it, and what goes on it.

A program is written for one device and mapped over the mesh, pmap style: the
batch is split, everything else is a copy. (Automatic partitioning would gather
the whole batch on every device for each grouped convolution, openxla/xla
issue 47945.) The axis has one name, `AXIS`, and gradients and sums cross it in
the step's one mean.
"""

import os
import secrets
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets.errors import InputError, UsageError

AXIS = "data"

# How long a new file may take to be seen on another host, over a network.
_SEEN_IN_SECONDS = 60

# In which launchers say how many processes they started. (Slurm's SLURM_NTASKS
# is also there in a job's shell, which is one process.)
_COUNTS = (
  "SLURM_STEP_NUM_TASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_NUM_PROCESSES",
)


def join_pod() -> None:
  """Makes this process part of a multi-host job; call before anything else.

  Address, number of processes and index come from the cluster (TPU pods, Slurm,
  Open MPI 4, Kubernetes) or from the variables JAX_COORDINATOR_ADDRESS
  (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process that
  is alone on its host has all GPUs there; of several each has the one of its
  number, or those in JAX_LOCAL_DEVICE_IDS.

  Raises:
    InputError: when the job cannot be joined.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address is not None and not address.rpartition(":")[2].isdecimal():
    raise InputError(
      f"JAX_COORDINATOR_ADDRESS={address} has no port: write host:port, with a "
      "port that is free on the host of process 0"
    )
  try:
    numbers = [
      int(os.environ[name]) if name in os.environ else None
      for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    ]
    # None: as JAX chooses, which is one for each process; an empty list: all.
    is_open = "JAX_LOCAL_DEVICE_IDS" not in os.environ and _is_alone_on_host()
    jax.distributed.initialize(None, *numbers, [] if is_open else None)
  except (ValueError, RuntimeError) as error:
    raise InputError(
      f"cannot join a multi-host job ({str(error).splitlines()[0]}): start one "
      "process per host under the cluster's launcher, or set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from None


def check_alone() -> None:
  """Raises `UsageError` where a launcher says that it started several.

  Without `join_pod` each of them would be a run of its own.
  """
  found = {name: os.environ.get(name, "") for name in _COUNTS}
  numbers = {k: int(v) for k, v in found.items() if v.isdecimal()}
  name = "TPU_WORKER_HOSTNAMES"
  numbers[name] = len(os.environ.get(name, "").split(","))
  for name, number in numbers.items():
    if number > 1:
      raise UsageError(
        f"{name} tells of {number} processes, and each would train a run of "
        "its own: add --pod to train one together, or, if several are wanted, "
        f"start each by `env -u {name}` with another --workdir"
      )


def _is_alone_on_host() -> bool:
  """Whether the launcher, if it is one, started one process on each host."""
  variables = os.environ
  if "OMPI_COMM_WORLD_LOCAL_SIZE" in variables:
    return variables["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
  if "SLURM_STEP_NUM_NODES" in variables:
    return variables.get("SLURM_NTASKS") == variables["SLURM_STEP_NUM_NODES"]
  return True


def is_first_host() -> bool:
  """Whether this process speaks and writes for all."""
  return jax.process_index() == 0


def wait_for_hosts(what: str) -> None:
  """Returns when all processes have come here; `what` tells places apart."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def on_all_hosts(function: Callable[[], Any]) -> Any:
  """What a function returns; what fails on one host fails on all.

  Else the others would wait for it, and end in an error about the network.

  Raises:
    InputError: on the others.
  """
  error, result = None, None
  try:
    result = function()
  except (InputError, OSError) as e:
    error = e
  if jax.process_count() > 1:
    failed = _processes_where(error is not None)
    if failed and error is None:
      error = InputError(f"process {failed} cannot start: it says why")
  if error is not None:
    raise error
  return result


def _processes_where(is_so: bool) -> str:
  """The numbers of those that call it with True; all must call it."""
  answers = multihost_utils.process_allgather(np.array(is_so))
  return ", ".join(map(str, np.flatnonzero(answers)))


def check_agreement(values: dict[str, Any]) -> None:
  """Raises `InputError`, on all hosts, unless they have the same values.

  Args:
    values: By name, the same names everywhere; compared as they are printed.
  """
  if jax.process_count() == 1:
    return
  mine = [zlib.crc32(repr(value).encode()) for value in values.values()]
  found = multihost_utils.process_allgather(np.array(mine, np.uint32))
  if names := [
    f"{name} (here {value!r})"
    for (name, value), is_other in zip(
      values.items(), (found != found[0]).any(0), strict=True
    )
    if is_other
  ]:
    raise InputError(
      f"the hosts differ in {', '.join(names)}: start the same command, with "
      "the same files, on each"
    )


def check_shared(folder: Path) -> None:
  """Raises `InputError`, on all hosts, unless a folder is the same for all.

  It is created if it is not there.
  """
  if jax.process_count() == 1:
    return
  mine = np.uint32(secrets.randbits(32))
  token = int(multihost_utils.broadcast_one_to_all(mine))
  path = folder / f".seen_by_all_{token:08x}"
  if is_first_host():
    folder.mkdir(parents=True, exist_ok=True)
    path.touch()
  wait_for_hosts("a file to be seen")
  start = time.monotonic()
  while not path.exists() and time.monotonic() - start < _SEEN_IN_SECONDS:
    time.sleep(0.1)
  others = _processes_where(not path.exists())
  if is_first_host():
    path.unlink()
  if others:
    raise InputError(
      f"{folder} is not the same folder on all hosts (process {others} does "
      "not see what process 0 wrote): --workdir must be on a file system that "
      "they share"
    )


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A one-axis mesh over the first `num_devices` devices (None: all)."""
  devices = jax.devices()
  if num_devices is not None:
    if jax.process_count() > 1 and num_devices != len(devices):
      raise InputError(
        f"{num_devices} devices were asked for, but a run on several hosts "
        f"uses all {len(devices)}: leave config.train.num_devices at None"
      )
    if not 1 <= num_devices <= len(devices):
      raise InputError(
        f"{num_devices} devices were asked for, but there are {len(devices)} "
        f"({devices[0].platform}): set config.train.num_devices to 1 to "
        f"{len(devices)}, or to None for all"
      )
    devices = devices[:num_devices]
  numbers = Counter(device.process_index for device in devices)
  if len(set(numbers.values())) > 1:
    raise InputError(
      f"processes with {sorted(numbers.values())} devices: a batch is split "
      "evenly, so each needs as many"
    )
  return Mesh(np.array(devices), (AXIS,))


def make_small_mesh() -> Mesh:
  """Of one device; on several hosts, all of which must take part, of all."""
  return make_mesh(None if jax.process_count() > 1 else 1)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Raises `InputError` unless a batch divides into equal parts."""
  parts = mesh.size * accumulate
  if batch_size < 1 or batch_size % parts:
    what = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    if accumulate > 1:
      what += f" x {accumulate} accumulated micro-batches"
    down = batch_size // parts * parts
    near = f"{down} or {down + parts}" if down > 0 else f"{parts}"
    raise InputError(
      f"a batch of {batch_size} images does not divide over {what}: use a "
      f"multiple of {parts}, such as {near}"
    )


def data_parallel(
  function: Callable[..., Any],
  mesh: Mesh,
  *,
  in_batch: Sequence[bool],
  donate_argnums: Sequence[int] = (),
) -> Callable[..., Any]:
  """Compiles a per-device function over the mesh.

  Args:
    function: Sees its device's part of each batch argument and a copy of every
      other; reduces over `AXIS` itself, so that its outputs are equal on all.
    in_batch: For each positional argument, whether it is split (on its first
      dimension) rather than copied.
    donate_argnums: Arguments whose memory the outputs may take over.
  """
  split, copied = PartitionSpec(AXIS), PartitionSpec()
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(split if batched else copied for batched in in_batch),
    out_specs=copied,
    # The gradient of a copied parameter stays this device's own until the
    # step's explicit mean.
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=tuple(donate_argnums))


def mean(tree: Any) -> Any:
  """Over the devices, inside of `data_parallel`.

  Of one device it is the tree itself; XLA on a CPU would copy all of it.
  """
  return jax.lax.pmean(tree, AXIS) if jax.lax.axis_size(AXIS) > 1 else tree


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this host's part of a batch (NumPy) on its devices."""
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device has a copy of."""
  return NamedSharding(mesh, PartitionSpec())


def create(function: Callable[[], Any], mesh: Mesh) -> Any:
  """Runs a function of nothing so that every device has its own results."""
  return jax.jit(function, out_shardings=replicated(mesh))()


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a tree of arrays to every device of the mesh (fresh buffers)."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      replicated(mesh), np.asarray(x)
    ),
    tree,
  )
