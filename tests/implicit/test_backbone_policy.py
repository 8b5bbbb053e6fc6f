"""What DESIGN.md promises of the backbone as code: it could be lifted out, and its files are short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zoo.implicit

PACKAGE = Path(zoo.implicit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = set(sys.stdlib_module_names) | {"torch", "zoo"}


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports."""
    package = ["zoo", "implicit", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *filter(None, [node.module])]))
    return names


def test_there_is_something_to_check() -> None:
    assert {"driver.py", "gradients.py", "anderson.py"} <= {path.name for path in FILES}
    assert "zoo.implicit.solvers.base" in imported(PACKAGE / "driver.py")
    assert "zoo.implicit.solvers.base" in imported(PACKAGE / "solvers" / "anderson.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_backbone_imports_torch_and_itself_only(path: Path) -> None:
    for name in imported(path):
        plots = path.name == "plots.py" and name.split(".")[0] == "matplotlib"  # imported where a figure is made
        assert name.split(".")[0] in ALLOWED or plots, name
        assert name.split(".")[0] != "zoo" or name.split(".")[:2] == ["zoo", "implicit"], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_it_works_when_lifted_out(tmp_path: Path) -> None:
    """Copied away from this project, in an interpreter that cannot import Lightning or torchvision."""
    (tmp_path / "backbone").symlink_to(PACKAGE)
    script = (
        "import sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'torchvision', 'zoo', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "import torch, backbone\n"
        "z, report = backbone.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3))\n"
        "assert report.converged.all() and (z - 2).abs().max() < 1e-2\n"
        "print(backbone.describe(backbone.Newton())['class_path'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "backbone.Newton"


def test_the_public_names_exist() -> None:
    assert sorted(zoo.implicit.__all__) == sorted(set(zoo.implicit.__all__))
    for name in zoo.implicit.__all__:
        assert getattr(zoo.implicit, name).__doc__ or name == "Gradient"
