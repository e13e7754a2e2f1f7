"""Every installed method keeps its stage's contract: one that is registered is tried, unasked.

A method that wants nothing special needs no entry here. An entry says what `check_method` cannot
know: steps that the method builds on, values of options whose types suggest none, and which
options cannot show an effect on a tiny model, with the reason.
"""

from __future__ import annotations

import pytest
from mctk.registry import load_plugins
from mctk.testing import FAMILIES, assert_conforms

QUICK = ["mixtral"]
MERGED = [{"merge": "mean"}]
RESIDUALS = [{"merge": "wasserstein"}]
EIGHT = ["deepseek_v3"]  # experts in two groups
RANDOM = "the experts of a random model have nothing in common"
# Bases for clusters of experts are weighed for the step that follows, at a budget's even share.
SEVERAL = {
    "options": {"bases": "auto"},
    "values": {"bases": [1, 2], "min_rank": [1, 16, 32]},
    "after": [{"decompose": "delta_svd", "size": "auto"}],
    "families": EIGHT,
    "without_effect": {"storage": RANDOM},
}
PROTECT = {"values": {"protect": [{1: [0]}, {1: [1]}, {1: [2]}, {1: [3]}]}}
SETTINGS = {
    "merge/fisher": SEVERAL,
    "merge/frequency": SEVERAL,
    "merge/mean": SEVERAL,
    "merge/random": SEVERAL,
    "merge/regmean": SEVERAL,
    "merge/ties": SEVERAL,
    "merge/hc_smoe": {"families": EIGHT},
    "merge/wasserstein": {
        "values": {"iterations": [1], "tolerance": [1e3]},
        "without_effect": {
            "iterations": f"{RANDOM}: the first assignment stands",
            "tolerance": f"{RANDOM}: the first assignment stands",
            "workers": "how many cores work, not on what",
        },
    },
    "decompose/delta_svd": {"before": MERGED},
    "prune/ean": PROTECT,
    "prune/frequency": PROTECT,
    "prune/mone": PROTECT,
    "prune/naee": {
        "without_effect": dict.fromkeys(
            ("search", "subsets", "width"), "of so few experts greedy search finds the best"
        )
    },
    "prune/random": PROTECT,
    "prune/reap": PROTECT,
    "prune/router_weight": PROTECT,
    "prune/semi_dynamic": {
        "before": [*MERGED, {"decompose": "delta_svd", "size": {"keep": 0.5}}],
        "options": {"static": 0.25},
    },
    "prune/joint_svd": {"before": RESIDUALS},
    "prune/up": {"before": RESIDUALS},
    "quantize/rtn": {"values": {"only": [["lowrank"]], "group": [32, None]}},
}
METHODS = [f"{method.stage}/{method.name}" for method in load_plugins().methods()]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


def test_settings_are_of_methods_that_there_are():
    assert set(SETTINGS) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_conforms(name, models):
    settings = {"families": QUICK, **SETTINGS.get(name, {})}
    found = assert_conforms(name, models=models, **settings)
    assert not found.refused, "what is refused is not tried: write settings that are not"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_conforms_on_every_family(name, models):
    settings = {**SETTINGS.get(name, {}), "families": FAMILIES}
    found = assert_conforms(name, models=models, **settings)
    assert not found.refused, str(found)
