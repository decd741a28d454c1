"""Ending a run when nothing gets better, and keeping the best weights.

What was best is read from the record of the run, so that a run that was killed
decides as if it never was. Where those weights are not there (patience came
later, or a run went back to an older checkpoint), it counts from what is there.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nfnets import metrics, pretrained
from nfnets.card import Card

_BEST = "best.safetensors"


class Patience:
  """The best evaluation so far, by top-1 of the averaged weights.

  Of equal ones (usual with few images to test with) it is that of least loss,
  which does not count as better for the end of the run.

  Args:
    workdir: Of the run.
    limit: Evaluations without a better one after which it is enough.
    step: The record counts up to here.
  """

  def __init__(self, workdir: Path, limit: int, *, step: int):
    self._path, self._limit = workdir / _BEST, limit
    self._finished = workdir / "weights.safetensors"  # Of a run that is over.
    rows = [
      row
      for row in metrics.read(workdir)
      if row["kind"] == "eval" and row["step"] <= step
    ]
    self._count(rows)
    files = filter(Path.exists, (self._path, self._finished))
    kept = [pretrained.step_of(path) for path in files]
    # A file that does not say whose weights it holds is taken for the best.
    if self.best is None or None in kept or self.best["step"] in kept:
      return
    for first in kept:
      self._count(row for row in rows if row["step"] >= first)
      if self.best is not None and self.best["step"] == first:
        return
    self._count([])

  def _count(self, rows: Iterable[metrics.Row]) -> None:
    """Begins with these evaluations."""
    self._num_since = 0
    self.best: metrics.Row | None = None  # Of the record.
    for row in rows:
      self.add(row)

  def add(self, row: metrics.Row) -> bool:
    """Takes the next evaluation; whether it is the best."""
    best = self.best or {"ema_top1": -1.0, "ema_loss": 0.0}
    is_better = row["ema_top1"] > best["ema_top1"]
    is_as_good = row["ema_top1"] == best["ema_top1"]
    is_best = is_better or (is_as_good and row["ema_loss"] < best["ema_loss"])
    self._num_since = 0 if is_better else self._num_since + 1
    if is_best:
      self.best = row
    return is_best

  @property
  def is_exhausted(self) -> bool:
    """Whether the run is to end."""
    return self._num_since >= self._limit

  def save(self, params: Any, card: Card) -> None:
    """Keeps the weights of the best evaluation; their card says its step."""
    pretrained.save(self._path, params, card)

  def go_on(self) -> None:
    """Takes the weights of a run that was over, if they are the best so far."""
    if self.best is None or not self._finished.exists():
      return
    if pretrained.step_of(self._finished) in (self.best["step"], None):
      self._finished.replace(self._path)

  def finish(self) -> bool:
    """Makes the best weights those of the run; whether there are any."""
    if self._path.exists():
      self._path.replace(self._finished)
    return self._finished.exists()
