"""The package installs as users install it: as a wheel and from source, with and without a compiler.

The editable form is what runs all the other tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen.ops import _native

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import sys
# the editable install of the environment would lend its own extension
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import fastgen, fastgen.kernels, torch
print(fastgen.__file__)
print(fastgen.kernels.__path__[0])
print(fastgen.ops.info()["cpp"])
z, kl = fastgen.ops.reparameterize(torch.zeros(4, 8), torch.zeros(4, 8))
"""


@pytest.mark.skipif(os.environ.get("FASTGEN_REQUIRE_CPP") != "1", reason="kernels are not required")
def test_kernels_are_there():
    assert _native.missing() is None


@pytest.fixture
def source(tmp_path):
    """A clean copy of what git would ship."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    target = tmp_path / "source"
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def pip(*arguments, **environment):
    """pip of this interpreter, offline: no isolation, no dependencies."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(command, check=True, env={**os.environ, **environment}, capture_output=True, text=True)


def probe(site):
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_wheel(source, tmp_path):
    pip("wheel", str(source), "--wheel-dir", str(tmp_path / "wheels"))
    (wheel,) = (tmp_path / "wheels").glob("fastgen_torch-*.whl")
    pip("install", str(wheel), "--target", str(tmp_path / "site"))
    package, kernels, cpp = probe(tmp_path / "site")
    assert package == str(tmp_path / "site/fastgen/__init__.py")
    assert kernels == str(tmp_path / "site/fastgen/kernels")
    assert cpp == "loaded"


def test_without_a_compiler(source, tmp_path):
    pip("install", str(source), "--target", str(tmp_path / "site"), CXX="/nonexistent/c++")
    _, kernels, cpp = probe(tmp_path / "site")
    assert kernels == str(tmp_path / "site/fastgen/kernels")
    assert cpp.startswith("fastgen._C cannot be imported")
