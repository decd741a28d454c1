"""The page beside an exported file: what it is and a script that uses it."""

import json
from pathlib import Path

from nfnets.card import Card

_WITH_PACKAGE = """\
from nfnets.predict import Classifier

classifier = Classifier({name})
for prediction in classifier.predict(["photo.jpg"]):
  print(prediction)
"""

# Programs need no more than their runtime, and Pillow for the images.
_ALONE = """\
import json

import numpy as np
{imports}
from PIL import Image, ImageOps


def prepare(path):
  image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
{geometry}


images = np.stack([prepare("photo.jpg")])  # uint8 [N, {size}, {size}, 3]; any N
{call}
with open({page}, encoding="utf-8") as file:
  details = file.read().split("\\n```json\\n")[-1].split("\\n```\\n")[0]
card = json.loads(details)
for values in probabilities:  # float32 [N, {num_classes}]
  for i in np.argsort(-values)[:5]:
    print(f"{{values[i]:7.2%}}  {{card['class_names'][i]}}")
"""

_NOTE = """\
The file normalises the colours itself: give it grey levels. Pillow resizes by
another bicubic than `nfnets predict` (and smooths where it makes an image
smaller), so probabilities differ a little; and much for images with transparent
parts, which predict lays on white, or with 16 bits, which it scales to 8.

"""

_INT8 = (
  ", kernels and matrices as int8: times `NAME.scale`, one for each output "
  "channel, they are the weights"
)

# By the ending: what to import, and the call.
_CALLS = {
  ".stablehlo": (
    "import jax",
    """\
with open({name}, "rb") as file:
  program = jax.export.deserialize(bytearray(file.read()))
probabilities = np.asarray(program.call(images))  # Compiles for each N.""",
  ),
  ".onnx": (
    "import onnxruntime",
    """\
session = onnxruntime.InferenceSession({name})
logits, probabilities = session.run(None, {{"images": images}})""",
  ),
}

# By `Card.crop`: in words, and with Pillow.
_CROPS = {
  "resize": (
    "resized to {full} x {full} px without regard to proportions (bicubic, "
    "a = -0.5, no antialiasing), of which the middle {size} x {size} is taken",
    """\
  pixels = np.asarray(image.resize(({full}, {full}), Image.BICUBIC))
  return pixels[{edge} : {edge} + {size}, {edge} : {edge} + {size}]""",
  ),
  "padded": (
    "the middle square is cut out, {size}/{full} of the shorter side, and "
    "resized to {size} x {size} px (bicubic, a = -0.5, no antialiasing)",
    """\
  side = min(image.size) * {size} / {full}
  left, top = ((length - side) / 2 for length in image.size)
  box = (left, top, left + side, top + side)
  return np.asarray(image.resize(({size}, {size}), Image.BICUBIC, box))""",
  ),
}


def model_card(card: Card, path: Path, *, is_int8: bool = False) -> str:
  """What a person needs to know to use a file, as Markdown."""
  model = card.make_model()
  numbers = {
    "name": _quoted(path.name),
    "page": _quoted(f"{path.name}.md"),
    "num_classes": model.num_classes,
    "size": card.image_size,
    "full": card.image_size + card.margin,
    "edge": (card.margin + 1) // 2,
  }
  crop, geometry = (text.format(**numbers) for text in _CROPS[card.crop])
  columns = ", ".join(f"{k}={v}" for k, v in card.overrides.items())
  macs = model.count_macs(card.image_size) / 1e9
  facts = {
    "file": f"`{path.name}`",
    "network": card.model + (f" with {columns}" if columns else ""),
    "weights from": card.source,
    "parameters": f"{model.count_params():,}"
    + (_INT8 if is_int8 else ", float32"),
    "multiply-accumulates": f"{macs:.2f} billion",
    "images": f"RGB, {crop}",
    "mean of the colours": f"{_listed(card.mean)} (of 0 to 255)",
    "standard deviation": _listed(card.std),
    "classes": f"{model.num_classes:,}",
  }
  table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
  if path.suffix in _CALLS:
    imports, call = _CALLS[path.suffix]
    call = call.format(**numbers)
    script = _ALONE.format(
      imports=imports, call=call, geometry=geometry, **numbers
    )
  else:
    script = _WITH_PACKAGE.format(**numbers)
  note = _NOTE if path.suffix in _CALLS else ""
  details = json.dumps(card._asdict(), ensure_ascii=False)
  return (
    f"# {card.model}\n\n| | |\n| --- | --- |\n{table}\n\n"
    f"```python\n{script}```\n\n{note}"
    f"All of it for programs, names of the classes in the order of the outputs "
    f"included:\n\n```json\n{details}\n```\n"
  )


def _quoted(name: str) -> str:
  """As Python writes it, with double quotes."""
  return json.dumps(name, ensure_ascii=False)


def _listed(values: tuple[float, ...]) -> str:
  return ", ".join(f"{value:g}" for value in values)
