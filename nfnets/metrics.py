"""Numbers over time: JSON lines and TensorBoard.

One file, `metrics.jsonl`, is the record; TensorBoard and `curves.png` are made
from the same rows. A row is `{"step": int, "kind": "train" | "eval", name:
number ...}`; evaluation names start with `raw_` (the trained weights) or `ema_`
(their moving average).
"""

import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from nfnets.errors import InputError
from nfnets.files import unfinished

Row = dict[str, Any]


class Log:
  """Appends rows to `metrics.jsonl` and to TensorBoard event files.

  Opening it at a step drops the rows that a killed run wrote beyond it, so the
  record of a resumed run is the record of one that never stopped. Of several
  hosts one is the writer; the others' logs do nothing.
  """

  def __init__(self, workdir: Path, *, step: int, is_writer: bool = True):
    self._is_writer = is_writer
    if not is_writer:
      return
    self._path = workdir / "metrics.jsonl"
    kept = [row for row in read(workdir) if row["step"] <= step]
    with unfinished(self._path) as partial:
      partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    self._file = self._path.open("a")
    self._board: _Board | None = _Board(workdir / "tensorboard", step=step)

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Adds a row."""
    if not self._is_writer:
      return
    row = {"step": step, "kind": kind, **values}
    try:
      self._file.write(json.dumps(row) + "\n")
      self._file.flush()
    except OSError as error:
      raise InputError(
        f"{self._path} could not be written: {error.strerror}; the run goes on "
        "from its newest checkpoint when it is started again"
      ) from error
    if self._board is None:
      return
    try:
      named = {f"{kind}/{name}": value for name, value in values.items()}
      self._board.write(step, named)
    except OSError as error:
      self._board = None
      warnings.warn(
        f"nothing more is written for TensorBoard ({error}); {self._path} goes "
        "on",
        stacklevel=2,
      )

  def close(self) -> None:
    """Finishes both records."""
    if self._is_writer:
      with contextlib.suppress(OSError):  # Of rows that could not be written.
        self._file.close()
      if self._board is not None:
        self._board.close()


class _Board:
  """TensorBoard's event files, written at once.

  The library's own writer does it in a thread. When that has failed (no space
  is left), whoever writes next waits for it for ever.
  """

  def __init__(self, folder: Path, *, step: int):
    folder.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    # Hides what a killed run wrote beyond its checkpoint.
    self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds numbers by name."""
    for name, value in values.items():
      self._add(step, summary=scalar(name, value))
    self._writer.flush()

  def _add(self, step: int, **what: Any) -> None:
    self._writer.write_event(Event(step=step, wall_time=time.time(), **what))

  def close(self) -> None:
    self._writer.close()


def read(workdir: Path) -> list[Row]:
  """All rows of a workdir's record; a last line that was cut short is not one.

  Raises:
    InputError: when another line is not JSON.
  """
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines):
        break  # The process was killed while it wrote this line.
      raise InputError(
        f"{path} line {number} is not JSON ({error}): move the file away to "
        "start a new record"
      ) from None
  return rows
