# SPDX-License-Identifier: Apache-2.0
"""Commands: ``python -m launch.<command>``.

From a checkout that is not installed, ``phalanx`` is not importable; the sibling folders are then mapped into
it exactly as ``setup.py`` would.
"""

from __future__ import annotations

import signal
import sys

if sys.argv[0] == "-m" or sys.argv[0].endswith("/phalanx"):
    # A command is starting: until `phalanx.launch.running` decides, Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
from pathlib import Path


def _map_checkout() -> None:
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "phalanx", root / "package" / "__init__.py", submodule_search_locations=[str(root), str(root / "package")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["phalanx"] = module
    spec.loader.exec_module(module)


if "phalanx" not in sys.modules and importlib.util.find_spec("phalanx") is None:
    _map_checkout()
