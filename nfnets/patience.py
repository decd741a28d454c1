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
    if self.best is None:
      return
    files = filter(Path.exists, (self._path, self._finished))
    kept = [pretrained.step_of(path) for path in files]
    # A file that does not say whose weights it holds is taken for the best.
    if None in kept or self.best["step"] in kept:
      return
    for row in rows:
      if row["step"] in kept and row["ema_top1"] == self._highest:
        self.best = row  # As good, though another had less loss.
        return
    for first in kept:
      self._count(row for row in rows if row["step"] >= first)
      if self.best is not None and self.best["step"] == first:
        return
    if any(first > step for first in kept):
      # A run that goes on as it did comes to those weights again.
      self._count(rows)
      self.best = None
      return
    self._count([])

  def _count(self, rows: Iterable[metrics.Row]) -> None:
    """Begins with these evaluations."""
    self._num_since, self._highest = 0, -1.0
    self.best: metrics.Row | None = None  # Of the record; its weights are kept.
    for row in rows:
      self.add(row)

  def add(self, row: metrics.Row) -> bool:
    """Takes the next evaluation; whether it is the best."""
    is_higher = row["ema_top1"] > self._highest
    self._num_since = 0 if is_higher else self._num_since + 1
    self._highest = max(self._highest, row["ema_top1"])
    rank = lambda row: (row["ema_top1"], -row["ema_loss"])
    is_best = self.best is None or rank(row) > rank(self.best)
    if is_best:
      self.best = row
    return is_best

  @property
  def is_exhausted(self) -> bool:
    """Whether the run is to end."""
    return self.best is not None and self._num_since >= self._limit

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
