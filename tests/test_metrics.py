"""The record of a run: rows, resuming, and the picture of it."""

import json

import pytest
from PIL import Image

from nfnets import metrics, plots
from nfnets.errors import InputError


def _write(workdir, steps, start=0):
  log = metrics.Log(workdir, step=start)
  for step in steps:
    values = {"loss": 1 / step, "accuracy": 0.5, "learning_rate": 0.1}
    log.write(step, "train", values | {"clipped/all": 0.1, "clipped/stem": 0.2})
  log.write(steps[-1], "eval", {"raw_loss": 1.0, "raw_top1": 0.5})
  log.close()


def test_resuming_drops_what_was_written_beyond(tmp_path):
  _write(tmp_path, [1, 2, 3])
  _write(tmp_path, [3, 4], start=2)
  rows = metrics.read(tmp_path)
  assert [(r["step"], r["kind"]) for r in rows] == [
    (1, "train"),
    (2, "train"),
    (3, "train"),
    (4, "train"),
    (4, "eval"),
  ]


def test_a_last_line_cut_short_is_no_row_but_another_one_is_an_error(tmp_path):
  _write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  whole = path.read_text()
  path.write_text(whole[:-20])
  assert len(metrics.read(tmp_path)) == 2
  path.write_text("garbage\n" + whole)
  with pytest.raises(InputError, match=r"metrics.jsonl line 1 is not JSON"):
    metrics.read(tmp_path)


def test_tensorboard_events_are_written(tmp_path):
  _write(tmp_path, [1])
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/clipped/stem" in events.read_bytes()


def test_curves_are_drawn_with_and_without_clipping(tmp_path):
  _write(tmp_path, [1, 2, 3])
  plots.save_curves(tmp_path, tmp_path / "with.png", title="a run")
  rows = [
    {k: v for k, v in row.items() if not k.startswith("clipped")}
    for row in metrics.read(tmp_path)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metrics.jsonl").write_text(text)
  plots.save_curves(tmp_path, tmp_path / "without.png", title="a run")
  for name in ("with", "without"):
    with Image.open(tmp_path / f"{name}.png") as image:
      assert min(image.size) > 500
