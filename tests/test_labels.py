"""Label files: what people said of a round's images, and every way in which a file can be wrong."""

import json
from itertools import permutations

import pytest

from diffalign.errors import InputError
from diffalign.online.labels import read_labels, write_template

IDS = ["0-0", "0-1", "0-2", "10-0", "10-1", "10-2"]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for image in IDS:
        (images / f"{image}.png").write_bytes(b"")
    return images


def written(folder, *rows):
    """A label file of these objects, or lines."""
    file = folder.parent / "labels.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def one(image, label, annotator=None):
    row = {"id": image, "label": label}
    return row if annotator is None else {**row, "annotator": annotator}


def whole():
    return [one(image, i) for i, image in enumerate(IDS)]


def read(folder, *rows, partial=False):
    return read_labels(written(folder, *rows), IDS, folder, partial=partial)


def test_every_image_has_its_label_in_the_order_of_the_round(folder):
    found = read(folder, *reversed(whole()))
    assert list(found.mean.items()) == [(image, float(i)) for i, image in enumerate(IDS)]
    assert (found.unlabelled, found.annotators) == (0, 1)


def test_labels_of_several_annotators_are_averaged_image_by_image(folder):
    more = [one("0-0", 1, "ann"), one("0-0", 0.5, "bo"), one("0-1", -3, "bo")]
    found = read(folder, *[row for row in whole() if row["id"] not in ("0-0", "0-1")], *more)
    assert (found.mean["0-0"], found.mean["0-1"], found.mean["10-2"]) == (0.75, -3, 5)
    assert found.annotators == 3


def test_equal_labels_have_equal_means_in_whatever_order_they_come(folder):
    rows = []
    for image, labels in zip(IDS, permutations([0.1, 0.2, 0.3]), strict=True):
        rows += [one(image, label, str(i)) for i, label in enumerate(labels)]
    assert len(set(read(folder, *rows).mean.values())) == 1


def test_a_prompt_s_labels_may_come_in_one_list(folder):
    lists = [{"prompt_id": "10", "labels": [1, 0, 2]}, {"prompt_id": "0", "labels": [0, 0, 1], "annotator": "ann"}]
    found = read(folder, *lists, one("10-0", 0, "bo"))
    assert list(found.mean.values()) == [0, 0, 1, 0.5, 0, 2]


def test_blank_lines_and_a_byte_order_mark_are_no_labels(folder):
    file = written(folder, "", *whole(), "  ")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_labels(file, IDS, folder).mean) == 6


def test_a_template_asks_for_every_image_and_is_read_once_it_is_filled_in(folder):
    file = folder.parent / "labels.jsonl"
    write_template(file, IDS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"id": image, "label": None} for image in IDS]
    with pytest.raises(InputError, match=r"labels must hold at least one label, got none in '.*labels\.jsonl'"):
        read_labels(file, IDS, folder)
    assert read(folder, *rows, *whole()).mean == read(folder, *whole()).mean


def test_a_template_never_takes_the_place_of_labels(folder):
    file = written(folder, *whole())
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"labels\.jsonl must not be there yet, got a file; move it"):
        write_template(file, IDS)
    assert file.read_bytes() == before


def test_images_without_a_label_are_an_error_and_named(folder):
    message = r"must be of all 6 images, got none for 2 \('0-1', '10-2'\); label them, or allow partial labels"
    rows = [one(row["id"], None if row["id"] == "0-1" else row["label"]) for row in whole()[:-1]]
    with pytest.raises(InputError, match=message):
        read(folder, *rows)
    with pytest.raises(InputError, match=r"got none for 5 \('0-1', '0-2', '10-0', '10-1', '10-2'\); label"):
        read(folder, one("0-0", 1))


def test_many_images_without_a_label_are_not_all_named(folder):
    ids = [*IDS, "11-0"]
    with pytest.raises(InputError, match=r"got none for 6 \('0-1', '0-2', '10-0', '10-1', '10-2', \.\.\.\);"):
        read_labels(written(folder, one("0-0", 1)), ids, folder)


def test_images_without_a_label_are_left_out_and_counted_where_that_is_allowed(folder):
    found = read(folder, one("0-0", 1), {"prompt_id": "10", "labels": [1, None, 0]}, partial=True)
    assert found.mean == {"0-0": 1, "10-0": 1, "10-2": 0}
    assert found.unlabelled == 3


