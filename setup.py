"""The compiled core; everything else about the build is in pyproject.toml."""

import sys

from setuptools import Extension, setup

# /O2 is the most that MSVC offers; -O3 is where gcc and clang vectorise the block sums.
# Without -g0 the debug information that Python was built with makes the module five times its size.
OPTIMISE = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]

setup(ext_modules=[Extension("gradscope._kernels", ["gradscope/_kernels.pyx"], extra_compile_args=OPTIMISE)])
