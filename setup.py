"""Builds the native library (CMakeLists.txt) beside the Python package; the project's metadata is in pyproject.toml.

The library is an accelerator, not a requirement: without CMake or a C++ compiler, or when the build fails, the install
goes on without it, says what was skipped and why, and the PyTorch implementation serves (`lcdd kernels` shows which).
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cmake_command() -> list[str] | None:
    """CMake from the PATH, else from the `cmake` package of this interpreter, else None."""
    if found := shutil.which("cmake"):
        return [found]
    if importlib.util.find_spec("cmake") is not None:
        return [sys.executable, "-m", "cmake"]
    return None


class BuildNative(build_ext):
    """`build_ext` that hands its one extension to CMake; `--inplace` (editable) writes into the source tree."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # a plain library that ctypes loads by path: no Python suffix

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_library(target)
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # an older build would not fit the Python side
            print(f"lcdd: SKIPPED the native CPU library ({error}); PyTorch serves instead.", file=sys.stderr)

    def build_library(self, target: Path) -> None:
        cmake = cmake_command()
        if cmake is None:
            raise FileNotFoundError("no cmake: install it, or `pip install cmake`, and install lcdd again")
        build = Path(self.build_temp).resolve() / "native"
        configure = ["-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", "-DLCDD_CUDA=OFF"]
        configure.append(f"-DLCDD_OUTPUT_DIR={target.parent}")
        for arguments in (configure, ["--build", str(build), "--parallel", "2"]):
            run = subprocess.run([*cmake, *arguments], capture_output=True, text=True)
            if run.returncode != 0:
                print(run.stdout + run.stderr, file=sys.stderr)
                run.check_returncode()


setup(
    ext_modules=[Extension("lcdd_kernels.liblcdd_native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
