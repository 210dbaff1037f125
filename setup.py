"""Everything that can be declared is in pyproject.toml; this file is where the compiled extension will hook in."""

from setuptools import setup

setup()
