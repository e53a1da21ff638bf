"""Which parts of source tensors declarations may take."""

from __future__ import annotations

import pytest

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models.declared import check_sources

WHOLE = WeightSpec("a.weight", (Part("t", (2, 8)),))
FIRST_ROW = WeightSpec("b.weight", (Part("t", (1, 8), source_rows=2),))


@pytest.mark.parametrize("specs", [(WHOLE, FIRST_ROW), (FIRST_ROW, WHOLE)], ids=["whole first", "row first"])
def test_a_tensor_may_be_taken_whole_and_in_part(specs: tuple[WeightSpec, ...]) -> None:
    check_sources(specs)


def test_rows_that_no_weight_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no weight takes the rows from 1 on of t, which has 2; declare a part"):
        check_sources([FIRST_ROW])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_whole_tensor_of_other_rows_than_its_parts_say_is_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match=rf"rows 0 to {rows} of t are declared, which has 2 rows; correct"):
        check_sources([FIRST_ROW, WeightSpec("a.weight", (Part("t", (rows, 8)),))])
