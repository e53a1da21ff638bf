# SPDX-License-Identifier: Apache-2.0
"""An HTTP process of ``launch.serve``, which starts it; not a command for users."""

from __future__ import annotations

from phalanx.runtime.server.process import main

if __name__ == "__main__":
    raise SystemExit(main())
