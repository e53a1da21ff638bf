# SPDX-License-Identifier: Apache-2.0
"""A client process of ``launch.bench serve``, which starts it; not a command for users."""

from __future__ import annotations

from phalanx.launch.load.client import main

if __name__ == "__main__":
    raise SystemExit(main())
