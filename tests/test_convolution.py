"""Convolution: every form computes what XLA's own does, gradients too."""

import re
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nfnets import convolution, rowwise
from nfnets.errors import InputError


def _normal(seed, *shape, dtype=np.float32):
  # NumPy's, here and where results are compared: JAX compiles anew for a shape.
  rng = np.random.default_rng(seed)
  drawn = rng.standard_normal(shape, dtype=np.float32)
  return jnp.asarray(drawn.astype(dtype))


class Case(NamedTuple):
  """A convolution: images, stride, padding, kernel, channels of groups."""

  num: int
  height: int
  width: int
  stride: int
  padding: str
  kernel: int
  groups: int
  width_of_groups: int
  expansion: int
  form: str


# Sizes reach over both thresholds of `products`: 1,600 pixels of all images,
# and 2,304 of those that are computed at once.
CASES = strategies.builds(
  Case,
  num=strategies.sampled_from((1, 2, 6)),
  height=strategies.integers(1, 34),
  width=strategies.integers(1, 34),
  stride=strategies.sampled_from((1, 2, 3)),
  padding=strategies.sampled_from(("same", "symmetric")),
  kernel=strategies.sampled_from((1, 3, 5)),
  groups=strategies.sampled_from((1, 2, 3)),
  width_of_groups=strategies.sampled_from((1, 2, 3, 16)),
  expansion=strategies.sampled_from((1, 2)),
  form=strategies.sampled_from(sorted(convolution.FORMS)),
)


@pytest.fixture
def set_amx(monkeypatch):
  """Lets this machine seem to have AMX, or not."""
  return lambda has: monkeypatch.setattr(rowwise, "is_fast", lambda: has)


