"""Puts the configs into the package, as ``tpp_jax/configs``; see pyproject.toml.

A checkout has them at the top, where who runs an experiment looks for them.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tpp_jax", "tpp_jax.*"]),
        "tpp_jax.configs",
        "tpp_jax.configs.tables",
    ],
    package_dir={"tpp_jax.configs": "configs"},
)
