"""The parts of a report of several arms: what is shown, what is left out, colours, and figures."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffalign.evaluate import plots, views, wording
from diffalign.evaluate.comparison import compare
from diffalign.evaluate.report import write_report
from diffalign.evaluate.results import (
    Check,
    Correlations,
    Diversity,
    Drift,
    Rating,
    Results,
    SetResult,
    Sweep,
    SweepComparison,
    SweepPoint,
)
from diffalign.evaluate.score import Table
from diffalign.evaluate.summary import summary
from tests.test_report import draw, judges, results_of, scores

ARMS = ("base", "dpo", "sft")
ROLES = {"target": "trained_on", "eye": "held_out", "clip": "held_out"}
TEMPLATES = Path(plots.__file__).with_name("templates")


class Page(HTMLParser):
    """Headings, ids, links, classes of boxes, images and tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.bare_headers = 0
        self.drawings: list[dict[str, str | None]] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._heading = tag == "h2"
        if tag == "h2":
            self.headings.append("")
        if tag == "section":
            self.ids.append(found["id"] or "")
        if tag == "a":
            self.links.append(found["href"] or "")
        if tag == "img":
            self.images.append(found)
        if (tag == "svg" and "viewBox" not in found) or (tag == "svg" and "role" in found):
            self.drawings.append(found)
        self.bare_headers += tag == "th" and "scope" not in found

    def handle_endtag(self, tag: str) -> None:
        self._heading = self._heading and tag != "h2"

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings[-1] += data


def several(n: int = 24, k: int = 2) -> Table:
    """Scores of three arms."""
    pair = scores({"target": 1.0, "eye": 0.4, "clip": -0.4}, n=n, k=k)
    other = scores({"target": 0.5, "eye": 0.2, "clip": 0.0}, n=n, k=k, seed=1)
    half = n * k
    table = {name: [*values, *other[name][half:]] for name, values in pair.items()}
    table["arm"] = [arm for arm in ARMS for _ in range(half)]
    return table


def whole(table: Table) -> Results:
    """An evaluation of three arms with everything in it."""
    labels = {"Category": [("animals", "food & drink")[i % 2] for i in range(max(table["prompt_index"]) + 1)]}
    pairs = (("dpo", "base"), ("sft", "base"), ("sft", "dpo"))
    found = [compare(table, judges(**ROLES), arm=a, against=b, labels=labels) for a, b in pairs]
    comparisons = tuple(
        replace(
            c,
            correlations=Correlations(
                rewards=tuple(ROLES), matrix=((1.0, -0.25, None), (-0.25, 1.0, 0.5), (None, 0.5, 1.0))
            ),
            diversity=(Diversity(metric="vendi", encoder="e", value_arm=2.0, value_base=2.5, ratio=0.8, n=24),),
            drift=(Drift(metric="LPIPS", encoder="e", mean=0.1 + 0.1 * place, low=0.05, high=0.4, n=24),),
            checks=checks(c.arm),
        )
        for place, c in enumerate(found)
    )
    total = comparisons[0].rewards["eye"].total
    guidances = (3.0, 7.5)
    rated = [
        Rating(reward=r, arm=a, rating=1000.0 + 20 * i, low=990.0, high=1030.0)
        for r in ROLES
        for i, a in enumerate(ARMS)
    ]
    model = results_of(scores({"eye": 0.0}, n=3), judges(eye="held_out")).models["base"]
    return replace(
        results_of(scores({"eye": 0.0}, n=3), judges(eye="held_out")),
        arms=ARMS,
        n_prompts=24,
        n_seeds=2,
        comparisons=comparisons,
        tier="quick",
        ratings=tuple(rated),
        sets=tuple(
            SetResult(reward="fd", spec="fd:e", version="1", arm=a, score=-2.0, raw={"distance": 2.0}, samples=48)
            for a in ARMS
        ),
        sweep=Sweep(
            guidances=guidances,
            n_prompts=96,
            points=tuple(SweepPoint(arm=a, guidance=g, reward="eye", mean=g) for a in ARMS for g in guidances),
            comparisons=(
                *(
                    SweepComparison(
                        arm="dpo", against="base", reward="eye", kind="same", guidance_arm=g, guidance_against=g,
                        measured=replace(total, win_rate=0.5 + g / 100),
                    )
                    for g in guidances
                ),
                SweepComparison(
                    arm="dpo", against="base", reward="eye", kind="best", guidance_arm=3.0, guidance_against=7.5,
                    measured=replace(total, win_rate=0.612, ci_low=0.57, ci_high=0.651),
                ),
            ),
        ),
        models=dict.fromkeys(ARMS, model),
        manifest={"protocol": "p2-paired-v1", "arms": {"dpo": "<digest>"}},
    )  # fmt: skip


