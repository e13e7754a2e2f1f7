"""A disk that is too small is found before weights are read."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from mctk.files import room_for


@pytest.fixture
def small_disk(monkeypatch):
    """Every disk has so many bytes free."""

    def set_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return set_free


def test_what_an_output_holds_is_room_for_it(tmp_path, small_disk):
    small_disk(100)
    assert room_for(tmp_path / "new" / "run") == (tmp_path, 100)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "shard").write_bytes(bytes(30))
    assert room_for(tmp_path / "run") == (tmp_path / "run", 130)


def test_a_run_that_would_fill_the_disk_is_refused(refused, write_recipe, small_disk, tmp_path):
    small_disk(1000)
    output = tmp_path / "out"
    [line] = refused("run", write_recipe(), "--output", str(output)).splitlines()
    assert " has 1.00 kB free" in line and "choose an output on a larger disk" in line
    assert not output.exists()


def test_a_plan_warns(mctk, write_recipe, small_disk):
    small_disk(1000)
    code, out, _ = mctk("plan", write_recipe())
    assert code == 0 and "1.00 kB free: choose an output on a larger disk" in out
    small_disk(10**15)
    assert "larger disk" not in mctk("plan", write_recipe())[1]
