"""The record of a run: rows, resuming, and the picture of it."""

import io
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from nfnets import metrics, plots, progress
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


@pytest.mark.skipif(sys.platform != "linux", reason="opens /dev/full")
def test_a_record_that_cannot_be_written_is_named(tmp_path):
  log = metrics.Log(tmp_path, step=0)
  log._file.close()
  with pathlib.Path("/dev/full").open("a") as log._file:
    with pytest.raises(InputError, match=r"jsonl could not be written: No sp"):
      log.write(1, "train", {"loss": 1.0})
    log.close()


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


def test_tensorboard_sees_a_row_at_once(tmp_path):
  log = metrics.Log(tmp_path, step=0)
  log.write(1, "train", {"loss": 1.0})
  (path,) = (tmp_path / "tensorboard").iterdir()
  assert [event.step for event in _events(path)][-1] == 1
  log.close()


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


def test_few_high_values_do_not_flatten_a_curve():
  usual = list(np.linspace(7, 1, 200))
  assert plots._without_spikes(usual) is None
  assert 7 < plots._without_spikes([*usual, 900.0]) < 12
  assert plots._without_spikes([]) is None


@pytest.mark.parametrize("num", [2, 40])
def test_confusions_of_few_and_many_classes_are_drawn(tmp_path, num):
  confusion = np.diag(np.full(num, 9))
  confusion[1, 0] = 3
  names = tuple(f"class_{i}_{'with_a_long_name' * 3}" for i in range(num))
  assert plots.shortened(names[1], 20) == "class_1_with_a_lo..."
  path = tmp_path / "confusion.png"
  plots.save_confusion(confusion, names, path)
  with Image.open(path) as image:
    assert max(image.size) < 1200
    assert len(set(image.convert("L").get_flattened_data())) > 50


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were drawn, in the place of files."""
  figures = []
  monkeypatch.setattr(
    plots, "_save", lambda figure, *_, **__: figures.append(figure)
  )
  return figures


def test_a_table_of_confusions_has_classes_as_rows(drawn, tmp_path):
  plots.save_confusion(np.array([[5, 2], [0, 9]]), ("a", "b"), tmp_path)
  axis = drawn[0].axes[0]
  numbers = {text.get_position(): text.get_text() for text in axis.texts}
  assert numbers == {(0, 0): "5", (1, 0): "2", (1, 1): "9"}  # (x, y).
  assert (axis.get_ylabel(), axis.get_xlabel()) == ("class", "taken for")
  (image,) = axis.images
  np.testing.assert_allclose(image.get_array(), [[5 / 7, 2 / 7], [0, 1]])


def test_the_commonest_mistakes_of_many_classes_come_first(drawn, tmp_path):
  confusion = np.diag(np.full(40, 6))
  confusion[2, 0], confusion[1, 0], confusion[1, 1] = 1, 3, 9
  plots.save_confusion(confusion, tuple(f"c{i}" for i in range(40)), tmp_path)
  axis = drawn[0].axes[0]
  labels = [label.get_text() for label in axis.get_yticklabels()]
  assert labels == ["c1 → c0", "c2 → c0"]
  assert [text.get_text() for text in axis.texts] == [" 3", " 1"]
  assert [bar.get_width() for bar in axis.patches] == [
    25,
    pytest.approx(100 / 7),
  ]


def test_curves_have_their_values_and_units(drawn, tmp_path):
  _write(tmp_path, [2, 4])
  row = {"step": 4, "kind": "eval", "ema_loss": 3.0, "ema_top1": 0.25}
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write(json.dumps(row) + "\n")
  plots.save_curves(tmp_path, tmp_path, title="a run")
  found = [
    {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    for axis in drawn[0].axes
  ]
  train = "training batch, augmented"
  assert list(found.pop(2).values()) == [[0.1, 0.1]]  # Of the learning rate.
  assert found == [
    {train: [0.5, 0.25], "test, raw": [1.0], "test, EMA": [3.0]},
    {train: [50, 50], "test, raw": [50], "test, EMA": [25]},
    {"stem": [20, 20], "all": [10, 10]},
  ]


def test_a_grid_has_a_place_for_each_picture(drawn, tmp_path):
  pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(5)]
  plots.save_grid(pictures, [f"no. {i}" for i in range(5)], tmp_path)
  axes = [axis for axis in drawn[0].axes if axis.images]
  assert [axis.get_title() for axis in axes] == [f"no. {i}" for i in range(5)]
  assert [axis.images[0].get_array()[0, 0, 0] for axis in axes] == [*range(5)]


def test_names_are_no_mathematics(tmp_path):
  path = tmp_path / "confusion.png"
  plots.save_confusion(np.eye(2, dtype=int), ("a$_$b", "$x$"), path)
  assert path.stat().st_size > 0


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_bar_keeps_step_and_time(monkeypatch, capsys, width):
  """In narrow terminals other numbers are cut."""
  monkeypatch.setenv("COLUMNS", str(width))
  monkeypatch.setenv("TTY_COMPATIBLE", "1")
  with progress.TrainProgress(start=0, total=112500, batch_size=4096) as bar:
    bar.restart_clock()
    values = {"loss": 6.123, "accuracy": 0.123, "clipped/all": 0.31}
    bar.update(27172, values)
    bar._bar.refresh()
    shown = capsys.readouterr().out
    assert "27172/112500" in shown
    assert "loss 6.1" in shown
    bar.evaluating(1024, 50000)
    bar._bar.refresh()
    assert "evaluating: 1,024 of 50,000" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "is_shown"), [(1.0, False), (12.0, True)])
def test_much_waiting_for_data_is_shown(monkeypatch, capsys, seconds, is_shown):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(progress, "time", clock)
  with progress.TrainProgress(start=0, total=9, batch_size=4) as bar:
    with bar.waiting_for_data():  # Before the clock starts: not counted.
      now[0] = 30.0
    bar.restart_clock()
    with bar.waiting_for_data():
      now[0] += seconds
    now[0] = 50.0
    bar.update(1, {"loss": 6.0, "accuracy": 0.1})
  shown = capsys.readouterr().out
  assert "step 1/9" in shown
  assert ("waiting for data 60%" in shown) == is_shown


def test_speed_and_time_left_are_those_since_the_clock_started(
  monkeypatch, capsys
):
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(progress, "time", clock)
  values = {"loss": 6.0, "accuracy": 0.1}
  with progress.TrainProgress(start=2, total=11, batch_size=400) as bar:
    bar.restart_clock()
    now[0] = 20.0
    bar.update(3, values)
    bar.restart_clock()
    now[0] = 40.0
    bar.update(5, values)
  first, second = capsys.readouterr().out.splitlines()
  assert " 20 img/s" in first
  assert first.endswith("left 0:02:40")
  assert " 40 img/s" in second
  assert second.endswith("left 0:01:00")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_reader_that_went_away_ends_no_run(monkeypatch, is_terminal):
  class Gone(io.StringIO):
    def write(self, text):
      raise BrokenPipeError

  monkeypatch.setattr("sys.stdout", Gone())
  monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
  with progress.TrainProgress(start=0, total=10, batch_size=4) as bar:
    bar.say("to nobody")


def test_lines_come_now_and_then(monkeypatch, capsys):
  now = iter([0.0, 5.0, 10.5, 12.0, 21.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(now))
  monkeypatch.setattr(progress, "time", clock)
  ticker = progress.Ticker(print)
  for done in range(1000, 5000, 1000):
    ticker(done, 50_000)
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    "evaluating: 2,000 of 50,000 images",
    "evaluating: 4,000 of 50,000 images",
  ]


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
