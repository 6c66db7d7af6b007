"""What an evaluation says outside its page: numbers, summary.md, and the terminal's tables."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from diffalign.evaluate import terminal, wording
from diffalign.evaluate.results import Results, write_results
from diffalign.evaluate.summary import summary, write_summary
from tests.test_report import judges, results_of, scores
from tests.test_report_sections import several, whole

# --- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.3456, "21.35"),
        (0.26789, "0.268"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (0.0, "0.000"),
        (0.00042, "0.00042"),
        (None, "\N{EN DASH}"),
    ],
)
def test_a_number_has_the_digits_that_count(value, text):
    assert wording.number(value) == text


def test_a_difference_has_as_many_digits_as_its_interval():
    total = results_of(scores({"eye": 0.0}), judges(eye="held_out")).comparisons[0].rewards["eye"].total
    known = replace(total, mean_difference=0.00059, difference_low=-0.00396, difference_high=0.00513)
    assert wording.difference(known) == "+0.00059 (\N{MINUS SIGN}0.00396 to +0.00513)"
    assert wording.difference(replace(known, difference_low=None)) == "+0.00059"


# --- summary.md


def test_the_summary_opens_with_the_held_out_rewards_even_where_a_labeller_has_the_headline():
    found = results_of(scores({"person": 1.0, "eye": 1.0}), judges(person="labeller", eye="held_out"))
    total = found.comparisons[0].rewards["eye"].total
    lines = summary(found).splitlines()
    assert lines[0] == "## Evaluation"
    assert lines[2].startswith("**By rewards that training never saw, aligned wins against base: ")
    assert f"{100 * total.win_rate:.1f} % ({100 * total.ci_low:.1f} to {100 * total.ci_high:.1f}) by eye" in lines[2]
    assert "by person (labeller)" in lines[4]


def test_the_summary_has_tables_flags_ratings_and_the_protocol(tmp_path):
    text = write_summary(whole(several()), tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "## Evaluation", "### dpo", "### sft", "### sft against dpo"
    ]  # fmt: skip
    assert text.count("Checks for reward hacking: 2 made, 1 flagged.") == 3
    assert "- **loud**: loud of dpo is 80.0 % of its base's." in text
    assert "| eye | 1000 (990 to 1030) | 1020 (990 to 1030) | 1040 (990 to 1030) |" in text
    assert "Protocol p2-paired-v1: 24 prompts (given, sha256 abababababab), 2 images each from the same noise" in text
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert columns == {6, 5, 3}  # of comparisons, sets and ratings
    assert "| Whole sets of images, higher is better | base | dpo | sft | Difference (95 %) | Images |" in text


def test_a_name_cannot_break_a_table_of_the_summary():
    table = scores({"a|b": 1.0}, n=3)
    text = summary(results_of(table, judges(**{"a|b": "held_out"})))
    assert "| a\\|b | held out |" in text


# --- the terminal


def printed(results: Results, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for line in terminal.lines(results, width):
        console.print(line, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_terminal_shows_each_comparison_in_80_columns():
    lines = [line.rstrip() for line in printed(whole(several()), 80)]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line in ("dpo against base", "sft against base", "sft against dpo")] == [
        "dpo against base", "sft against base", "sft against dpo"
    ]  # fmt: skip
    assert sum(line.startswith("flag: loud of ") for line in lines) == 3
    assert "Elo, 95 % interval" in lines
    assert not any(line.startswith("%") for line in lines)
    assert next(line.split()[:3] for line in lines if line.strip().startswith("target")) == ["target", "trained", "on"]


@pytest.mark.parametrize("width", range(60, 81, 4))
def test_a_percent_sign_stays_with_its_number_at_any_width(width):
    for line in printed(results_of(scores({"eye": 0.3}), judges(eye="held_out")), width):
        assert not line.strip().startswith("%")
        assert len(line.rstrip()) <= width


def test_the_terminal_shows_rewards_of_sets():
    [line] = [line.split() for line in printed(whole(several()), 80) if line.split()[:1] == ["fd"]]
    assert line == ["fd", "-2.000", "-2.000", "-2.000", "48"]


def test_a_spec_is_printed_as_it_was_typed():
    found = results_of(scores({"fad:clap:x[bold]": 0.3}), judges(**{"fad:clap:x[bold]": "held_out"}))
    assert any("fad:clap:x[bold]" in line for line in printed(found, 80))  # rich knows emoji and markup


def test_names_of_arms_too_long_for_a_column_stand_above_the_table():
    long = "a-model-with-a-very-long-name"
    found = results_of(scores({"eye": 0.0}), judges(eye="held_out"))
    comparison = replace(found.comparisons[0], arm=long)
    lines = printed(replace(found, comparisons=(comparison,)), 80)
    assert lines[0].strip() == f"{long} against base"
    assert "opponent" in "".join(lines)
    assert sum(long in line for line in lines) <= 3


def test_what_is_printed_can_be_pasted_into_a_program():
    table = scores({"eye": -3.0})
    text = "\n".join(printed(results_of(table, judges(eye="held_out")), 80))
    assert " -3.0" in text or " -2.9" in text
    assert "\N{MINUS SIGN}" not in text


def test_results_json_keeps_a_check_that_was_not_measured(tmp_path):
    write_results(whole(several()), tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())["comparisons"][0]["checks"]
    assert [check["flagged"] for check in found] == [False, None, True]
