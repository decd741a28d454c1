"""A network as an ONNX graph, for runtimes that know nothing of JAX.

Written layer by layer from the plan. The general converter that is kept up
(jax2onnx) was tried first: its newest version for Python 3.11 prints tracebacks
of plugins that JAX 0.10.2 broke, brings fourteen packages, and gave F0 a graph
with 366 transpositions. This one has 217 nodes in all, because the gains of the
activations are multiplied into the kernels after them.

Shapes: images [N, size, size, 3] as everywhere; inside [N, C, H, W].
"""

import json
from typing import Any

import numpy as np

from nfnets import layers, models
from nfnets.card import Card
from nfnets.errors import InputError
from nfnets.models.plan import Block, Conv, Plan

_OPSET = 20  # The first that has Gelu.
_MOST_BYTES = 2**31 - 2**20  # What a protocol buffer can hold.

# (operator, attributes); the others take two lines in `_Graph.activate`.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
  "celu": ("Celu", {}),
  "elu": ("Elu", {}),
  "gelu": ("Gelu", {"approximate": "tanh"}),
  "gelu_exact": ("Gelu", {"approximate": "none"}),
  "identity": ("Identity", {}),
  "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
  "relu": ("Relu", {}),
  "selu": ("Selu", {}),
  "sigmoid": ("Sigmoid", {}),
  "soft_sign": ("Softsign", {}),
  "softplus": ("Softplus", {}),
  "tanh": ("Tanh", {}),
}


def build(params: Any, card: Card) -> Any:
  """An ONNX model.

  Input `images`: uint8 [N, size, size, 3], RGB, resized as the card says.
  Outputs `logits` and `probabilities`, float32 [N, classes]. The card is in
  the model's metadata, as JSON under `nfnets`.

  Args:
    params: Weights, not folded.
    card: What they are.

  Raises:
    InputError: without the `onnx` package, or for weights over two gigabytes.
  """
  try:
    import onnx
  except ImportError:
    raise InputError(
      "ONNX needs the package onnx: pip install 'nfnets[onnx]'"
    ) from None
  model = card.make_model()
  if 4 * model.count_params() > _MOST_BYTES:
    raise InputError(
      f"{model.name} has {4 * model.count_params() / 2**30:.2f} GiB of "
      "weights, an ONNX file holds 2: export them as safetensors"
    )
  _, weights = models.fold(model, params)
  graph = _Graph(onnx, model.plan, weights)
  size, num_classes = card.image_size, model.num_classes

  x = graph.add("Cast", ["images"], to=onnx.TensorProto.FLOAT)
  x = graph.add("Sub", [x, graph.constant(card.mean)])
  x = graph.add("Div", [x, graph.constant(card.std)])
  x = graph.add("Transpose", [x], perm=[0, 3, 1, 2])
  x = graph.network(x, size)
  graph.add("Identity", [x], output="logits")
  graph.add("Softmax", ["logits"], output="probabilities", axis=-1)

  tensor = onnx.helper.make_tensor_value_info
  proto = onnx.helper.make_model(
    onnx.helper.make_graph(
      graph.nodes,
      card.model,
      [tensor("images", onnx.TensorProto.UINT8, ["N", size, size, 3])],
      [
        tensor(name, onnx.TensorProto.FLOAT, ["N", num_classes])
        for name in ("logits", "probabilities")
      ],
      graph.constants,
    ),
    opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
    producer_name="nfnets",
    ir_version=9,
  )
  entry = proto.metadata_props.add()
  entry.key, entry.value = "nfnets", json.dumps(card._asdict())
  return proto


