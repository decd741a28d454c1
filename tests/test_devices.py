"""Devices: what does not divide is refused with numbers that would."""

import jax
import numpy as np
import pytest

from nfnets import devices
from nfnets.errors import InputError


@pytest.mark.parametrize(
  ("batch_size", "num_devices", "accumulate", "message"),
  [
    (30, 4, 1, r"batch of 30 images .* 4 devices: .* multiple of 4.* 28 or 32"),
    (3, 8, 1, r"multiple of 8, such as 8$"),
    (12, 4, 2, r"4 devices x 2 accumulated .* multiple of 8, such as 8 or 16"),
  ],
)
def test_batch_that_does_not_divide(
  batch_size, num_devices, accumulate, message
):
  mesh = devices.make_mesh(num_devices)
  with pytest.raises(InputError, match=message):
    devices.check_batch_size(batch_size, mesh, accumulate)
  devices.check_batch_size(16, mesh, accumulate)


@pytest.mark.parametrize(
  ("num", "size", "parts"),
  [
    *((1, 192, 1), (14, 192, 1), (27, 192, 1), (32, 192, 2), (128, 192, 8)),
    *((8, 256, 1), (32, 256, 4), (37, 256, 1), (34, 256, 2), (4, 576, 4)),
    *((1024, 32, 1), (2048, 32, 2), (2, 800, 2)),
  ],
)
def test_large_batches_are_divided_on_a_cpu(monkeypatch, num, size, parts):
  assert devices.micro_batches(num, size) == parts
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert devices.micro_batches(num, size) == 1
  assert devices.images_at_once(size) is None


def test_more_devices_than_there_are():
  with pytest.raises(InputError, match=r"9 devices .* there are 8 \(cpu\)"):
    devices.make_mesh(9)
  with pytest.raises(InputError, match="1 to 8"):
    devices.make_mesh(0)


def test_replicated_copies_can_be_donated_without_losing_the_source():
  mesh = devices.make_mesh(4)
  source = np.arange(3.0, dtype=np.float32)
  copy = devices.replicate(source, mesh)
  double = jax.jit(lambda x: 2 * x, donate_argnums=0)(copy)
  np.testing.assert_array_equal(source, [0, 1, 2])
  np.testing.assert_array_equal(double, [0, 2, 4])


@pytest.mark.parametrize("num_devices", [1, 4])
def test_one_device_has_no_mean_to_take(num_devices):
  mesh = devices.make_mesh(num_devices)
  mean = devices.data_parallel(devices.mean, mesh, in_batch=(True,))
  values = np.arange(8.0, dtype=np.float32)
  parts = values.reshape(num_devices, -1)
  np.testing.assert_allclose(mean(values), parts.mean(axis=0))
  compiled = mean.lower(values).compile().as_text()
  assert ("all-reduce" in compiled) == (num_devices > 1)


def test_batches_are_split_on_their_first_dimension():
  mesh = devices.make_mesh(4)
  batch = devices.shard_batch(np.arange(8), mesh)
  shards = [np.asarray(s.data).tolist() for s in batch.addressable_shards]
  assert shards == [[0, 1], [2, 3], [4, 5], [6, 7]]
