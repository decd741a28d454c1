"""The network of a plan, and its residual block.

Shapes: N batch, H height, W width, C channels; images [N, H, W, 3].
"""

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets import layers
from nfnets.models.plan import Attention, Block, Conv, Plan


def _make_conv(conv: Conv, plan: Plan, *, is_folded: bool) -> layers.WSConv2D:
  return layers.WSConv2D(
    conv.channels,
    conv.kernel_size,
    stride=conv.stride,
    groups=conv.groups,
    padding=plan.padding,
    is_folded=is_folded,
    name=conv.name,
  )


def _make_attention(attention: Attention | None) -> hk.Module | None:
  if attention is None:
    return None
  if attention.kind == "eca":
    return layers.EfficientAttention(attention.size, name="eca")
  return layers.SqueezeExcite(attention.channels, attention.size)


class NFBlock(hk.Module):
  """`shortcut + alpha * skip_gain * f(x * beta)`, figure 1 of 2102.06171."""

  def __init__(self, block: Block, plan: Plan, *, is_folded: bool = False):
    super().__init__(name=block.name.rstrip("_0123456789"))
    self.block, self.alpha = block, plan.alpha
    self.activation = layers.ACTIVATIONS[plan.activation]
    make = lambda conv: _make_conv(conv, plan, is_folded=is_folded)
    self.convs = [make(conv) for conv in block.convs]
    self.shortcut = make(block.shortcut) if block.shortcut else None
    self.attention = _make_attention(block.attention)

  def __call__(
    self, x: jax.Array, *, is_training: bool
  ) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, in_channels] -> [N, H / stride, W / stride, channels].

    Also returns the mean channel variance of the residual branch, a scalar.
    """
    act, block = self.activation, self.block
    out = act(x) * block.beta

    shortcut = x
    if self.shortcut is not None:
      is_pooled = block.is_pooled and block.stride > 1
      shortcut = self.shortcut(layers.average_pool(out) if is_pooled else out)

    *convs, last = self.convs
    for i, conv in enumerate(convs):
      out = conv(act(out) if i else out)
    if block.attention is not None and block.attention.is_in_middle:
      out = self._attend(out)
    out = last(act(out))
    if block.attention is not None and not block.attention.is_in_middle:
      out = self._attend(out)
    residual_variance = jnp.mean(jnp.var(out.astype(jnp.float32), (0, 1, 2)))

    out = layers.stochastic_depth(
      out, block.stochdepth_rate, is_training=is_training
    )
    # SkipInit: every block starts as its shortcut.
    skip_gain = hk.get_parameter("skip_gain", (), jnp.float32, jnp.zeros)
    out = shortcut + out * (self.alpha * skip_gain).astype(out.dtype)
    return out, residual_variance

  def _attend(self, x: jax.Array) -> jax.Array:
    return x * self.attention(x) * 2  # 2: the gate starts near 1/2.


class Network(hk.Module):
  """Stem, blocks, head."""

  def __init__(self, plan: Plan, num_classes: int, *, is_folded: bool = False):
    super().__init__(name=plan.name)
    self.plan = plan
    self.activation = layers.ACTIVATIONS[plan.activation]
    make = lambda conv: _make_conv(conv, plan, is_folded=is_folded)
    self.stem = [make(conv) for conv in plan.stem]
    self.blocks = [
      NFBlock(block, plan, is_folded=is_folded) for block in plan.blocks
    ]
    self.final_conv = make(plan.final_conv) if plan.final_conv else None
    self.classifier = hk.Linear(
      num_classes,
      w_init=hk.initializers.RandomNormal(stddev=plan.classifier_std),
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
    x = images
    for i, conv in enumerate(self.stem):
      x = conv(self.activation(x) if i else x)
    if self.plan.has_stem_pool:
      x = layers.max_pool(x, self.plan.padding)
    if return_metrics:
      outputs.update(layers.signal_metrics(x, 0))
    if return_features:
      outputs["stem"] = x

    for i, block in enumerate(self.blocks):
      x, residual_variance = block(x, is_training=is_training)
      if return_metrics:
        outputs.update(layers.signal_metrics(x, i + 1))
        outputs[f"res_avg_var_{i}"] = residual_variance
      if return_features:  # The last block of a stage stays.
        outputs[f"stage{block.block.stage}"] = x

    x = self.activation(self.final_conv(x) if self.final_conv else x)
    if return_features:
      outputs["final"] = x
    pool = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, features]
    outputs["pool"] = pool
    if is_training and self.plan.drop_rate:
      pool = hk.dropout(hk.next_rng_key(), self.plan.drop_rate, pool)
    outputs["logits"] = self.classifier(pool)  # [N, num_classes]
    return outputs