BAD = {
    "an unknown image": (one("0-7", 1), r"line 7: id must be an image of this round, got '0-7'; did you mean '0-2'\?"),
    "an image by number": (one(3, 1), r"line 7: id must be an image of this round, got 3"),
    "an unknown prompt": (
        {"prompt_id": "100", "labels": [1]},
        r"line 7: prompt_id must be a prompt of this round, got '100'; did you mean '10'\?",
    ),
    "too few of a prompt": (
        {"prompt_id": "10", "labels": [1, 2]},
        r"line 7: labels must be a list of 3, one for each image, got 2$",
    ),
    "no list": ({"prompt_id": "10", "labels": 3}, r"line 7: labels must be a list of 3, one for each image, got 3$"),
    "twice": (
        one("0-1", 0),
        r"line 7: '0-1' must have one label of each annotator, got a second without an annotator after line 2; name",
    ),
    "a prompt twice": ({"prompt_id": "0", "labels": [0, 0, 0]}, r"line 7: '0-0' must have one label of each annotator"),
    "text": (one("0-1", "good", "ann"), r"line 7: label of '0-1' must be a number, got 'good'"),
    "a truth": (one("0-1", True, "ann"), r"line 7: label of '0-1' must be a number, got True"),
    "no number": (
        '{"id": "0-1", "label": NaN, "annotator": "ann"}',
        r"line 7: label of '0-1' must be a number, got nan",
    ),
    "infinite": ('{"id": "0-1", "label": -Infinity, "annotator": "a"}', r"label of '0-1' must be a number, got -inf"),
    "beyond floats": ('{"id": "0-1", "label": 1' + "0" * 400 + ', "annotator": "a"}', r"label of '0-1' must be a num"),
    "text in a list": (
        {"prompt_id": "0", "labels": [0, "1", 0], "annotator": "ann"},
        r"line 7: label of '0-1' must be a number, got '1'",
    ),
    "cut off": ('{"id": "0-1", "la', r"labels\.jsonl, line 7 must be valid JSON: Unterminated string"),
    "a list": ("[[1, 0, 0], [0, 0, 1]]", r"line 7 must be an object, got \[\[1, 0, 0\], \[0, 0, 1\]\]"),
    "another key": (
        {"id": "0-1", "lable": 1},
        r"line 7 must have the keys id and label, or prompt_id and labels, got id, lable; did you mean 'label'\?",
    ),
    "both forms": (
        {"id": "0-1", "labels": [1]},
        r"must have the keys id and label, or prompt_id and labels, got id, l",
    ),
    "no keys": ({}, r"line 7 must have the keys id and label, or prompt_id and labels, got none$"),
    "no name": (one("0-1", 1, " "), r"line 7: annotator must be a name, got ' '; leave it out where there is but one"),
    "a number for a name": (one("0-1", 1, 3), r"line 7: annotator must be a name, got 3"),
}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_line_is_one_error_that_names_it(folder, case, partial):
    row, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        read(folder, *whole(), row, partial=partial)
    assert "\n" not in str(error.value)


def test_a_second_label_of_one_annotator_names_the_first(folder):
    rows = [one("0-1", 0, "ann"), one("0-0", 0, "ann"), one("0-1", 0, "ann")]
    with pytest.raises(
        InputError, match=r"line 3: '0-1' must have one label of each annotator, got a second by 'ann' aft"
    ):
        read(folder, *rows)


def test_a_label_for_an_image_that_is_not_on_disk_is_an_error(folder):
    (folder / "10-0.png").unlink()
    with pytest.raises(InputError, match=r"line 4: image '10-0' must be on disk, got no file '.*/images/10-0\.png'"):
        read(folder, *whole())


@pytest.mark.parametrize("rows", [[], ["", "  "]], ids=["empty", "blank"])
def test_an_empty_file_is_an_error(folder, rows):
    for partial in (False, True):
        with pytest.raises(InputError, match="labels must hold at least one label, got none"):
            read(folder, *rows, partial=partial)


def test_no_file_and_a_file_that_is_not_text_are_errors(folder):
    with pytest.raises(InputError, match=r"labels must be a file, got '.*nobody\.jsonl'"):
        read_labels(folder / "nobody.jsonl", IDS, folder)
    with pytest.raises(InputError, match=r"labels must be a file, got '.*images'"):
        read_labels(folder, IDS, folder)
    (folder / "image.jsonl").write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(InputError, match=r"labels must be UTF-8, got '.*image\.jsonl'"):
        read_labels(folder / "image.jsonl", IDS, folder)
