"""The record of a run: rows, resuming, and the picture of it."""

import json

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

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


def _events(path):
  """Records: their length, its checksum, what is in them, its checksum."""
  data = path.read_bytes()
  while data:
    size = int.from_bytes(data[:8], "little")
    yield Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


@pytest.mark.parametrize("start", [0, 2])
def test_tensorboard_events_are_written(tmp_path, start):
  """They begin with what hides older ones, of a run that was killed."""
  _write(tmp_path, [start + 1, start + 2], start)
  (path,) = (tmp_path / "tensorboard").iterdir()
  version, hiding, *events = _events(path)
  assert version.file_version
  assert hiding.session_log.status == SessionLog.START
  assert hiding.step == start + 1
  values = [(e.step, e.summary.value[0].tag) for e in events]
  assert values[4] == (start + 1, "train/clipped/stem")
  assert values[-1] == (start + 2, "eval/raw_top1")
  assert events[-1].summary.value[0].simple_value == 0.5


def test_a_record_goes_on_without_tensorboard(tmp_path, monkeypatch):
  log = metrics.Log(tmp_path, step=0)
  log.write(1, "train", {"loss": 1.0})

  def fail(*_):
    raise OSError("no space is left")

  monkeypatch.setattr(log._board._writer, "write_event", fail)
  with pytest.warns(UserWarning, match=r"for TensorBoard \(no space is left\)"):
    log.write(2, "train", {"loss": 0.5})
  log.write(3, "train", {"loss": 0.2})
  log.close()
  assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


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
