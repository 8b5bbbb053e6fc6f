"""What ``import zoo`` and loading weights do not import."""

from __future__ import annotations

import subprocess
import sys

from tests.command_line import ROOT

UNUSED = ["matplotlib", "huggingface_hub", "wandb", "onnx", "sklearn", "pytorch_lightning"]
HEAVY = ["torchvision", "torch._dynamo", "torch._inductor", "sympy"]
"""The first brings the others, and all of them take as long as torch itself."""


def imported(*programs: str) -> list[set[str]]:
    """What of these a fresh process has imported after each of the programs."""
    report = f"print(*(name for name in {UNUSED + HEAVY} if name in sys.modules))"
    code = "\n".join(["import sys", *(f"{program}\n{report}" for program in programs)])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def loading(*names: str) -> list[set[str]]:
    return imported("import zoo", *(f"zoo.load_pretrained({name!r})" for name in names))


def test_loading_imports_nothing_that_the_model_does_not_need() -> None:
    light = ["tanh_deq.digits", "deq_transformer_nano.pydocs", "mdeq_nano_scenes.digit_scenes"]
    *before, mdeq, flow = loading(*light, "mdeq_nano.digits", "deq_flow_nano.synthetic")
    assert before == [set()] * 4
    assert "torchvision" in mdeq, "its head has torchvision's bottlenecks"
    assert not (mdeq | flow) & set(UNUSED)
