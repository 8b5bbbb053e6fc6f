"""The house in order: who imports whom, what ships, and that every command that is written down is understood."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

import cli
from tests.command_line import DIGITS, ROOT, Fitted
from zoo.implicit import Gradient, Solver, from_description

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# ----------------------------------------------------------------------------------------------------- who imports whom

# Besides the standard library and itself.
MAY_IMPORT = {
    "zoo/implicit": {"torch", "matplotlib"},  # the latter in plots.py only, as a test of the backbone says
    "zoo": {  # torchvision for blocks of explicit layers; clients of hubs and exporters only where they are used
        *("torch", "torchvision", "safetensors", "matplotlib"),
        *("huggingface_hub", "wandb", "onnx", "onnxscript", "onnxruntime"),
        *("filelock", "rich"),  # downloads: one process at a time, and its progress bar
    },
    "lightning_modules": {
        *("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "torchmetrics", "zoo"),
        "numpy",  # whose random numbers are seeded, for users' modules
        "PIL",  # letters on the pictures for the loggers
    },
    "datamodules": {"torch", "pytorch_lightning", "torchvision", "sklearn", "numpy", "PIL"},
    "commands": {
        *("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "jsonargparse", "yaml", "rich"),
        *("zoo", "lightning_modules", "datamodules"),
    },
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: Path) -> list[str]:
    """The modules that a file imports, anywhere in it."""
    return list(imports_of(file.read_text(encoding="utf-8"), file.relative_to(ROOT).parts[:-1]))


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """The full names of the modules that a file in ``package`` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join((*above, str(name))) for name in names)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_who_imports_whom(folder: str) -> None:
    own = folder.replace("/", ".")
    files = python_files(folder)
    assert len(files) > 3
    for file in files:
        for module in imported(file):
            top = module.partition(".")[0]
            known = is_in(module, own) or top in sys.stdlib_module_names
            assert known or any(is_in(module, name) for name in MAY_IMPORT[folder]), f"{file} imports {module}"


def test_the_rule_sees_every_kind_of_import() -> None:
    source = """
import a.b as c
from d import e
from . import f
from .g import h
from ..i import j
from ... import k
def late():
    import lightning
"""
    assert set(imports_of(source, ("zoo", "implicit", "solvers"))) == {
        *("a.b", "d", "lightning", "zoo.implicit.solvers.f", "zoo.implicit.solvers.g", "zoo.implicit.i", "zoo.k")
    }


def test_nobody_imports_the_other_lightning() -> None:
    """``lightning`` and ``pytorch_lightning`` are two packages whose classes do not know each other."""
    folders = (*MAY_IMPORT, "examples", "tests")
    files = [ROOT / "cli.py", *(file for folder in folders for file in python_files(folder))]
    assert [str(file) for file in files if any(is_in(module, "lightning") for module in imported(file))] == []


# ----------------------------------------------------------------------------------------------------------- what ships

TOP = ("zoo", "lightning_modules", "datamodules", "commands")


def test_the_packages_are_the_folders() -> None:
    settings = PYPROJECT["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts) for name in TOP for file in (ROOT / name).rglob("__init__.py")
    }
    code = {".".join(file.parent.relative_to(ROOT).parts) for name in TOP for file in (ROOT / name).rglob("*.py")}
    assert folders == code, "a folder of code without __init__.py does not ship"
    assert sorted(settings["packages"]) == sorted({*folders, "zoo.checkpoints"})
    assert settings["package-dir"] == {"zoo.checkpoints": "checkpoints"}
    assert settings["py-modules"] == ["cli"]
    assert all((ROOT / name / "py.typed").is_file() for name in TOP)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".*", "*.egg-info", "build", "dist", "runs", "wandb", "data", "tests", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *quiet, "--wheel-dir", str(folder), str(folder / "source")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_code_types_and_weights(wheel: Path) -> None:
    version = PYPROJECT["project"]["version"]
    assert wheel.name == f"deq_zoo-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(f"deq_zoo-{version}.dist-info/entry_points.txt").decode()
    sources = {str(file.relative_to(ROOT)) for name in TOP for file in python_files(name)}
    checkpoints = ROOT / "checkpoints"
    shipped = {
        f"zoo/checkpoints/{file.relative_to(checkpoints)}"
        for pattern in ("*.safetensors", "*.json", "originals/*.json")
        for file in checkpoints.glob(pattern)
    }
    assert names == {"cli.py", *sources, *shipped, *(f"{name}/py.typed" for name in TOP)}
    assert "zoo/checkpoints/tanh_deq.digits.safetensors" in names
    (target,) = re.findall(r"^deq-zoo = cli:(\w+)$", entry_points, re.MULTILINE)
    assert callable(getattr(cli, target))


