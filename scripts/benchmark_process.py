"""The driver's end of a worker: its process, requests, and how it ends."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

from benchmark_worker import Job

from nfnets.main import MALLOC

# No compilation may come from an earlier run; several processes share a GPU, so
# none takes it all; and libraries keep to themselves what they think. Memory is
# set as `nfnets` starts with it; for PyTorch too.
_ENVIRONMENT = {
  "GLIBC_TUNABLES": MALLOC,
  "JAX_ENABLE_COMPILATION_CACHE": "false",
  "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "PYTHONWARNINGS": "ignore",
}


class FailedError(Exception):
  """Something could not be measured; the text is one line."""


class Worker:
  """A process that measures one job; see benchmark_worker.py."""

  def __init__(self, command: list[str], job: Job, **variables: str):
    self._errors = tempfile.TemporaryFile()  # noqa: SIM115
    self._process = subprocess.Popen(
      [*command, json.dumps(job._asdict())],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=_environment() | variables,
      # Ctrl-C reaches the driver alone, which then ends the workers.
      start_new_session=True,
    )
    self.pid = self._process.pid
    self._why_stopped = ""

  @staticmethod
  def describe(command: list[str]) -> dict:
    """What a worker would run on."""
    result = subprocess.run(
      [*command, "--describe"],
      capture_output=True,
      text=True,
      env=_environment(),
      check=False,
    )
    if result.returncode:
      raise FailedError(_last_line(result.stderr) or "it does not start")
    return json.loads(result.stdout.splitlines()[-1])

  def ask(self, do: str, **options) -> dict:
    """Sends a request and waits for its answer.

    Raises:
      FailedError: when the worker could not do it, or is no more.
    """
    try:
      self._process.stdin.write(json.dumps({"do": do} | options) + "\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      raise FailedError(self._last_words())
    answer = json.loads(line)
    if "error" in answer:
      raise FailedError(answer["error"])
    return answer

  def _last_words(self) -> str:
    code = self._process.wait()
    if self._why_stopped:
      return self._why_stopped
    if code == -signal.SIGKILL:
      return "was killed (out of memory?)"
    self._errors.seek(0)
    text = _last_line(self._errors.read().decode(errors="replace"))
    return text or f"ended with exit code {code}"

  def stop(self, why: str) -> None:
    """Ends the process; what it was asked for fails for that reason."""
    self._why_stopped = why
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)

  def close(self) -> None:
    """Ends the process and all that it started."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.pid, stop)
      try:
        self._process.wait(timeout=5)
        break
      except subprocess.TimeoutExpired:
        continue
    with contextlib.suppress(BrokenPipeError):  # Of what it did not read.
      self._process.stdin.close()
    self._process.stdout.close()
    self._errors.close()


def _environment() -> dict[str, str]:
  variables = os.environ | _ENVIRONMENT
  if cache := os.environ.get("XDG_CACHE_HOME"):
    variables.setdefault(
      "TORCHINDUCTOR_CACHE_DIR", str(Path(cache) / "torchinductor")
    )
  return variables


def _last_line(text: str) -> str:
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1][:200] if lines else ""
