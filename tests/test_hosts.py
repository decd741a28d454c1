"""Hosts: how the processes of a job start, and fail together."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from conftest import run_processes

from nfnets import hosts
from nfnets.errors import InputError

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
  assert hosts._is_alone_on_host() == is_alone


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
from nfnets import hosts
hosts.join_pod()
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
    hosts, "_processes_where", lambda is_so: told.append(is_so) or ""
  )

  def start():
    if error is not None:
      raise error
    return "started"

  if error is None:
    assert hosts.on_all_hosts(start) == "started"
  else:
    with pytest.raises(type(error), match=str(error)):
      hosts.on_all_hosts(start)
  assert told == [error is not None]


def test_an_address_without_a_port_is_one_clear_line(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0")
  with pytest.raises(InputError, match=r"ADDRESS=host0 has no port: write"):
    hosts.join_pod()


@pytest.mark.parametrize(
  ("body", "codes", "last_words"),
  [
    # One waits for the other in a program.
    (
      """
    if mine == 1:
      time.sleep(1)
      raise InputError("no images")
    hosts.wait_for_hosts("what never comes")""",
      [1, 1],
      ["process 1 failed and says why: this one ends with it", "no images"],
    ),
    # One has left already, and waits for the other at its end.
    (
      """
    if mine == 0:
      time.sleep(4)
      raise InputError("the disk is full")""",
      [1, 1],
      [
        "the disk is full",
        "process 0 failed and says why: this one ends with it",
      ],
    ),
    ("if mine == 0: time.sleep(3)", [0, 0], ["done", "done"]),
  ],
)
def test_a_job_ends_together(body, codes, last_words):
  code = f"""
import os, sys, time
import jax
from nfnets import hosts
from nfnets.errors import InputError
mine = int(os.environ["JAX_PROCESS_ID"])
try:
  with hosts.pod():
    hosts.wait_for_hosts("start")
    {body.strip()}
  print("done", file=sys.stderr)
except InputError as error:
  print(error, file=sys.stderr)
  sys.exit(1)"""
  command = [sys.executable, "-c", code]
  results = run_processes(os.environ, command, command)
  assert [code for code, *_ in results] == codes, results
  for (*_, errors), expected in zip(results, last_words, strict=True):
    assert errors.strip().endswith(expected), results
