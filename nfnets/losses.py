"""Cross-entropy with label smoothing, and top-k accuracy.

Shapes: N batch, K classes; logits [N, K] float32.
"""

import jax
import jax.numpy as jnp
import optax


def smooth(targets: jax.Array, amount: float) -> jax.Array:
  """Mixes label distributions [N, K] with the uniform one (all K classes)."""
  return (1 - amount) * targets + amount / targets.shape[-1]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy of each example [N], in nats; targets [N, K] sum to 1."""
  return optax.losses.softmax_cross_entropy(logits, targets)


def is_in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether each label [N] is among the k largest logits: float32 [N].

  Among equal logits the lower class comes first.
  """
  k = min(k, logits.shape[-1])
  _, best = jax.lax.top_k(logits, k)  # [N, k]
  return jnp.any(best == labels[:, None], axis=-1).astype(jnp.float32)
