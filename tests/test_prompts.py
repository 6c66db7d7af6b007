"""Prompt sets: every format, kept byte for byte, and errors in one line."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from diffalign import shipped
from diffalign.data.prompts import by_hash, read_prompts
from diffalign.errors import InputError

PROMPTS = [' "a" quoted one', "café, naïve", "tab-free  ", "last"]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def files(folder: Path) -> list[str]:
    """The same prompts in every format."""
    quoted = ['"' + p.replace('"', '""') + '"' for p in PROMPTS]
    return [
        write(folder, "a.txt", "\n".join([*PROMPTS[:2], "", "   ", *PROMPTS[2:]]) + "\n"),
        write(folder, "a.jsonl", "\n".join(json.dumps({"prompt": p}) for p in PROMPTS) + "\n\n"),
        write(folder, "b.jsonl", "\n".join(json.dumps({"caption": p, "kind": "x"}) for p in PROMPTS)),
        write(folder, "a.json", json.dumps(PROMPTS)),
        write(folder, "b.json", json.dumps([{"prompt": p} for p in PROMPTS])),
        write(folder, "a.csv", "caption,kind\n" + "\n".join(f"{q},x" for q in quoted)),
        write(folder, "a.tsv", "Prompt\tCategory\n" + "\n".join(f"{p}\tx" for p in PROMPTS)),
        write(folder, "bom.csv", "\ufeffprompt\n" + "\n".join(quoted)),
        write(folder, "dos.txt", "\r\n".join(PROMPTS) + "\r\n"),
    ]


def test_every_format_gives_the_same_prompts_with_blanks_and_quotes_kept(tmp_path):
    for file in files(tmp_path):
        assert read_prompts(file).prompts == PROMPTS, file


def test_other_columns_and_keys_are_metadata(tmp_path):
    files(tmp_path)
    assert read_prompts(tmp_path / "a.tsv").metadata == [{"Category": "x"}] * 4
    assert read_prompts(tmp_path / "b.jsonl").metadata == [{"kind": "x"}] * 4
    assert read_prompts(tmp_path / "a.txt").metadata == [{}] * 4


def test_a_limit_keeps_the_least_hashes_in_file_order_and_is_nested(tmp_path):
    file = write(tmp_path, "many.txt", "\n".join(f"prompt {i}" for i in range(50)))
    whole = read_prompts(file).prompts
    few, more = read_prompts(file, 5).prompts, read_prompts(file, 20).prompts
    assert set(few) == {whole[i] for i in by_hash(whole)[:5]}
    assert set(few) < set(more)
    assert more == [p for p in whole if p in more]
    assert few != whole[:5]
    assert read_prompts(file, 1000).prompts == whole


def test_the_hash_of_a_set_changes_with_any_byte_and_with_the_order(tmp_path):
    hashes = {
        read_prompts(write(tmp_path, f"{i}.txt", text)).sha256
        for i, text in enumerate(["a\nb\n", "b\na\n", "a\nb \n", "ab\n"])
    }
    assert len(hashes) == 4


def test_a_shipped_set_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(shipped.PROMPTS, "small", "small.jsonl")
    monkeypatch.setattr(shipped, "assets", lambda: tmp_path)
    write(tmp_path, "small.jsonl", '{"prompt": "a", "split": "held_out"}\n')
    found = read_prompts("small")
    assert (found.name, found.prompts, found.metadata) == ("small", ["a"], [{"split": "held_out"}])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "\n  \n", "at least one prompt, got none"),
        ("a.tsv", "Text\tKind\nx\ty\n", "must have a column Prompt, prompt, caption, got Text, Kind"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', "line 2 must have a prompt that is text, got 3"),
        ("b.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2 must have a key Prompt, prompt, caption, got text"),
        ("c.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 must be valid JSON"),
        ("a.json", '{"prompt": "x"}', "must be a JSON list, got dict"),
        ("b.json", '["x", null]', "entry 2 must be a string or an object with a prompt, got NoneType"),
        ("a.csv", "prompt,kind\nx,1\n,2\n", "line 3 must have a prompt that is text, got ''"),
        ("a.md", "x", r"must be a \.txt, \.jsonl, \.json, \.csv, \.tsv file"),
    ],
)
def test_a_broken_file_ends_in_one_line_that_names_the_place(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_lists_the_sets(tmp_path):
    with pytest.raises(
        InputError,
        match=r"a set by name \(.*tiny, .*tiny-train\), got 'tinny'; did you mean 'tiny'",
    ):
        read_prompts("tinny")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_partiprompts_is_read_with_its_literal_quotes():
    folder = os.environ.get("DIFFALIGN_TEST_DATA")
    if folder is None:
        pytest.skip("DIFFALIGN_TEST_DATA is unset: it names the folder with PartiPrompts.tsv")
    found = read_prompts(Path(folder) / "PartiPrompts.tsv")
    assert len(found) == len(set(found.prompts)) == 1632  # evaluation.md 1.1
    counts = Counter(m["Category"] for m in found.metadata)
    assert (counts["Animals"], counts["Artifacts"], counts["Abstract"], counts["Indoor Scenes"]) == (314, 287, 51, 40)
    assert Counter(m["Challenge"] for m in found.metadata)["Fine-grained Detail"] == 312
    assert sum('"' in p for p in found.prompts) > 10
    assert any('"G I G G L E"' in p for p in found.prompts)
