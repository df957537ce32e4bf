"""Where a number comes from: what every result file says about the software and the machine that made it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the git commit (empty outside a checkout of this project)."""
    import torch
    import transformers

    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    # An installed package may lie in the checkout of another project.
    tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = "" if tracked.returncode else head.stdout.strip()
    return {
        "foveate": importlib.metadata.version("foveate"),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, str | int]:
    """Return what a timing depends on: processor, device and threads."""
    import torch

    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
