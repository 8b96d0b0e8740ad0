"""For tools that look for a setup.py: the project, and how it is built, is in pyproject.toml (scikit-build-core)."""

from setuptools import setup

setup()