def checks(arm: str) -> tuple[Check, ...]:
    def check(name: str, flagged: bool | None) -> Check:
        return Check(
            name=name, statistic="ratio", value_arm=0.8, value_base=None, bound="below 0.9", flagged=flagged,
            sentence=f"{name} of {arm} is 80.0 % of its base's.",
        )  # fmt: skip

    return check("calm", False), check("unknown", None), check("loud", True)


def drawn(folder: Path, table: Table) -> Path:
    for arm in ("aligned", *ARMS):
        (folder / "images" / arm).mkdir(parents=True, exist_ok=True)
    (folder / "plain").mkdir()
    draw(folder / "plain", scores({"eye": 0.0}, n=24, k=2))
    for arm in ARMS:
        (folder / "images" / arm).rmdir()
        (folder / "images" / arm).symlink_to(folder / "plain" / "images" / "base")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    table = several()
    folder = drawn(tmp_path_factory.mktemp("evaluation"), table)
    labels = {"Category": [("animals", "food & drink")[i % 2] for i in range(24)]}
    return write_report(whole(table), table, folder, labels).read_text()


# --- the page of three arms


def test_every_part_is_there_once_and_the_contents_lead_to_it(text):
    page = Page(text)
    assert page.headings == [
        "Win rates", "Numbers", "Ratings", "Checks", "By category", "What training saw against what it never saw",
        "Reward against drift", "Guidance", "Diversity of a prompt's images", "Whole sets",
        "Which rewards rise together",
        "Pictures that nobody chose", "Largest changes, by eye", "Settings and environment", "How to reproduce",
    ]  # fmt: skip
    assert [f"#{place}" for place in page.ids] == page.links
    assert len(page.ids) == len(set(page.ids)) == len(page.headings)


def test_what_is_empty_leaves_no_heading(tmp_path):
    table = scores({"eye": 1.0}, n=3)
    draw(tmp_path, table)
    text = write_report(results_of(table, judges(eye="held_out")), table, tmp_path).read_text()
    assert Page(text).headings == [
        "Win rates", "Numbers", "Pictures that nobody chose", "Largest changes, by eye", "Settings and environment",
        "How to reproduce",
    ]  # fmt: skip
    assert "raised a flag" not in text
    assert "Manifest" not in text


def test_each_comparison_has_its_verdict_and_its_held_out_rewards_in_large(text):
    assert len(re.findall(r'<div class="verdict ', text)) == 3
    large = re.findall(r'<span class="soft">(\w+), held out</span><span class="big', text)
    assert large == ["eye", "clip"] * 3


def test_flags_are_in_words_at_the_top_and_named_by_their_arm(text):
    box = text.split('<div class="box flags">')[1].split("</div>")[0]
    assert "3 checks raised a flag" in box
    assert "<strong>sft against dpo</strong>: loud of sft is 80.0\N{NO-BREAK SPACE}% of its base" in box
    assert "calm" not in box
    assert text.index("box flags") < text.index("<section")


def test_checks_are_listed_flagged_first_then_passed_then_not_measured(text):
    part = text.split('<section id="checks">')[1].split("</section>")[0].split("<h3>")[1]
    assert re.findall(r'<span class="badge \w*">([\w ]+)</span>', part) == ["flagged", "passed", "not measured"]


def test_the_gallery_has_all_arms_side_by_side_with_words_for_those_who_cannot_see(text):
    page = Page(text)
    gallery = [image for image in page.images if image["alt"]]
    assert len(gallery) == len(page.images)
    assert [(image["alt"] or "").split(":")[0] for image in gallery[:3]] == list(ARMS)
    assert text.split('<section id="gallery">')[1].split("</section>")[0].count("food &amp; drink") == 4


def test_drawings_and_tables_name_what_they_show(text):
    page = Page(text)
    assert page.bare_headers == 0
    assert all(drawing.get("aria-label") for drawing in page.drawings)


def test_the_sweep_is_said_in_words(text):
    words = views.sweep_words(whole(several()).sweep or pytest.fail("no sweep"))
    assert words == {
        "eye": [
            "By eye, at the same guidance dpo wins between 53.0 and 57.5 % of comparisons with base; each at its own "
            "best guidance (dpo at 3, base at 7.5) it wins 61.2 % (95 % interval 57.0 to 65.1)."
        ]
    }
    assert wording.tied(words["eye"][0]) in text


