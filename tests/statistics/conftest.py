"""One calibration of each family for all tests."""

from __future__ import annotations

import pytest
from calibration_bench import Bench


@pytest.fixture(scope="session")
def benches(tmp_path_factory):
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(tmp_path_factory.mktemp(family), family)
            assert made[family].calibrate(made[family].cache()) == 1
        return made[family]

    return bench