class _Graph:
  """Nodes and constants, in the order in which they were added."""

  def __init__(self, onnx: Any, plan: Plan, weights: Any):
    self._onnx, self._plan, self._weights = onnx, plan, weights
    self._gain = layers.GAINS[plan.activation]
    self.nodes: list[Any] = []
    self.constants: list[Any] = []

  def add(
    self, operator: str, inputs: list[str], output: str = "", **attributes
  ) -> str:
    """Adds a node; returns the name of its output."""
    output = output or f"{operator.lower()}_{len(self.nodes)}"
    self.nodes.append(
      self._onnx.helper.make_node(operator, inputs, [output], **attributes)
    )
    return output

  def constant(self, value: Any, dtype: Any = np.float32) -> str:
    name = f"constant_{len(self.constants)}"
    value = np.ascontiguousarray(np.asarray(value, dtype))
    self.constants.append(self._onnx.numpy_helper.from_array(value, name))
    return name

  def network(self, x: str, size: int) -> str:
    """Normalised images -> logits."""
    plan = self._plan
    for i, conv in enumerate(plan.stem):
      x = self.conv(self.activate(x) if i else x, conv, "", size, bool(i))
      size = -(-size // conv.stride)
    if plan.has_stem_pool:
      pads = self._pads(size, 3, 2)
      x = self.add(
        "MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=pads
      )
      size = -(-size // 2)
    for block in plan.blocks:
      x = self.block(x, block, size)
      size = -(-size // block.stride)
    if plan.final_conv is not None:
      x = self.conv(x, plan.final_conv, "", size, False)
    x = self.add("GlobalAveragePool", [self.activate(x)])
    x = self.add("Flatten", [x])
    linear = self._weights[f"{plan.name}/~/linear"]
    w = self.constant(self._gain * linear["w"])
    return self.add("Gemm", [x, w, self.constant(linear["b"])])

  def block(self, x: str, block: Block, size: int) -> str:
    """`shortcut + alpha * skip_gain * f(act(x) * beta)`."""
    path = f"{block.name}/~/"
    gate, shortcut = block.attention, x
    skip_gain = self._weights[f"{self._plan.name}/~/{block.name}"]["skip_gain"]
    scale = float(self._plan.alpha * skip_gain)
    out = self.activate(x)

    if block.shortcut is not None:
      pooled = out
      if block.is_pooled and block.stride > 1:
        pooled = self.add(
          "AveragePool",
          [out],
          kernel_shape=[2, 2],
          strides=[2, 2],
          ceil_mode=1,
          count_include_pad=0,
        )
      shortcut = self.conv(
        pooled, block.shortcut, path, size, True, scale=block.beta
      )

    for i, conv in enumerate(block.convs):
      is_last = i == len(block.convs) - 1
      if is_last and gate is not None and gate.is_in_middle:
        out = self.attend(out, block, 2.0)
      out = self.activate(out) if i else out
      out = self.conv(
        out, conv, path, size, True, scale=1.0 if i else block.beta
      )
      size = -(-size // conv.stride)
    if gate is not None and not gate.is_in_middle:
      out = self.attend(out, block, 2.0 * scale)
    else:
      out = self.add("Mul", [out, self.constant(scale)])
    return self.add("Add", [out, shortcut])

  def conv(
    self,
    x: str,
    conv: Conv,
    path: str,
    size: int,
    is_activated: bool,
    *,
    scale: float = 1.0,
  ) -> str:
    """`is_activated`: whether the gain of an activation is still to come."""
    module = self._weights[f"{self._plan.name}/~/{path}{conv.name}"]
    scale *= self._gain if is_activated else 1.0
    w = self.constant(scale * module["w"].transpose(3, 2, 0, 1))
    return self.add(
      "Conv",
      [x, w, self.constant(module["bias"])],
      kernel_shape=[conv.kernel_size] * 2,
      strides=[conv.stride] * 2,
      pads=self._pads(size, conv.kernel_size, conv.stride),
      group=conv.groups,
    )

  def attend(self, x: str, block: Block, scale: float) -> str:
    """`scale * gate(x) * x`."""
    path = f"{self._plan.name}/~/{block.name}/~/"
    gate = self.add("GlobalAveragePool", [x])  # [N, C, 1, 1]
    if block.attention.kind == "eca":
      taps = self._weights[f"{path}eca"]["w"]
      half = len(taps) // 2
      gate = self.add("Squeeze", [gate, self.constant([3], np.int64)])
      gate = self.add("Transpose", [gate], perm=[0, 2, 1])  # [N, 1, C]
      w = self.constant(taps[None, None])
      gate = self.add("Conv", [gate, w], pads=[half, half])
      gate = self.add("Transpose", [gate], perm=[0, 2, 1])
      gate = self.add("Unsqueeze", [gate, self.constant([3], np.int64)])
    else:
      for i, suffix in enumerate(("", "_1")):
        linear = self._weights[f"{path}squeeze_excite/~/linear{suffix}"]
        w = self.constant(linear["w"].T[:, :, None, None])
        gate = self.add("Relu", [gate]) if i else gate
        gate = self.add("Conv", [gate, w, self.constant(linear["b"])])
    gate = self.add("Sigmoid", [gate])
    gate = self.add("Mul", [gate, self.constant(scale)])
    return self.add("Mul", [x, gate])

  def activate(self, x: str) -> str:
    """The nonlinearity without its gain."""
    name = self._plan.activation
    if name == "silu":
      return self.add("Mul", [x, self.add("Sigmoid", [x])])
    if name == "relu6":
      return self.add("Clip", [x, self.constant(0.0), self.constant(6.0)])
    if name == "log_sigmoid":
      minus = self.add("Neg", [x])
      return self.add("Neg", [self.add("Softplus", [minus])])
    operator, attributes = _ACTIVATIONS[name]
    return self.add(operator, [x], **attributes)

  def _pads(self, size: int, kernel_size: int, stride: int) -> list[int]:
    if self._plan.padding == "symmetric":
      return [kernel_size // 2] * 4
    num = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return [num // 2] * 2 + [num - num // 2] * 2
