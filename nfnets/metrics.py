"""Numbers over time: JSON lines, TensorBoard, and the curves at the end.

One file, `metrics.jsonl`, is the record; TensorBoard and `curves.png` are made
from the same rows. A row is `{"step": int, "kind": "train" | "eval", name:
number ...}`; evaluation names start with `raw_` (the trained weights) or `ema_`
(their moving average).
"""

import json
import os
from pathlib import Path
from typing import Any

from nfnets.errors import InputError

Row = dict[str, Any]


class Log:
  """Appends rows to `metrics.jsonl` and to TensorBoard event files.

  Opening it at a step drops the rows that a killed run wrote beyond it, so the
  record of a resumed run is the record of one that never stopped. Of several
  hosts one is the writer; the others' logs do nothing.
  """

  def __init__(self, workdir: Path, *, step: int, is_writer: bool = True):
    from tensorboardX import SummaryWriter

    self._is_writer = is_writer
    if not is_writer:
      return
    self._path = workdir / "metrics.jsonl"
    kept = [row for row in read(workdir) if row["step"] <= step]
    _write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))
    self._file = self._path.open("a")
    self._board = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1 if step else None
    )

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Adds a row."""
    if not self._is_writer:
      return
    row = {"step": step, "kind": kind, **values}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    """Finishes both records."""
    if self._is_writer:
      self._file.close()
      self._board.close()


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


def _write_atomically(path: Path, text: str) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text)
  os.replace(partial, path)
