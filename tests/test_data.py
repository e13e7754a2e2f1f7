import json
import random
import sys
import types

import pytest
import torch
from mctk.data import (
    MixedSource,
    Source,
    calibration_windows,
    evaluation_windows,
    load_documents,
)
from mctk.errors import UserError
from pydantic import ValidationError

EOS, BOS = 0, 1


class Tokenizer:
    """A token a character, so that windows can be read."""

    eos_token_id = EOS

    def __init__(self):
        self.characters = 0

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        self.characters += sum(map(len, texts))
        start = [BOS] if add_special_tokens else []
        return {"input_ids": [start + [ord(character) for character in text] for text in texts]}


def documents(count, seed=0, low=5, high=60):
    """Texts of random letters that begin with "seed.number:"."""
    draw = random.Random(seed)
    return [
        f"{seed}.{number}:" + "".join(draw.choices("abcdefgh", k=draw.randint(low, high)))
        for number in range(count)
    ]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(text=str(path))


def windows(tmp_path, texts, sequences=20, length=32, seed=0, tokenizer=None):
    source = write(tmp_path / "text.jsonl", texts)
    drawn = calibration_windows(tokenizer or Tokenizer(), source, sequences, length, seed)
    return [tuple(row) for row in drawn.ids.tolist()]


def test_windows_are_text_of_the_documents_joined_by_the_end_token(tmp_path):
    texts = documents(100)
    source = write(tmp_path / "text.jsonl", texts)
    drawn = calibration_windows(Tokenizer(), source, 20, 32, seed=0)
    assert drawn.ids.shape == (20, 32) and drawn.ids.dtype == torch.long
    assert drawn.sources == ["text"] * 20
    assert BOS not in drawn.ids
    assert (drawn.ids == EOS).sum() > 10
    for row in drawn.ids.tolist():
        for piece in "".join(map(chr, row)).split(chr(EOS)):
            assert any(piece in text for text in texts)
    assert len({tuple(row) for row in drawn.ids.tolist()}) == 20


