"""Rows of text and conversations: JSONL, Parquet, datasets of the hub, chat templates."""

from __future__ import annotations

import inspect
import json
import sys
from types import SimpleNamespace

import pytest
from mctk.data import (
    MixedSource,
    Source,
    TextError,
    calibration_windows,
    evaluation_windows,
    load_documents,
)
from mctk.errors import RecipeError
from mctk.planning import describe, make_plan
from mctk.recipe import Calibration, PerplexityText, load_recipe
from mctk.registry import load_plugins
from pydantic import ValidationError

from tests.tiny_checkpoint import save_checkpoint, tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{{ message.role }} {{ message.content }}{% if message.tool_calls is defined %}!{% endif %}"
    "{{ eos_token }} {% endfor %}"
)
TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
WRITTEN = "<s>user w1 w2</s> assistant w3</s> "


def talker():
    found = tokenizer()
    found.chat_template = TEMPLATE
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet_is_read_like_jsonl(tmp_path):
    texts = [f"w{i} " * 9 for i in range(40)]
    table = Source(text=parquet(tmp_path / "a.parquet", text=[*texts, None, " "], other=[1] * 42))
    lines = Source(text=jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert list(load_documents(table)) == list(load_documents(lines)) == texts
    drawn = [calibration_windows(tokenizer(), source, 5, 16, 0) for source in (table, lines)]
    assert drawn[0].digest == drawn[1].digest
    windows = [evaluation_windows(tokenizer(), source, 16) for source in (table, lines)]
    assert windows[0].digest == windows[1].digest


def test_a_column_of_ones_own(tmp_path):
    for file in (
        parquet(tmp_path / "a.parquet", body=["w1", "w2"]),
        jsonl(tmp_path / "a.jsonl", [{"body": "w1", "n": 1}, {"body": "w2"}]),
    ):
        assert list(load_documents(Source(text=file, column="body"))) == ["w1", "w2"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "a"}, {"body": "b"}],
            {},
            r'a\.jsonl:2: .* string "text"; it has body: name one',
        ),
        ([{"text": 3}], {}, r'a\.jsonl:1: not an object with a string "text"$'),
        ([None], {}, r'a\.jsonl:1: not an object with a string "text"$'),
        ([{"messages": TALK}, {"text": "a"}], {"chat": True}, r'a\.jsonl:2: .*"messages", a list'),
        ([{"messages": []}], {"chat": True}, r"a\.jsonl:1: not an object with .messages"),
        ([{"messages": [{"role": "user"}]}], {"chat": True}, r"a\.jsonl:1: not an object"),
        ([{"messages": [{"content": "x"}]}], {"chat": True}, r"a\.jsonl:1: not an object"),
        ([{"prompt": "x"}], {"chat": True}, r'a\.jsonl:1: .* or with "prompt" and "response"$'),
        (
            [{"messages": TALK}, {"messages": TALK[1:]}],
            {"chat": True},
            r"a\.jsonl:2: the tokenizer's chat template refuses it: roles must take turns",
        ),
        (
            [{"talk": TALK}],
            {"chat": True, "column": "talks"},
            r'a\.jsonl:1: .*"talks", a list[^"]*$',
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, options, message):
    source = Source(text=jsonl(tmp_path / "a.jsonl", rows), **options)
    with pytest.raises(TextError, match=message):
        list(load_documents(source, tokenizer=talker()))


def test_bad_parquet_is_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", texts=["a", "b"])
    with pytest.raises(TextError, match=r"a\.parquet: no column 'text' .did you mean 'texts'"):
        list(load_documents(Source(text=file)))
    (tmp_path / "a.parquet").write_bytes(b"text")
    with pytest.raises(TextError, match=r"a\.parquet: cannot be read as Parquet"):
        list(load_documents(Source(text=file)))
    file = parquet(tmp_path / "b.parquet", messages=[TALK, TALK[1:]])
    with pytest.raises(TextError, match=r"b\.parquet: row 2: the tokenizer's chat template ref"):
        list(load_documents(Source(text=file, chat=True), tokenizer=talker()))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr("mctk.data.sources.find_spec", lambda name: None)
    with pytest.raises(TextError, match=r"text: .*a\.parquet needs pyarrow: pip install"):
        Source(text=str(tmp_path / "a.parquet")).files()


def test_conversations_are_written_out_by_the_template(tmp_path):
    filled = [{**message, "tool_calls": None} for message in TALK]  # as tables have it
    for rows in (
        [{"messages": TALK}],
        [{"prompt": "w1 w2", "response": "w3"}],
        [{"prompt": TALK[:1], "completion": TALK[1:]}],
        [{"messages": filled}],
    ):
        source = Source(text=jsonl(tmp_path / "a.jsonl", rows), chat=True)
        assert list(load_documents(source, tokenizer=talker())) == [WRITTEN]
    source = Source(text=parquet(tmp_path / "a.parquet", messages=[filled]), chat=True)
    assert list(load_documents(source, tokenizer=talker())) == [WRITTEN]
    source = Source(text=jsonl(tmp_path / "b.jsonl", [{"talk": TALK}]), chat=True, column="talk")
    assert list(load_documents(source, tokenizer=talker())) == [WRITTEN]


