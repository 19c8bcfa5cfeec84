"""Builds the CPU kernels, once per ISA level, and never for the build machine alone; and CUDA's.

Environment:
  NEGLOG_COMPILE=0   build nothing for the CPU: the Numba twins run instead
  NEGLOG_COMPILE=1   a failing compiler is an error (the default is to go on without)
  NEGLOG_CUDA=0      build nothing for CUDA
  NEGLOG_CUDA=1      build it or fail (the default: where nvcc and a CUDA build of torch are)
  ARCHITECTURES      of CUDA's devices, see csrc/compile.sh
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

X86_64_LEVELS = {
    "x86_64_v2": ["-march=x86-64-v2"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
# Neither flag lets the compiler assume away NaN or inf: errno is not read, and no trap handler is.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
STEMS = ["nll", "pairs"]
CUDA = "neglog.neglog_cuda"


def isa_levels() -> dict[str, list[str]]:
    gnu = sysconfig.get_platform().startswith(("linux", "macosx"))
    if gnu and platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
        return X86_64_LEVELS
    return {"generic": []}


def torch_is_for_cuda() -> bool | None:
    """None where there is no torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda is not None


def wants_cuda() -> bool:
    """Raises RuntimeError where CUDA is demanded and cannot be had."""
    asked = os.environ.get("NEGLOG_CUDA", "")
    if asked not in ("", "0", "1"):
        raise RuntimeError(f"NEGLOG_CUDA: expected 0, 1 or nothing, got {asked!r}")
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if asked != "1":
        return asked == "" and nvcc is not None and bool(torch_is_for_cuda())
    if nvcc is None:
        raise RuntimeError("NEGLOG_CUDA=1: nvcc is not found; put it in PATH, or name it in NVCC")
    if torch_is_for_cuda() is None:
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


def cpu_extensions() -> list[Extension]:
    if os.environ.get("NEGLOG_COMPILE") == "0":
        return []
    headers = [str(path) for path in Path("kernels/cython").glob("block*.*")]
    built = [
        Extension(
            "neglog.kernels.cython.cpu_level", ["kernels/cython/cpu_level.pyx"], language="c++"
        )
    ]
    for level, march in isa_levels().items():
        for stem in STEMS:
            built.append(
                Extension(
                    f"neglog.kernels.cython.{level}.{stem}",
                    [f"kernels/cython/{stem}.pyx"],
                    include_dirs=["kernels/cython"],
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
                if extension.name == CUDA:
                    return extension
                where = f"build/cython/{extension.name}"
                return cythonize([extension], include_path=["kernels/cython"], build_dir=where)[0]

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

    def get_ext_filename(self, fullname):
        if CUDA.endswith(fullname):  # a library for torch to load, not a module of one Python
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

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

    def build_extension(self, ext):
        if ext.name == CUDA:
            self.build_cuda(ext)
            return
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def copy_extensions_to_source(self):
        for extension in self.extensions:  # a fresh clone has no folder for the ISA levels
            if extension.name == CUDA:
                continue
            relative = os.path.join(*extension.name.split(".")[2:-1], "")
            Path("kernels", relative).mkdir(exist_ok=True)
        super().copy_extensions_to_source()


setup(ext_modules=cpu_extensions() + cuda_extensions(), cmdclass={"build_ext": BuildKernels})
