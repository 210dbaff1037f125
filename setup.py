"""What can be declared is in pyproject.toml; the native extension is compiled by csrc/build_native.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build_native import SOURCES, BuildNative

setup(
    ext_modules=[Extension("inception_fused._native", sources=SOURCES)],
    cmdclass={"build_ext": BuildNative},
)
