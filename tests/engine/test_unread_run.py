"""Tensors that transformers does not read: kept or left out, counted, and said."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mctk.checkpoint import Source, Unread
from mctk.engine import run
from mctk.errors import CheckpointError, RecipeError
from mctk.evaluate.loading import load_model
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.sweep import StreamedModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, DeepseekV3PreTrainedModel
from transformers.modeling_layers import MtpModel

from tests.families import tiny, token_ids
from tests.quantised_checkpoint import FILE, add_predictor, store_fp8
from tests.removal_method import registry as removal_registry
from tests.tiny_run import DEMO

SVD = {"decompose": "svd", "targets": "experts.*", "size": {"keep": 0.7}}
REMOVE = {"prune": "remove", "targets": ["experts.*"], "size": {"rank": 6}}
COUNT = "num_nextn_predict_layers"
ATTENTION = {"decompose": "svd", "targets": "attention.o", "size": {"rank": 8}}
IGNORED = "_keys_to_ignore_on_load_unexpected"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "deepseek"
    tiny("deepseek_v3", vocab_size=4096).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    return path


@pytest.fixture
def source(plain, tmp_path) -> Path:
    """With a fourth layer for multi-token prediction that has 8 experts."""
    path = Path(shutil.copytree(plain, tmp_path / "source"))
    assert len(add_predictor(path, 3)) > 30
    return path


@pytest.fixture
def dense_source(plain, tmp_path) -> Path:
    """With one that has no experts."""
    path = Path(shutil.copytree(plain, tmp_path / "dense"))
    assert add_predictor(path, 3, routed=False)
    return path


@pytest.fixture(scope="module")
def registry():
    return removal_registry()


@pytest.fixture
def load(write_recipe, registry) -> Callable[..., Any]:
    def load_one(model: Path, *steps: dict[str, Any], **keys: Any) -> Any:
        keys = {"budget": None, "calibration": None, **keys, "steps": list(steps)}
        keys = {key: value for key, value in keys.items() if value is not ...}  # the default
        return load_recipe(write_recipe(model=str(model), **keys), registry=registry)

    return load_one


@pytest.fixture
def go(load, registry, cache) -> Callable[..., dict[str, Any]]:
    return lambda *given, **keys: run([load(*given, **keys)], registry, cache=cache)[0]


@pytest.fixture
def plan(load, registry) -> Callable[..., Any]:
    return lambda *given, **keys: make_plan(load(*given, **keys), registry)


def mtp(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in Source(path).files:
        found |= {n: t for n, t in load_file(path / file).items() if ".layers.3." in n}
    return found


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def counted(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    return sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())


def test_they_are_kept_where_the_configuration_stays(source, go, tmp_path):
    metrics = go(source, SVD, gate=True)
    before, after = mtp(source), mtp(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config(tmp_path / "out")[COUNT] == 1
    assert metrics["gate"]["fresh_process_equal"]
    sizes = metrics["sizes"]
    assert sizes["planned"] == sizes["attained"]
    parameters, nbytes = counted(before)
    [part] = metrics["unread"]["parts"]
    assert (part["parameters"], part["bytes"], part["tensors"]) == (parameters, nbytes, len(before))
    assert part["kept"] and metrics["unread"]["config"] == []
    [line] = [w for w in metrics["warnings"] if "multi-token prediction" in w]
    assert "copied as they are" in line and line in (tmp_path / "out" / "report.md").read_text()


def test_transformers_drafts_with_what_was_kept(source, go, tmp_path, monkeypatch):
    """It finds the tensors by a list of its own, which knows the published models' layers only."""
    go(source, SVD)
    patterns = [r"model\.layers\.3\..*"]
    monkeypatch.setattr(DeepseekV3PreTrainedModel, IGNORED, patterns)
    monkeypatch.setattr(DeepseekV3ForCausalLM, IGNORED, patterns)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(rows=1)
    expected = model.generate(ids, **settings)
    drafted: list[int] = []
    forward = MtpModel.forward
    monkeypatch.setattr(MtpModel, "forward", lambda *a, **k: drafted.append(1) or forward(*a, **k))
    assert torch.equal(model.generate(ids, use_mtp=True, **settings), expected)
    assert drafted


def test_dropped_if_asked(source, go, tmp_path):
    metrics = go(source, SVD, unread="drop")
    assert not mtp(tmp_path / "out") and config(tmp_path / "out")[COUNT] == 0
    parameters, nbytes = counted(mtp(source))
    sizes = metrics["sizes"]
    assert sizes["planned"] == sizes["attained"]
    kept = go(source, SVD, output=str(tmp_path / "kept"))["sizes"]["attained"]
    assert kept["parameters"] - sizes["attained"]["parameters"] == parameters
    assert kept["bytes"] - sizes["attained"]["bytes"] == nbytes
    assert kept["active_parameters"] == sizes["attained"]["active_parameters"]
    [line] = [w for w in metrics["warnings"] if "multi-token prediction" in w]
    assert "left out, as the recipe says" in line and f"{COUNT} is set to 0" in line


