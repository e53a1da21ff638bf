"""Mistakes in flags of ``launch.serve`` that are found before a rank loads anything."""

from __future__ import annotations

import pytest

from phalanx.launch.drain import DrainSignals
from phalanx.launch.front import frontend_settings
from phalanx.launch.serve import build_parser
from phalanx.launch.supervise import launcher_words
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.liveness.judge import Limits


def test_an_open_quotation_in_the_launcher_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"--launcher mpirun '-n cannot be read: No closing quotation"):
        launcher_words(build_parser().parse_args(["--supervise", "--launcher", "mpirun '-n"]))


def test_a_model_whose_name_is_not_utf_8_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"--model /models/a\\udcff is not UTF-8"):
        frontend_settings(build_parser().parse_args(["--model", "/models/a\udcff"]), None)


def test_limits_in_seconds_are_checked() -> None:
    with pytest.raises(ConfigError, match="--start-timeout=0 is out of range"):
        Limits(start=0.0)
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"--shutdown-timeout=.* is out of range"):
            DrainSignals.check_limit(seconds)
