"""What a gallery shows is decided by hashes; what the page of changes shows by a judge; sides by hashes again."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffalign.data.prompts import read_prompts
from diffalign.errors import InputError
from diffalign.evaluate import gallery

PROMPTS = [f"a picture of thing {i}" for i in range(200)]


def digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def test_each_of_twelve_categories_gives_its_four_prompts_of_least_hash():
    categories = [f"category {i % 12}" for i in range(200)]
    chosen = gallery.unselected(PROMPTS, categories)
    assert len(chosen) == 48
    assert Counter(categories[i] for i in chosen) == {f"category {c}": 4 for c in range(12)}
    for c in range(12):
        members = sorted((digest(PROMPTS[i]), i) for i in range(200) if categories[i] == f"category {c}")
        assert [i for i in chosen if categories[i] == f"category {c}"] == [i for _, i in members[:4]]


def test_the_choice_does_not_depend_on_the_order_of_the_prompts():
    categories = [f"category {i % 5}" for i in range(200)]
    chosen = {PROMPTS[i] for i in gallery.unselected(PROMPTS, categories)}
    turned = gallery.unselected(PROMPTS[::-1], categories[::-1])
    assert {PROMPTS[::-1][i] for i in turned} == chosen
    assert len(chosen) == 20


def test_small_sets_give_what_they_have():
    assert sorted(gallery.unselected(PROMPTS[:3])) == [0, 1, 2]
    assert gallery.unselected([]) == []
    assert len(gallery.unselected(PROMPTS)) == 48
    uneven = ["rare"] * 2 + ["common"] * 198
    assert Counter(uneven[i] for i in gallery.unselected(PROMPTS, uneven)) == {"rare": 2, "common": 4}


def test_many_categories_share_the_places():
    categories = [f"{i % 40}" for i in range(200)]
    counts = Counter(categories[i] for i in gallery.unselected(PROMPTS, categories))
    assert sum(counts.values()) == 48
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 40


def test_categories_must_belong_to_the_prompts():
    with pytest.raises(InputError, match="one entry per prompt, 200, got 1"):
        gallery.unselected(PROMPTS, ["x"])


def test_partiprompts_give_four_of_each_category():
    folder = os.environ.get("DIFFALIGN_TEST_DATA")
    if not folder:
        pytest.skip("DIFFALIGN_TEST_DATA does not name the folder with PartiPrompts.tsv")
    prompts = read_prompts(Path(folder) / "PartiPrompts.tsv")
    categories = [row["Category"] for row in prompts.metadata]
    chosen = gallery.unselected(prompts.prompts, categories)
    assert len(chosen) == 48
    assert set(Counter(categories[i] for i in chosen).values()) == {4}


def test_the_largest_changes_and_the_middle():
    differences = np.linspace(-1, 1, 101)[::-1].copy()
    page = gallery.largest_change(differences, PROMPTS[:101])
    assert page.best == tuple(range(12))
    assert page.worst == tuple(range(100, 88, -1))
    assert page.median == tuple(range(44, 56))
    assert np.median(differences) == differences[50]


def test_no_prompt_is_shown_twice_and_unjudged_ones_never():
    differences = np.arange(10.0)
    differences[4] = np.nan
    page = gallery.largest_change(differences, PROMPTS[:10])
    shown = page.best + page.worst + page.median
    assert len(shown) == len(set(shown)) == 9
    assert 4 not in shown
    assert page.best == (9, 8, 7)
    assert page.worst == (0, 1, 2)


def test_equal_changes_are_ordered_by_hash():
    page = gallery.largest_change(np.zeros(30), PROMPTS[:30], count=10)
    order = sorted(range(30), key=lambda i: digest(PROMPTS[i]))
    assert page.best + page.median + page.worst[::-1] == tuple(order)


def test_sides_are_fixed_by_the_prompt_and_balanced():
    assert gallery.sides("bond", ("a", "b")) == gallery.sides("bond", ("a", "b"))
    for prompt in PROMPTS:
        even = int(hashlib.sha256(f"{prompt}side".encode()).hexdigest(), 16) % 2 == 0
        assert gallery.sides(prompt, ("a", "b")) == (("a", "b") if even else ("b", "a"))
    left = Counter(gallery.sides(prompt, ("a", "b"))[0] for prompt in PROMPTS)
    assert 70 <= left["a"] <= 130  # 200 fair coins stay within with probability 0.99998