def test_the_templates_special_tokens_are_the_only_ones(tmp_path):
    """No second <s> before a conversation, and no end token beside the template's own."""
    source = Source(text=jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] * 3), chat=True)
    made = talker()
    once = made(WRITTEN, add_special_tokens=False)["input_ids"]
    drawn = calibration_windows(made, source, 1, len(once), 0)
    assert drawn.ids.tolist() == [once]  # equal conversations count once
    measured = evaluation_windows(made, source, len(once))
    assert measured.ids.tolist() == [once] * 3


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    source = Source(text=jsonl(tmp_path / "a.jsonl", [{"messages": TALK}]), chat=True)
    for draw in (
        lambda: calibration_windows(tokenizer(), source, 1, 4, 0),
        lambda: evaluation_windows(tokenizer(), source, 4),
    ):
        with pytest.raises(TextError, match="chat: the model's tokenizer has no chat template"):
            draw()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "wiki"}, r"no dataset is called 'wiki' \(did you mean 'wikitext2'\?\); those"),
        ({"dataset": "a/b/c"}, "no dataset is called 'a/b/c'"),
        ({"dataset": "c4", "column": "text"}, "column has no effect: c4 is read as papers do"),
        ({"dataset": "c4", "chat": True}, "chat has no effect: c4"),
        ({"text": "a", "subset": "b"}, "subset has no effect without dataset"),
        ({"text": "a", "data_files": "b"}, "data_files has no effect without dataset"),
    ],
)
def test_settings_without_effect(keys, message):
    with pytest.raises(ValidationError, match=message):
        Source(**keys)


def test_settings_of_a_mix_belong_to_its_sources():
    parts = [{"text": "a.txt", "weight": 1}, {"text": "b.txt", "weight": 9.0}]
    for key, value in (("chat", True), ("column", "x")):
        with pytest.raises(ValidationError, match=f"{key} has no effect beside mix"):
            Calibration(mix=[MixedSource(text="a")], **{key: value})
    with pytest.raises(ValidationError, match=r"mix\.0 \(a\) gets none of the 4 sequences"):
        Calibration.model_validate({"mix": parts, "sequences": 4}, strict=False)
    Calibration.model_validate({"mix": parts, "sequences": 5}, strict=False)


def test_keys_at_their_defaults_are_not_in_what_is_hashed():
    """Runs and figures from before there were such keys stay what they are."""
    assert set(PerplexityText(text="a").model_dump()) == {
        "text", "dataset", "split", "name", "length", "windows"
    }  # fmt: skip
    dumped = Source(dataset="a/b", subset="c", column="d", chat=True).model_dump()
    assert (dumped["subset"], dumped["column"], dumped["chat"]) == ("c", "d", True)


def test_any_dataset_of_the_hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    signature, calls = inspect.signature(datasets.load_dataset), []

    def load(*given, **options):
        calls.append(signature.bind(*given, **options).arguments)  # the library takes such a call
        return [{"body": "w1", "messages": TALK}, {"body": "w2", "messages": TALK}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    source = Source(
        dataset="owner/talks@v2", subset="en", split="train[:2]", data_files="a*", column="body"
    )
    assert source.label == "owner/talks"
    assert list(load_documents(source)) == ["w1", "w2"]
    assert (
        list(load_documents(Source(dataset="owner/talks", chat=True), "test", talker()))
        == [WRITTEN] * 2
    )
    wanted = {"path": "owner/talks", "name": "en", "data_files": {"train": ["a*"]},
              "split": "train[:2]", "revision": "v2"}  # fmt: skip
    assert calls[0] == wanted
    assert (calls[1]["split"], calls[1]["revision"]) == ("test", None)
    with pytest.raises(TextError, match=r"owner/talks .split train.: row 1: .*it has body"):
        list(load_documents(Source(dataset="owner/talks")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def plan(model, tmp_path, calibration, evaluate=None):
    recipe = {
        "model": str(model),
        "calibration": {"sequences": 2, "length": 8, **calibration},
        "steps": [{"decompose": "svd_llm", "size": {"rank": 2}}],
        **({"evaluate": evaluate} if evaluate else {}),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe, indent=1))  # YAML holds JSON
    registry = load_plugins()
    return describe(make_plan(load_recipe(file, registry=registry), registry))


def test_the_plan_finds_what_is_wrong_with_conversations(model, tmp_path):
    talks = jsonl(
        tmp_path / "talks.jsonl", [{"prompt": f"w{i}", "response": "w5"} for i in range(9)]
    )
    message = r"recipe\.yaml:\d+: key {}\.chat: the model's tokenizer has no chat template"
    with pytest.raises(RecipeError, match=message.format("calibration")):
        plan(model, tmp_path, {"text": talks, "chat": True})
    with pytest.raises(RecipeError, match=message.format(r"calibration\.mix\.1")):
        remote = {"dataset": "owner/talks", "chat": True}
        plan(model, tmp_path, {"mix": [{"text": talks, "column": "prompt"}, remote]})
    with pytest.raises(RecipeError, match=message.format(r"evaluate\.perplexity\.0")):
        remote = {"dataset": "owner/talks", "chat": True, "length": 8}
        plan(model, tmp_path, {"text": talks, "column": "prompt"}, {"perplexity": [remote]})

    ready = tmp_path / "ready"
    save_checkpoint(ready)
    talker().save_pretrained(ready)
    found = plan(ready, tmp_path, {"text": talks, "chat": True})
    assert found["calibration"]["checked"]
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": "w1", "response": "w5"}, {"prompt": "w1"}])
    with pytest.raises(RecipeError, match=r"key calibration\.text: .*bad\.jsonl:2: not an object"):
        plan(ready, tmp_path, {"text": bad, "chat": True})
