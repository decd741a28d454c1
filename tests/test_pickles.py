"""Pickled checkpoints: the released form is read, everything else refused."""

import builtins
import os
import pickle
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_params, param_shapes
from haiku._src import data_structures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfnets import models, pickles, pretrained
from nfnets.errors import InputError


class _Call:
  """Pickles as a call of a function by its name."""

  def __init__(self, function, *args):
    self._call = function, args

  def __reduce__(self):
    return self._call


def _released(params):
  """Wrapped in the classes that Haiku wrapped the released trees in."""
  wrap = lambda content: _Call(data_structures.FlatMapping, content)
  return wrap({module: wrap(values) for module, values in params.items()})


def _dump(tree, protocol=4):
  """As NumPy of 2021 would have written it, where that can be told apart."""
  data = pickle.dumps(tree, protocol)
  if protocol < 4:
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
  return data


TREE = {
  "net/conv": {
    "w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "gain": np.array(0.5, np.float32),
  },
  "net/linear": {"w": np.asfortranarray(np.ones((2, 3), np.float16))},
}


def _load(tmp_path, data):
  path = tmp_path / "F0_haiku.npz"
  path.write_bytes(data)
  return pickles.load(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_released_tree_is_read(tmp_path, protocol):
  found = _load(tmp_path, _dump(_released(TREE), protocol))
  jax.tree.map(np.testing.assert_array_equal, found, TREE)


@pytest.mark.parametrize("protocol", [4, 5])
def test_arrays_of_jax_and_of_the_newest_protocol_are_read(tmp_path, protocol):
  tree = jax.tree.map(jnp.asarray, TREE) if protocol == 4 else TREE
  transposed = TREE["net/conv"]["w"].transpose(1, 0, 2)
  tree = tree | {"net/turned": {"w": transposed}}
  found = _load(tmp_path, pickle.dumps(tree, protocol))
  expected = TREE | {"net/turned": {"w": transposed}}
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_room_is_made_for_the_bytes_that_are_there(tmp_path):
  data = pickle.PROTO + b"\5" + pickle.BYTEARRAY8
  data += (1 << 50).to_bytes(8, "little") + b"few" + pickle.STOP
  with pytest.raises(InputError, match=r"is damaged or no checkpoint"):
    _load(tmp_path, data)


def test_a_tree_of_no_published_network_is_refused(tmp_path):
  path = tmp_path / "F0_haiku.npz"
  path.write_bytes(_dump(_released(TREE)))
  with pytest.raises(InputError, match=r"does not hold weights of .*missing"):
    pretrained.load(path)


def test_arrays_that_dill_wrote_are_read(tmp_path, monkeypatch):
  def _create_array(*unused):
    del unused

  dill = types.ModuleType("dill._dill")
  dill._create_array = _create_array
  _create_array.__module__ = "dill._dill"
  _create_array.__qualname__ = "_create_array"
  monkeypatch.setitem(sys.modules, "dill", types.ModuleType("dill"))
  monkeypatch.setitem(sys.modules, "dill._dill", dill)
  value = TREE["net/conv"]["w"]
  function, args, state = value.__reduce__()
  tree = {"net": {"w": _Call(_create_array, function, args, state, None)}}
  found = _load(tmp_path, _dump(tree))
  np.testing.assert_array_equal(found["net"]["w"], value)


@pytest.mark.slow
def test_the_whole_tree_of_f0(tmp_path):
  """The released file's content in kind: applied with no renaming."""
  model = models.make("nfnet_f0")
  params = draw_params(param_shapes(model))
  path = tmp_path / "anything.npz"
  path.write_bytes(_dump(_released(params)))
  found, card = pretrained.load_with_card(path)
  assert card.model == "nfnet_f0"
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, found, params)
  images = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)
  apply = jax.jit(lambda p: model.apply(p, {}, None, images)[0]["logits"])
  np.testing.assert_array_equal(apply(found), apply(params))


