"""The compiled core; everything else about the build is in pyproject.toml."""

import compileall
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# /O2 is the most that MSVC offers; -O3 is where gcc and clang vectorise the block sums.
# Without -g0 the debug information that Python was built with makes the module five times its size.
OPTIMISE = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]


class BuildInPlace(build_ext):
    """Compile the modules too where they stay: pip does so with those that it copies, and a start takes 0.1 s less."""

    def run(self) -> None:
        """Build the extension, then the bytecode if both stay here."""
        super().run()
        if self.inplace or self.editable_mode:
            compileall.compile_dir("gradscope", quiet=1)


setup(
    ext_modules=[
        Extension(
            f"gradscope.{name}",
            [f"gradscope/{name}.pyx"],
            include_dirs=["gradscope"],
            depends=["gradscope/block_sums.h", *glob("gradscope/*.pxi")],
            extra_compile_args=OPTIMISE,
        )
        for name in ("_kernels", "_meter")
    ],
    cmdclass={"build_ext": BuildInPlace},
)
