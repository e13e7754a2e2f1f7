"""`mctk inspect`: what a directory holds, from headers alone."""

from __future__ import annotations

import json

import pytest

from tests.cli.mistakes import damage, each_damage


@pytest.fixture
def compressed(mctk, write_recipe, tmp_path):
    recipe = write_recipe(
        calibration=None,
        budget=None,
        steps=[
            {
                "decompose": "svd",
                "targets": "experts.*",
                "layers": "1-2",
                "size": {"rank": 16},
                "options": {"storage": "pivoted"},
            },
            {"decompose": "svd", "targets": "attention.q", "layers": 0, "size": {"rank": 8}},
        ],
    )
    code, _, err = mctk("run", recipe, "--quiet")
    assert code == 0, err
    return tmp_path / "out"


def test_an_original(mctk, mixtral):
    code, out, err = mctk("inspect", mixtral)
    assert (code, err) == (0, "")
    assert "mixtral, original" in out and "3 layers, hidden 48, vocabulary 4096, 2 experts" in out
    [row] = [line for line in out.splitlines() if "experts.gate" in line]
    assert row.split() == ["0-2", "experts.gate", "4", "×", "80", "×", "48", "dense", "15.4", "k"]
    assert "embeddings" in out and "attention.q" in out


def test_parts_add_up(mctk, mixtral):
    found = json.loads(mctk("inspect", mixtral, "--json")[1])
    assert sum(found["parts"].values()) == found["sizes"]["parameters"]
    assert found["parts"]["experts"] == 3 * 4 * 3 * 80 * 48
    assert found["parts"]["embeddings"] == 4096 * 48  # tied: once
    assert not found["compressed"] and found["method"] is None


def test_a_compressed_checkpoint(mctk, compressed):
    found = json.loads(mctk("inspect", compressed, "--json")[1])
    assert found["compressed"] and found["format_version"] == 2
    terms = {(row["layer"], row["bank"]): row["terms"] for row in found["banks"]}
    assert terms[0, "experts.gate"] == ["dense"]
    assert terms[1, "experts.gate"] == ["lowrank r=16 pivoted"]
    assert terms[0, "attention.q"] == ["lowrank r=8"]
    metrics = json.loads((compressed / "metrics.json").read_text())
    assert found["sizes"] == metrics["sizes"]["attained"]
    assert sum(found["parts"].values()) == found["sizes"]["parameters"]
    code, out, _ = mctk("inspect", compressed)
    assert code == 0 and "compressed, format 2, by decompose/svd v1" in out
    rows = [line for line in out.splitlines() if " experts.gate " in line]
    assert [row.split()[0] for row in rows] == ["0", "1-2"]
    each = mctk("inspect", compressed, "--layers")[1]
    rows = [line for line in each.splitlines() if " experts.gate " in line]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]


@each_damage
def test_damaged_models_are_refused_by_name(refused, mixtral, tmp_path, how):
    model, message = damage(mixtral, tmp_path / "damaged", how)
    assert message in refused("inspect", model)


def test_what_is_no_model(refused, tmp_path):
    assert f"{tmp_path}: no config.json" in refused("inspect", tmp_path)
    missing = tmp_path / "none"
    assert f"model: no directory {missing}" in refused("inspect", missing)
