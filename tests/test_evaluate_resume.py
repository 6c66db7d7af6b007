"""Evaluations that are killed anywhere and gone on with; settings that changed; two processes instead of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from diffalign.errors import InputError, RunError
from diffalign.evaluate import EvaluationSettings, evaluate, images, judging, store, work
from diffalign.types import FunctionReward
from tests.builders import tiny_sd_pipeline

PROMPTS = ["a red circle", "a blue star", "a green cross", "a gray ring", "a small dot"]
SETTINGS = EvaluationSettings(images_per_prompt=2, steps=2, guidance=2.0, batch_size=2, device="cpu")


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3)) + torch.tensor([0.01 * len(p) for p in prompts])


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


REWARDS = [FunctionReward(name="bright", function=brightness), FunctionReward(name="red", function=redness)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "other")):
        tiny_sd_pipeline(seed=seed).save_pretrained(folder / name)
    return folder


def run(models: Path, out: Path, **changes: object) -> None:
    asked = {"prompts": PROMPTS, "rewards": REWARDS, "settings": SETTINGS, **changes}
    evaluate(str(models / "base"), asked.pop("aligned", str(models / "other")), output=out, **asked)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """An evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(models, out)
    return out


def same(one: Path, two: Path) -> None:
    """Images, raw scores and results are equal, bit for bit; nothing is left over."""
    names = [sorted(f.relative_to(place).as_posix() for f in (place / "images").rglob("*")) for place in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".png", ".jsonl")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert pq.read_table(one / "scores.parquet").equals(pq.read_table(two / "scores.parquet"))
    assert results(one) == results(two)


