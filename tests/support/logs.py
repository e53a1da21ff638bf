"""What a command that failed had to say."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["why_it_failed"]


def why_it_failed(error: subprocess.CalledProcessError | subprocess.TimeoutExpired, log: Path, count: int = 5) -> str:
    """How the command ended, where its output is, and the last ``count`` lines of that which are not empty."""
    if isinstance(error, subprocess.TimeoutExpired):
        end = f"no result after {error.timeout:g} s"
    else:
        end = f"exit status {error.returncode}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n    ".join([f"{end}; {log} ends with", *(lines[-count:] or ["nothing"])])
