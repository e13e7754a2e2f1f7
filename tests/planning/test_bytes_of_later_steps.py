"""A budget in bytes counts what an auto step leaves once the steps after it are done as well."""

from __future__ import annotations

import pytest
from mctk.planning import TOLERANCE, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.tiny_run import mixtral  # noqa: F401 (a fixture)


@pytest.mark.parametrize("remove", [0.75, 0.85])
def test_ranks_that_are_rounded_afterwards(mixtral, remove):  # noqa: F811
    registry = load_plugins()
    data = {
        "model": str(mixtral),
        "output": "never-written",
        "budget": {"remove": remove, "of": "experts", "unit": "bytes"},
        "steps": [
            {"decompose": "svd", "targets": ["experts.*"], "options": {"rank_multiple": 1}},
            {"quantize": "rtn", "targets": ["experts.*"], "options": {"bits": 4, "group": 16}},
        ],
    }
    plan = make_plan(load_recipe(data, registry=registry), registry)
    attained = plan.attained(plan.predict(plan.solve()).as_dict())
    assert plan.allowed - TOLERANCE * plan.scope <= attained <= plan.allowed
