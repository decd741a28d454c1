"""Packaging; versions seen to work together are in scripts/constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
  name="nfnets",
  version="0.1.0",
  description="Normalizer-Free Networks on JAX and Haiku",
  long_description=Path(__file__).with_name("README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["nfnets", "nfnets.*", "configs"]),
  package_data={"nfnets.data": ["imagenet_classes.txt"]},
  install_requires=[
    "absl-py",
    "dm-haiku>=0.0.17",
    "jax>=0.10",
    "matplotlib",
    "ml_collections>=1.1",
    "numpy",
    "opencv-python-headless",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow",
    "platformdirs",
    "rich",
    "safetensors",
    "scikit-learn",
    "simplejpeg",
    "tensorboardX",
  ],
  extras_require={
    # Only to compile for accelerators elsewhere; see scripts/compile_for.sh.
    "compilers": [
      "jax-cuda12-plugin",
      "libtpu",
      "nvidia-cuda-nvcc-cu12",
      "nvidia-cuda-runtime-cu12",
      "nvidia-nvjitlink-cu12",
    ],
    "cuda": ["jax[cuda13]"],
    "onnx": ["onnx"],
    "tfds": ["array_record", "importlib_resources", "tensorflow-datasets"],
    # Only to prepare ImageNet and to compare input pipelines.
    "tensorflow": [
      "apache-beam",
      "array_record",
      "importlib_resources",
      "tensorflow-cpu",
      "tensorflow-datasets",
    ],
    # Only to compare with PyTorch Image Models; see scripts/timm.sh.
    "timm": ["huggingface_hub", "pyyaml", "torch"],
    "tpu": ["jax[tpu]"],
    "test": [
      "array_record",
      "hypothesis",
      "importlib_resources",
      "ipykernel",
      "nbclient",
      "onnx",
      "onnxruntime",
      "pytest",
      "pytest-xdist",
      "ruff",
      "tensorflow-datasets",
    ],
  },
  entry_points={"console_scripts": ["nfnets=nfnets.main:start"]},
)
