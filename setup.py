"""Builds the CPU kernels, once per ISA level, and never for the build machine alone.

Environment:
  NEGLOG_COMPILE=0   build nothing: the Numba twins run instead
  NEGLOG_COMPILE=1   a failing compiler is an error (the default is to go on without)
"""

import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

X86_64_LEVELS = {
    "x86_64_v2": ["-march=x86-64-v2"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
# Neither flag lets the compiler assume away NaN or inf: errno is not read, and no trap handler is.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
STEMS = ["nll", "infonce"]


def isa_levels() -> dict[str, list[str]]:
    gnu = sysconfig.get_platform().startswith(("linux", "macosx"))
    if gnu and platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
        return X86_64_LEVELS
    return {"generic": []}


def extensions() -> list[Extension]:
    if os.environ.get("NEGLOG_COMPILE") == "0":
        return []
    headers = [str(path) for path in Path("kernels").glob("numerics.*")]
    built = [Extension("neglog.kernels.cpu", ["kernels/cpu.pyx"], language="c++")]
    for level, march in isa_levels().items():
        for stem in STEMS:
            built.append(
                Extension(
                    f"neglog.kernels.{level}.{stem}",
                    [f"kernels/{stem}.pyx"],
                    include_dirs=["kernels"],
                    depends=headers,
                    language="c++",
                    extra_compile_args=[*FLAGS, *march, "-fopenmp"],
                    extra_link_args=["-fopenmp"],
                )
            )
    return built


class BuildKernels(build_ext):
    """One source, several objects: each extension gets a directory of its own for them."""

    def finalize_options(self):
        if self.distribution.ext_modules:
            from Cython.Build import cythonize

            # Each in a directory of its own: Cython writes the full module name into the C++.
            def translated(extension):
                where = f"build/cython/{extension.name}"
                return cythonize([extension], include_path=["kernels"], build_dir=where)[0]

            self.distribution.ext_modules = list(map(translated, self.distribution.ext_modules))
        super().finalize_options()

    def run(self):
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            if os.environ.get("NEGLOG_COMPILE") == "1":
                raise
            self.extensions = []
            print(
                f"neglog: the kernels were not compiled ({error}).\n"
                "neglog: it installs all the same and runs its Numba twins: pip install numba",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def copy_extensions_to_source(self):
        for extension in self.extensions:  # a fresh clone has no folder for the ISA levels
            relative = os.path.join(*extension.name.split(".")[2:-1], "")
            Path("kernels", relative).mkdir(exist_ok=True)
        super().copy_extensions_to_source()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
