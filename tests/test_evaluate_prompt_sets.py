"""Published prompt sets: read as published, checked, and what is refused."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from diffalign.data import prompt_sets
from diffalign.data.prompts import PromptSet, by_hash, quick_rows, read_prompts
from diffalign.errors import InputError


@pytest.fixture
def parti(monkeypatch) -> Path:
    folder = os.environ.get("DIFFALIGN_TEST_DATA")
    if folder is None:
        pytest.skip("DIFFALIGN_TEST_DATA is unset: it names the folder with PartiPrompts.tsv")
    monkeypatch.delenv(prompt_sets.FOLDER, raising=False)
    return Path(folder) / "PartiPrompts.tsv"


def test_partiprompts_has_the_published_counts(parti):
    found = read_prompts(f"partiprompts:{parti}")
    assert (found.name, len(found), len(set(found.prompts))) == ("partiprompts", 1632, 1632)
    assert Counter(m["Category"] for m in found.metadata) == {
        "Animals": 314, "Artifacts": 287, "World Knowledge": 214, "People": 177, "Outdoor Scenes": 131,
        "Illustrations": 124, "Vehicles": 104, "Food & Beverage": 74, "Arts": 66, "Abstract": 51,
        "Produce & Plants": 50, "Indoor Scenes": 40,
    }  # fmt: skip
    assert Counter(m["Challenge"] for m in found.metadata) == {
        "Fine-grained Detail": 312, "Basic": 272, "Simple Detail": 232, "Style & Format": 206, "Imagination": 150,
        "Complex": 113, "Writing & Symbols": 91, "Quantity": 90, "Perspective": 70, "Linguistic Structures": 61,
        "Properties & Positioning": 35,
    }  # fmt: skip
    assert sum(p != p.strip() for p in found.prompts) == 10  # blanks are part of the seed
    assert any(p.startswith('"G I G G L E" painted') for p in found.prompts)


def test_the_quick_tier_is_8_prompts_of_each_category_of_least_hash(parti):
    found = read_prompts(parti)
    labels = [m["Category"] for m in found.metadata]
    quick = quick_rows(found, labels)
    assert len(quick) == 96
    assert set(Counter(m["Category"] for m in quick.metadata).values()) == {8}
    animals = [p for p, label in zip(found.prompts, labels, strict=True) if label == "Animals"]
    least = {animals[i] for i in by_hash(animals)[:8]}
    assert least == {p for p, m in zip(quick.prompts, quick.metadata, strict=True) if m["Category"] == "Animals"}
    assert quick.prompts == [p for p in found.prompts if p in set(quick.prompts)]


def test_the_quick_tier_of_a_set_without_categories_is_the_least_hashes():
    prompts = PromptSet(name="x", prompts=[f"p{i}" for i in range(200)], metadata=[{}] * 200)
    assert set(quick_rows(prompts, None).prompts) == {prompts.prompts[i] for i in by_hash(prompts.prompts)[:96]}
    assert quick_rows(prompts.rows(list(range(5))), None).prompts == prompts.prompts[:5]


def test_a_changed_byte_is_refused_with_both_hashes(parti, tmp_path):
    data = bytearray(parti.read_bytes())
    data[5000] ^= 1
    (tmp_path / "PartiPrompts.tsv").write_bytes(data)
    with pytest.raises(InputError, match=r"sha256 fab29e41bb.*got sha256 [0-9a-f]{64}") as caught:
        read_prompts(f"partiprompts:{tmp_path / 'PartiPrompts.tsv'}")
    assert "\n" not in str(caught.value)


def test_a_name_alone_is_found_in_the_folder_of_copies_or_on_the_hub(parti, tmp_path, monkeypatch):
    asked = []

    def hub(repository: str, name: str) -> Path:
        asked.append((repository, name))
        return parti

    monkeypatch.setattr(prompt_sets, "hub_file", hub)
    assert len(read_prompts("partiprompts")) == 1632
    assert asked == [("nateraw/parti-prompts", "PartiPrompts.tsv")]
    monkeypatch.setenv(prompt_sets.FOLDER, str(parti.parent))
    assert len(read_prompts("partiprompts", 3)) == 3
    assert len(asked) == 1


def test_the_hub_out_of_reach_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.delenv(prompt_sets.FOLDER, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"no 'PartiPrompts.tsv' of 'nateraw/parti-prompts'.*after a colon") as caught:
        read_prompts("partiprompts")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hpd(tmp_path) -> Path:
    for style in prompt_sets.STYLES:
        rows = [f"{style} {i}" for i in range(799)]
        (tmp_path / f"{style}.json").write_text(json.dumps([*rows, "given by every style"]))
    return tmp_path


def test_hpdv2_is_indexed_by_style_and_row_and_keeps_what_is_given_twice(hpd):
    found = read_prompts(f"hpdv2:{hpd}")
    assert (len(found), len(set(found.prompts)), found.indexed) == (3200, 3197, True)
    assert found.metadata[800] == {"style": "concept-art", "row": 0}
    assert found.prompts[1599] == found.prompts[3199] == "given by every style"


def test_hpdv2_with_a_style_missing_or_cut_is_refused(hpd):
    (hpd / "photo.json").write_text('["one"]')
    with pytest.raises(InputError, match=r"800 prompts of each style, got 1 in .*photo\.json"):
        read_prompts(f"hpdv2:{hpd}")
    (hpd / "photo.json").unlink()
    with pytest.raises(InputError, match=r"photo\.json, got none 'photo'"):
        read_prompts(f"hpdv2:{hpd}")


def test_pickapic_names_version_and_split_and_gives_each_caption_once(monkeypatch):
    asked = []

    def column(repository: str, split: str, name: str) -> list[str]:
        asked.append((repository, split, name))
        return ["a", "b", "a"]

    monkeypatch.setattr(prompt_sets, "hub_column", column)
    assert read_prompts("pickapic").name == "pickapic v2 test_unique"
    found = read_prompts("pickapic:v1/validation_unique")
    assert (found.name, found.prompts) == ("pickapic v1 validation_unique", ["a", "b"])
    assert asked[1] == ("yuvalkirstain/pickapic_v1_no_images", "validation_unique", "caption")
    for wrong in ("pickapic:v3/test_unique", "pickapic:v2/train_unique"):
        with pytest.raises(InputError, match="version and split"):
            read_prompts(wrong)


def test_drawbench_copies_that_repeat_prompts_give_200(tmp_path):
    file = tmp_path / "test.txt"
    file.write_text("\n".join(f"prompt {i % 200}" for i in range(999)))
    found = read_prompts(f"drawbench:{file}")
    assert found.prompts == [f"prompt {i}" for i in range(200)]
    file.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="200 distinct prompts, got 2"):
        read_prompts(f"drawbench:{file}")


def test_geneval_rows_keep_what_the_judge_needs(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    row = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [], "prompt": "three cups"}
    file.write_text(json.dumps(row) + "\n")
    found = read_prompts(f"geneval:{file}")
    assert (found.prompts, found.metadata[0]["include"]) == (["three cups"], [{"class": "cup", "count": 3}])
    file.write_text('{"prompt": "three cups"}\n')
    with pytest.raises(InputError, match="tag and include in every row, got row 1"):
        read_prompts(f"geneval:{file}")


def test_a_set_without_a_copy_on_the_hub_says_how_to_name_one(monkeypatch, tmp_path):
    monkeypatch.delenv(prompt_sets.FOLDER, raising=False)
    with pytest.raises(InputError, match="as geneval:PATH or in the folder DIFFALIGN_PROMPTS as evaluation_metadata"):
        read_prompts("geneval")
    with pytest.raises(InputError, match="does not exist"):
        read_prompts("partiprompts:/nowhere/PartiPrompts.tsv")


def test_a_file_of_the_sets_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hpdv2:mine.txt").write_text("a\n")
    assert read_prompts("hpdv2:mine.txt").prompts == ["a"]


# --- captions of sound


def audiocaps(file: Path, clips: int = 975) -> Path:
    """Five captions of each clip, as the published table has them, the least number not first."""
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for i in range(clips):
        lines += [f'{10 * i + n},clip{i},{i % 7},"sound {i}, heard by {n}"' for n in (13, 9, 11, 12, 10)]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_audiocaps_is_one_caption_of_each_clip_the_first_by_number(tmp_path):
    found = read_prompts(f"audiocaps:{audiocaps(tmp_path / 'test.csv')}")
    assert (found.name, len(found), found.indexed) == ("audiocaps", 975, True)
    assert found.prompts[:2] == ["sound 0, heard by 9", "sound 1, heard by 9"]
    assert found.metadata[1] == {"audiocap_id": "19", "youtube_id": "clip1", "start_time": "1"}
    assert len(read_prompts(tmp_path / "test.csv")) == 4875  # by its path alone


def test_musiccaps_and_song_describer_are_read_as_published(tmp_path, monkeypatch):
    header = (
        "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
    )
    rows = [f'-{i},30,40,"/m/0,/m/1","[\'a\', \'b\']","song {i}, slow",4,False,True' for i in range(5521)]
    (tmp_path / "musiccaps-public.csv").write_text("\n".join([header, *rows]) + "\n")
    monkeypatch.setenv(prompt_sets.FOLDER, str(tmp_path))
    found = read_prompts("musiccaps")
    assert (len(found), found.prompts[7], found.metadata[7]["is_audioset_eval"]) == (5521, "song 7, slow", "True")
    header = "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration"
    (tmp_path / "song_describer.csv").write_text(f'{header}\n859,1004034,"a tune, twice",True,0,3,4,34/1.mp3,202.5\n')
    found = read_prompts("songdescriber")
    assert (found.prompts, found.metadata[0]["track_id"]) == (["a tune, twice"], "1004034")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("audiocaps", "caption\na dog\n", "audiocaps must have the columns audiocap_id, youtube_id, start_time, got"),
        ("audiocaps", "audiocap_id,youtube_id,start_time,caption\n1,a,0,x\n", "captions of 975 clips, got 1 in"),
        ("audiocaps", "audiocap_id,youtube_id,start_time,caption\nx,a,0,x\ny,a,0,z\n", "numbers as audiocap_id, got"),
        ("musiccaps", "ytid,start_s,aspect_list,caption\na,0,[],x\n", "musiccaps must have 5521 captions, got 1"),
        ("songdescriber", "caption_id,caption\n1,x\n", r"columns .* without 'track_id'"),
    ],
)
def test_a_file_that_is_not_the_named_captions_is_refused(tmp_path, name, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(f"{name}:{tmp_path / 'a.csv'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["audiocaps", "musiccaps", "songdescriber"])
def test_captions_must_be_a_local_copy(monkeypatch, name):
    monkeypatch.delenv(prompt_sets.FOLDER, raising=False)
    with pytest.raises(InputError, match=f"as {name}:PATH or in the folder DIFFALIGN_PROMPTS"):
        read_prompts(name)
