"""What the original implementations computed, and the keys of their checkpoints: data beside this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(__file__).parents[3] / "shared"
PARITY = Path(os.environ.get("DEQ_ZOO_PARITY", SHARED / "parity"))
MANIFESTS = SHARED / "reference" / "manifests"


def parity(name: str, file: str = "tensors") -> dict[str, Tensor]:
    """The tensors of one original, or its ``state_dict``; skips the test where there are none."""
    return load_file(_present(PARITY / name, "parity data", "set DEQ_ZOO_PARITY") / f"{file}.safetensors")


def meta(name: str) -> dict[str, Any]:
    """The configuration of one original, and the numbers that it computed."""
    folder = _present(PARITY / name, "parity data", "set DEQ_ZOO_PARITY")
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def manifest(name: str) -> dict[str, Any]:
    """The keys and shapes of one checkpoint, and its number of parameters."""
    file = _present(MANIFESTS / f"{name}.json", "manifest", "it stands beside the repository")
    return json.loads(file.read_text(encoding="utf-8"))


def _present(path: Path, what: str, advice: str) -> Path:
    if not path.exists():
        pytest.skip(f"no {what} at {path}; {advice}")
    return path