HOSTILE = {
  "os.system": lambda p: _Call(os.system, f"touch {p}"),
  "eval": lambda p: _Call(builtins.eval, f"open({str(p)!r}, 'w')"),
  "exec": lambda p: _Call(builtins.exec, f"open({str(p)!r}, 'w')"),
  "subprocess.check_call": lambda p: _Call(
    subprocess.check_call, ["touch", str(p)]
  ),
  "numpy.load": lambda p: _Call(np.load, str(p)),
  "getattr": lambda p: _Call(builtins.getattr, "x", "upper"),
  "bytearray": lambda p: _Call(bytearray, 1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_files_are_refused_by_what_they_ask_for(tmp_path, name, nested):
  touched = tmp_path / "touched"
  tree = HOSTILE[name](touched)
  if nested:
    tree = _released({"net": {"w": TREE["net/conv"]["w"], "b": tree}})
  with pytest.raises(pickles.RefusedError, match=r"asks for \w+\.\w+, which"):
    _load(tmp_path, pickle.dumps(tree))
  assert not touched.exists()


def _op(*parts):
  return b"\x80\x04" + b"".join(parts) + b"."


NDARRAY = b"cnumpy\nndarray\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
F4 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
OBJECT = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR"
HUGE = b"J\xff\xff\xff\x7f"  # 2147483647
DICT = b"chaiku._src.data_structures\nFlatMapping\n"


def _array(shape, dtype=F4, data=b"C\x04abcd"):
  """An array's reconstruction with a state of our choice."""
  return RECONSTRUCT + b"(tR(K\x01" + shape + dtype + b"\x89" + data + b"tb"


@pytest.mark.parametrize(
  "data",
  {
    "array by declared size": _op(NDARRAY, b"(", HUGE, HUGE, b"\x86tR"),
    "shape beyond its bytes": _op(_array(HUGE + HUGE + b"\x86")),
    "negative shape": _op(_array(b"J\xff\xff\xff\xff\x85")),
    "objects": _op(_array(b"K\x01\x85", dtype=OBJECT)),
    "bytes by declared size": _op(b"\x8e" + b"\xff" * 7 + b"\x7f"),
    "text by declared size": _op(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "frame by declared size": _op(b"\x95" + b"\xff" * 7 + b"\x7f"),
    "bytearray by declared size": _op(b"\x96" + b"\xff" * 7 + b"\x7f"),
    "memo by declared index": _op(b"}r\xff\xff\xff\x7f"),
    "long by declared size": _op(b"\x8b\xff\xff\xff\x7f"),
    "a changed function": _op(DICT, b"}X\x01\x00\x00\x00aK\x01sb"),
    "an extension": _op(b"\x82\x01"),
    "a reference outside": _op(b"X\x01\x00\x00\x00aQ"),
    "lists of lists of lists": _op(b"]", b"2(\x6c" * 64),
    "itself": _op(b"}q\x00X\x01\x00\x00\x00ah\x00s"),
    "no end": b"\x80\x04}",
    "nothing on the stack": b"\x80\x04.",
    "a number": _op(b"K\x01"),
    "an array that was never filled": _op(
      b"}X\x01\x00\x00\x00a}X\x01\x00\x00\x00b", RECONSTRUCT, b"(tRss"
    ),
  }.items(),
  ids=lambda item: item[0],
)
def test_bombs_and_other_damage_are_one_clear_line(tmp_path, data):
  with pytest.raises(
    InputError, match=r"F0_haiku.npz (is damaged|asks|chang|ref)"
  ):
    _load(tmp_path, data[1])
  # Nothing of the reader itself was changed on the way.
  assert not vars(pickles._dict)
  found = _load(tmp_path, _dump(_released(TREE)))
  assert found.keys() == TREE.keys()


@settings(
  deadline=None,
  max_examples=300,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_file_that_was_changed_anywhere_is_read_or_one_clear_line(
  tmp_path, data
):
  content = bytearray(_dump(_released(TREE), data.draw(st.integers(2, 4))))
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(2, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
  end = data.draw(st.integers(2, len(content)))
  try:
    found = _load(tmp_path, bytes(content[:end]))
  except InputError:
    return
  for leaf in jax.tree.leaves(found):
    assert leaf.dtype == np.float32
