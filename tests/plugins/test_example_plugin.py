"""The example of docs/write_a_plugin.md: installs, loads, works, and is what the page prints."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mctk.registry import Registry
from mctk.statistics import LayerStatistics, Moment, SecondMoment
from mctk.terms import Bank, BankShape, Dense

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "tests" / "fixtures" / "example_plugin"


@pytest.fixture(scope="module")
def method():
    spec = importlib.util.spec_from_file_location("mctk_scaled", EXAMPLE / "mctk_scaled.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mctk_scaled"] = module
    spec.loader.exec_module(module)
    registry = Registry({"scaled": module})
    assert [info.error for info in registry.plugins()] == [None]
    yield registry.method("decompose", "scaled_svd")
    del sys.modules["mctk_scaled"]


@pytest.mark.parametrize("name", ["pyproject.toml", "mctk_scaled.py"])
def test_the_page_prints_the_example(name):
    page = (ROOT / "docs" / "write_a_plugin.md").read_text(encoding="utf-8")
    assert (EXAMPLE / name).read_text(encoding="utf-8") in page


def test_method_works(method):
    generator = torch.Generator().manual_seed(0)
    shape = BankShape(2, 12, 10)
    weight = torch.randn(2, 12, 10, generator=generator)
    bank = Bank("experts.up", 0, shape, [Dense(shape, [0, 1], weight)])
    inputs = torch.randn(200, 10, generator=generator) * torch.logspace(0, 2, 10)
    moment = Moment((inputs.T @ inputs).repeat(2, 1, 1), torch.tensor([200, 200]))
    (need,) = method.needs(shape, bank.name, method.Options())
    assert need == SecondMoment("experts.up", "input")
    statistics = LayerStatistics(0, {need: moment}, {bank.name})

    def error(alpha):
        options = method.Options(alpha=alpha)
        (term,) = method.decompose(bank, statistics, 4, options)
        return sum(
            float((inputs @ (weight[e] - term.materialise(e)[0]).T).norm()) for e in range(2)
        )

    assert error(1.0) < error(0.5) < error(0.0)
    (term,) = method.decompose(bank, statistics, 10, method.Options())
    assert torch.allclose(term.materialise(1)[0], weight[1], atol=1e-4)


def test_an_installed_plugin_is_found(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "mctk_scaled.py"):
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    place = tmp_path / "site"
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(place), str(source)], check=True, timeout=120
    )
    script = (
        "from mctk.registry import load_plugins; registry = load_plugins();"
        "print(registry.plugin_of(registry.method('decompose', 'scaled_svd')).distribution)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(place), "MCTK_PLUGINS": "scaled"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "mctk-scaled"
