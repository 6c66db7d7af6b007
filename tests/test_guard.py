"""The guard: what counts as a divergence, what follows from it, and that its record survives a stop."""

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign import guarding
from diffalign.data.prompts import PromptSet
from diffalign.errors import InputError, RunError
from diffalign.evaluate.findings import Paired
from diffalign.evaluate.lazy import PairedImages
from diffalign.evaluate.watched import read_watch
from diffalign.guard.look import Look, examine
from diffalign.guard.parts import GuardParts, make_guard
from diffalign.guard.settings import GuardSettings
from diffalign.online.settings import OnlineSettings
from diffalign.types import Embedded, FunctionReward, RewardBatch
from tests import online_rewards, test_processes, test_report, worlds
from tests.test_online import table
from tests.test_train import config, metrics, same, weights

N, K = 12, 4
COLOURS, SHAPES = ("red", "green", "blue", "white"), ("circle", "square")
PROMPTS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


# --- what counts as a divergence


class Pixels:
    """An encoder whose embedding of an image is the image."""

    version = "pixels"
    modality = "image"

    def embed(self, batch: RewardBatch) -> Embedded:
        rows = batch.images.flatten(1)
        return Embedded(rows=rows, counts=(1,) * len(rows))

    embed_with_graph = embed


def guard_of(*, trained: dict[str, float] | None = None, encoder: object = None, **settings: object) -> GuardParts:
    trained = {"brightness": 1.0} if trained is None else trained
    names = ["redness", *trained]
    return GuardParts(
        settings=GuardSettings(every=1, prompts="given", held_out=("redness",), **settings),
        prompts=PromptSet(name="given", prompts=[f"prompt {i}" for i in range(N)], metadata=[{}] * N),
        rewards=tuple(FunctionReward(name=name, function=getattr(online_rewards, name)) for name in names),
        trained=trained,
        encoder=encoder,  # type: ignore[arg-type]
    )


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(N * K, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def paired(arm: torch.Tensor, base: torch.Tensor) -> PairedImages:
    places = [(i, k) for i in range(N) for k in range(K)]
    return PairedImages(prompt_index=[i for i, _ in places], k=[k for _, k in places], arm=list(arm), base=list(base))


def scores(shift: float, spread: float = 0.1, seed: int = 0) -> Paired:
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(N, K, generator=rng, dtype=torch.float64)
    noise = spread * torch.randn(N, K, generator=rng, dtype=torch.float64)
    return Paired(arm=(base + shift + noise).numpy(), base=base.numpy())


def look(trained: float | None, held_out: float, *, sign: float = 1.0, **settings: object):
    names = {} if trained is None else {"brightness": sign}
    found = {"redness": scores(held_out, seed=1)}
    if trained is not None:
        found["brightness"] = scores(trained, seed=2)
    images = paired(pictures(), pictures())
    return examine(guard_of(trained=names, **settings), images, found, seed=0)


@pytest.mark.parametrize(
    ("trained", "held_out", "diverged"),
    [
        (1.0, -1.0, True),  # the reward is hacked
        (-1.0, -1.0, False),  # damage, but nothing was gained by it
        (1.0, 1.0, False),
        (1.0, 0.0, False),  # no more than chance
        (0.0, -1.0, False),
        (None, -1.0, True),  # nobody knows whether anything was gained
        (None, 0.0, False),
    ],
)
def test_training_diverges_where_its_reward_rises_and_a_held_out_one_falls(trained, held_out, diverged):
    found = look(trained, held_out)
    assert found.diverged is diverged
    assert found.trained_rose is (None if trained is None else trained > 0)
    assert ("By redness, which training never saw" in found.reason) is diverged
    assert {name: one.role for name, one in found.rewards.items()}["redness"] == "held_out"


def test_a_reward_of_negative_weight_has_risen_where_it_fell():
    assert look(-1.0, -1.0, sign=-1.0).diverged
    assert not look(1.0, -1.0, sign=-1.0).diverged


def test_the_bound_of_the_win_rate_is_the_one_that_is_given():
    slightly = {"redness": scores(-0.1, spread=0.4, seed=1), "brightness": scores(1.0, seed=2)}
    images = paired(pictures(), pictures())
    beyond = {
        bound: next(
            check.flagged
            for check in examine(guard_of(win_rate=bound), images, slightly, seed=0).checks
            if check.name == "held_out:redness"
        )
        for bound in (0.1, 0.9)
    }
    assert beyond == {0.1: False, 0.9: True}


def alike(images: torch.Tensor, share: float) -> torch.Tensor:
    """Images of a prompt, moved towards the first of them."""
    groups = images.unflatten(0, (N, K))
    return (groups + share * (groups[:, :1] - groups)).flatten(0, 1)


@pytest.mark.parametrize(("share", "bound", "diverged"), [(0.9, 0.9, True), (0.9, 0.001, False), (0.0, 0.9, False)])
def test_a_loss_of_variety_within_prompts_is_a_divergence(share, bound, diverged):
    images = paired(alike(pictures(), share), pictures())
    found = {"redness": scores(0.0, seed=1), "brightness": scores(1.0, seed=2)}
    seen = examine(guard_of(encoder=Pixels(), diversity=bound), images, found, seed=0)
    assert seen.diverged is diverged
    assert ("variety" in seen.reason) is diverged
    assert seen.diversity[0].ratio == pytest.approx(1.0) if share == 0 else seen.diversity[0].ratio < 0.9


@pytest.mark.parametrize(("bound", "diverged"), [(0.01, True), (0.9, False), (None, False)])
def test_drift_counts_by_itself_where_it_has_a_bound(bound, diverged):
    images = paired(pictures(1), pictures(0))
    nothing = {"redness": scores(0.0, seed=1), "brightness": scores(0.0, seed=2)}
    seen = examine(guard_of(encoder=Pixels(), drift=bound), images, nothing, seed=0)
    assert seen.diverged is diverged
    cosine = torch.nn.functional.cosine_similarity(pictures(1).flatten(1), pictures(0).flatten(1)).mean()
    assert seen.drift[0].mean == pytest.approx(1 - float(cosine), abs=1e-6)


def test_nothing_is_found_where_nothing_moved():
    still = Paired(arm=scores(0.0).base, base=scores(0.0).base)
    images = paired(pictures(), pictures())
    seen = examine(guard_of(encoder=Pixels(), drift=1e-5), images, {"redness": still, "brightness": still}, seed=0)
    assert (seen.diverged, seen.reason, seen.trained_rose) == (False, "", False)
    assert {one.measured.win_rate for one in seen.rewards.values()} == {0.5}
    assert [one.ratio for one in seen.diversity] == pytest.approx([1.0, 1.0])
    assert [one.mean for one in seen.drift] == pytest.approx([0.0, 0.0], abs=1e-6)  # rows are unit in float32


def run_of(folder: Path, *found: Look, action: str = "warn") -> Path:
    """The folder of a run whose guard found this, every ten steps."""
    folder.mkdir()
    whole, lines = 0, []
    for number, one in enumerate(found):
        whole = whole if one.diverged else 10 * number
        lines.append({"step": 10 * number, "guard": {"action": action, "whole": whole, **one.entry()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_shows_what_the_guard_of_a_run_found(tmp_path):
    start, hacked = look(0.0, 0.0), look(1.0, -1.0)
    judged = test_report.scores({"person": 1.0}, n=4)
    for action, words in {
        "warn": "diverged in 1 of its looks (2), at step 20; training went on. At step 20: By redness",
        "stop": "ended training at step 20; the last look that found nothing was at step 10. By redness",
        "roll_back": "ended training at step 20; the weights are those of step 10, the last that was found whole.",
    }.items():
        run = run_of(tmp_path / action, start, start, hacked, action=action)
        text = html.unescape(test_report.page(tmp_path / f"page-{action}", judged, run=str(run)))
        assert "<h2>Guard of the training</h2>" in text
        assert "<strong>Divergence.</strong>" in text
        assert words in text.replace("\N{NO-BREAK SPACE}", " ")
        assert "redness (held out)" in text
    calm = test_report.page(tmp_path / "page", judged, run=str(run_of(tmp_path / "calm", start, start)))
    assert "found nothing in any of its looks (1)" in html.unescape(calm).replace("\N{NO-BREAK SPACE}", " ")
    assert "Divergence" not in calm
    assert read_watch(tmp_path) is None


# --- a run with a guard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    (root / "guard.txt").write_text("\n".join(PROMPTS) + "\n")
    (root / "prompts.txt").write_text("a red circle\na blue square\nthe small green circle\nlarge red square\n")
    return root


def guarded(world: Path, output: Path, *, up: str = "brightness", down: str = "darkness", **sections) -> dict:
    """A run that makes all images brighter, whose trained and held-out rewards are each other's opposite."""
    guard = {
        "every": 2,
        "prompts": str(world / "guard.txt"),
        "held_out": [f"tests.online_rewards:{down}"],
        "trained": [f"tests.online_rewards:{up}"],
        "images_per_prompt": 1,
        "steps": 2,
        "guidance": 1.0,
        "batch_size": 4,
        **sections.pop("guard", {}),
    }
    options = {"trainable": "full", "optimizer": {"lr": LR}, "train": {"steps": 4}, **sections}
    return config(world, output, guard=guard, **options)


LR = 5e-2
UP, DOWN = "brightness", "darkness"
"""Where the large steps of this run happen to go, and the opposite."""


def looks(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "guard" in line]


def test_a_hacked_reward_is_said_and_training_goes_on(world, tmp_path, caplog):
    result = diffalign.train(guarded(world, tmp_path / "run", up=UP, down=DOWN, guard={"every": 4}))
    first, last = looks(result.folder)
    assert (first["step"], last["step"]) == (0, 4)
    assert (first["guard"]["diverged"], last["guard"]["diverged"]) == (False, True)
    assert first["guard"]["rewards"][UP]["measured"]["win_rate"] == 0.5
    assert last["guard"]["rewards"][UP]["measured"]["win_rate"] > 0.8
    [said] = [r.getMessage() for r in caplog.records if "diverges" in r.getMessage()]
    assert said.startswith(f"step 4: training diverges: By {DOWN}, which training never saw, the arm wins ")
    assert result.step == 4
    assert sorted(p.name for p in (result.folder / "guard").iterdir()) == ["step-000000", "step-000004"]
    assert len(list((result.folder / "guard" / "step-000000").glob("*.png"))) == len(PROMPTS)
    card = (result.export / "README.md").read_text()
    assert "diverged in 1 of its looks (1), at step 4; training went on" in card
    found = read_watch(result.folder)
    assert found is not None
    assert found.diverged
    assert [chart.title for chart in found.charts][:2] == ["Win rate against the start", "Win rate against drift"]


def test_stop_ends_with_the_weights_as_they_are_and_stays_ended(world, tmp_path):
    run = guarded(world, tmp_path / "run", up=UP, down=DOWN, guard={"action": "stop"}, checkpoint={"every": 9})
    result = diffalign.train(run)
    assert result.step == 2
    assert [line["step"] for line in metrics(result.folder) if "loss" in line] == [1, 2]
    assert (result.folder / "checkpoints" / "step-2").is_dir()
    exported = load_file(next(result.export.rglob("*.safetensors")))
    stopped = weights(result.folder, 2)
    assert all(torch.equal(exported[name], stopped[name]) for name in stopped)
    assert "ended training at step 2" in (result.export / "README.md").read_text()
    before = (result.folder / "metrics.jsonl").read_bytes()
    again = diffalign.train({**run, "resume": "latest"})
    assert again.step == 2
    assert (again.folder / "metrics.jsonl").read_bytes() == before
    back = {**run, "resume": "latest", "guard": {**run["guard"], "action": "roll_back"}}
    with pytest.raises(InputError, match=r"changed: guard\.action \('stop' then, 'roll_back' now\)"):
        diffalign.train(back)  # nothing that was whole is kept
    on = {**run, "resume": "latest", "guard": {**run["guard"], "action": "warn"}}
    assert diffalign.train(on).step == 4


def test_roll_back_hands_out_the_start_where_the_first_look_diverges(world, tmp_path):
    run = guarded(world, tmp_path / "run", up=UP, down=DOWN, guard={"action": "roll_back"})
    result = diffalign.train(run)
    assert result.step == 0
    exported = load_file(next(result.export.rglob("*.safetensors")))
    start = load_file(next((world / "sd" / "unet").glob("*.safetensors")))
    assert all(torch.equal(exported[name], start[name]) for name in start)
    assert "the weights are those of step 0, the last that was found whole" in (result.export / "README.md").read_text()
    before = metrics(result.folder)
    shutil.rmtree(result.folder / "checkpoints" / "step-2")
    assert diffalign.train({**run, "resume": "latest"}).step == 0
    assert metrics(result.folder) == before  # from the checkpoint of the start every line is written anew


def test_roll_back_goes_to_the_last_look_that_found_nothing(world, tmp_path, monkeypatch):
    """With `keep_last = 1` that checkpoint stays by the guard's word alone."""
    count = iter(range(9))

    def verdict(*args, **kwargs):
        return replace(examine(*args, **kwargs), diverged=next(count) == 2, reason="by decree")

    monkeypatch.setattr(guarding, "examine", verdict)
    checkpoint = {"every": 1, "keep_last": 1}
    run = guarded(world, tmp_path / "run", guard={"action": "roll_back"}, train={"steps": 6}, checkpoint=checkpoint)
    result = diffalign.train(run)
    assert [(line["step"], line["guard"]["whole"]) for line in looks(result.folder)] == [(0, 0), (2, 2), (4, 2)]
    assert sorted(p.name for p in (result.folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert result.step == 2
    whole, exported = weights(result.folder, 2), load_file(next(result.export.rglob("*.safetensors")))
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
    again = diffalign.train({**run, "resume": "latest"})
    assert again.step == 2


def test_a_stopped_run_looks_as_the_whole_one_does(world, tmp_path):
    """A moving average is what is looked at; images of the start are those of before the stop."""
    common = {"up": UP, "down": DOWN, "guard": {"every": 1, "encoder": "clip:tiny-clip", "images_per_prompt": 4}}
    ema = {"ema_decay": 0.5}
    whole = diffalign.train(guarded(world, tmp_path / "whole", **common, train={"steps": 2, **ema}))
    first = guarded(world, tmp_path / "parts", **common, train={"steps": 1, **ema})
    diffalign.train(first)
    start = (tmp_path / "parts" / "guard" / "step-000000" / "00000-0.png").stat()
    file = tmp_path / "parts" / "metrics.jsonl"
    line = file.read_bytes().splitlines(keepends=True)[-1]
    with file.open("ab") as handle:
        handle.write(line)  # what a killed run wrote after its last checkpoint
    parts = diffalign.train({**first, "train": {**first["train"], "steps": 2}, "resume": "latest"})
    assert metrics(whole.folder) == metrics(parts.folder)
    assert [line["step"] for line in looks(parts.folder)] == [0, 1, 2]
    assert same(weights(whole.folder, 2), weights(parts.folder, 2))
    after = (tmp_path / "parts" / "guard" / "step-000000" / "00000-0.png").stat()
    assert (start.st_mtime_ns, start.st_ino) == (after.st_mtime_ns, after.st_ino)
    seen = looks(parts.folder)[-1]["guard"]
    assert [one["metric"] for one in seen["diversity"]] == ["vendi", "mean 1 - cosine of pairs"]
    assert seen["drift"][0]["mean"] > 0


def test_without_the_images_of_the_start_a_resumed_run_says_so(world, tmp_path):
    run = guarded(world, tmp_path / "run", train={"steps": 2})
    diffalign.train(run)
    (tmp_path / "run" / "guard" / "step-000000" / "scores.json").unlink()
    more = {**run, "train": {**run["train"], "steps": 4}, "resume": "latest"}
    with pytest.raises(RunError, match=r"guard/step-000000 must hold the images of the policy at its start"):
        diffalign.train(more)


def test_a_run_on_its_own_images_is_watched_by_its_own_rewards(world, tmp_path):
    guard = guarded(world, tmp_path / "unused")["guard"] | {"held_out": ["tests.online_rewards:redness"]}
    del guard["trained"]
    result = diffalign.train(table(world, tmp_path / "run", guard=guard, train={"steps": 2}))
    first, last = looks(result.folder)
    roles = {name: one["role"] for name, one in last["guard"]["rewards"].items()}
    assert roles == {"redness": "held_out", "brightness": "trained_on"}
    assert first["guard"]["trained_rose"] is False
    scored = json.loads((result.folder / "guard" / "step-000002" / "scores.json").read_text())
    assert [len(values) for values in scored.values()] == [len(PROMPTS)] * 2


# --- what a guard cannot be


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"held_out": ["clpi"]}, r"did you mean 'clip'"),
        ({"held_out": []}, r"guard\.held_out must name at least one reward that training never sees, got none"),
        (
            {"held_out": ["tests.online_rewards:brightness"]},
            r"guard\.held_out must name rewards that training never sees",
        ),
        ({"held_out": ["image_similarity"]}, r"guard\.held_out must judge images and prompts alone"),
        ({"prompts": None}, r"config\.guard: missing key 'prompts'"),
        ({"prompts": "none"}, r"prompts must be a file or a set by name"),
        ({"limit": 7}, r"guard\.prompts must hold at least 8 prompts"),
        ({"every": 0}, r"guard\.every must be at least 1, got 0"),
        ({"every": 5}, r"config\.guard\.every must be at most train\.steps, 4"),
        ({"every": 3}, r"config\.guard\.every must be a multiple of online\.updates, 2, got 3"),
        ({"trained": ["clip"]}, r"config\.guard\.trained must be left out with online\.rewards"),
        ({"action": "pause"}, r"config\.guard\.action must be one of 'warn', 'stop', 'roll_back', got 'pause'"),
        ({"encoder": "clip:tiny-clip"}, r"guard\.images_per_prompt must be at least 4 with guard\.encoder"),
        ({"drift": 0.1}, r"guard\.encoder must be there with guard\.drift"),
        ({"drift": -1.0}, r"guard\.drift must be positive, got -1\.0"),
        ({"diversity": 1.5}, r"guard\.diversity must be in \(0, 1\], got 1\.5"),
        ({"win_rate": 0.0}, r"guard\.win_rate must be in \(0, 1\], got 0\.0"),
    ],
)
def test_what_a_guard_cannot_be_is_said_in_one_line(world, tmp_path, guard, words):
    run = guarded(world, tmp_path / "unused")["guard"] | {"held_out": ["tests.online_rewards:redness"]}
    del run["trained"]
    run = {key: value for key, value in {**run, **guard}.items() if value is not None}
    with pytest.raises(InputError, match=words) as found:
        diffalign.train(table(world, tmp_path / "run", guard=run))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_labelled_the_data_is_not_held_out(world, tmp_path):
    (tmp_path / "pairs.card.json").write_text(json.dumps({"labels": "clip:tiny-clip"}))
    settings = GuardSettings(every=1, prompts=str(world / "guard.txt"), held_out=("clip:tiny-clip",))
    with pytest.raises(InputError, match=r"never sees, got 'clip:tiny-clip', and it judged .*pairs\.parquet"):
        make_guard(settings, None, str(tmp_path / "pairs.parquet"))


def test_a_guard_of_a_run_on_its_own_images_knows_what_its_weights_lower(world):
    settings = GuardSettings(every=1, prompts=str(world / "guard.txt"), held_out=("clip:tiny-clip",))
    names = [f"tests.online_rewards:{name}" for name in ("brightness", "redness", "darkness")]
    online = OnlineSettings(rewards=tuple(names), weights=(-2.0, 0.5, 0.0))
    guard = make_guard(settings, online, "nowhere.txt")
    assert guard.trained == {"brightness": -1.0, "redness": 1.0}
    assert guard.held_out == ("clip",)
    assert guard.encoder is not None
    assert "tiny-clip" in guard.encoder.version


@pytest.mark.slow
def test_two_processes_look_as_one_does(world, tmp_path):
    common = {"up": UP, "down": DOWN, "guard": {"action": "stop"}}
    one = guarded(world, tmp_path / "one", **common, train={"steps": 4, "batch_size": 2})
    two = guarded(world, tmp_path / "two", **common, train={"steps": 4, "batch_size": 1})
    test_processes.run(one, 1, tmp_path)
    test_processes.run(two, 2, tmp_path)
    folders = [tmp_path / name for name in ("one", "two")]
    first = [(folder / "guard" / "step-000000" / "scores.json").read_bytes() for folder in folders]
    assert first[0] == first[1]
    found = [[(line["step"], line["guard"]["diverged"]) for line in looks(folder)] for folder in folders]
    assert found[0] == found[1] == [(0, False), (2, True)]
    assert all((folder / "checkpoints" / "step-2").is_dir() and (folder / "export").is_dir() for folder in folders)
