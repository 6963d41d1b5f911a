"""What a script imports before it knows what it is asked for: nothing that takes seconds and may not be needed."""

import subprocess
import sys

from running import ENVIRONMENT, SCRIPTS

NAMES = (
    *("sample_diffusion_ddim", "sample_diffusion_ldm", "txt2img", "make_calibration_data", "compare_methods"),
    *("benchmark", "export", "check_checkpoint", "sensitivity", "report"),
)
SLOW = (
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "torchvision",
    "transformers",
    "onnxruntime",
)


def test_nothing_slow_is_imported_first():
    """In one process for all: what each imports is there at the end."""
    lines = [f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}]", *(f"import {name}" for name in NAMES)]
    lines.append(f"print([name for name in {SLOW} if name in sys.modules])")
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
