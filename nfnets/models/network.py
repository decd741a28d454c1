"""The network of a plan, and its residual block.

Shapes: N batch, H height, W width, C channels; images [N, H, W, 3].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from nfnets import layers, space_to_depth
from nfnets.initial import Draw
from nfnets.models import plan as plans
from nfnets.models.plan import Attention, Block, Conv, Plan

# What a gradient keeps of the forward pass: everything; or the inputs of blocks
# or of stages, from which the rest is computed again.
REMATS = ("none", "blocks", "stages")

# On a CPU an evaluation computes as many images at once as make no more than so
# many numbers in a part of the network (7 MB), which its caches hold.
_NUMBERS_AT_ONCE = 1_800_000

# On a CPU equal blocks are compiled once in an evaluation. In training that may
# cost a few hundredths of the time, which pays where compilation is long, from
# so many blocks on (F2 has 36), and where blocks are computed again, as it is
# what saves memory then.
_BLOCKS_OF_DEEP = 32


class Execution(NamedTuple):
  """How a network is computed; what it computes does not depend on it."""

  is_folded: bool = False  # Its weights are standardised already.
  convolution: str | None = None  # Of convolution.FORMS; None: the fast one.
  remat: str = "none"  # Of REMATS.
  # Equal blocks are one loop, compiled once, rather than one after the other.
  is_scanned: bool = False
  # Trained in fewer arrays (`models.packed`); None: where the device is a GPU.
  is_packed: bool | None = None


def _make_conv(conv: Conv, plan: Plan, execution: Execution) -> layers.WSConv2D:
  return layers.WSConv2D(
    conv.channels,
    conv.kernel_size,
    stride=conv.stride,
    groups=conv.groups,
    padding=plan.padding,
    is_folded=execution.is_folded,
    form=execution.convolution,
    name=conv.name,
  )


def _make_attention(attention: Attention | None) -> hk.Module | None:
  if attention is None:
    return None
  if attention.kind == "eca":
    return layers.EfficientAttention(attention.size, name="eca")
  return layers.SqueezeExcite(attention.channels, attention.size)


class Drawn(NamedTuple):
  """What differs between blocks of one shape."""

  beta: Any  # See plan.Block; a scalar.
  keep: jax.Array | None  # [N], of stochastic depth; None: all are kept.


class NFBlock(hk.Module):
  """`shortcut + alpha * skip_gain * f(act(x) * beta)` (2102.06171, figure 1).

  Where the shape changes, the shortcut is a convolution of `act(x) * beta` too.
  """

  def __init__(self, block: Block, plan: Plan, execution: Execution):
    super().__init__(name=block.kind)
    self.block, self.alpha = block, plan.alpha
    self.activation = layers.ACTIVATIONS[plan.activation]
    make = lambda conv: _make_conv(conv, plan, execution)
    self.convs = [make(conv) for conv in block.convs]
    self.shortcut = make(block.shortcut) if block.shortcut else None
    self.attention = _make_attention(block.attention)

  def __call__(self, x: jax.Array, drawn: Drawn) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, in_channels] -> [N, H / stride, W / stride, channels].

    Also returns the mean channel variance of the residual branch, a scalar.
    """
    block = self.block
    act = self.activation
    out = (act(x) * jnp.asarray(drawn.beta, jnp.float32)).astype(x.dtype)

    shortcut = x
    if self.shortcut is not None:
      is_pooled = block.is_pooled and block.stride > 1
      shortcut = self.shortcut(
        layers.average_pool(out) if is_pooled else out, after=x
      )

    first, *convs, last = self.convs
    out = first(out, after=x)
    for conv in convs:
      out = conv(act(out), after=out)
    if block.attention is not None and block.attention.is_in_middle:
      out = (out * self._gate(out)).astype(out.dtype)
    out = last(act(out), after=out)

    # What scales the branch is one small factor, multiplied with it once.
    scale = 1.0
    if block.attention is not None and not block.attention.is_in_middle:
      scale = self._gate(out)
    residual_variance = jnp.mean(
      jnp.var((out * scale).astype(jnp.float32), (0, 1, 2))
    )
    if drawn.keep is not None:
      scale *= drawn.keep[:, None, None, None]
    # SkipInit: every block starts as its shortcut.
    skip_gain = hk.get_parameter("skip_gain", (), jnp.float32, jnp.zeros)
    scale *= self.alpha * skip_gain
    return shortcut + (out * scale).astype(x.dtype), residual_variance

  def _gate(self, x: jax.Array) -> jax.Array:
    return self.attention(x) * 2  # 2: the gate starts near 1/2.


