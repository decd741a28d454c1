"""Runs a network of PyTorch Image Models, for tests to compare with.

    scripts/timm.sh scripts/timm_reference.py --model=nfnet_l0 --size=64 \\
      --out=FOLDER

writes `weights.safetensors` (drawn at random, of the size that trained weights
have, unless `--weights` gives some), `images.npy` [2, size, size, 3] and
`logits.npy`. PyTorch has no torchvision for CPUs beside it here, and the
networks do not need it: empty modules stand in for it.
"""

import argparse
import enum
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path


class _Standin(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Makes every module of torchvision an empty one."""

  def find_spec(self, name, path=None, target=None):
    del path, target
    if name.split(".")[0] != "torchvision":
      return None
    return importlib.machinery.ModuleSpec(name, self, is_package=True)

  def create_module(self, spec):
    module = types.ModuleType(spec.name)
    module.__path__ = []

    def missing(attribute):
      if attribute.startswith("__"):
        raise AttributeError(attribute)
      if attribute == "InterpolationMode":
        names = ["NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
        return enum.Enum(attribute, {name: name.lower() for name in names})
      return type(attribute, (), {})

    module.__getattr__ = missing
    return module

  def exec_module(self, module):
    del module


def import_timm():
  """timm, with a stand-in for torchvision where that is not installed."""
  try:
    import torchvision  # noqa: F401
  except ImportError:
    sys.meta_path.insert(0, _Standin())
  import timm

  return timm


def draw(model) -> None:
  """Random weights of realistic sizes; no parameter stays at zero."""
  import torch

  torch.manual_seed(0)
  for name, value in model.named_parameters():
    noise = torch.randn_like(value)
    with torch.no_grad():
      if name.endswith("gain"):
        value.copy_(1 + 0.1 * noise if value.ndim else 0.75 + 0.1 * noise)
      elif value.ndim == 1:
        value.copy_(0.1 * noise)
      elif name.endswith("conv.weight") and "attn" in name:  # ECA
        value.copy_(0.5 * noise)
      else:
        value.copy_(noise / value[0].numel() ** 0.5)


def align(model) -> None:
  """Computes as the released code: its GELU, next to no epsilon."""
  import torch

  for module in model.modules():
    if hasattr(module, "eps"):
      module.eps = 1e-12
    if hasattr(module, "act_fn"):
      module.act_fn = lambda x, inplace=False: torch.nn.functional.gelu(
        x, approximate="tanh"
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--size", type=int, default=64)
  parser.add_argument("--weights", type=Path)
  parser.add_argument("--align", action="store_true", help=align.__doc__)
  parser.add_argument("--out", type=Path, required=True)
  args = parser.parse_args()
  timm = import_timm()
  import numpy as np
  import torch
  from safetensors.torch import load_file, save_file

  model = timm.create_model(args.model).eval()
  if args.weights:
    model.load_state_dict(load_file(args.weights), strict=True)
  else:
    draw(model)
  if args.align:
    align(model)
  rng = np.random.default_rng(args.size)
  shape = (2, args.size, args.size, 3)
  images = rng.standard_normal(shape, dtype=np.float32)
  with torch.inference_mode():
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
  args.out.mkdir(parents=True, exist_ok=True)
  save_file(model.state_dict(), args.out / "weights.safetensors")
  np.save(args.out / "images.npy", images)
  np.save(args.out / "logits.npy", logits.numpy())


if __name__ == "__main__":
  main()