def test_a_native_result_goes_without_prediction_layers_that_have_experts(source, go, tmp_path):
    """They would have 8 experts where config.json says 6."""
    metrics = go(source, REMOVE, gate=True)
    assert metrics["output_kind"] == "native" and metrics["gate"]["fresh_process_equal"]
    found = config(tmp_path / "out")
    assert (found["n_routed_experts"], found[COUNT]) == (6, 0)
    assert not mtp(tmp_path / "out")
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    [line] = [w for w in metrics["warnings"] if "multi-token prediction" in w]
    assert "left out, since their experts would be more" in line
    for shown in ("report.md", "README.md"):  # it is no saving of the method
        page = (tmp_path / "out" / shown).read_text()
        assert "of which not read with the model (multi-token prediction)" in page, shown


def test_so_does_a_result_of_terms_if_config_says_fewer_experts(source, go, tmp_path):
    metrics = go(source, REMOVE, ATTENTION, gate=True)
    assert metrics["output_kind"] == "mctk" and metrics["gate"]["fresh_process_equal"]
    found = config(tmp_path / "out")
    assert (found["n_routed_experts"], found[COUNT]) == (6, 0)
    assert not mtp(tmp_path / "out")
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    [part] = metrics["unread"]["parts"]
    assert not part["kept"] and metrics["unread"]["config"] == [COUNT]


def test_they_are_kept_where_only_some_layers_lose_experts(source, go, tmp_path):
    metrics = go(source, REMOVE | {"layers": "1"}, unread="keep")
    assert metrics["output_kind"] == "mctk"
    found = config(tmp_path / "out")
    assert (found["n_routed_experts"], found[COUNT]) == (8, 1)
    before, after = mtp(source), mtp(tmp_path / "out")
    assert before.keys() == after.keys()
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]


def test_a_native_result_keeps_prediction_layers_without_experts(dense_source, go, tmp_path):
    metrics = go(dense_source, REMOVE)
    assert metrics["output_kind"] == "native" and config(tmp_path / "out")[COUNT] == 1
    before, after = mtp(dense_source), mtp(tmp_path / "out")
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_kept_is_refused_in_the_plan(source, dense_source, plan):
    with pytest.raises(RecipeError, match=r"unread: .*more of them than config\.json says"):
        plan(source, REMOVE, unread="keep")
    with pytest.raises(RecipeError, match=r"unread: .*more of them than config\.json says"):
        plan(source, REMOVE, ATTENTION, unread="keep")
    assert plan(source, SVD, unread="keep").left_out(None) == ()
    assert plan(dense_source, REMOVE, unread="keep").left_out(6) == ()


AUTO = {"prune": "remove", "targets": ["experts.*"], "size": "auto"}
SOME = AUTO | {"prune": "remove_some"}
MERGE = {"merge": "fisher", "options": {"bases": "auto"}, "targets": "experts.*"}
BY_LOSS = {"budget": {"remove": 0.2, "of": "experts"}, "allocate": {"method": "by_loss"}}
BUDGET = {"budget": {"remove": 0.2, "of": "experts"}}
FOUR = {"rank": 4}


@pytest.mark.parametrize(
    ("steps", "keys", "waits"),
    [
        ([AUTO, ATTENTION], BY_LOSS, "needs_curves"),
        ([SOME], BY_LOSS, "needs_curves"),
        ([MERGE, AUTO], BUDGET, "pending"),
    ],
)
def test_what_data_may_forbid_to_keep_is_refused_in_the_plan(source, plan, steps, keys, waits):
    """Else a run would find out at its end."""
    keys = keys | {"calibration": ...}
    assert getattr(plan(source, *steps, **keys), waits)
    with pytest.raises(RecipeError, match=r"unread: .*more of them than config\.json says"):
        plan(source, *steps, unread="keep", **keys)


def lets_data_decide(monkeypatch, registry, stage: str, name: str) -> None:
    method = registry.method(stage, name)
    monkeypatch.setattr(method, "layout", lambda banks, size, options: None)


@pytest.mark.parametrize("name", ["remove", "svd"])
def test_so_is_what_a_layout_by_data_may_forbid(source, plan, monkeypatch, registry, name):
    stage = "prune" if name == "remove" else "decompose"
    lets_data_decide(monkeypatch, registry, stage, name)
    made = plan(source, REMOVE, ATTENTION)
    assert made.layout(made.solve()) is None
    assert not describe(made)["unread"]["parts"][0]["kept"]
    with pytest.raises(RecipeError, match=r"unread: .*more of them than config\.json says"):
        plan(source, REMOVE, ATTENTION, unread="keep")


