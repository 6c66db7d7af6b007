"""The text in an image: published values, quotes, and what cannot be judged."""

import pytest
import torch

from diffalign.errors import InputError
from diffalign.rewards.ocr import OCRReward, distance, text_score, wanted_text
from diffalign.types import RewardBatch

IMAGES = torch.zeros(3, 3, 8, 8)


@pytest.mark.parametrize(
    ("target", "read", "score"),
    [
        ("hello", "say hello!", 1.0),
        ("hello", "helo", 0.8),
        ("hello", "", 0.0),
        ("hello", "completely different", 0.0),
        ("AB", "BA", 0.0),
        ("Hello World", "HELLOWORLD", 1.0),
    ],
)
def test_published_values(target, read, score):
    assert text_score(target, read) == pytest.approx(score)


def test_the_distance_is_a_metric_where_neither_text_holds_the_other():
    assert distance("kitten", "sitting") == 3
    assert distance("sitting", "kitten") == 3
    assert distance("abc", "xabcx") == 0


def test_what_is_wanted_stands_in_quotes():
    assert wanted_text('a sign that says "STOP" in red') == "STOP"
    assert wanted_text("a sign that says \N{LEFT DOUBLE QUOTATION MARK}Go\N{RIGHT DOUBLE QUOTATION MARK}") == "Go"
    assert wanted_text('"one" above "two"') == "onetwo"
    assert wanted_text("no text") is None
    assert wanted_text('only " " blanks') is None


def test_what_cannot_be_judged_is_nan():
    reward = OCRReward(lambda images: ["stop", None, "x"])
    out = reward.score(RewardBatch(images=IMAGES, prompts=['say "stop"', 'say "stop"', "say nothing"]))
    assert out.scores[0] == 1
    assert out.scores[1:].isnan().all()
    assert out.valid.tolist() == [True, False, False]


def test_a_reader_is_needed_and_gives_a_text_an_image():
    with pytest.raises(InputError, match="must get a reader"):
        OCRReward()
    with pytest.raises(InputError, match="one text per image, 3, got 1"):
        OCRReward(lambda images: ["a"]).score(RewardBatch(images=IMAGES, prompts=["a"] * 3))
    with pytest.raises(InputError, match="hold a letter"):
        text_score(" ", "a")
