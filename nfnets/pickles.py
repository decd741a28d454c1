"""The released checkpoints, which are pickles, read without running them.

A pickle is a program that may call anything. This reader knows the few things
that a saved tree of NumPy arrays asks for, builds them itself from bytes whose
length it has checked, and refuses everything else by name. Neither Haiku nor
dill, which wrote those files, is needed.
"""

import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nfnets.errors import InputError

# Kinds of numbers that weights may be: NumPy's codes, little endian.
_DTYPES = ("f2", "f4", "f8", "i4", "i8")


class RefusedError(InputError):
  """The file asks for something that no tree of arrays needs."""


def is_pickle(head: bytes) -> bool:
  """Whether a file that starts so is a pickle (protocol 2 or newer)."""
  return len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5


def load(path: Path) -> dict[str, dict[str, np.ndarray]]:
  """The two-level dict of arrays that a pickle holds, as float32.

  Raises:
    RefusedError: when it asks for anything else.
    InputError: when it is damaged.
  """
  with (
    path.open("rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
  ):
    try:
      return _plain(_Reader(_Window(mapped), path).load())
    except RefusedError:
      raise
    except Exception as error:  # Damaged pickles fail in any way.
      text = str(error).strip() or type(error).__name__
      raise InputError(f"{path} is damaged or no checkpoint ({text})") from None


class _Window:
  """A file that never makes room for more bytes than it has."""

  def __init__(self, mapped: mmap.mmap):
    self._mapped, self._at = mapped, 0

  def read(self, num: int) -> bytes:
    if num < 0:
      raise ValueError("a negative length")
    found = self._mapped[self._at : self._at + num]
    self._at += len(found)
    return found

  def readline(self) -> bytes:
    end = self._mapped.find(b"\n", self._at)
    return self.read((len(self._mapped) if end < 0 else end + 1) - self._at)

  def readinto(self, buffer: bytearray) -> int:
    found = self.read(len(buffer))
    buffer[: len(found)] = found
    return len(found)


class _Dtype:
  """Stands in for a NumPy dtype."""

  def __init__(self, code: str, *flags: Any):
    del flags  # Whether to align and to copy.
    self._code, self._order = code, "<"

  def __setstate__(self, state: tuple) -> None:
    self._order = state[1]

  def build(self) -> np.dtype:
    if self._code not in _DTYPES or self._order not in ("<", "=", "|"):
      raise ValueError(f"an array of {self._order}{self._code}")
    return np.dtype("<" + self._code)


class _Array:
  """Stands in for a NumPy array until its bytes are known to be all there."""

  value: np.ndarray | None = None

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, is_fortran, data = state
    if type(dtype) is not _Dtype or type(data) is not bytes:
      raise ValueError("an array of something else than numbers")
    # Raises unless the bytes are as many as the shape says.
    flat = np.frombuffer(data, dtype.build())
    self.value = flat.reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*unused: Any) -> _Array:
  del unused  # Its class, and a shape and type that the state replaces.
  return _Array()


def _create_array(function: Any, args: Any, state: tuple, *unused: Any):
  """What dill and JAX call to make an array."""
  del args, unused
  if function is not _reconstruct:
    raise ValueError("an array made by something else than NumPy")
  array = _Array()
  array.__setstate__(state)
  return array


def _from_buffer(
  data: Any, dtype: _Dtype, shape: Any, order: str, axes: Any = None
) -> _Array:
  """An array of pickle's protocol 5; `axes` are transposed in memory."""
  if not isinstance(data, bytes | bytearray):
    raise ValueError("an array of something else than bytes")
  array = _Array()
  array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
  if axes is not None:
    array.value = array.value.transpose(axes)
  return array


def _scalar(dtype: _Dtype, data: bytes) -> np.ndarray:
  array = _Array()
  array.__setstate__((1, (), dtype, False, data))
  return array


def _dict(content: Any = ()) -> dict:
  if not isinstance(content, dict):
    raise ValueError("a mapping made from something else than a dict")
  return dict(content)


def _ndarray(*unused: Any) -> None:
  raise ValueError("an array that is made without its bytes")


def _encode(text: str, encoding: str) -> bytes:
  """How old protocols write bytes."""
  if encoding != "latin1":
    raise ValueError(f"bytes encoded as {encoding}")
  return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
  ("_codecs", "encode"): _encode,
  ("collections", "OrderedDict"): _dict,
  ("dill._dill", "_create_array"): _create_array,
  ("haiku._src.data_structures", "FlatMapping"): _dict,
  ("haiku._src.data_structures", "FlatMap"): _dict,
  ("haiku._src.data_structures", "to_immutable_dict"): _dict,
  ("jax._src.array", "_reconstruct_array"): _create_array,
  ("jax._src.device_array", "reconstruct_device_array"): _create_array,
  ("numpy", "dtype"): _Dtype,
  ("numpy", "ndarray"): _ndarray,
  **{
    (module, name): function
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
  },
  ("numpy.core.numeric", "_frombuffer"): _from_buffer,
  ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Reader(pickle._Unpickler):
  """Python's own reader, not the C one, whose tables a file can blow up."""

  def __init__(self, file: _Window, path: Path):
    super().__init__(file)
    self._path = path

  def find_class(self, module: str, name: str) -> Callable[..., Any]:
    if (module, name) not in _KNOWN:
      raise RefusedError(
        f"{self._path} asks for {module}.{name}, which no checkpoint needs: "
        "it is not loaded; get the file from its publisher again"
      )
    return _KNOWN[module, name]

  def load_build(self) -> None:
    if type(self.stack[-2]) not in (_Array, _Dtype):
      raise RefusedError(
        f"{self._path} changes a {type(self.stack[-2]).__name__} in place, "
        "which no checkpoint needs: it is not loaded"
      )
    super().load_build()

  def load_bytearray8(self) -> None:
    # Python's own makes room for as many bytes as the file says.
    size = int.from_bytes(self.read(8), "little")
    self.append(bytearray(self.read(size)))

  dispatch: ClassVar = {
    **pickle._Unpickler.dispatch,
    pickle.BUILD[0]: load_build,
    pickle.BYTEARRAY8[0]: load_bytearray8,
  }

  def get_extension(self, code: int) -> None:
    raise RefusedError(
      f"{self._path} asks for extension {code} of this Python, which no "
      "checkpoint needs: it is not loaded"
    )

  def persistent_load(self, pid: Any) -> None:
    raise RefusedError(
      f"{self._path} refers to {str(pid)[:40]!r} outside of itself, which no "
      "checkpoint does: it is not loaded"
    )


def _plain(tree: Any) -> dict[str, dict[str, np.ndarray]]:
  """The two-level dict, arrays instead of what stood in for them."""

  def items(level: Any):
    if type(level) is not dict:
      raise ValueError(f"a {type(level).__name__} where weights should be")
    for key, value in level.items():
      if type(key) is not str:
        raise ValueError(f"a name that is a {type(key).__name__}")
      yield key, value

  def array(leaf: Any) -> np.ndarray:
    if type(leaf) is not _Array or leaf.value is None:
      raise ValueError(f"a {type(leaf).__name__} where an array should be")
    return leaf.value.astype(np.float32, copy=False)

  if not tree:
    raise ValueError("nothing in it")
  return {
    module: {name: array(leaf) for name, leaf in items(values)}
    for module, values in items(tree)
  }
