"""Record what transformers computes for the small checkpoints of the tests: ``python -m tools.record_reference [NAME ...]``.

Needs torch and transformers; the tests read the files that this writes, so they run without either.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support.checkpoints import ARCEE, CASES_BY_NAME, OLMO
from tests.support.reference import FOLDER, transformers_reference


def main() -> None:
    """Write one ``.npz`` for each case, or for those named."""
    FOLDER.mkdir(exist_ok=True)
    known = {**CASES_BY_NAME, ARCEE.name: ARCEE, OLMO.name: OLMO}
    for case in (known[name] for name in sys.argv[1:] or known):
        with tempfile.TemporaryDirectory() as directory:
            reference = transformers_reference(case, Path(directory))
        np.savez_compressed(FOLDER / f"{case.name}.npz", logits=reference.logits, greedy=np.array(reference.greedy))
        print(case.name, "range", float(np.ptp(reference.logits)), "distinct", len(set(reference.greedy)))


if __name__ == "__main__":
    main()
