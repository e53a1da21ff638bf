import numpy as np
import pytest

from phalanx.kernels.sigmoid_gate import sigmoid_gate

from .devices import cases
from .tolerance import assert_close


@pytest.mark.parametrize(("dtype", "features"), cases((64,), (37,), (2056,)), ids=str)
def test_sigmoid_gate_equals_float64(device, random_normal, dtype, features):
    x, y = random_normal(dtype, 5, features), random_normal(dtype, 5, features)
    weight = random_normal(dtype, 1, features, scale=features**-0.5)
    out = device.put(x)
    sigmoid_gate(device.library, out, device.put(y), device.put(weight))
    wide = [array.astype(np.float64) for array in (x, y, weight)]
    assert_close(device.get(out), wide[0] / (1 + np.exp(-wide[1] @ wide[2].T)))
