"""Installs the top-level folder configs/ as aurora_jax/configs/, which pyproject.toml cannot express."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["aurora_jax", "aurora_jax.*"]), "aurora_jax.configs"],
  package_dir={"aurora_jax.configs": "configs"},
)
