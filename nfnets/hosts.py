"""Hosts: the processes of one job, how they start, agree, and end together.

(Usually one for each host, and so they are called; of several each has its
part of the host's devices.)
"""

import atexit
import contextlib
import errno
import fcntl
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # Neither has a public name.
from jax.experimental import multihost_utils

from nfnets.errors import InputError, StoppedError, UsageError

# How long a new file may take to be seen on another host, over a network.
_SEEN_IN_SECONDS = 60

# Where a process that fails leaves its number for the others of its job, how
# often these look, and how long one that fails as well has to say why.
_FAILED = "nfnets/failed"
_LOOK_EVERY_SECONDS = 1.0
_SECONDS_TO_SAY_WHY = 3.0

# How a shell tells of a process that was aborted, as JAX aborts those whose job
# has lost another: such a job may go on where it was.
_ABORTED = 128 + signal.SIGABRT

# How errors of XLA begin that another process or the network may have caused.
_BROKEN = re.compile(
  "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL"
  "|UNAVAILABLE|UNKNOWN): "
)

_SECONDS_TO_JOIN = 300  # JAX's own.

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
    InputError: when the job cannot be joined, or is joined already by another
      process with this one's number, for which JAX would end all of the job.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address is not None and not address.rpartition(":")[2].isdecimal():
    raise InputError(
      f"JAX_COORDINATOR_ADDRESS={address} has no port: write host:port, with a "
      "port that is free on the host of process 0"
    )
  _choose_port_in_slurm()
  try:
    numbers = [
      int(os.environ[name]) if name in os.environ else None
      for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    ]
    # None: as JAX chooses, which is one for each process; an empty list: all.
    is_open = "JAX_LOCAL_DEVICE_IDS" not in os.environ and _has_own_gpus()
    gpus = [] if is_open else None
    num, index = numbers
    if None in (address, num, index):
      detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
      address, num, index, _ = detect(
        address, num, index, gpus, None, _SECONDS_TO_JOIN
      )
    if None not in (address, num, index):
      _be_the_only_one(address, index)
      if index == 0:
        _check_port(address)
        if num > 1:
          text = f"waiting for the {num} processes of this job at {address}"
          print(f"nfnets: {text}", file=sys.stderr, flush=True)
    jax.distributed.initialize(
      address, num, index, gpus, initialization_timeout=_SECONDS_TO_JOIN
    )
  except InputError:
    raise
  except (ValueError, RuntimeError) as error:
    raise InputError(
      f"cannot join a multi-host job ({str(error).splitlines()[0]}): start one "
      "process per host under the cluster's launcher, or set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from None


def _choose_port_in_slurm() -> None:
  """Another for each step of a job: JAX has one for all, which would meet.

  (Not under mpirun, whose processes on the first host are in no step.)
  """
  job, step = (os.environ.get(f"SLURM_{x}_ID", "") for x in ("JOB", "STEP"))
  is_started_by_slurm = "OMPI_COMM_WORLD_SIZE" not in os.environ
  if is_started_by_slurm and job.isdecimal() and step.isdecimal():
    port = 2**16 - 2**12 + (int(job) + 97 * int(step)) % 2**12
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(port))


