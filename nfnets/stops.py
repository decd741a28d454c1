"""Ending a run early, with all saved: by signals, on one host or several."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stop:
  """Whether something asked the run to end."""

  reason: str | None = None

  def is_due(self, step: int) -> bool:
    """The answer after a step; on several hosts all get the same one."""
    # On several hosts JAX's own listener spreads one's SIGTERM to all.
    is_pod = jax.process_count() > 1
    if is_pod and multihost_utils.reached_preemption_sync_point(step):
      self.reason = "preemption"
    return self.reason is not None


@contextlib.contextmanager
def on_signal() -> Iterator[Stop]:
  """Ctrl-C, SIGTERM and SIGHUP end the run after its step.

  A second Ctrl-C does at once. SIGHUP, which comes when a terminal goes away,
  stays ignored where it was when the process began (`nohup`).
  """
  stop = Stop()

  def request(number, frame):
    del frame
    stop.reason = signal.Signals(number).name
    _leave_what_is_gone()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Without effect where it comes in the middle of another line (Python
    # refuses that), or where the output's disk is full.
    with contextlib.suppress(RuntimeError, OSError):
      print(
        "stopping after this step (the first is compiled before it); Ctrl-C "
        "again stops at once",
        flush=True,
      )

  is_main = threading.current_thread() is threading.main_thread()
  numbers = [signal.SIGINT, signal.SIGTERM]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    numbers.append(signal.SIGHUP)
  if not is_main or jax.process_count() > 1:  # The signals are not ours.
    numbers = []
  old = {number: signal.signal(number, request) for number in numbers}
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _leave_what_is_gone() -> None:
  """Says no more to a terminal or reader (`tee`) that ended: it is an error."""
  for output in (1, 2):
    poll = select.poll()
    poll.register(output, 0)  # Of errors it tells nevertheless.
    if any(event for _, event in poll.poll(0)):
      os.dup2(os.open(os.devnull, os.O_WRONLY), output)