def test_what_is_sure_to_fit_may_be_kept_though_data_decide(source, plan, monkeypatch, registry):
    some = REMOVE | {"layers": "1"}
    svd = ATTENTION | {"size": "auto"}
    keys = {"budget": {"remove": 0.015, "of": "model"}, "allocate": {"method": "by_score"}}
    keys |= {"calibration": ...}
    assert plan(source, some, svd, unread="keep", **keys).needs_curves
    lets_data_decide(monkeypatch, registry, "decompose", "svd")
    for steps in ([ATTENTION], [some, ATTENTION], [some, REMOVE | {"layers": "2", "size": FOUR}]):
        plan(source, *steps, unread="keep")


FOUR = {"rank": 4}


def test_a_plan_says_what_becomes_of_them(source, plan):
    parameters, nbytes = counted(mtp(source))
    kept, native = describe(plan(source, SVD)), describe(plan(source, REMOVE))
    dropped = describe(plan(source, SVD, unread="drop"))
    first = kept["unread"]["parts"][0]
    assert (first["what"], first["parameters"]) == ("multi-token prediction", parameters)
    assert first["bytes"] == nbytes and first["kept"]
    assert not native["unread"]["parts"][0]["kept"] and native["unread"]["config"] == [COUNT]
    difference = kept["sizes"]["planned"]["parameters"] - dropped["sizes"]["planned"]["parameters"]
    assert difference == parameters
    assert kept["sizes"]["original"] == dropped["sizes"]["original"]
    stored = sum(t.numel() for t in load_file(source / FILE).values())
    assert kept["sizes"]["original"]["parameters"] == stored


@pytest.mark.parametrize("of", ["model", "experts"])
@pytest.mark.parametrize("unread", ["keep", "drop"])
def test_a_budget_is_of_what_transformers_reads(source, plan, plan_of_plain, of, unread):
    """So that leaving prediction layers out buys nothing."""
    budget = {"remove": 0.1, "of": of}
    step = {"decompose": "svd", "targets": "experts.*", "options": {"rank_multiple": 1}}
    made = plan(source, step, budget=budget, unread=unread)
    plain = plan_of_plain(step, budget=budget)
    assert (made.scope, made.allowed, made.budget) == (plain.scope, plain.allowed, plain.budget)
    sizes = made.predict(made.solve()).as_dict()
    assert made.attained(sizes) == plain.attained(plain.predict(plain.solve()).as_dict())
    assert sizes["active_parameters"] == plain.predict(plain.solve()).active_parameters


@pytest.fixture
def plan_of_plain(plain, plan) -> Callable[..., Any]:
    return lambda step, **keys: plan(plain, step, **keys)


def test_of_a_quantised_source_they_are_dequantised(source, go, tmp_path):
    meant = store_fp8(source)
    go(source, SVD)
    after = mtp(tmp_path / "out")
    names = [name for name in after if name in meant]
    assert len(names) > 20 and not any(name.endswith("_scale_inv") for name in after)
    assert all(torch.equal(after[name], meant[name].to(torch.bfloat16)) for name in names)


def test_tensors_of_another_kind_are_kept(source, go, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(source / FILE)
    save_file({**tensors, "model.rotary.inv_freq": torch.ones(4)}, source / FILE)
    metrics = go(source, REMOVE)
    assert [part["what"] for part in metrics["unread"]["parts"]] == [
        "multi-token prediction",
        "other",
    ]
    first, second = [w for w in metrics["warnings"] if "not read by transformers" in w]
    assert "multi-token prediction" in first and first.endswith(f"; {COUNT} is set to 0")
    assert "model.rotary.inv_freq" in second and COUNT not in second
    assert "model.rotary.inv_freq" in Source(tmp_path / "out").tensors
    assert not mtp(tmp_path / "out")


def loaded(path: Path) -> str:
    """Loads a whole model as an evaluation does; gives what transformers said of it."""
    logger, words = logging.getLogger("transformers"), io.StringIO()
    handler = logging.StreamHandler(words)
    logger.addHandler(handler)
    try:
        load_model(path, "cpu", torch.float32, False)
    finally:
        logger.removeHandler(handler)
    return words.getvalue()


def test_loading_does_not_report_what_is_listed_as_unread(source):
    """A user takes twenty UNEXPECTED lines for a failure; plan and report have said it."""
    assert "LOAD REPORT" not in loaded(source)
    settings = {"dtype": torch.float32, "output_loading_info": True}
    info = AutoModelForCausalLM.from_pretrained(source, **settings)[1]
    assert len(info["unexpected_keys"]) > 10  # there would have been something to say


def test_loading_tells_what_is_not_listed(source, monkeypatch):
    monkeypatch.setattr(StreamedModel, "unread", Unread((), ()))
    assert "LOAD REPORT" in loaded(source)


def test_loading_that_leaves_something_out_is_an_error(source, monkeypatch):
    class Leaving:
        @staticmethod
        def from_pretrained(*_: object, **settings: object):
            assert settings["output_loading_info"]
            return tiny("deepseek_v3"), {"missing_keys": {"model.norm.weight"}}

    monkeypatch.setattr("mctk.models.auto_class", lambda _: Leaving)
    with pytest.raises(CheckpointError, match=r"source: transformers found no model\.norm\.weight"):
        loaded(source)
