"""Results go to the hub with their cards, and nothing private goes with them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mctk
import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects
from mctk.cli import main

REPOSITORY = "me/small"
REAL = huggingface_hub.HfApi


class Hub:
    """A stand-in for the client: takes calls that the real one takes, and remembers them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}
        self.private, self.tags, self.refuse = False, [], {}

    def __call__(self) -> Hub:
        return self

    def __getattr__(self, name: str):
        signature = inspect.signature(getattr(REAL, name))

        def call(*given, **options):
            bound = signature.bind(self, *given, **options)
            self.calls.append(name)
            if name in self.refuse:
                raise self.refuse[name]
            return getattr(self, f"_{name}")(**dict(list(bound.arguments.items())[1:]))

        return call

    def _whoami(self):
        return {"name": "me"}

    def _create_repo(self, repo_id, exist_ok, private):
        assert exist_ok and private in (True, None)  # None: as the owner's default says
        self.private = self.private or bool(private)

    def _auth_check(self, repo_id, write):
        assert write

    def _model_info(self, repo_id):
        files = [SimpleNamespace(rfilename=name) for name in self.files]
        return SimpleNamespace(siblings=files, tags=self.tags, private=self.private)

    def _upload_folder(
        self, repo_id, folder_path, allow_patterns, ignore_patterns, delete_patterns, commit_message
    ):
        folder = Path(folder_path)
        there = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
        names = set(
            filter_repo_objects(
                there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        for old in filter_repo_objects(list(self.files), allow_patterns=delete_patterns):
            del self.files[old]
        self.files |= {name: (folder / name).read_bytes() for name in names}
        self.tags = yaml.safe_load(self.files["README.md"].decode().split("---\n")[1])["tags"]


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


@pytest.fixture
def recipe(write_recipe) -> Path:
    # A streamed gate alone: the other one starts a process.
    return write_recipe(calibration=None, steps=[{"decompose": "svd"}], gate=True)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(
        "mctk.engine.finish.check_fresh_process", lambda *args: {"fresh_process_equal": None}
    )


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_a_run_is_uploaded_and_a_finished_one_only_that(hub, recipe, cache, capsys, tmp_path):
    asked = ["run", recipe, "--cache", cache, "--push-to-hub", REPOSITORY, "--private", "--quiet"]
    code, out, err = command(capsys, *asked)
    assert code == 0, err
    assert out.rstrip().endswith(f"uploaded to https://huggingface.co/{REPOSITORY}")
    assert hub.calls == ["whoami", "create_repo", "auth_check", "model_info", "upload_folder"]
    assert hub.private
    output = tmp_path / "out"
    assert {"config.json", "tokenizer.json", "README.md", "report.md", "recipe.yaml"} < {*hub.files}
    assert not {"metrics.json", "run.log"} & {*hub.files}
    assert not any(name.startswith(".") or "/" in name for name in hub.files)
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content, name
    weights = {path.name for path in output.glob("*.safetensors")}
    assert weights == {name for name in hub.files if name.endswith(".safetensors")}
    card = hub.files["README.md"].decode()
    assert f'path = "{REPOSITORY}"\nmodel =' in card and "mctk" in hub.tags

    hub.files["model-00009-of-00009.safetensors"] = b"of an earlier upload"
    before = (output / "metrics.json").read_bytes()
    code, out, err = command(capsys, *asked)
    assert code == 0, err
    assert (output / "metrics.json").read_bytes() == before
    assert hub.calls[5:] == hub.calls[:5] and "model-00009-of-00009.safetensors" not in hub.files

    finished = mctk.CompressedModel(output, json.loads(before))
    assert finished.push_to_hub("me/again").endswith("me/again")
    card = hub.files["README.md"].decode()
    assert 'path = "me/again"\nmodel =' in card and REPOSITORY not in card


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("whoami", "no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("create_repo", "does the token of me have write access to me?"),
        ("auth_check", "does the token of me have write access to me?"),
    ],
)
def test_what_the_hub_refuses_is_told_before_the_run(
    hub, recipe, cache, capsys, tmp_path, call, message
):
    hub.refuse[call] = OSError("no\ntoken")
    code, _, err = command(
        capsys, "run", recipe, "--cache", cache, "--push-to-hub", REPOSITORY, "--quiet"
    )
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_is_refused_without_asking(hub, recipe, cache, capsys, monkeypatch, tmp_path):
    def refused(*more: str) -> str:
        code, _, err = command(capsys, "run", recipe, "--cache", cache, "--quiet", *more)
        assert code == 2 and not (tmp_path / "out").exists()
        return err

    assert "'small' is no name of a repository" in refused("--push-to-hub", "small")
    assert "key gate: false, and what was not checked is not uploaded" in refused(
        "--push-to-hub", REPOSITORY, "--set", "gate=false"
    )
    assert "--private has no effect without" in refused("--private")
    assert hub.calls == []
    hub.files["pytorch_model.bin"] = b""
    assert "holds a model that mctk did not make" in refused("--push-to-hub", REPOSITORY)
    hub.files.clear()
    monkeypatch.setattr(hub, "_create_repo", lambda **given: None)  # it is there, and public
    assert "and public; make it private" in refused("--push-to-hub", REPOSITORY, "--private")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refused("--push-to-hub", REPOSITORY)


def test_the_original_is_not_overwritten(hub):
    from mctk.publish import prepare

    with pytest.raises(mctk.UserError, match="owner/name is the original; give the result another"):
        prepare("owner/name", base="owner/name")


def test_only_checked_results_are_pushed(hub, write_recipe, cache, mixtral, capsys, tmp_path):
    code, _, err = command(capsys, "push", mixtral, REPOSITORY)
    assert code == 2 and "is no result of mctk" in err
    code, _, err = command(capsys, "push", tmp_path, REPOSITORY)
    assert code == 2 and "no config.json" in err
    recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    command(capsys, "run", recipe, "--cache", cache, "--quiet")
    output = tmp_path / "out"
    code, _, err = command(capsys, "push", output, REPOSITORY)
    assert code == 2 and "its files were not checked (gate: false)" in err
    metrics = json.loads((output / "metrics.json").read_text())
    metrics["gate"]["streamed_equal"] = True
    (output / "metrics.json").write_text(json.dumps(metrics))
    manifest = output / ".mctk" / "manifest.json"
    unfinished = json.loads(manifest.read_text()) | {"finished": False}
    manifest.write_text(json.dumps(unfinished))
    code, _, err = command(capsys, "push", output, REPOSITORY)
    assert code == 2 and "the run is not finished" in err
    manifest.write_text(json.dumps(unfinished | {"finished": True}))
    code, out, err = command(capsys, "push", output, REPOSITORY)
    assert (code, out) == (0, f"uploaded to https://huggingface.co/{REPOSITORY}\n"), err
    metrics["model"]["hub"] = REPOSITORY
    (output / "metrics.json").write_text(json.dumps(metrics))
    code, _, err = command(capsys, "push", output, REPOSITORY)
    assert code == 2 and "me/small is the original; give the result another name" in err
    for file in output.glob("*.safetensors"):
        file.unlink()
    code, _, err = command(capsys, "push", output, REPOSITORY)
    assert code == 2 and "holds no weights any more" in err


def test_an_export_is_pushed_with_its_card(hub, recipe, cache, capsys, tmp_path):
    command(capsys, "run", recipe, "--cache", cache, "--quiet")
    dense = tmp_path / "dense"
    code, _, err = command(capsys, "export", tmp_path / "out", "--dense", "-o", dense, "--quiet")
    assert code == 0, err
    code, _, err = command(capsys, "push", dense, REPOSITORY)
    assert code == 0, err
    card = hub.files["README.md"].decode()
    assert "**Multiplied out.**" in card and f'path = "{REPOSITORY}"' in card
