"""What a person sees while a run goes on.

A bar on a terminal; elsewhere (a log file, a notebook, CI) a line now and then.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)
from rich.table import Column

_SECONDS_BETWEEN_LINES = 10.0
_MUCH_WAITING = 0.1  # Share of the time, from which on it is shown.
_WIDE = 100  # Columns of a terminal in which the bar fits beside the numbers.


class Ticker:
  """Says now and then how far an evaluation is; `say` prints a line."""

  def __init__(self, say: Callable[[str], None]):
    self._say = say
    self._last_line = time.monotonic()

  def is_due(self) -> bool:
    """Whether it is time for a line; if so, the next is due later."""
    now = time.monotonic()
    if now - self._last_line <= _SECONDS_BETWEEN_LINES:
      return False
    self._last_line = now
    return True

  def __call__(self, done: int, total: int) -> None:
    if self.is_due():
      self._say(_evaluating(done, total))


def _evaluating(done: int, total: int) -> str:
  return f"evaluating: {done:,} of {total:,} images"


class _Output:
  """Standard output; that a terminal or `tee` went away ends no run.

  What it is at the start: while a bar is shown rich has its own in its place.
  """

  def __init__(self) -> None:
    self._file = sys.stdout

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      self._file.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      self._file.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._file, name)


class TrainProgress:
  """Steps done, the latest numbers, images per second, time left.

  A context manager. `say` prints a line that stays. Of several hosts one is
  shown.
  """

  def __init__(
    self, *, start: int, total: int, batch_size: int, is_shown: bool = True
  ):
    self._console = Console(
      file=_Output(), soft_wrap=True, highlight=False, quiet=not is_shown
    )
    self._batch_size = batch_size
    self._step, self._total = start, total
    self._since: tuple[float, int] | None = None  # Time and step of the clock.
    self._waited = 0.0  # Seconds of it.
    self._ticker = Ticker(self.say)
    whole = lambda: Column(no_wrap=True)  # What must not be cut.
    bar = [BarColumn(24)] if self._console.width >= _WIDE else []
    self._bar = Progress(
      *bar,
      MofNCompleteColumn(table_column=whole()),
      TimeRemainingColumn(compact=True, table_column=whole()),
      TextColumn("left", table_column=whole()),
      TextColumn(
        "{task.fields[text]}", table_column=Column(no_wrap=True, ratio=1)
      ),
      console=self._console,
      disable=not self._console.is_terminal,
      transient=True,
      expand=True,
    )
    self._task = self._bar.add_task(
      "train", total=total, completed=start, text="compiling"
    )

  def __enter__(self) -> "TrainProgress":
    self._bar.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._bar.stop()

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    self._console.print(line, markup=False)

  def restart_clock(self) -> None:
    """Leaves what came before (compiling, evaluating) out of the speed.

    There is no speed before the first call.
    """
    self._since, self._waited = (time.monotonic(), self._step), 0.0

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Around what the next batch is waited for in; much of it is shown."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  def update(self, step: int, values: dict[str, float]) -> None:
    """Shows the numbers of a finished step."""
    self._step = step
    parts = [f"loss {values['loss']:.3f}", f"acc {values['accuracy']:.1%}"]
    left, waited = "", 0.0
    if self._since is not None and step > self._since[1]:
      elapsed = time.monotonic() - self._since[0]
      seconds_per_step = elapsed / (step - self._since[1])
      parts.append(f"{self._batch_size / seconds_per_step:,.0f} img/s")
      waited = self._waited / elapsed
      seconds = round((self._total - step) * seconds_per_step)
      left = f"  left {datetime.timedelta(seconds=seconds)}"
    if "clipped/all" in values:
      parts.append(f"clipped {values['clipped/all']:.0%}")
    if waited > _MUCH_WAITING:
      parts.append(f"waiting for data {waited:.0%}")
    text = "  ".join(parts)
    self._bar.update(self._task, completed=step, text=text)
    if self._bar.disable and self._ticker.is_due():
      self.say(f"step {step}/{self._total}  {text}{left}")

  def evaluating(self, done: int, total: int) -> None:
    """Shows how far an evaluation is."""
    if self._bar.disable:
      self._ticker(done, total)
    else:
      self._bar.update(self._task, text=_evaluating(done, total))
