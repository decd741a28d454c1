"""The story of leaving: weights and programs that run without this package."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nfnets import models, onnx_graph, pretrained, runs, timm
from nfnets.augment import Normalization
from nfnets.card import Card
from nfnets.errors import InputError
from nfnets.files import check_keeps, check_output, local, unfinished
from nfnets.model_card import model_card
from nfnets.models import plan

# A StableHLO program is a flat buffer.
_MOST_BYTES = 2**31 - 2**24

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
  source: str | Path, out: str | Path, *, is_int8: bool = False
) -> list[Path]:
  """Writes weights, or a program with the weights inside, and a model card.

  Args:
    source: What `pretrained.load` takes.
    out: `.safetensors` or `.npz` (weights), `.stablehlo` (a program for
      `jax.export.deserialize`), `.onnx`.
    is_int8: See `pretrained.save`; of weights only.

  Returns:
    The files that were written.

  Raises:
    InputError: for another ending, or weights that nobody knows the network of.
  """
  out = Path(out)
  _check_out(out, WRITERS, source)
  write = WRITERS[out.suffix]
  if is_int8:
    if write is not pretrained.save:
      raise InputError(
        f"{out}: int8 is for files of weights (.safetensors, .npz); programs "
        "compute with float32"
      )
    write = functools.partial(write, is_int8=True)
  params, card = pretrained.load_with_known_card(source)
  card = card._replace(source=card.source or str(source))
  write(out, params, card)
  page = out.with_name(f"{out.name}.md")
  with unfinished(page) as partial:
    text = model_card(card, out, is_int8=is_int8)
    partial.write_text(text, encoding="utf-8")
  return [out, page]


def _check_out(out: Path, endings: Iterable[str], source: str | Path) -> None:
  """Raises for a file that cannot be written, or is one of the source's."""
  check_output(out, endings)
  path = Path(local(str(source)))
  check_keeps(out, [path, runs.newest_round(path) / "weights.safetensors"])


def save_stablehlo(path: Path, params: Any, card: Card) -> None:
  """Writes a self-contained program: uint8 images -> probabilities.

  It takes uint8 [N, size, size, 3] for any N and gives float32 [N, classes], on
  CPU, CUDA and TPU, each with the form of convolution that is fast there:

      program = jax.export.deserialize(bytearray(open(path, "rb").read()))
      probabilities = program.call(images)

  Raises:
    InputError: for weights of over two gigabytes.
  """
  portable = card.make_model(convolution="portable")
  model, weights = models.fold(portable, params)
  if 4 * model.count_params() > _MOST_BYTES:
    raise InputError(
      f"{model.name} has {4 * model.count_params() / 2**30:.2f} GiB of "
      "weights, a program can hold 2: export them as safetensors"
    )

  def classify(images: jax.Array) -> jax.Array:
    images = Normalization(card.mean, card.std)(images, jnp.float32)
    outputs, _ = model.apply(weights, {}, None, images)
    return jax.nn.softmax(outputs["logits"])

  (num,) = jax.export.symbolic_shape("N")
  shape = (num, card.image_size, card.image_size, 3)
  exported = jax.export.export(jax.jit(classify), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct(shape, jnp.uint8)
  )
  with unfinished(path) as partial:
    partial.write_bytes(exported.serialize())


def save_onnx(path: Path, params: Any, card: Card) -> None:
  """Writes an ONNX model: see `onnx_graph.build`."""
  with unfinished(path) as partial:
    partial.write_bytes(onnx_graph.build(params, card).SerializeToString())


WRITERS: dict[str, Callable[[Path, Any, Card], None]] = {
  ".safetensors": pretrained.save,
  ".npz": pretrained.save,
  ".stablehlo": save_stablehlo,
  ".onnx": save_onnx,
}


def convert(
  source: str | Path, out: str | Path, *, to: str = "ours", folds_epsilon: bool
) -> str:
  """Rewrites weights; returns what they are.

  Args:
    source: What `pretrained.load` takes.
    out: `.safetensors` or `.npz`.
    to: `ours`, the published names, with a card; or `timm`.
    folds_epsilon: See `timm.to_ours` and `timm.from_ours`.

  Raises:
    InputError: for weights that nobody knows the network of, or that timm has
      no network for.
  """
  out = Path(out)
  _check_out(out, (".safetensors", ".npz"), source)
  params, card, model = pretrained.load_with_model(
    source, trained_in_timm=folds_epsilon
  )
  if model is None:  # Raises, with the differences to the nearest.
    model = pretrained.recognize(params, str(source))
  if folds_epsilon and not (timm.name_of(model) or "").startswith("dm_"):
    raise InputError(
      f"--fold_epsilon is for dm_nfnet_f0 to f6, and {source} is {model.name}: "
      "leave it out"
    )
  if to == "ours":
    pretrained.save(out, params, card)
    return f"{model.name}, {model.num_classes} classes"
  of_table = models.make(model.name, model.num_classes)
  if plan.in_evaluation(model.plan) != plan.in_evaluation(of_table.plan):
    raise InputError(
      f"{source} is {model.name} with other columns ({card.overrides}), for "
      "which timm has no name"
    )
  tensors = timm.from_ours(params, model, for_use_in_timm=folds_epsilon)
  pretrained.save_tensors(out, tensors)
  return f"timm's {timm.name_of(model)}, {model.num_classes} classes"
