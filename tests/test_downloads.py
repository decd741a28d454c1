"""Published weights: from a server of the test's own into the cache."""

import fcntl
import hashlib
import http.client
import http.server
import pickle
import ssl
import threading
import time

import jax
import numpy as np
import pytest
from conftest import draw_params, param_shapes

from nfnets import downloads, models, pretrained
from nfnets.errors import InputError

DATA = np.random.default_rng(0).bytes(3_000_000)


class _Server(http.server.BaseHTTPRequestHandler):
  """Serves `DATA`, or what is left of it; breaks off when told to."""

  requests: list = []  # noqa: RUF012
  cut_at = None
  status = None

  def do_GET(self):
    asked = self.headers.get("Range")
    type(self).requests.append(asked)
    if self.status:
      self.send_error(self.status)
      return
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if start >= len(DATA):
      self.send_error(416)
      return
    self.send_response(206 if asked else 200)
    self.send_header("Content-Length", str(len(DATA) - start))
    self.end_headers()
    end = self.cut_at if self.cut_at and not asked else len(DATA)
    self.wfile.write(DATA[start:end])

  def log_message(self, *unused):
    del unused


@pytest.fixture
def server(tmp_path, monkeypatch):
  """The running server's handler; `published` is the one name."""
  handler = type("Handler", (_Server,), {"requests": []})
  running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=running.serve_forever, daemon=True).start()
  entry = downloads.Published(
    model="nfnet_tiny",
    url=f"http://127.0.0.1:{running.server_port}/tiny.npz",
    num_bytes=len(DATA),
    md5=hashlib.md5(DATA).hexdigest(),
    licence="Apache-2.0",
  )
  monkeypatch.setattr(downloads, "PUBLISHED", {"published": entry})
  monkeypatch.setenv("NFNETS_CACHE", str(tmp_path))
  yield handler
  running.shutdown()
  running.server_close()


def test_a_file_is_downloaded_once(server, tmp_path, capsys):
  path = downloads.fetch("published")
  assert path == tmp_path / "weights" / "tiny.npz"
  assert path.read_bytes() == DATA
  assert "downloading published (3 MB)" in capsys.readouterr().err
  assert downloads.fetch("published") == path
  assert server.requests == [None]
  kept = {p.name for p in path.parent.iterdir() if not p.name.startswith(".")}
  assert kept == {"tiny.npz", "tiny.npz.md5"}


def test_a_download_that_broke_off_goes_on(server):
  server.cut_at = 1_000_000
  with pytest.raises(InputError, match=r"ended after 1 of 3 MB.*the same call"):
    downloads.fetch("published")
  assert downloads.fetch("published").read_bytes() == DATA
  assert server.requests == [None, "bytes=1000000-"]


def test_a_server_that_knows_no_parts_sends_all_of_it(server, tmp_path):
  part = tmp_path / "weights" / "tiny.npz.part"
  part.parent.mkdir()
  part.write_bytes(DATA[:1000])

  def send_all(self):
    self.send_response(200)
    self.send_header("Content-Length", str(len(DATA)))
    self.end_headers()
    self.wfile.write(DATA)

  server.do_GET = send_all
  assert downloads.fetch("published").read_bytes() == DATA


def test_one_process_at_a_time_downloads_a_file(server, monkeypatch):
  seen = []
  monkeypatch.setattr(
    downloads.fcntl, "flock", lambda file, how: seen.append(how)
  )
  downloads.fetch("published")
  assert seen == [fcntl.LOCK_EX]


def test_a_server_that_falls_silent_is_left(server, monkeypatch):
  monkeypatch.setattr(downloads, "_SECONDS_OF_SILENCE", 0.1)
  server.do_GET = lambda self: time.sleep(1)
  with pytest.raises(InputError, match="timed out"):
    downloads.fetch("published")


def test_a_cache_that_jax_was_given_is_kept():
  downloads.keep_compiled()
  assert jax.config.jax_compilation_cache_dir == ""  # The tests' own.


def test_a_whole_part_is_taken(server, tmp_path):
  (tmp_path / "weights").mkdir()
  (tmp_path / "weights" / "tiny.npz.part").write_bytes(DATA)
  assert downloads.fetch("published").read_bytes() == DATA


def test_a_damaged_download_is_removed(server, tmp_path):
  part = tmp_path / "weights" / "tiny.npz.part"
  part.parent.mkdir()
  part.write_bytes(b"x" * 1000)
  with pytest.raises(InputError, match=r"came damaged .*: try again \(md5 "):
    downloads.fetch("published")
  assert not part.exists()
  assert downloads.fetch("published").read_bytes() == DATA