def test_a_correlation_that_is_not_defined_is_a_dash(text):
    part = text.split('<section id="correlations">')[1].split("</section>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", part)[:9] == [
        "1.00", "\N{MINUS SIGN}0.25", "\N{EN DASH}", "\N{MINUS SIGN}0.25", "1.00", "0.50", "\N{EN DASH}", "0.50", "1.00"
    ]  # fmt: skip


def test_names_are_text_not_markup(text):
    assert "&lt;digest&gt;" in text
    assert "<digest>" not in text


def test_the_scatter_says_how_often_the_target_rose_and_a_judge_fell():
    table = scores({"target": 0.0, "eye": 0.0}, n=4)
    table["target"], table["eye"] = [0.0] * 4 + [1.0, 1.0, 1.0, -1.0], [0.0] * 4 + [-1.0, 1.0, 1.0, -1.0]
    [chart] = views.trade_offs(results_of(table, judges(target="trained_on", eye="held_out")), table)
    assert "on 25.0 % target rose and eye fell" in chart.about
    assert len(re.findall("M[0-9.]+,[0-9.]+h0", chart.svg)) == 4


def test_few_prompts_are_shared_out_among_gains_losses_and_the_middle(text):
    part = text.split('<section id="changes">')[1].split("</section>")[0]
    assert "Largest gains: 8 selected" in part
    assert "In the middle: 8 selected" in part


def test_a_reward_that_one_arm_trained_on_and_another_never_saw_has_a_role_in_each_comparison():
    found = whole(several())
    first = found.comparisons[0]
    seen = {**first.rewards, "eye": replace(first.rewards["eye"], role="trained_on")}
    found = replace(found, comparisons=(replace(first, rewards=seen), *found.comparisons[1:]))
    assert views.roles(found) == {"clip": "held_out", "target": "trained_on", "eye": None}
    [part] = [part for part in views.forest(found) if part.title == "eye"]
    assert (part.role, [row.role for row in part.rows]) == (None, ["trained_on", "held_out", "held_out"])
    assert [views.judge(c) for c in found.comparisons] == ["clip", "eye", "eye"]


def test_finished_images_have_no_sampler_and_no_known_noise(tmp_path):
    table = scores({"eye": 1.0}, n=3)
    draw(tmp_path, table)
    about = {"spec": "folder", "source": None, "images": "folder", "scheduler": {"class": "finished images"}}
    found = results_of(table, judges(eye="held_out"))
    unknown = replace(found, models=dict.fromkeys(found.arms, about), latents_sha256=None)
    text = write_report(unknown, table, tmp_path).read_text()
    assert "finished images do not say" in text
    assert "<dt>Sampler</dt>" not in text
    half = replace(found, models={**found.models, "base": about})
    assert "not sampled alike" not in write_report(half, table, tmp_path).read_text()
    assert "DDIM, 20 steps" in summary(half)
    assert "steps" not in summary(unknown)


# --- colours


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_it_lies_on(theme):
    style = (TEMPLATES / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light if theme == "light" else dark))
    texts = [name for name in colours if name in ("ink", "soft", "better", "worse", "open") or name.startswith("arm")]
    assert len(texts) == 11
    for name in texts:
        for ground in ("page", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for ground in ("warn", "bad"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
        assert contrast(colours["soft"], colours[ground]) >= 4.5


def contrast(one: str, two: str) -> float:
    """Ratio of luminances as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


# --- figures


def test_a_figure_puts_its_marks_in_proportion():
    svg = plots.figure(
        "a & b",
        [
            plots.Dot(x=0.0, y=0.0, style="arm1"),
            plots.Dot(x=1.0, y=1.0, style="arm1"),
            plots.Dot(x=0.5, y=0.25, style="arm2"),
        ],
        x_name="x",
        y_name="y",
    )
    (ax, ay), (bx, by), (cx, cy) = [
        (float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]
    assert (cx - ax) / (bx - ax) == pytest.approx(0.5, abs=0.01)
    assert (cy - ay) / (by - ay) == pytest.approx(0.25, abs=0.01)
    assert ax < bx
    assert ay > by
    assert 'aria-label="a &amp; b"' in svg


def test_a_single_value_is_a_figure_too():
    assert "<circle" in plots.figure("t", [plots.Dot(x=2.0, y=3.0, style="arm1")], x_name="x", y_name="y")
