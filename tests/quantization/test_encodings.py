"""Golden words: literal stored words and the codes that the formats' own packers mean by them."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.checkpoints.quantization.encodings import AWQ_ORDER, GroupIndex, NibbleRows, PackedWords, Scales
from phalanx.parallel.errors import CheckpointError


def word(value: int) -> np.ndarray:
    return np.array([[value]], np.uint32).view(np.int32)


@pytest.mark.parametrize(
    ("encoding", "stored", "codes"),
    [
        # compressed-tensors: code + 8, in order along inputs.
        (PackedWords(4, 1, offset=8), 0x76543210, [-8, -7, -6, -5, -4, -3, -2, -1]),
        (PackedWords(4, 1, offset=8), 0xFEDCBA98, [0, 1, 2, 3, 4, 5, 6, 7]),
        (PackedWords(8, 1, offset=128), 0xFF807F00, [-128, -1, 0, 127]),
        # AutoAWQ: nibble i is column [0, 2, 4, 6, 1, 3, 5, 7][i], nothing subtracted.
        (PackedWords(4, 0, order=AWQ_ORDER), 0x75316420, [0, 1, 2, 3, 4, 5, 6, 7]),
        (PackedWords(4, 0, order=AWQ_ORDER), 0xFEDCBA98, [8, 12, 9, 13, 10, 14, 11, 15]),
        # GPTQ v1: zero points are stored less one; symmetric ones are 0x77777777, and 15 means 0.
        (PackedWords(4, 0, offset=8, added=1), 0x77777777, [0] * 8),
        (PackedWords(4, 0, offset=8, added=1), 0xF0000000, [-7, -7, -7, -7, -7, -7, -7, -8]),
        (PackedWords(8, 0, offset=128, added=1), 0xFF7F0001, [-126, -127, 0, -128]),
        # GPTQ v2: as they are.
        (PackedWords(4, 0, offset=8), 0x88888888, [0] * 8),
    ],
)
def test_words_hold_the_codes_that_their_packers_meant(encoding: PackedWords, stored: int, codes: list[int]) -> None:
    decoded = encoding.decode(word(stored))
    assert decoded.dtype == np.int8
    assert decoded.reshape(-1).tolist() == codes
    assert decoded.shape == ((len(codes), 1) if encoding.axis == 0 else (1, len(codes)))


def test_zero_points_repeat_for_each_piece_of_their_group() -> None:
    stored = np.array([[0x76543210, 0x01234567]], np.uint32).view(np.int32)
    expected = [[code, code, 7 - code, 7 - code] for code in range(8)]
    assert PackedWords(4, 0, columns=2).decode(stored).tolist() == expected


def test_bytes_hold_two_rows_as_modelopt_packed_them() -> None:
    """What ``pack_int4_in_uint8`` of ModelOpt 0.47 made of these two rows, with scales of 1."""
    rows = [[-8, -7, -1, 0, 1, 2, 7, 3], [7, -8, 0, -1, 5, -3, 6, -2]]
    decoded = NibbleRows().decode(np.array([[0x78, 0x89, 0x0F, 0xF0, 0x51, 0xD2, 0x67, 0xE3]], np.uint8))
    assert decoded.dtype == np.int8
    assert decoded.tolist() == rows


def test_every_row_of_a_weight_has_its_columns_groups() -> None:
    assert GroupIndex(3, 1).decode(np.array([[1, 0, 2]], np.int32)).tolist() == [[1, 0, 2]] * 3


def test_groups_are_in_order_where_the_index_is_unset() -> None:
    assert GroupIndex(2, 3).decode(np.full((1, 7), -1, np.int32)).tolist() == [[0, 0, 0, 1, 1, 1, 2]] * 2


@pytest.mark.parametrize("index", [[0, -1, -1], [0, 1, 3]])
def test_groups_that_do_not_exist_are_an_error(index: list[int]) -> None:
    with pytest.raises(CheckpointError, match=rf"a column is in group {min(index) if -1 in index else 3} of 3"):
        GroupIndex(2, 1).decode(np.array([index], np.int32))


def test_scales_widen_exactly_and_repeat() -> None:
    stored = np.array([[0.1, 0.2], [0.3, 0.4]], np.float16)
    decoded = Scales(rows=2, columns=3).decode(stored)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, np.repeat(np.repeat(stored.astype(np.float32), 2, 0), 3, 1))
    assert Scales(rows=3).decode(np.array([0.5], np.float32)).tolist() == [0.5] * 3
