"""Rules of the house that a machine can keep: import directions, names, files, tables."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen import ops, registry
from fastgen.interop import diffusers

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("autoencoders", "gans", "diffusion", "flows", "autoregressive", "energy", "classical")

# package -> what it may import of fastgen, besides itself
ALLOWED = {
    "_arguments": set(),
    "_extras": set(),
    "random": set(),
    "kernels": set(),
    "ops": {"random", "kernels"},
    "nn": {"ops", "random"},
    "data": {"ops", "random"},
    "registry": {"nn"},
    **{family: {"registry", "nn", "ops", "random"} for family in FAMILIES},
    "training": {"registry", "nn", "ops", "random", "data", "sampling"},
    "sampling": {"registry", "nn", "ops", "random", "data", "training"},
    "metrics": {"registry", "nn", "ops", "random", "data", "sampling", "training"},
    "interop": {"registry", "nn", "ops", "random", "data", *FAMILIES},
    "cli": {
        "registry",
        "nn",
        "ops",
        "random",
        "data",
        "sampling",
        "training",
        "metrics",
        "autoencoders",
        "diffusion",
        "interop",
    },
    "__init__": set(),
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    """Every module of the library by dotted name, kernels/ included."""
    found = {}
    for top, prefix in ((ROOT / "fastgen", "fastgen"), (ROOT / "kernels", "fastgen.kernels")):
        for path in sorted(top.rglob("*.py")):
            if top.name == "fastgen" and "kernels" in path.relative_to(top).parts:
                continue
            name = ".".join((prefix, *path.relative_to(top).with_suffix("").parts))
            found[name.removesuffix(".__init__") if path.parent != ROOT / "fastgen" else name] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "fastgen" else {node.module}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    package = name.split(".")[1]
    for imported in imports(MODULES[name]):
        if imported.startswith("fastgen."):
            target = imported.split(".")[1]
            if target == package or target in ("__version__", "_C", "_arguments", "_extras"):
                continue
            assert target in ALLOWED[package], f"{name} imports {imported}: {package} may not import {target}"


@pytest.mark.parametrize("name", MODULES)
def test_triton_stays_in_kernels(name):
    uses = any(i.split(".")[0] == "triton" for i in imports(MODULES[name]))
    assert not uses or name.startswith("fastgen.kernels")


@pytest.mark.parametrize("name", [n for n in MODULES if "kernels" not in n and not n.endswith(("__init__", "__main__"))])
def test_modules_declare_what_is_public(name):
    text = MODULES[name].read_text()
    tree = ast.parse(text)
    has_names = any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)) for node in tree.body)
    assert "__all__" in text or not has_names, f"{name} has no __all__"
    assert ast.get_docstring(tree), f"{name} has no docstring"


@pytest.mark.parametrize("spec", ops.all_specs().values(), ids=ops.all_specs())
def test_one_stem_everywhere(spec):
    for file in (f"fastgen/ops/{spec.name}.py", f"tests/ops/test_{spec.name}.py"):
        assert (ROOT / file).exists(), file
    text = (ROOT / f"fastgen/ops/{spec.name}.py").read_text()
    for file, used in (
        (f"kernels/{spec.name}.py", r"triton_module\("),
        (f"csrc/ops/{spec.name}.h", r"_native\.(kernel|Launch)\("),
    ):
        assert (ROOT / file).exists() == bool(re.search(used, text)), f"{file} and fastgen/ops/{spec.name}.py disagree"


def test_readme_lists_every_model():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\[`?([\w/]+\.py)`?\]\(", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert rows == {name: registry.describe(name).file for name in registry.names()}


def test_readme_lists_every_op():
    text = (ROOT / "README.md").read_text()
    for name in ops.all_specs():
        assert f"`{name}`" in text, f"README.md does not mention the op {name}"


def test_readme_lists_every_scheduler():
    classes = set(
        re.findall(
            r"^class ([A-Z]\w+Scheduler)\b",
            "".join(path.read_text() for path in (ROOT / "fastgen/interop/diffusers/schedulers").glob("*.py")),
            re.MULTILINE,
        )
    )
    listed = set(re.findall(r"`(\w+Scheduler)`", (ROOT / "README.md").read_text()))
    assert listed == classes == {name for name in diffusers.__all__ if name.endswith("Scheduler")}


def test_environment_variables_are_documented():
    used = set()
    for path in [*MODULES.values(), ROOT / "tests/conftest.py", ROOT / "tests/emulation.py"]:
        used |= set(re.findall(r"(?<!-D)FASTGEN_[A-Z_]+", path.read_text()))  # macros are none
    documented = set(re.findall(r"`(FASTGEN_[A-Z_]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert used <= documented, f"not in CONTRIBUTING.md: {sorted(used - documented)}"


def test_files_that_the_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/accuracy.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document} points to {target}"


ALONE = """
import importlib.abc, sys
BLOCKED = {"triton", "safetensors", "tqdm", "matplotlib", "PIL", "typer", "rich", "sklearn"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name == "fastgen._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
before = set(sys.modules)
import fastgen
assert not [m for m in sys.modules if m.startswith("fastgen.")], "import fastgen is lazy"
import torch
model = fastgen.create("vae", event_shape=(1, 8, 8), latent=2, hidden=(8,))
model.loss(torch.rand(4, 1, 8, 8)).loss.backward()
assert model.sample(3).shape == (3, 1, 8, 8)
assert fastgen.explain("normal", (2, 3)).startswith("normal runs on reference")
assert "cannot be imported" in fastgen.ops.info()["cpp"]
"""


def test_torch_alone_is_enough():
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(header.stem for header in (ROOT / "csrc/ops").glob("*.h")))
def test_baseline_units_hold_no_wide_instructions(op, tmp_path):
    """The units without ISA flags run on any x86-64: no ymm and no zmm register may appear in them."""
    unit = tmp_path / "scalar.o"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-Wno-psabi", "-DFASTGEN_ISA=scalar", f"-DFASTGEN_OP={op}"]
    subprocess.run(["g++", *flags, "-c", str(ROOT / "csrc/unit.cpp"), "-o", str(unit)], check=True)
    listing = subprocess.run(["objdump", "-d", str(unit)], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"%[yz]mm", listing)
