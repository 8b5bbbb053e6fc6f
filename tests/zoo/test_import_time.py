"""What ``import zoo`` and loading weights do not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.command_line import ROOT

HEAVY = [
    "torchvision",
    "matplotlib",
    "huggingface_hub",
    "wandb",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "sklearn",
]
"""The first four are not needed to load; torchvision brings the three after them, and takes as long as torch itself."""


def imported(program: str) -> set[str]:
    """What of ``HEAVY`` a fresh process has imported at the end of a program."""
    code = f"import sys; {program}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("weights", ["tanh_deq.digits", "deq_transformer_nano.pydocs", "mdeq_nano_scenes.digit_scenes"])
def test_loading_imports_nothing_that_the_model_does_not_need(weights: str) -> None:
    assert imported(f"import zoo; zoo.load_pretrained({weights!r})") == set()


@pytest.mark.parametrize("weights", ["mdeq_nano.digits", "deq_flow_nano.synthetic"])
def test_models_of_torchvision_parts_import_it_when_they_are_made(weights: str) -> None:
    code = f"import zoo; assert 'torchvision' not in sys.modules; zoo.load_pretrained({weights!r})"
    assert "torchvision" in imported(code)
    assert not imported(code) & {"matplotlib", "huggingface_hub", "wandb", "sklearn"}
