"""Hosts: how the processes of a job start, and fail together."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from conftest import run_processes

from nfnets import hosts
from nfnets.errors import InputError, UsageError

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
  assert hosts._has_own_gpus() == is_alone


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


def test_gpus_that_a_launcher_hands_out(monkeypatch):
  """By Slurm's `--gpus-per-task=1` each of several sees its own alone."""
  monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
  monkeypatch.setenv("SLURM_NTASKS", "16")
  for name in _OPEN_MPI:
    monkeypatch.delenv(name, raising=False)
  for seen, is_own in (("3", True), ("0,1", False), ("", False)):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert hosts._has_own_gpus() == is_own


def test_steps_of_a_job_of_slurm_do_not_meet(monkeypatch):
  monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "")  # In the end there is none.
  ports = []
  for job, step in ((7, 0), (7, 1), (8, 0), (2**31, 2**31)):
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_STEP_ID", str(step))
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    hosts._choose_port_in_slurm()
    ports.append(int(os.environ["JAX_COORDINATOR_PORT"]))
  assert len(set(ports)) == 4
  assert all(2**16 - 2**12 <= port < 2**16 for port in ports)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
  hosts._choose_port_in_slurm()
  assert os.environ["JAX_COORDINATOR_PORT"] == "1234"
  monkeypatch.delenv("JAX_COORDINATOR_PORT")
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")  # By mpirun.
  hosts._choose_port_in_slurm()
  assert "JAX_COORDINATOR_PORT" not in os.environ


@pytest.mark.parametrize("num", ["1", "2"])
def test_a_port_in_use_is_one_clear_line(num, monkeypatch):
  """Of which gRPC dies by a segmentation fault."""
  monkeypatch.setattr(hosts, "_be_the_only_one", lambda *_: None)
  with socket.create_server(("127.0.0.1", 0)) as used:
    port = used.getsockname()[1]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", num)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    for bind in (f"127.0.0.1:{port}", f"[::]:{port}", None):
      if bind is None:
        monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS")
      else:
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind)
      with pytest.raises(InputError, match=rf"port {port} of this machine is"):
        hosts.join_pod()


def test_a_cluster_is_not_asked_for_what_is_given(monkeypatch):
  """Kubernetes without its package complains."""
  given = []
  monkeypatch.setattr(hosts.clusters, "ClusterEnv", None)
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *x, **_: given.append(x)
  )
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:9")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
  hosts.join_pod()
  assert given == [("127.0.0.1:9", 2, 1, None)]


def test_a_process_of_a_pod_is_not_alone(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  with pytest.raises(UsageError, match=r"one of 4 processes of a pod: add --p"):
    hosts.job(is_pod=False)


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
    # The same is started once more beside it.
    (
      """
    if mine == 1:
      join = "from nfnets import hosts; hosts.join_pod()"
      again = subprocess.run(
        [sys.executable, "-c", join], capture_output=True, text=True
      )
      assert "runs on this machine already: wait for" in again.stderr, again
    hosts.wait_for_hosts("end")""",
      [0, 0],
      ["done", "done"],
    ),
    ("if mine == 0: time.sleep(3)", [0, 0], ["done", "done"]),
    # One is killed: as by JAX's own end, the job may go on.
    (
      """
    if mine == 1: os.kill(os.getpid(), 9)
    hosts.wait_for_hosts("what never comes")""",
      [134, -9],
      ["goes on from the newest checkpoint", ""],
    ),
  ],
)
def test_a_job_ends_together(body, codes, last_words):
  code = f"""
import os, subprocess, sys, time
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
  one_each = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  results = run_processes(os.environ | one_each, command, command)
  assert [code for code, *_ in results] == codes, results
  for (*_, errors), expected in zip(results, last_words, strict=True):
    assert errors.strip().endswith(expected), results
