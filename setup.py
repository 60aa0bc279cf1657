"""Build of ``fastgen._C``: csrc/ compiled once per instruction set with ninja, no PyTorch headers.

Everything else about the package stands in pyproject.toml. Without a working compiler the extension is skipped: the
package installs all the same, the PyTorch reference serves, and ``fastgen info`` says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Exact normals need every multiply and add rounded on its own; the other two let GCC vectorise without changing results.
# -Wno-psabi: vectors wider than the baseline ABI never cross a translation unit.
KERNEL_FLAGS = [
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]  # GCC 12 warns about its own AVX-512 headers
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "neon": ["-DFASTGEN_NEON"],
}
ISAS = {  # fastest first
    "x86_64": ["avx512", "avx2", "scalar"],
    "AMD64": ["avx512", "avx2", "scalar"],
    "aarch64": ["neon", "scalar"],
}


def compiler() -> list[str]:
    """The C++ compiler: $CXX, else Python's own, else g++."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")


def openmp_flags(build: Path) -> list[str]:
    """-fopenmp where the compiler has it; a build without it runs on one thread."""
    probe = build / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*compiler(), "-fopenmp", str(probe), "-o", str(build / "openmp")]
    return ["-fopenmp"] if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


def write_if_changed(file: Path, text: str) -> None:
    """Leave a file that is right already its time stamp, by which ninja goes."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def ninja_file(target: Path, build: Path) -> str:
    """The build as ninja rules: a unit per op and instruction set, the bindings, the link."""
    import pybind11

    isas = ISAS.get(platform.machine(), ["scalar"])
    ops = sorted(header.stem for header in (CSRC / "ops").glob("*.h"))
    openmp = openmp_flags(build)
    write_if_changed(build / "units.inc", "".join(f"UNIT({isa}, {op})\n" for isa in isas for op in ops))
    source = Path(os.path.relpath(CSRC, build))  # relative, so that a checkout may be moved or copied with its objects
    bindings = ["-I.", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    units = {"bindings.o": (source / "bindings.cpp", bindings)}
    for isa in isas:
        for op in ops:
            flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa], *openmp, f"-DFASTGEN_ISA={isa}", f"-DFASTGEN_OP={op}"]
            units[f"{op}.{isa}.o"] = (source / "unit.cpp", flags)
    lines = [
        f"cxx = {' '.join(compiler())}",
        "rule compile",
        f"  command = $cxx {' '.join(COMMON_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {' '.join(openmp)}",
    ]
    for unit, (file, flags) in units.items():
        lines += [f"build {unit}: compile {file}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {target}: link {' '.join(units)}", ""]
    return "\n".join(lines)


class BuildWithNinja(build_ext):
    """Compiles in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # not in build_temp, which differs between pip and a build in place: objects are compiled once for both
        build = (Path("build") / "native").resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (build / "build.ninja").write_text(ninja_file(target, build))
            subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"fastgen._C was not built, the PyTorch reference will serve: {error}") from error


setup(
    # kernels/ stands at the top of the repository and installs as fastgen.kernels; it is one flat package.
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), "fastgen.kernels"],
    package_dir={"fastgen.kernels": "kernels"},
    package_data={"fastgen": ["py.typed"]},
    ext_modules=[Extension("fastgen._C", [str(CSRC / "bindings.cpp")], optional=True)],
    cmdclass={"build_ext": BuildWithNinja},
)