def test_the_same_draw_gives_the_same_digest_and_another_seed_another(tmp_path):
    source = write(tmp_path / "text.jsonl", documents(100))
    digests = [calibration_windows(Tokenizer(), source, 10, 32, s).digest for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def test_neither_order_nor_repetition_of_documents_matters(tmp_path):
    texts = documents(200)
    shuffled = texts + texts[:50]
    random.Random(1).shuffle(shuffled)
    assert windows(tmp_path, texts) == windows(tmp_path, shuffled)
    split = tmp_path / "split"
    split.mkdir()
    write(split / "a.jsonl", texts[120:])
    write(split / "b.jsonl", texts[:120])
    source = Source(text=[str(split / "*.jsonl")])
    again = calibration_windows(Tokenizer(), source, 20, 32, 0)
    assert [tuple(row) for row in again.ids.tolist()] == windows(tmp_path, texts)


def test_long_documents_keep_their_windows_when_the_corpus_grows(tmp_path):
    """Documents of four windows or more, all in the pool: only new windows push old ones out."""
    texts, more = documents(8, low=140, high=200), documents(3, seed=1, low=140, high=200)
    before, after = windows(tmp_path, texts), windows(tmp_path, texts + more)
    kept = [row for row in after if row in before]
    new = ["".join(map(chr, row)) for row in after if row not in before]
    assert 0 < len(new) < 12
    assert all(any(text in added + chr(EOS) for added in more) for text in new)
    assert kept == before[: len(kept)]


@pytest.mark.parametrize(("added", "least"), [(1, 18), (10, 13)])
def test_short_documents_keep_most_windows_when_the_corpus_grows(tmp_path, added, least):
    """Each added document touches one bundle of four windows on average, of 30 in the pool."""
    texts, more = documents(400), documents(added, seed=1)
    before, after = windows(tmp_path, texts), windows(tmp_path, texts + more)
    kept = len(set(before) & set(after))
    assert kept >= least


def test_only_as_much_text_is_tokenised_as_the_draw_needs(tmp_path):
    tokenizer = Tokenizer()
    texts = documents(30, low=100_000, high=100_000)
    drawn = windows(tmp_path, texts, sequences=4, length=64, tokenizer=tokenizer)
    assert len(drawn) == 4
    assert tokenizer.characters < 300_000


class Coarse(Tokenizer):
    """Hardly any token for the text: the first guess at how much is needed falls short."""

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        self.characters += sum(map(len, texts))
        return {"input_ids": [[ord(text[0])] * (len(text) // 40) for text in texts]}


def test_more_text_is_taken_where_tokens_are_long(tmp_path):
    texts = documents(400, low=200, high=400)
    wide = windows(tmp_path, texts, sequences=3, length=16, tokenizer=Coarse())
    assert len(wide) == 3


def test_too_little_text_says_how_much_there_is(tmp_path):
    with pytest.raises(
        UserError, match=r"'text' gives \d+ sequences of 32 tokens, and 20 are asked"
    ):
        windows(tmp_path, documents(10))
    with pytest.raises(UserError, match=r"gives 0 sequences of 32 tokens, .* calibration\.length"):
        windows(tmp_path, [])


def test_all_windows_can_be_drawn_and_little_text_is_lost(tmp_path):
    texts = documents(200)
    tokens = sum(len(text) + 1 for text in texts)
    with pytest.raises(UserError) as error:
        windows(tmp_path, texts, sequences=10_000)
    available = int(str(error.value).split("gives ")[1].split()[0])
    assert available * 32 > 0.8 * tokens
    assert len(windows(tmp_path, texts, sequences=available)) == available


def test_a_mix_draws_by_weight_and_mixes_the_order(tmp_path):
    parts = []
    for name, weight in (("one", 1.0), ("two", 3.0)):
        write(tmp_path / f"{name}.jsonl", documents(100, seed=len(parts)))
        parts.append(MixedSource(text=str(tmp_path / f"{name}.jsonl"), weight=weight))
    drawn = calibration_windows(Tokenizer(), parts, 21, 32, 0)
    assert drawn.sources.count("one") == 5 and drawn.sources.count("two") == 16
    assert "one" in drawn.sources[:12] and "two" in drawn.sources[:12]
    alone = calibration_windows(Tokenizer(), parts[0], 5, 32, 0)
    rows = [
        row for row, name in zip(drawn.ids.tolist(), drawn.sources, strict=True) if name == "one"
    ]
    assert rows == alone.ids.tolist()
    with pytest.raises(UserError, match="'one' gets none of the 1 sequences by its weight"):
        calibration_windows(Tokenizer(), parts, 1, 32, 0)


def test_evaluation_windows_are_the_joined_text_in_order(tmp_path):
    texts = documents(20)
    source = write(tmp_path / "held.jsonl", texts)
    whole = [BOS, *map(ord, "\n\n".join(texts))]
    drawn = evaluation_windows(Tokenizer(), source, 32)
    count = len(whole) // 32
    assert drawn.ids.shape == (count, 32)
    assert drawn.ids.flatten().tolist() == whole[: count * 32]
    assert (
        evaluation_windows(Tokenizer(), source, 32, limit=2).ids.tolist() == drawn.ids[:2].tolist()
    )
    assert evaluation_windows(Tokenizer(), source, 32, limit=10_000).digest == drawn.digest
    with pytest.raises(UserError, match=r"'held' has \d+ tokens, less than one window of 99999"):
        evaluation_windows(Tokenizer(), source, 99999)


def test_documents_of_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first é\n", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n")
    write(tmp_path / "c.jsonl", ["third", "", "fourth"])
    (tmp_path / "c.jsonl").open("a").write("\n")
    source = Source(text=[str(tmp_path / "*.jsonl"), str(tmp_path / "**/*.txt")])
    assert list(load_documents(source)) == ["first é\n", "second\n", "third", "fourth"]
    assert source.label == tmp_path.name
    assert Source(text=["a/*.txt", "b.jsonl", "*.txt"]).label == "a,b,*.txt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON: Expecting value"),
        ("bad.jsonl", b'{"content": "a"}\n', r'bad\.jsonl:1: not an object with a string "text"'),
        ("bad.jsonl", b'["a"]\n', r"bad\.jsonl:1: not an object"),
        ("bad.txt", b"\xff\xfe", r"bad\.txt is not UTF-8"),
        ("bad.csv", b"a", r"bad\.csv is neither \.txt nor \.jsonl nor \.parquet"),
        ("other", b"", r"no file matches '.*bad\.\*' in"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(load_documents(Source(text=str(tmp_path / "bad.*"))))


@pytest.mark.parametrize("given", [{}, {"text": "a", "dataset": "c4"}, {"text": "a", "split": "x"}])
def test_a_source_is_one_thing(given):
    with pytest.raises(ValidationError, match=r"exactly one of text, dataset|split has no effect"):
        Source(**given)


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_named_datasets_are_joined_as_papers_do(monkeypatch):
    calls = []
    columns = {"Salesforce/wikitext": "text", "allenai/c4": "text"}

    def load(path, name, data_files, split, revision):
        calls.append((path, split, data_files))
        return [{columns.get(path, "sentence"): f"row {number}"} for number in range(3000)]

    fake_datasets(monkeypatch, load)
    (whole,) = load_documents(Source(dataset="wikitext2"))
    assert whole.startswith("row 0\n\nrow 1") and whole.endswith("row 2999")
    (ptb,) = load_documents(Source(dataset="ptb"))
    assert ptb.startswith("row 0 row 1")
    assert len(list(load_documents(Source(dataset="c4")))) == 3000
    assert evaluation_windows(Tokenizer(), Source(dataset="wikitext2"), 8, 4).ids.shape == (4, 8)
    c4 = evaluation_windows(Tokenizer(), Source(dataset="c4"), 16)
    assert c4.ids.shape == (256, 16)
    assert "".join(map(chr, c4.ids[0].tolist()[1:])) == "row 0 row 1 row"
    assert evaluation_windows(Tokenizer(), Source(dataset="ptb", split="validation"), 8).sources
    assert [(path.split("/")[1], split) for path, split, _ in calls] == [
        ("wikitext", "train"),
        ("ptb_text_only", "train"),
        ("c4", "train"),
        ("wikitext", "test"),
        ("c4", "validation"),
        ("ptb_text_only", "validation"),
    ]
    assert calls[2][2] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    with pytest.raises(UserError, match="dataset: c4 has no split 'test'"):
        list(load_documents(Source(dataset="c4", split="test")))


def test_a_dataset_that_cannot_be_loaded(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(
        UserError, match=r"wikitext2 \(split train\) .*: Couldn't reach the hub; it"
    ):
        list(load_documents(Source(dataset="wikitext2")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library: pip install 'mctk\[eval\]'"):
        list(load_documents(Source(dataset="wikitext2")))