def test_a_file_put_there_by_hand_is_checked_once(server, tmp_path):
  path = tmp_path / "weights" / "tiny.npz"
  path.parent.mkdir()
  path.write_bytes(b"something else")
  with pytest.raises(InputError, match=r"is not the published file \(md5 "):
    downloads.fetch("published")
  assert path.read_bytes() == b"something else"
  path.write_bytes(DATA)
  assert downloads.fetch("published") == path
  assert server.requests == []


def test_without_the_file_or_a_network_it_says_what_to_put_where(
  server, tmp_path, monkeypatch
):
  server.status = 404
  with pytest.raises(
    InputError,
    match=rf"could not be downloaded \(HTTP 404\).*get http://127.*tiny.npz "
    rf"elsewhere and put it at {tmp_path}/weights/tiny.npz .*md5 [0-9a-f]+",
  ):
    downloads.fetch("published")
  entry = downloads.PUBLISHED["published"]
  closed = entry._replace(url="http://127.0.0.1:9/tiny.npz")
  monkeypatch.setitem(downloads.PUBLISHED, "published", closed)
  with pytest.raises(InputError, match=r"downloaded \(.*refused"):
    downloads.fetch("published")


def test_without_space_nothing_is_fetched(server, monkeypatch):
  usage = type("Usage", (), {"free": 1_000_000})
  monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(InputError, match=r"needs 3 MB in .*, where 1 MB are fr"):
    downloads.fetch("published")
  assert server.requests == []


def test_space_for_the_rest_is_enough(server, tmp_path, monkeypatch):
  part = tmp_path / "weights" / "tiny.npz.part"
  part.parent.mkdir()
  part.write_bytes(DATA[:2_500_000])
  usage = type("Usage", (), {"free": 1_000_000})
  monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
  assert downloads.fetch("published").read_bytes() == DATA


def test_a_full_disk_on_the_way_is_one_line(server, monkeypatch):
  def full(*arguments):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(downloads, "_copy", full)
  with pytest.raises(InputError, match=r"No space left.*NFNETS_CACHE"):
    downloads.fetch("published")


@pytest.mark.parametrize(
  "error",
  [
    ssl.SSLError(1, "bad record mac"),
    OSError(113, "No route to host"),
    http.client.IncompleteRead(b""),
  ],
)
def test_a_network_that_fails_on_the_way_is_not_the_disk(
  server, monkeypatch, error
):
  def fail(*_):
    raise error

  monkeypatch.setattr(http.client.HTTPResponse, "read", fail)
  with pytest.raises(InputError, match=r"could not be downloaded \(.*the same"):
    downloads.fetch("published")


def test_a_file_in_a_cache_that_cannot_be_written_is_taken(
  server, tmp_path, monkeypatch
):
  path = tmp_path / "weights" / "tiny.npz"
  path.parent.mkdir()
  path.write_bytes(DATA)

  def refuse(*_):
    raise OSError(30, "Read-only file system")

  monkeypatch.setattr(downloads.fcntl, "flock", refuse)
  assert downloads.fetch("published") == path
  path.write_bytes(b"something else")
  with pytest.raises(InputError, match=r"is not the published file"):
    downloads.fetch("published")
  assert server.requests == []


def test_the_table():
  assert list(downloads.PUBLISHED) == [f"dm_nfnet_f{n}" for n in range(7)]
  for entry in downloads.PUBLISHED.values():
    assert entry.num_bytes == 4 * models.make(entry.model).count_params()
    assert len(entry.md5) == 32


def test_a_published_name_is_loaded_and_checked(tmp_path, monkeypatch):
  """The whole way, with weights of F0 that the test makes."""
  model = models.make("nfnet_f0")
  params = draw_params(param_shapes(model))
  path = tmp_path / "weights" / "F0_haiku.npz"
  path.parent.mkdir()
  path.write_bytes(pickle.dumps(params, protocol=4))
  md5 = hashlib.md5(path.read_bytes()).hexdigest()
  entry = downloads.PUBLISHED["dm_nfnet_f0"]._replace(md5=md5)
  monkeypatch.setitem(downloads.PUBLISHED, "dm_nfnet_f0", entry)
  monkeypatch.setenv("NFNETS_CACHE", str(tmp_path))
  loaded, card = pretrained.load_with_card("dm_nfnet_f0")
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert card.model == "nfnet_f0"
  assert (card.image_size, card.crop, card.margin) == (256, "resize", 32)
  assert card.source == "dm_nfnet_f0"

  # The file of another variant under this name.
  wrong = entry._replace(model="nfnet_f1")
  monkeypatch.setitem(downloads.PUBLISHED, "dm_nfnet_f0", wrong)
  with pytest.raises(InputError, match=r"hold weights of nfnet_f1 .*more"):
    pretrained.load("dm_nfnet_f0")


def test_a_name_that_is_none():
  with pytest.raises(InputError, match=r"'dm_nfnet_f9': did you mean dm_nfnet"):
    pretrained.load("dm_nfnet_f9")
