"""Files that a user names: where they are, and how one comes to be.

An output is checked before anything is computed for it, never replaces what it
is made from, and appears when it is whole.
"""

import contextlib
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

from nfnets.errors import InputError


def local(path: str) -> str:
  """A path as the shell would have it, which leaves `--option=~/x` as it is.

  Raises:
    InputError: for an address on the network.
  """
  if path.startswith("file:"):
    path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
  if re.match(r"[a-z]\w+:/", path):  # A `Path` has one slash there.
    raise InputError(
      f"{path} is on the network: give a path on this machine (mount what is "
      "there, or download it)"
    )
  return os.path.expanduser(path)


def check_output(path: Path, endings: Iterable[str]) -> None:
  """Raises `InputError` for a file that could not be written in the end."""
  endings = list(endings)
  if path.suffix not in endings:
    raise InputError(
      f"{path}: its name must end in {', '.join(endings)}, which says what is "
      "written"
    )
  if not path.absolute().parent.is_dir():
    raise InputError(f"{path}: there is no folder {path.absolute().parent}")


def check_keeps(path: Path, inputs: Iterable[str | Path]) -> None:
  """Raises `InputError` for an output in the place of one of the inputs."""
  if path.exists() and any(
    os.path.exists(given) and path.samefile(given) for given in inputs
  ):
    raise InputError(
      f"{path} is read, and would be overwritten: give another name"
    )


def make_writable(folder: Path, option: str) -> None:
  """Makes a folder, if it is not there, that an option names.

  Raises:
    InputError: where nothing can be written in it.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise InputError(
      f"{option}={folder} cannot be written to ({error.strerror})"
    ) from None


@contextlib.contextmanager
def unfinished(path: str | Path) -> Iterator[Path]:
  """Where to write a file that appears as `path` when it is whole.

  Raises:
    InputError: when it cannot be written; nothing of it is left.
  """
  path = Path(path)
  partial = path.with_name(f".partial-{path.name}")
  try:
    yield partial
    os.replace(partial, path)
  except OSError as error:
    reason = error.strerror or str(error)
    raise InputError(f"{path} could not be written: {reason}") from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()
