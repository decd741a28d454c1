"""RandAugment: released pixels, one image at a time, quirks only by name."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from nfnets import devices, randaugment
from nfnets.errors import InputError
from tests.conftest import REFERENCE

NAMES = [
  "AutoContrast",
  "Equalize",
  "Invert",
  "Rotate",
  "Posterize",
  "Solarize",
  "Color",
  "Contrast",
  "Brightness",
  "Sharpness",
  "ShearX",
  "ShearY",
  "TranslateX",
  "TranslateY",
  "Cutout",
  "SolarizeAdd",
]
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
HEIGHT, WIDTH, NUM = 24, 40, 16