def results(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    found.pop("environment")
    for name in ("command", "fresh"):
        found["settings"].pop(name)
    return found


class Killed(BaseException):
    """Ends the work as a kill does: nothing is allowed to catch it."""


def dying(monkeypatch, owner: object, name: str, nth: int) -> None:
    """Makes the n-th call of a function the last one, half-way through its work."""
    inner, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            if name == "write":
                args[0].handle.write(b'{"key": "half a li')
                args[0].handle.flush()
            raise Killed
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


QUICK_MOMENTS = [(images, "write_whole", 2), (store.Appender, "write", 22)]
MOMENTS = [
    (images, "make_batch", 1),
    (images, "make_batch", 4),
    (images, "write_whole", 11),
    (store.Appender, "write", 2),
    (store.Appender, "write", 13),
    (work, "write_metadata", 2),
    (judging, "columns_of", 3),
    (work, "compare", 1),
    (work, "write_report", 1),
    (work, "write_results", 1),
]


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [*QUICK_MOMENTS, *(pytest.param(*moment, marks=pytest.mark.slow) for moment in MOMENTS)],
    ids=[f"{name}-{nth}" for _, name, nth in (*QUICK_MOMENTS, *MOMENTS)],
)
def test_a_killed_evaluation_ends_as_if_it_had_not_been(models, whole, tmp_path, monkeypatch, owner, name, nth):
    with monkeypatch.context() as patched:
        dying(patched, owner, name, nth)
        with pytest.raises(Killed):
            run(models, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    run(models, tmp_path / "out")
    same(whole, tmp_path / "out")


def counted(monkeypatch, owner: object, name: str) -> list[int]:
    """Counts calls by the length of what they are given."""
    inner, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(len(args[3]) if name == "make_batch" else len(args[1]))
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_what_is_done_is_not_done_again(models, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    made, judged = counted(monkeypatch, images, "make_batch"), counted(monkeypatch, judging, "columns_of")
    monkeypatch.setattr(images, "load_pipeline", lambda source: pytest.fail("no pipeline is needed"))
    run(models, out)
    assert (made, judged) == ([], [])
    same(whole, out)


def test_after_a_kill_only_the_batch_in_hand_is_made_again(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        dying(patched, images, "make_batch", 4)
        with pytest.raises(Killed):
            run(models, tmp_path / "out")
    made = counted(monkeypatch, images, "make_batch")
    run(models, tmp_path / "out")
    assert sum(made) == 2 * 10 - 5  # batches of 2, 2 and 1 of the first seed were safe


def test_a_damaged_or_missing_image_is_made_again(models, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "images" / "other").mkdir()
    (out / "images" / "base" / "00000-0.png").write_bytes(b"half an image")
    (out / "images" / "aligned" / "00003-1.png").unlink()
    (out / "images" / "other").rmdir()
    made = counted(monkeypatch, images, "make_batch")
    run(models, out)
    assert made == [2, 2]
    same(whole, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": replace(SETTINGS, steps=3)}, r"steps was 2 and is 3 now; .*fresh"),
        ({"settings": replace(SETTINGS, guidance=3.0)}, r"guidance was 2\.0 and is 3\.0 now"),
        ({"settings": replace(SETTINGS, dtype="bfloat16")}, "dtype was 'float32' and is 'bfloat16' now"),
        ({"prompts": PROMPTS[:3]}, "prompts was '[0-9a-f]{64}'"),
    ],
)
def test_a_changed_setting_is_named_and_nothing_is_touched(models, whole, tmp_path, changes, message):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with pytest.raises(InputError, match=message) as caught:
        run(models, out, **changes)
    assert "\n" not in str(caught.value)
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_another_model_under_an_arms_name_is_named(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(InputError, match="the model of aligned was"):
        run(models, tmp_path / "out", aligned=str(models / "base"))
    run(models, tmp_path / "out", aligned=str(models / "base"), settings=replace(SETTINGS, fresh=True))
    assert results(tmp_path / "out")["comparisons"][0]["rewards"]["red"]["tie_share"] == 1.0


def test_a_folder_of_an_older_version_is_not_gone_on_with(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(InputError, match="an evaluation of another version"):
        run(models, tmp_path / "out")


def test_another_batch_size_is_no_other_evaluation(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    run(models, tmp_path / "out", settings=replace(SETTINGS, batch_size=5))
    assert results(tmp_path / "out")["comparisons"] == results(whole)["comparisons"]


def test_a_function_that_was_rewritten_judges_again(models, whole, tmp_path):
    def redness_2(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return 2 * images[:, 0].mean((1, 2))

    shutil.copytree(whole, tmp_path / "out")
    run(models, tmp_path / "out", rewards=[REWARDS[0], FunctionReward(name="red", function=redness_2)])
    before, after = (pq.read_table(f / "scores.parquet").to_pydict() for f in (whole, tmp_path / "out"))
    assert after["bright"] == before["bright"]
    assert after["red"] == pytest.approx([2 * v for v in before["red"]])


def test_equal_images_of_two_arms_are_judged_once(models, tmp_path, monkeypatch):
    judged = counted(monkeypatch, judging, "columns_of")
    run(models, tmp_path / "out", aligned=str(models / "base"), rewards=[FunctionReward(name="r", function=redness)])
    assert sum(judged) == 10


def test_too_many_unjudged_images_end_the_evaluation_and_the_images_stay(models, tmp_path):
    blind = FunctionReward(name="blind", function=lambda images, texts: [float("nan")] * len(images))
    with pytest.raises(RunError, match="'blind' could not judge 10 of 10 images"):
        run(models, tmp_path / "out", rewards=[blind])
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 20
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_journal_drops_the_line_that_was_cut_off(tmp_path):
    for rows in ([{"key": "a", "v": 1}], [{"key": "b", "v": float("nan")}]):
        with store.appending(tmp_path, "x", 0) as journal:
            journal.write(rows)
            journal.handle.write(b'{"key": "half')
    found = store.read_journal(tmp_path, "x")
    assert list(found) == ["a", "b"]
    assert found["b"]["v"] != found["b"]["v"]


# --- new processes

CODE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from diffalign.evaluate import images, judging, store, work
from tests import test_evaluate_resume as t
from pathlib import Path

moment = json.loads(sys.argv[3])
if moment:
    owners = {"images": images, "judging": judging, "work": work, "journal": store.Appender}
    owner, name, nth = owners[moment[0]], moment[1], moment[2]
    inner, calls = getattr(owner, name), [0]
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(owner, name, wrapper)
t.run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def process(models: Path, out: Path, moment: list | None, count: int = 1) -> int:
    """Exit status of an evaluation in processes of its own."""
    script = out.parent / "script.py"
    script.write_text(CODE)
    launcher = [sys.executable]
    if count > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--rdzv_backend=c10d"]
        launcher += ["--rdzv_endpoint=localhost:0"]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [*launcher, str(script), str(models), str(out), json.dumps(moment)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, cwd=root,
    )  # fmt: skip
    assert result.returncode in (0, -signal.SIGKILL) or moment, result.stderr[-3000:]
    return result.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [["images", "make_batch", 3], ["journal", "write", 7], ["judging", "columns_of", 2], ["work", "write_results", 1]],
)
def test_an_evaluation_that_is_really_killed_ends_as_if_it_had_not_been(models, whole, tmp_path, moment):
    assert process(models, tmp_path / "out", moment) == -signal.SIGKILL
    assert process(models, tmp_path / "out", None) == 0
    same(whole, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_give_the_results_of_one_and_can_be_killed_too(models, whole, tmp_path):
    assert process(models, tmp_path / "out", None, count=2) == 0
    same(whole, tmp_path / "out")
    assert process(models, tmp_path / "again", ["images", "make_batch", 2], count=2) != 0
    assert process(models, tmp_path / "again", None) == 0
    same(whole, tmp_path / "again")
