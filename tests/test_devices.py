"""Devices: what does not divide is refused with numbers that would."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from nfnets import devices
from nfnets.errors import InputError


@pytest.mark.parametrize(
  ("batch_size", "num_devices", "accumulate", "message"),
  [
    (30, 4, 1, r"batch of 30 images .* 4 devices: .* multiple of 4.* 28 or 32"),
    (3, 8, 1, r"multiple of 8, such as 8$"),
    (12, 4, 2, r"4 devices x 2 accumulated .* multiple of 8, such as 8 or 16"),
  ],
)
def test_batch_that_does_not_divide(
  batch_size, num_devices, accumulate, message
):
  mesh = devices.make_mesh(num_devices)
  with pytest.raises(InputError, match=message):
    devices.check_batch_size(batch_size, mesh, accumulate)
  devices.check_batch_size(16, mesh, accumulate)


def test_more_devices_than_there_are():
  with pytest.raises(InputError, match=r"9 devices .* there are 8 \(cpu\)"):
    devices.make_mesh(9)


def test_replicated_copies_can_be_donated_without_losing_the_source():
  mesh = devices.make_mesh(4)
  source = np.arange(3.0, dtype=np.float32)
  copy = devices.replicate(source, mesh)
  double = jax.jit(lambda x: 2 * x, donate_argnums=0)(copy)
  np.testing.assert_array_equal(source, [0, 1, 2])
  np.testing.assert_array_equal(double, [0, 2, 4])


@pytest.mark.parametrize("num_devices", [1, 4])
def test_one_device_has_no_mean_to_take(num_devices):
  mesh = devices.make_mesh(num_devices)
  mean = devices.data_parallel(devices.mean, mesh, in_batch=(True,))
  values = np.arange(8.0, dtype=np.float32)
  parts = values.reshape(num_devices, -1)
  np.testing.assert_allclose(mean(values), parts.mean(axis=0))
  compiled = mean.lower(values).compile().as_text()
  assert ("all-reduce" in compiled) == (num_devices > 1)


def test_batches_are_split_on_their_first_dimension():
  mesh = devices.make_mesh(4)
  batch = devices.shard_batch(np.arange(8), mesh)
  shards = [np.asarray(s.data).tolist() for s in batch.addressable_shards]
  assert shards == [[0, 1], [2, 3], [4, 5], [6, 7]]


_SLURM = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}
_OPEN_MPI = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


@pytest.mark.parametrize(
  ("variables", "is_alone"),
  [
    ({}, True),
    (_SLURM, True),
    (_SLURM | {"SLURM_NTASKS": "16"}, False),
    (_OPEN_MPI, True),
    # Started by mpirun in a job of Slurm.
    (_OPEN_MPI | _SLURM | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
  ],
)
def test_processes_that_are_alone_on_their_host(
  variables, is_alone, monkeypatch
):
  for name in (*_SLURM, *_OPEN_MPI):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert devices._is_alone_on_host() == is_alone


@pytest.mark.parametrize(
  ("more", "visible"), [({}, "all"), ({"JAX_LOCAL_DEVICE_IDS": "3,5"}, "3,5")]
)
def test_one_process_of_slurm_on_a_host_takes_all_gpus(more, visible):
  """JAX alone would have it take the first."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  variables = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": port,
  }
  code = """
import jax
from nfnets import devices
devices.join_pod()
print(jax.process_count(), jax.config._read("jax_cuda_visible_devices"))"""
  result = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | variables | more,
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert result.stdout.split() == ["1", visible], result.stderr


@pytest.mark.parametrize("error", [InputError("no"), OSError("stale"), None])
def test_what_fails_on_one_host_is_told_to_the_others(error, monkeypatch):
  told = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    devices, "_processes_where", lambda is_so: told.append(is_so) or ""
  )

  def start():
    if error is not None:
      raise error
    return "started"

  if error is None:
    assert devices.on_all_hosts(start) == "started"
  else:
    with pytest.raises(type(error), match=str(error)):
      devices.on_all_hosts(start)
  assert told == [error is not None]


def test_an_address_without_a_port_is_one_clear_line(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0")
  with pytest.raises(InputError, match=r"ADDRESS=host0 has no port: write"):
    devices.join_pod()