class Network(hk.Module):
  """Stem, blocks, head."""

  def __init__(self, plan: Plan, num_classes: int, execution: Execution):
    super().__init__(name=plan.name)
    self.plan, self.execution = plan, execution
    self.activation = layers.ACTIVATIONS[plan.activation]
    make = lambda conv: _make_conv(conv, plan, execution)
    self.stem = [make(conv) for conv in plan.stem]
    self.blocks = [NFBlock(block, plan, execution) for block in plan.blocks]
    self.final_conv = make(plan.final_conv) if plan.final_conv else None
    self.classifier = hk.Linear(
      num_classes,
      w_init=Draw("normal", plan.classifier_std),
      name="linear",
    )

  def __call__(
    self,
    images: jax.Array,
    *,
    is_training: bool,
    return_metrics: bool = False,
    return_features: bool = False,
  ) -> dict[str, jax.Array]:
    """Classifies normalised images [N, H, W, 3], float32 or bfloat16.

    Returns:
      `logits` [N, num_classes] and `pool` [N, features], both float32. With
      `return_metrics` also the signal propagation of each block:
      `avg_sq_mean_i` and `avg_var_i` (0 is the stem), `res_avg_var_i`. With
      `return_features` also the outputs of `stem`, `stage1` ... and `final`
      (what is averaged into `pool`), each [N, H', W', C].
    """
    outputs = {}
    is_cut = not is_training and self._is_for_cpu()
    cut = _some_at_a_time if is_cut else lambda part, _: part
    stem = self._maybe_remat(self._run_stem, "blocks", "stages")
    x = cut(stem, self.plan.stem)(images)
    if return_metrics:
      outputs.update(layers.signal_metrics(x, 0))
    if return_features:
      outputs["stem"] = x

    drawn = self._draw(images.shape[0], is_training)
    for number, members in enumerate(plans.stages(self.plan), start=1):
      if return_metrics:
        for i in members:
          x, variance = self.blocks[i](x, drawn[i])
          outputs.update(layers.signal_metrics(x, i + 1))
          outputs[f"res_avg_var_{i}"] = variance
      else:
        stage = functools.partial(self._run_stage, members, is_training)
        stage = self._maybe_remat(stage, "stages")
        stage = functools.partial(stage, drawn=[drawn[i] for i in members])
        x = cut(stage, self.plan.blocks[members[0]].convs)(x)
      if return_features:
        outputs[f"stage{number}"] = x

    x = self.activation(self.final_conv(x) if self.final_conv else x)
    if return_features:
      outputs["final"] = x
    pool = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, features]
    outputs["pool"] = pool
    if is_training and self.plan.drop_rate:
      pool = hk.dropout(hk.next_rng_key(), self.plan.drop_rate, pool)
    outputs["logits"] = self.classifier(pool)  # [N, num_classes]
    return outputs

  def _run_stem(self, x: jax.Array) -> jax.Array:
    if (square := self._square_of_stem(x)) > 1:
      x = space_to_depth.squares(x, square)
    for i, conv in enumerate(self.stem):
      x = conv(self.activation(x) if i else x, after=x, square=square)
      square = max(1, square // conv.stride)
    if self.plan.has_stem_pool:
      x = layers.max_pool(x, self.plan.padding)
    return x

  def _square_of_stem(self, x: jax.Array) -> int:
    """Rows and columns that are one pixel there: on a TPU what become one."""
    square = math.prod(conv.stride for conv in self.stem)
    is_tpu = jax.default_backend() == "tpu" and not hk.running_init()
    is_chosen = self.execution.convolution is not None
    is_whole = not (x.shape[1] % square or x.shape[2] % square)
    return square if is_tpu and is_whole and not is_chosen else 1

  def _draw(self, num: int, is_training: bool) -> list[Drawn]:
    """For each block."""
    blocks = self.plan.blocks
    betas = np.array([block.beta for block in blocks], np.float32)
    keep_rates = [1 - block.stochdepth_rate for block in blocks]
    if not is_training:
      return [Drawn(beta, None) for beta in betas]
    keep = None
    if min(keep_rates) < 1:
      keep = layers.stochastic_depth(hk.next_rng_key(), keep_rates, num)
    return _rows(Drawn(betas, keep))

  def _run_stage(
    self,
    members: list[int],
    is_training: bool,
    x: jax.Array,
    drawn: list[Drawn],
  ) -> jax.Array:
    """Blocks one after the other; runs of equal ones as a loop or as calls."""
    drawn = dict(zip(members, drawn, strict=True))
    for run in plans.runs(self.plan, members):
      drawn_of_run = [drawn[i] for i in run]
      if len(run) > 1 and self.execution.is_scanned and not hk.running_init():
        x = self._scan(x, run, drawn_of_run)
      elif len(run) > 1 and self._is_better_compiled_once(is_training):
        x = self._call(x, run, drawn_of_run)
      else:
        for i in run:
          x, _ = self._maybe_remat(self.blocks[i], "blocks")(x, drawn[i])
    return x

  def _is_better_compiled_once(self, is_training: bool) -> bool:
    is_deep = len(self.plan.blocks) >= _BLOCKS_OF_DEEP
    is_better = is_deep or not is_training or self.execution.remat == "blocks"
    return is_better and self._is_for_cpu()

  def _call(
    self, x: jax.Array, run: list[int], drawn: list[Drawn]
  ) -> jax.Array:
    """Blocks that differ in their numbers alone, by calls of one function."""
    block = _compiled_once(self._as_function(run[0]))
    for i, drawn_of_one in zip(run, drawn, strict=True):
      x = block(_relative_params(self.blocks[i]), x, drawn_of_one)
    return x

  def _scan(
    self, x: jax.Array, run: list[int], drawn: list[Drawn]
  ) -> jax.Array:
    """Blocks that differ in their numbers alone, as one loop over them."""
    block = self._as_function(run[0])

    def body(x, inputs):
      params, drawn = inputs
      return block(params, x, drawn), None

    params = [_relative_params(self.blocks[i]) for i in run]
    is_stacked = not params[1]  # By models.stacked: the first block has all.
    together = lambda *leaves: jnp.stack(leaves)
    stacked = params[0] if is_stacked else jax.tree.map(together, *params)
    drawn = jax.tree.map(together, *drawn)
    return jax.lax.scan(body, x, (stacked, drawn))[0]

  def _as_function(self, i: int) -> Callable[..., jax.Array]:
    """A block, of its parameters by their names in it, x, and what is drawn.

    Apart from the network, where a module's parameters are its own: so that one
    function serves all blocks that are equal to this one.
    """
    block = self.plan.blocks[i]
    net = hk.transform(
      lambda x, drawn: NFBlock(block, self.plan, self.execution)(x, drawn)
    )

    def run(params, x, drawn):
      return net.apply(params, None, x, drawn)[0]

    return jax.checkpoint(run) if self.execution.remat == "blocks" else run

  def _is_for_cpu(self) -> bool:
    """Whether this is for a program, and one that may be made for a CPU alone.

    Not for one with a chosen form of convolution, as an export, which runs
    elsewhere too. Outside of `jax.jit` there is no program: a loop or a call
    would be compiled anew each time.
    """
    is_ours = self.execution.convolution is None and not hk.running_init()
    is_compiled = isinstance(jnp.zeros(()), jax.core.Tracer)
    return jax.default_backend() == "cpu" and is_ours and is_compiled

  def _maybe_remat(self, function: Any, *where: str) -> Any:
    """A part that is computed again for the gradient, where that is wanted."""
    if self.execution.remat not in where or hk.running_init():
      return function
    return hk.remat(function)


def _some_at_a_time(
  run: Callable[[jax.Array], jax.Array], convs: Sequence[Conv]
) -> Callable[[jax.Array], jax.Array]:
  """A part of the network that has these convolutions, as a loop over images.

  They come in parts that make `_NUMBERS_AT_ONCE` at most; images of zeros make
  the parts equal. All at once where they are no more, or any number.
  """

  def in_parts(x: jax.Array) -> jax.Array:
    num, *shape = x.shape
    stride = math.prod(conv.stride for conv in convs)
    channels = max(conv.channels for conv in convs)
    of_one = shape[0] * shape[1] / stride**2 * channels
    most = max(1, int(_NUMBERS_AT_ONCE / of_one))
    if not isinstance(num, int) or num <= most:
      return run(x)
    # Of parts not much smaller, the largest that leave least to be added.
    missing = lambda size: -num % size
    size = min(range(most, most // 2, -1), key=missing)
    pads = [(0, missing(size))] + [(0, 0)] * len(shape)
    out = jax.lax.map(run, jnp.pad(x, pads).reshape(-1, size, *shape))
    return out.reshape(-1, *out.shape[2:])[:num]

  return in_parts


def _compiled_once(
  block: Callable[[hk.Params, jax.Array, Drawn], jax.Array],
) -> Callable[[hk.Params, jax.Array, Drawn], jax.Array]:
  """The same function, which XLA compiles once for all calls in a program.

  What computes its gradient likewise, but some of it more than once where the
  whole stage is computed again. XLA takes calls of equal functions for one unit
  if they carry a mark, which JAX puts on what made a given array: forward that
  is the call that made the result, backward the one that made the gradient of
  x. (Where XLA ignores the mark, blocks are compiled one by one.)
  """
  marked = functools.partial(set_xla_metadata, compilation_unit="block")
  with_marked_gradient = jax.custom_vjp(lambda x: x)
  with_marked_gradient.defvjp(lambda x: (x, None), lambda _, dx: (marked(dx),))
  compiled = jax.jit(block)

  def run(params, x, drawn):
    return marked(compiled(params, with_marked_gradient(x), drawn))

  return run


def _rows(arrays: Any) -> list[Any]:
  """A tree of arrays as a list of trees, along the first axis.

  On CPU by a loop: what is cut from an array by its index, or is a constant,
  XLA makes a part of the operations that use it, so that they differ and each
  is compiled apart. On a GPU each turn of a loop would copy all rows.
  """
  (num,) = {len(array) for array in jax.tree.leaves(arrays)}
  row = lambda i: jax.tree.map(lambda array: array[i], arrays)
  if jax.default_backend() != "cpu":
    return [row(i) for i in range(num)]
  arrays = jax.tree.map(jnp.asarray, arrays)
  rows = [jax.tree.map(jnp.zeros_like, row(0))] * num
  return jax.lax.fori_loop(0, num, lambda i, rows: [*rows[1:], row(i)], rows)


def _relative_params(block: NFBlock) -> hk.Params:
  """A block's parameters by the names that it has outside of a network."""
  params: dict[str, dict[str, jax.Array]] = {}
  for path, value in block.params_dict().items():
    module, _, name = path.rpartition("/")
    module = block.block.kind + module.removeprefix(block.module_name)
    params.setdefault(module, {})[name] = value
  return params
