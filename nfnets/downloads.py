"""The published weights: where they are, and how they get into the cache.

A file is fetched once, in pieces that survive an interruption, and has its
final name only when its checksum is right.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from nfnets.errors import InputError

_PIECE = 2**20  # Bytes.
_SECONDS_OF_SILENCE = 30.0
_OF_NETWORK = (
  urllib.error.URLError,
  http.client.HTTPException,
  TimeoutError,
  ConnectionError,
)


class Published(NamedTuple):
  """One file of published weights."""

  model: str  # In our table of networks.
  url: str
  num_bytes: int  # At least: four for each parameter.
  md5: str
  licence: str


# The weights of 2102.06171's Table 3. The checksums are those that a third
# party's downloader lists; the licence is the one that PyTorch Image Models
# states for its copies (the release itself names none).
_RELEASE = (
  ("0a41039da1cb43adf47f1b7d86ddfe0f", 71_489_284),
  ("c9126bbfaf855f9ddb7ff3b902558781", 132_634_256),
  ("7a018d8d1498020e2f5a8719a1e7f53f", 193_779_228),
  ("d8e1e78d26db659c486150dbaccbe78a", 254_924_200),
  ("f5974a7e3388aa81b91a9f1403e759a4", 316_069_172),
  ("8639e925de951030651ac775b9f915c3", 377_214_144),
  ("b16cca40ac1ecec2bd5e3273866da0c1", 438_359_116),
)

PUBLISHED: dict[str, Published] = {
  f"dm_nfnet_f{n}": Published(
    model=f"nfnet_f{n}",
    url=f"https://storage.googleapis.com/dm-nfnets/F{n}_haiku.npz",
    num_bytes=4 * num_params,
    md5=md5,
    licence="Apache-2.0",
  )
  for n, (md5, num_params) in enumerate(_RELEASE)
}


def cache_folder() -> Path:
  """`NFNETS_CACHE`, or the platform's folder for caches."""
  if chosen := os.environ.get("NFNETS_CACHE"):
    return Path(chosen)
  import platformdirs

  return Path(platformdirs.user_cache_dir("nfnets"))


def keep_compiled() -> None:
  """Keeps compiled programs for the next start, unless JAX is told where."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    folder = cache_folder() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def fetch(name: str) -> Path:
  """The file of published weights, downloaded unless it is in the cache.

  Args:
    name: A key of `PUBLISHED`.

  Raises:
    InputError: when it cannot be had: no network, no space, or another
      checksum.
  """
  entry = PUBLISHED[name]
  folder = cache_folder() / "weights"
  path = folder / entry.url.rpartition("/")[2]
  checked = path.with_name(f"{path.name}.md5")
  if path.is_file() and checked.is_file():
    return path
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{path.name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # Of two processes one downloads.
      if not path.is_file():
        _download(name, entry, path)
      elif not checked.is_file():  # Put there by hand, or by the line above.
        _check(path, entry, name)
      checked.write_text(entry.md5 + "\n")
  except OSError as error:
    if path.is_file():  # Put there by someone else, who alone may write.
      _check(path, entry, name)
      return path
    raise InputError(
      f"{name} cannot be stored in {folder} ({error}): free some space, or "
      "name another folder in NFNETS_CACHE"
    ) from None
  return path


def _download(name: str, entry: Published, path: Path) -> None:
  partial = path.with_name(f"{path.name}.part")
  start = partial.stat().st_size if partial.exists() else 0
  needed = entry.num_bytes - start
  free = shutil.disk_usage(path.parent).free
  if free < needed:
    raise InputError(
      f"{name} needs {needed / 1e6:,.0f} MB in {path.parent}, where "
      f"{free / 1e6:,.0f} MB are free: make room, or name another folder in "
      "NFNETS_CACHE"
    )
  request = urllib.request.Request(entry.url)
  if start:
    request.add_header("Range", f"bytes={start}-")
  try:
    with urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE) as answer:
      is_rest = answer.status == 206
      with partial.open("ab" if is_rest else "wb") as file:
        _copy(name, answer, file, start if is_rest else 0)
  except urllib.error.HTTPError as error:
    if error.code == 416:  # There is no more: what is here is whole, or wrong.
      pass
    else:
      raise _offline(name, entry, path, f"HTTP {error.code}") from None
  except _OF_NETWORK as error:
    reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise _offline(name, entry, path, reason) from None
  _check(partial, entry, name)
  os.replace(partial, path)


def _copy(name: str, answer, file, start: int) -> None:
  """All that is left of an answer, with what a person sees of it."""
  from rich.console import Console
  from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
  )

  length = answer.headers.get("Content-Length")
  total = start + int(length) if length else None
  console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
  size = f" ({total / 1e6:,.0f} MB)" if total else ""
  console.print(f"downloading {name}{size}", markup=False)
  columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
  bar = Progress(
    *columns,
    TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
    transient=True,
  )
  done, last_line = start, time.monotonic()
  with bar:
    task = bar.add_task(name, total=total, completed=start)
    while piece := _read(answer):
      file.write(piece)
      done += len(piece)
      bar.update(task, completed=done)
      if not console.is_terminal and time.monotonic() - last_line > 10:
        last_line = time.monotonic()
        console.print(f"{name}: {done / 1e6:,.0f} MB", markup=False)
  if total is not None and done < total:
    raise ConnectionError(
      f"the connection ended after {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
    )


def _read(answer) -> bytes:
  """The next piece; what goes wrong here is no fault of the disk."""
  try:
    return answer.read(_PIECE)
  except (OSError, http.client.HTTPException) as error:
    raise ConnectionError(str(error) or type(error).__name__) from None


def _offline(
  name: str, entry: Published, path: Path, reason: str
) -> InputError:
  return InputError(
    f"{name} could not be downloaded ({reason}); what has come is kept, and "
    f"the same call goes on. Without a network: get {entry.url} elsewhere and "
    f"put it at {path} (about {entry.num_bytes / 1e6:,.0f} MB, md5 {entry.md5})"
  )


def _check(path: Path, entry: Published, name: str) -> None:
  """Raises `InputError` unless the checksum is right; removes a download."""
  with path.open("rb") as file:
    found = hashlib.file_digest(
      file, lambda: hashlib.md5(usedforsecurity=False)
    ).hexdigest()
  if found == entry.md5:
    return
  what = "is not the published file"
  if path.suffix == ".part":
    what = "came damaged and was removed: try again"
    with contextlib.suppress(FileNotFoundError):
      path.unlink()
  raise InputError(
    f"{path} of {name} {what} (md5 {found}, expected {entry.md5})"
  )
