"""Builds the CPU kernels, once for each ISA level, and the CUDA kernels.

The CPU kernels are never built for the build machine alone: which level runs is decided at import.

Environment:
  NEGLOG_COMPILE=0   build no CPU kernels: Numba compiles its version of them at the first call
  NEGLOG_COMPILE=1   fail if the compiler fails (by default the install goes on without them)
  NEGLOG_CUDA=0      build no CUDA kernels
  NEGLOG_CUDA=1      build them or fail (by default: build them where nvcc and a CUDA torch are)
  ARCHITECTURES      of the CUDA devices, see csrc/compile.sh
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("kernels/cython")
FAMILIES = ["nll", "kl", "pairs"]
X86_64_LEVELS = {
    "x86_64_v2": ["-march=x86-64-v2"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
# No flag lets the compiler assume that NaN or inf do not occur. Nothing here reads errno or handles
# floating-point traps.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CUDA = "neglog.neglog_cuda"


# CPU


def isa_levels() -> dict[str, list[str]]:
    """The levels to build and the flags of each."""
    gnu = sysconfig.get_platform().startswith(("linux", "macosx"))
    if gnu and platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
        return X86_64_LEVELS
    return {"generic": []}


def kernel_extension(level: str, family: str, march: list[str]) -> Extension:
    return Extension(
        f"neglog.kernels.cython.{level}.{family}",
        [str(SOURCES / f"{family}.pyx")],
        include_dirs=[str(SOURCES)],
        depends=sorted(map(str, [*SOURCES.glob("*.hpp"), *SOURCES.glob("*.pxd")])),
        language="c++",
        extra_compile_args=[*FLAGS, *march, "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )


def cpu_extensions() -> list[Extension]:
    if os.environ.get("NEGLOG_COMPILE") == "0":
        return []
    cpu_level = Extension(
        "neglog.kernels.cython.cpu_level", [str(SOURCES / "cpu_level.pyx")], language="c++"
    )
    kernels = [
        kernel_extension(level, family, march)
        for level, march in isa_levels().items()
        for family in FAMILIES
    ]
    return [cpu_level, *kernels]


def cythonized(extension: Extension) -> Extension:
    """With the C++ that Cython makes of its source, in a folder of its own.

    Cython writes the full module name into the C++, so each level's file is another.
    Without `aliases` Cython would add the flags of the levels before to those of each level.
    """
    from Cython.Build import cythonize

    folder = f"build/cython/{extension.name}"
    return cythonize([extension], include_path=[str(SOURCES)], build_dir=folder, aliases={})[0]


# CUDA


def torch_has_cuda() -> bool | None:
    """None if torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda is not None


def wants_cuda() -> bool:
    """Raises RuntimeError if NEGLOG_CUDA=1 cannot be met."""
    asked = os.environ.get("NEGLOG_CUDA", "")
    if asked not in ("", "0", "1"):
        raise RuntimeError(f"NEGLOG_CUDA: expected 0, 1 or nothing, got {asked!r}")
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if asked != "1":
        return asked == "" and nvcc is not None and bool(torch_has_cuda())
    if nvcc is None:
        raise RuntimeError("NEGLOG_CUDA=1: nvcc is not found; put it in PATH, or name it in NVCC")
    if torch_has_cuda() is None:
        raise RuntimeError(
            "NEGLOG_CUDA=1: torch, whose headers the kernels need, is not found; install it first, "
            "and neglog with --no-build-isolation"
        )
    return True


def cuda_extensions() -> list[Extension]:
    if not wants_cuda():
        return []
    sources, headers = (sorted(map(str, Path("csrc").glob(p))) for p in ("**/*.cu", "**/*.*h*"))
    return [Extension(CUDA, sources, depends=headers)]


class BuildKernels(build_ext):
    """Compiles the CPU kernels by setuptools, and the CUDA kernels by csrc/compile.sh."""

    def finalize_options(self):
        self.distribution.ext_modules = [
            extension if extension.name == CUDA else cythonized(extension)
            for extension in self.distribution.ext_modules or []
        ]
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
                "neglog: the install goes on; Numba can compile its version: pip install numba",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        if ext.name == CUDA:
            self.build_cuda(ext)
            return
        # The levels have the same sources, so each extension needs its own folder for its objects.
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def build_cuda(self, ext):
        out = Path(self.build_temp, ext.name).resolve()
        command = ["sh", "csrc/compile.sh", str(out)]
        failed = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}).returncode
        if failed and os.environ.get("NEGLOG_CUDA") == "1":
            raise RuntimeError("NEGLOG_CUDA=1: csrc/compile.sh failed, see above")
        if failed:
            self.extensions = [other for other in self.extensions if other is not ext]
            print("neglog: the CUDA kernels were not compiled, see above", file=sys.stderr)
            return
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "neglog_cuda.so", target)

    def get_ext_filename(self, fullname):
        if CUDA.endswith(fullname):  # a library for torch to load, not a module of one Python
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self):
        for extension in self.extensions:  # a fresh clone has no folders for the ISA levels
            if extension.name != CUDA:
                folder = os.path.join(*extension.name.split(".")[2:-1])
                Path("kernels", folder).mkdir(exist_ok=True)
        super().copy_extensions_to_source()


setup(ext_modules=cpu_extensions() + cuda_extensions(), cmdclass={"build_ext": BuildKernels})