def _be_the_only_one(address: str, index: int) -> None:
  """Raises `InputError` where this number of a job runs on this machine.

  What tells is a lock, which the system frees at the end of a process, on an
  empty file that stays; where there can be none, nothing does.
  """
  place = zlib.crc32(f"{socket.gethostname()} {address}".encode())
  name = f"nfnets-{os.getuid()}-{place:08x}-{index}.lock"
  try:
    lock = os.open(Path(tempfile.gettempdir()) / name, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise InputError(
      f"process {index} of a job at {address} runs on this machine already: "
      "wait for its end, or give this job a port of its own "
      "(JAX_COORDINATOR_ADDRESS, or under a launcher JAX_COORDINATOR_PORT)"
    ) from None
  except OSError:
    pass


def _check_port(address: str) -> None:
  """Raises `InputError` for a port in use, of which gRPC would die."""
  everywhere = "[::]:" + address.rpartition(":")[2]
  bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", everywhere)
  host, _, port = bind.rpartition(":")
  is_all = host == "[::]" and socket.has_dualstack_ipv6()  # As gRPC takes it.
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    socket.create_server(
      (host.strip("[]"), int(port)), family=family, dualstack_ipv6=is_all
    ).close()
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      raise InputError(
        f"port {port} of this machine is in use: choose one that is free "
        "(JAX_COORDINATOR_ADDRESS, or under a launcher JAX_COORDINATOR_PORT)"
      ) from None


def job(*, is_pod: bool) -> contextlib.AbstractContextManager[None]:
  """`pod` for one of several processes, `check_alone` for one alone."""
  if is_pod:
    return pod()
  check_alone()
  return contextlib.nullcontext()


@contextlib.contextmanager
def pod() -> Iterator[None]:
  """`join_pod`; from the context on, a process that fails ends all of the job.

  Else the others would wait for it in a program of theirs, it for them at its
  end, and all would be aborted after minutes.
  """
  join_pod()
  state = distributed.global_state
  if state.num_processes == 1:
    yield
    return
  client = state.client
  # Who has the store goes last: without it JAX aborts the others.
  is_last = state.service is not None
  seconds = _SECONDS_TO_SAY_WHY * (2 if is_last else 1)
  fails_itself = threading.Event()

  def end_with_others() -> None:
    while (who := _who_failed(client)) is None:
      if fails_itself.wait(_LOOK_EVERY_SECONDS):
        return
    time.sleep(seconds)
    with contextlib.suppress(OSError):
      text = f"process {who} failed and says why: this one ends with it"
      print(f"nfnets: {text}", file=sys.stderr)
    _leave(1)

  # It looks to the end of the process: the others may be done before.
  watch = threading.Thread(target=end_with_others, daemon=True)
  watch.start()
  try:
    yield
  except StoppedError:  # As on all others.
    raise
  except Exception as error:
    is_known = isinstance(error, InputError | OSError)
    if not is_known and _who_failed(client) is not None:
      watch.join()  # What failed here is what the other should have sent.
    is_broken = bool(_BROKEN.match(str(error)))
    fails_itself.set()
    with contextlib.suppress(RuntimeError):  # Another failed before.
      client.key_value_set(_FAILED, str(state.process_id))
    # Before JAX, which would wait for the others.
    code = 2 if isinstance(error, UsageError) else 1
    if is_broken:
      code = _ABORTED
    atexit.register(_leave, code, after=seconds if is_last else 0.0)
    if is_broken:
      traceback.print_exc()
      raise InputError(
        "what the processes of this job compute together broke off "
        f"({str(error).splitlines()[0]}): another may have died, or the "
        "network; the same command goes on from the newest checkpoint"
      ) from error
    raise


def _who_failed(client: Any) -> str | None:
  """The number of a process that said so."""
  with contextlib.suppress(RuntimeError):  # Nobody did.
    return client.key_value_try_get(_FAILED)
  return None


def _leave(code: int, *, after: float = 0.0) -> None:
  """Ends this process at once, after so many seconds."""
  time.sleep(after)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):  # Nobody reads it any more.
      stream.flush()
  os._exit(code)


def check_alone() -> None:
  """Raises `UsageError` where a launcher says that it started several.

  Without `join_pod` each of them would work by itself, and those of a TPU pod
  wait for each other.
  """
  found = {name: os.environ.get(name, "") for name in _COUNTS}
  numbers = {k: int(v) for k, v in found.items() if v.isdecimal()}
  name = "TPU_WORKER_HOSTNAMES"
  numbers[name] = len(os.environ.get(name, "").split(","))
  for name, number in numbers.items():
    if number > 1:
      raise UsageError(
        f"{name} tells of {number} processes, and each would do all by itself: "
        "add --pod to work together, or, if that is what is wanted, start "
        f"each by `env -u {name}`, and runs with a --workdir of their own"
      )
  if (number := jax.process_count()) > 1:
    raise UsageError(
      f"this is one of {number} processes of a pod: add --pod, and start the "
      "same command on each"
    )


def _has_own_gpus() -> bool:
  """Whether a process takes all the GPUs that it sees.

  It does where the launcher, if it is one, started one process on each host,
  and where it has shown it one alone (Slurm's `--gpus-per-task=1`).
  """
  variables = os.environ
  seen = variables.get("CUDA_VISIBLE_DEVICES")
  if seen and "," not in seen:
    return True
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
  """Raises `InputError`, on all hosts, unless a folder is the same for all."""
  if jax.process_count() == 1:
    return
  mine = np.uint32(secrets.randbits(32))
  token = int(multihost_utils.broadcast_one_to_all(mine))
  path = folder / f".seen_by_all_{token:08x}"
  if is_first_host():
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