def test_the_wheel_loads_its_weights(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import torch, zoo; print(zoo.__file__); print([w.name for w in zoo.list_weights(source='shipped')]); "
        "print(tuple(zoo.load_pretrained('tanh_deq.digits')(torch.zeros(3, 1, 8, 8)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "zoo" / "__init__.py"),
        str([path.stem for path in sorted((ROOT / "checkpoints").glob("*.json"))]),
        "(3, 10)",
    ]


# ------------------------------------------------------------------------------------------------- what is written down

YAML = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
COMMAND = re.compile(rf"^(?:#[ \t]*)?python (?:\S*/)?cli\.py ((?:{'|'.join(cli.SUMMARIES)})(?: .*)?)$", re.MULTILINE)


def written_commands() -> dict[str, set[str]]:
    """Every command in the README, the guide and the configurations -> where it stands."""
    commands: dict[str, set[str]] = {}
    for name in ("README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")), *YAML):
        for command in COMMAND.findall((ROOT / name).read_text()):
            commands.setdefault(shlex.join(shlex.split(command, comments=True)), set()).add(name)
    return commands


def printed_config(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([*typed, "--print_config"])
    printed = capsys.readouterr()
    assert exit_.value.code == 0, printed.err
    return printed.out


@pytest.mark.parametrize("name", YAML)
def test_every_configuration_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe by itself, and a preset on top of the default one."""
    recipe = [] if "/" not in name.removeprefix("configs/") else ["-c", DIGITS]
    printed = printed_config(capsys, "fit", *recipe, "-c", str(ROOT / name))
    last = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines() if line.split("#")[0].strip()]
    key, _, value = last[-1].partition(": ")
    assert f"{key}: {value.rpartition('.')[2] if key == 'class_path' else ''}" in printed.replace("zoo.implicit.", "")
    asked, understood = (yaml.safe_load(text).get("model", {}) for text in ((ROOT / name).read_text(), printed))
    for role, kind in (("solver", Solver), ("gradient", Gradient)):
        choice = asked.get("init_args", asked).get(role)
        if choice is not None:
            assert from_description(understood["init_args"][role], kind) == from_description(choice, kind)


def test_commands_are_written_down() -> None:
    commands = written_commands()
    assert sum("README.md" in places for places in commands.values()) >= 5
    assert {command.split()[0] for command in commands} >= {"fit", "test", "predict"}
    assert set.union(*commands.values()) >= {"README.md", *YAML}, "each configuration says how it is used"


def written(kinds: Iterable[str]) -> list[str]:
    return [command for command in written_commands() if command.split()[0] in kinds]


@pytest.mark.parametrize("command", written(cli.VERBS))
def test_every_written_verb_is_understood(command: str) -> None:
    assert vars(cli.parse_verb(shlex.split(command)))


@pytest.mark.parametrize("command", written(cli.TRAINING))
def test_every_written_command_is_understood(
    command: str, fitted: Fitted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    typed = shlex.split(command)
    if "--ckpt_path" in typed:  # which a reader has made by then
        typed[typed.index("--ckpt_path") + 1] = fitted.best
    printed = printed_config(capsys, *typed)
    for option in (word for word in typed if word.startswith("--model.") and "=" not in word):
        typed_value = typed[typed.index(option) + 1]
        given = yaml.safe_load(typed_value)
        for value in given if isinstance(given, list) else [typed_value]:
            assert value in printed or str(float(value)) in printed
