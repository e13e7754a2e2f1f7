"""Benches of families, made once a module."""

from __future__ import annotations

import pytest

from tests.sweep.sweep_bench import Bench


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(tmp_path_factory.mktemp(family), family)
        return made[family]

    return bench
