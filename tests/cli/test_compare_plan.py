"""`mctk compare --plan`: what rows will store, before anything is read or written."""

from __future__ import annotations

import json

import yaml

from tests.tiny_run import TEXT


def test_rows_are_planned_and_refused_one_by_one(mctk, mixtral, tmp_path):
    file = tmp_path / "rows.yaml"
    comparison = {
        "model": str(mixtral),
        "calibration": {
            "text": str(TEXT / "calibration" / "*.jsonl"),
            "sequences": 2,
            "length": 32,
        },
        "budgets": {"remove": [0.25, 0.5], "of": "experts"},
        "rows": [
            {"name": "frequency", "steps": [{"prune": "frequency"}]},
            {"name": "one", "steps": [{"prune": "frequency", "size": {"rank": 1}}]},
            {
                "name": "loss",
                "steps": [{"decompose": "svd_llm"}],
                "allocate": {"method": "by_loss"},
            },
        ],
    }
    file.write_text(yaml.safe_dump(comparison))
    output = tmp_path / "out"
    arguments = ["compare", str(file), "--plan", "--output", str(output)]
    code, out, _ = mctk(*arguments, "--json")
    assert code == 1 and not output.exists()
    found = {(row["name"], (row["budget"] or {}).get("remove")): row
             for row in json.loads(out)}  # fmt: skip
    for share in (0.25, 0.5):
        sizes = found["frequency", share]["planned"]
        original = found["frequency", share]["original"]
        assert sizes["expert_parameters"] == (1 - share) * original["expert_parameters"]
        assert found["loss", share]["planned"] is None and not found["loss", share]["refused"]
    assert found["one", None]["refused"] and "steps" in found["one", None]["remarks"][0]
    code, out, _ = mctk(*arguments)
    assert code == 1 and "refused" in out