def _check_next_to_xlas_own(case, dtype, *, rtol, atol):
  """Value and gradients; `atol` is a share of the largest number."""
  num, height, width, stride, padding, kernel, groups, *_ = case
  channels = groups * case.width_of_groups
  outputs = case.expansion * channels
  shape = (num, -(-height // stride), -(-width // stride), outputs)
  inputs = (
    _normal(0, num, height, width, channels, dtype=dtype),
    _normal(1, kernel, kernel, case.width_of_groups, outputs, dtype=dtype),
    _normal(2, *shape, dtype=dtype),
  )

  def value_and_gradients(x, w, seen, form):
    convolve = lambda x, w: convolution.conv2d(
      x, w, stride=stride, groups=groups, padding=padding, form=form
    )
    out, back = jax.vjp(convolve, x, w)
    return out, *back(seen)

  run = jax.jit(value_and_gradients, static_argnums=3)
  ours = jax.device_get(run(*inputs, case.form))
  inputs = (x.astype(np.float32) for x in jax.device_get(inputs))
  exact = jax.device_get(run(*inputs, "xla"))
  assert ours[0].shape == shape
  for a, b in zip(ours, exact, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(
      a.astype(np.float32), b, rtol=rtol, atol=atol * abs(b).max()
    )


@hypothesis.given(CASES)
@hypothesis.example(Case(2, 34, 33, 1, "same", 3, 2, 3, 2, "products"))
@hypothesis.example(Case(4, 24, 23, 1, "same", 3, 1, 6, 2, "products"))
@hypothesis.example(Case(2, 8, 9, 2, "symmetric", 3, 3, 2, 1, "products"))
@hypothesis.example(Case(2, 9, 8, 1, "symmetric", 3, 2, 64, 1, "products"))
@hypothesis.example(Case(2, 33, 34, 1, "same", 3, 2, 16, 2, "products"))
@hypothesis.example(Case(6, 26, 26, 1, "same", 3, 2, 16, 2, "products"))
@hypothesis.example(Case(6, 26, 26, 1, "same", 3, 2, 16, 1, "products"))
@hypothesis.example(Case(1, 1, 1, 2, "same", 3, 2, 4, 1, "products"))
@hypothesis.example(Case(2, 2, 2, 2, "symmetric", 3, 2, 4, 1, "products"))
@hypothesis.example(Case(6, 34, 33, 2, "symmetric", 5, 2, 16, 2, "products"))
@hypothesis.example(Case(2, 12, 16, 2, "same", 3, 1, 3, 2, "cudnn"))
@hypothesis.example(Case(1, 8, 6, 2, "same", 3, 1, 2, 2, "cudnn"))
@hypothesis.example(Case(1, 8, 7, 2, "same", 3, 1, 3, 2, "cudnn"))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_forms_are_equal(case):
  # Sums of up to 70,000 products, in another order.
  _check_next_to_xlas_own(case, jnp.float32, rtol=1e-4, atol=1e-5)


# A result has 8 bits; sums are of float32, or rounded now and then.
ROUNDING = {"rtol": 2**-6, "atol": 2**-6}


@pytest.mark.parametrize(
  "form, has_amx",
  [(form, True) for form in sorted(convolution.FORMS)] + [("products", False)],
)
@pytest.mark.parametrize("size", [8, 20, 32])
def test_forms_in_bfloat16_are_equal_to_its_rounding(
  form, has_amx, size, set_amx
):
  set_amx(has_amx)
  case = Case(2, size, size, 1, "same", 3, 2, 4, 1, form)
  _check_next_to_xlas_own(case, jnp.bfloat16, **ROUNDING)


def test_cudnn_gets_channels_by_eights(monkeypatch):
  case = Case(2, 20, 16, 2, "same", 3, 1, 3, 4, "cudnn")
  _check_next_to_xlas_own(case, jnp.bfloat16, **ROUNDING)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  x, w = jnp.zeros((2, 20, 16, 3)), jnp.zeros((3, 3, 3, 12))
  convolve = lambda x, w: convolution.conv2d(x, w, stride=2)
  jaxpr = jax.make_jaxpr(convolve)(x, w)
  (convolved,) = (
    equation
    for equation in jaxpr.eqns
    if equation.primitive is jax.lax.conv_general_dilated_p
  )
  assert [v.aval.shape for v in convolved.invars] == [
    (2, 10, 8, 16),
    (2, 2, 16, 12),
  ]


@hypothesis.given(CASES)
@hypothesis.example(Case(2, 32, 31, 1, "same", 3, 2, 4, 1, "products"))
@hypothesis.example(Case(2, 32, 32, 2, "same", 3, 2, 4, 1, "products"))
@hypothesis.example(Case(2, 17, 18, 2, "symmetric", 3, 1, 3, 2, "products"))
@hypothesis.example(Case(1, 16, 15, 2, "same", 5, 2, 4, 2, "products"))
@hypothesis.example(Case(3, 7, 6, 1, "same", 1, 1, 8, 1, "products"))
@hypothesis.example(Case(1, 9, 8, 2, "same", 1, 2, 8, 1, "products"))
@hypothesis.example(Case(1, 1, 1, 2, "same", 3, 2, 4, 1, "products"))
@hypothesis.example(Case(2, 2, 2, 2, "symmetric", 3, 2, 4, 1, "products"))
@hypothesis.settings(
  max_examples=8,
  deadline=None,
  derandomize=True,
  # All examples find the same machine.
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_products_in_bfloat16_are_equal_to_its_rounding(set_amx, case):
  set_amx(True)
  case = case._replace(form="products")
  _check_next_to_xlas_own(case, jnp.bfloat16, **ROUNDING)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_second_derivatives_are_those_of_xlas_own(dtype, set_amx):
  """Of kernels that stay float32, as parameters do."""
  set_amx(True)
  x, w = _normal(0, 2, 8, 8, 8, dtype=dtype), _normal(1, 3, 3, 4, 8) / 6

  def loss(w, x, form):
    out = convolution.conv2d(x, w, groups=2, form=form)
    return jnp.sum(jnp.tanh(out.astype(jnp.float32)))

  def squares_of_slopes(w, x, form):
    slopes = jax.grad(loss, (0, 1))(w, x, form)
    return sum(jnp.sum(slope.astype(jnp.float32) ** 2) for slope in slopes)

  curvatures = jax.jit(jax.grad(squares_of_slopes, (0, 1)), static_argnums=2)
  ours = jax.device_get(curvatures(w, x, "products"))
  assert [a.dtype for a in ours] == [jnp.float32, dtype]
  exact = jax.device_get(curvatures(w, _normal(0, 2, 8, 8, 8), "xla"))
  error = 0.03 if dtype == jnp.bfloat16 else 1e-5
  for a, b in zip(ours, exact, strict=True):
    np.testing.assert_allclose(
      a.astype(np.float32), b, atol=error * abs(b).max()
    )


# Kernel gradients of these are products, in parts and at once, or convolutions.
@pytest.mark.parametrize("num, size", [(2, 48), (1, 42), (2, 8)])
def test_gradients_in_float64_are_as_exact(num, size):
  with jax.enable_x64(True):
    x = _normal(0, num, size, size, 32, dtype=np.float64)
    w = _normal(1, 3, 3, 16, 32, dtype=np.float64)
    gradients = lambda form: jax.grad(
      lambda w, x: jnp.sum(convolution.conv2d(x, w, groups=2, form=form) ** 2),
      (0, 1),
    )
    run = lambda form: jax.device_get(jax.jit(gradients(form))(w, x))
    for a, b in zip(run("products"), run("xla"), strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13 * abs(b).max())


@pytest.mark.parametrize("form", sorted(convolution.FORMS))
@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_results_have_the_dtype_of_the_images(dtype, kernel, groups, form):
  x, w = (
    jnp.ones((2, 4, 4, 8), dtype),
    jnp.ones((kernel, kernel, 8 // groups, 4)),
  )
  convolve = lambda x, w: convolution.conv2d(x, w, groups=groups, form=form)
  assert jax.eval_shape(convolve, x, w).dtype == dtype


@pytest.mark.parametrize("form", sorted(convolution.FORMS))
@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 2)])
def test_of_no_images_there_are_no_results(kernel, groups, form):
  x, w = jnp.ones((0, 48, 48, 32)), jnp.ones((kernel, kernel, 32 // groups, 32))

  def loss(w, x):
    out = convolution.conv2d(x, w, groups=groups, form=form)
    return jnp.sum(out), out

  (dw, dx), out = jax.grad(loss, (0, 1), has_aux=True)(w, x)
  assert out.shape == dx.shape == x.shape
  np.testing.assert_array_equal(dw, 0)


@pytest.mark.parametrize(
  # A grouped one; a loop over images alone.
  "groups, size",
  [(2, 8), (1, 40)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_several_devices_give_the_gradients_of_one(
  dtype, groups, size, set_amx
):
  """Where JAX checks what varies between them, as it does by default."""
  set_amx(True)
  x = _normal(0, 4, size, size, 32, dtype=dtype)
  w = _normal(1, 3, 3, 32 // groups, 32)

  def loss(w, x):
    out = convolution.conv2d(x, w, groups=groups, form="products")
    return jnp.sum(jnp.tanh(out.astype(jnp.float32)))

  gradient = lambda loss: jax.value_and_grad(loss, (0, 1))
  run = lambda loss: jax.device_get(jax.jit(gradient(loss))(w, x))
  of_all = jax.shard_map(
    lambda w, x: jax.lax.psum(loss(w, x), "data"),
    mesh=jax.sharding.Mesh(jax.devices()[:2], "data"),
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a.astype(np.float32), b, rtol=2**-7, atol=1e-5 * abs(b).max()
    ),
    run(of_all),
    jax.tree.map(lambda b: b.astype(np.float32), run(loss)),
  )


@pytest.mark.parametrize(
  "changes, is_forward, is_backward",
  [
    ({}, True, True),
    ({"groups": 1}, True, True),
    ({"stride": 2}, False, False),
    ({"size": 8}, False, True),
    ({"size": 7}, False, False),
    ({"channels": 64}, False, False),
    ({"channels": 64, "size": 20}, False, False),
    ({"channels": 64, "size": 20, "num": 4}, True, True),
    ({"channels": 16, "size": 20, "num": 4}, False, False),
    ({"dtype": jnp.bfloat16, "has_amx": True}, False, False),
    ({"dtype": jnp.bfloat16, "has_amx": False}, True, True),
    ({"form": "split"}, False, False),
  ],
)
def test_products_take_winograd_where_it_is_faster(
  changes, is_forward, is_backward, set_amx
):
  case = {"num": 1, "size": 12, "channels": 128, "dtype": jnp.float32}
  case |= {"groups": 2, "stride": 1, "form": "products"} | changes
  set_amx(case.pop("has_amx", False))
  num, size, channels, dtype = (
    case.pop(key) for key in ("num", "size", "channels", "dtype")
  )
  x = jnp.ones((num, size, size, channels), dtype)
  w = jnp.ones((3, 3, channels // case["groups"], channels), dtype)
  convolve = lambda x, w: convolution.conv2d(x, w, **case)
  dy = jax.eval_shape(convolve, x, w)
  gradients = lambda x, w, dy: jax.vjp(convolve, x, w)[1](dy)
  for function, inputs, is_winograd in (
    (convolve, (x, w), is_forward),
    (gradients, (x, w, dy), is_backward),
  ):
    program = jax.jit(function).lower(*inputs).as_text()
    assert ("batching_dims" in program) == is_winograd  # Six positions.
    if dtype == jnp.float32:
      assert ("stablehlo.convolution" not in program) == is_winograd


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="`products` are for the CPU"
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 40, 64])
@pytest.mark.parametrize("channels", [8, 128])
def test_loops_keep_to_the_layout_that_is_fast_on_cpu(channels, size, stride):
  w = _normal(1, 3, 3, channels // 2, channels)
  x = _normal(0, 3, 2, size, size, channels)

  def loss(w, x):
    out = convolution.conv2d(x, w, stride=stride, groups=2, form="products")
    return jnp.sum(out**2)

  def sum_of_gradients(w, x):
    add = lambda sums, x: (
      jax.tree.map(jnp.add, sums, jax.grad(loss, (0, 1))(w, x)),
      None,
    )
    return jax.lax.scan(add, (w, x[0]), x)[0]

  program = jax.jit(sum_of_gradients).lower(w, x).compile().as_text()
  # XLA rewrites others into this one, but not inside of a loop.
  layouts = set(re.findall(r"dim_labels=([\w>-]+)", program))
  assert layouts <= {"b01f_01io->b01f"}
  assert layouts or (stride == 1 and channels == 128)  # Products alone.


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="`products` are for the CPU"
)
@pytest.mark.parametrize("size, groups", [(16, 2), (48, 1)])
def test_equal_loops_begin_with_no_constant_of_which_each_has_a_copy(
  size, groups
):
  x = _normal(0, 4, size, size, 64)
  kernels = _normal(1, 3, 3, 3, 64 // groups, 64)

  def loss(kernels, x):
    for w in kernels:
      x = jnp.tanh(convolution.conv2d(x, w, groups=groups, form="products"))
    return jnp.sum(x**2)

  program = (
    jax.jit(jax.grad(loss, (0, 1))).lower(kernels, x).compile().as_text()
  )
  assert " while(" in program  # Over groups, or over parts of the images.
  assert " copy(%" in program  # How XLA prints one.
  copied = re.findall(r" = f32\[([\d,]+)\]\S* copy\(%\S*broadcast", program)
  # (The sum over parts does begin with zeros: the kernel's, of groups = 1.)
  written = [x.shape] if groups == 1 else [x.shape, kernels[0].shape]
  assert not {",".join(map(str, shape)) for shape in written} & set(copied)


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="`products` are for the CPU"
)
@pytest.mark.parametrize("stride, groups", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_is_multiplied_as_such_on_cpus_with_amx(
  kernel, stride, groups, set_amx
):
  set_amx(True)
  x = _normal(0, 2, 16, 16, 32, dtype=jnp.bfloat16)
  w = _normal(1, kernel, kernel, 32 // groups, 32, dtype=jnp.bfloat16)

  def value_and_gradients(x, w):
    convolve = lambda x, w: convolution.conv2d(
      x, w, stride=stride, groups=groups, form="products"
    )
    out, back = jax.vjp(convolve, jnp.tanh(x), jnp.tanh(w))
    return out, *back(jnp.tanh(out))

  program = jax.jit(value_and_gradients).lower(x, w).compile().as_text()
  assert " convolution(" not in program
  num = 0
  for computation in program.split("\n\n"):
    for operands in re.findall(r" dot\((\S+), (\S+)\)", computation):
      num += 1
      for name in operands:
        # XLA makes others float32 first, which are multiplied more slowly.
        assert f"{name} = bf16[" in computation
  assert num >= 3 * kernel - (stride > 1)


def test_a_portable_program_has_the_form_of_each_platform():
  x, w = _normal(0, 2, 8, 8, 8), _normal(1, 3, 3, 2, 12)
  convolve = jax.jit(
    lambda x, w: convolution.conv2d(x, w, groups=4, form="portable")
  )
  grouped = "feature_group_count = 4"
  for platform, is_grouped in (("cpu", False), ("cuda", True), ("tpu", True)):
    exported = jax.export.export(convolve, platforms=[platform])(x, w)
    assert (grouped in exported.mlir_module()) == is_grouped, platform


def test_a_portable_stem_takes_batches_of_any_size():
  """On GPUs its images have channels by eights."""
  (num,) = jax.export.symbolic_shape("n")
  x, w = _normal(0, 5, 12, 16, 3), _normal(1, 3, 3, 3, 4)
  shape = jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype)
  convolve = lambda form: jax.jit(
    lambda x, w: convolution.conv2d(x, w, stride=2, form=form)
  )
  kernels = {"cpu": "3x3x3x4", "cuda": "2x2x16x4", "tpu": "3x3x3x4"}
  for platform, kernel in kernels.items():
    export = jax.export.export(convolve("portable"), platforms=[platform])
    assert f"tensor<{kernel}xf32>" in export(shape, w).mlir_module(), platform
  exported = jax.export.export(convolve("cudnn"))(shape, w)
  np.testing.assert_allclose(
    exported.call(x, w), convolve("xla")(x, w), atol=1e-5
  )


@pytest.mark.parametrize("size, channels", [(48, 16), (16, 64)])
def test_a_portable_program_takes_batches_of_any_size(size, channels):
  """Also where images come one by one, as large ones do."""
  (num,) = jax.export.symbolic_shape("num")
  x, w = _normal(0, 3, size, size, channels), _normal(1, 3, 3, channels, 16)
  shape = jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype)
  convolve = jax.jit(lambda x, w: convolution.conv2d(x, w, form="portable"))
  exported = jax.export.export(convolve, platforms=["cpu", "cuda"])(shape, w)
  np.testing.assert_allclose(
    exported.call(x, w),
    convolution.conv2d(x, w, form="xla"),
    rtol=1e-4,
    atol=1e-4,
  )


def test_an_unknown_form_is_told_the_known_ones():
  with pytest.raises(InputError, match=r"form of convolution.*winograd.*xla"):
    convolution.conv2d(
      jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 1, 2, 2)), form="winograd"
    )


@pytest.mark.parametrize("form", sorted(convolution.FORMS))
@pytest.mark.parametrize(
  "channels, kernel, groups",
  [(7, (3, 3, 3, 8), 2), (8, (3, 3, 4, 7), 2), (8, (1, 1, 4, 8), 1)],
)
def test_channels_that_groups_do_not_divide_are_told(
  channels, kernel, groups, form
):
  given = rf"{channels} channels in {groups} groups .*{re.escape(str(kernel))}"
  with pytest.raises(InputError, match=given):
    convolution.conv2d(
      jnp.zeros((1, 4, 4, channels)),
      jnp.zeros(kernel),
      groups=groups,
      form=form,
    )
