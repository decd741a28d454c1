"""Normalizer-Free Networks (Brock, De, Smith, Simonyan 2021) on JAX and Haiku.

from nfnets import models, pretrained, agc
"""

__version__ = "0.1.0"
