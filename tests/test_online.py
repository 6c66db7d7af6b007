"""Online runs: what a round leaves on disk, ratios of 1, runs that were stopped in every phase, bad input."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign.assemble import assemble, claim_folder
from diffalign.config import parse
from diffalign.data.batches import stream
from diffalign.errors import InputError, RunError
from diffalign.evaluate.curves import read_training
from diffalign.logbook import Logbook
from diffalign.online.store import Store
from diffalign.online_rounds import own_phases
from diffalign.online_scores import statistics
from diffalign.types import Scored
from tests import worlds
from tests.test_train import metrics, same, weights

PROMPTS = ("a red circle", "a blue square", "the small green circle", "large red square on white")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def table(world: Path, output: Path, *, model: str | dict = "sd", method: str | dict = "d3po", **sections) -> dict:
    """Two rounds of two updates; a pair of images is trained at each of four moves."""
    found = {
        "output": str(output),
        "model": {"path": str(world / model)} if isinstance(model, str) else model,
        "data": {"path": str(world / "prompts.txt")},
        "method": {"name": method} if isinstance(method, str) else method,
        "online": {
            "rewards": ["tests.online_rewards:brightness"],
            "prompts": 2,
            "group": 2,
            "updates": 2,
            "steps": 4,
            "batch_size": 2,
        },
        "train": {"steps": 4, "batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-3},
        "lora": {"rank": 2},
        "checkpoint": {"every": 1},
    }
    for name, section in sections.items():
        found[name] = {**found.get(name, {}), **section} if isinstance(section, dict) else section
    return found


def rounds_of(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "round" in line]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_a_run_on_its_own_images_starts_every_method_where_policy_and_reference_agree(world, tmp_path, model, guidance):
    result = diffalign.train(table(world, tmp_path / "run", model=model, online={"guidance": guidance}))
    lines = metrics(result.folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert steps[1]["loss"] != steps[0]["loss"]
    first, second = rounds_of(result.folder)
    assert (first["round"], first["images"], second["step"]) == (1, 4, 2)
    assert (first["images_so_far"], second["images_so_far"]) == (4, 8)
    assert first["score/brightness"] != second["score/brightness"]
    assert (result.export / "pytorch_lora_weights.safetensors").is_file()
    words = "2 rounds of 4, 2 a prompt, judged by `tests.online_rewards:brightness`."
    assert words in (result.export / "README.md").read_text().replace("\n", " ")


def test_a_round_says_of_each_reward_its_mean_its_spread_and_the_best_of_each_prompt():
    scored = Scored(
        scores={"a": torch.tensor([1.0, 3.0, -2.0, -4.0, -6.0])},
        weights={"a": 1.0},
        group=torch.tensor([0, 0, 3, 3, 3]),
        prompts=["x", "y", "z", "w"],
    )
    found = statistics(scored)
    assert found == {"score/a": -1.6, "score/a/std": pytest.approx(math.sqrt(10.64), abs=1e-6), "score/a/best": 0.5}


@pytest.mark.parametrize("sampled", [2, 4, 3], ids=lambda n: f"sampled by {n}")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("model", "method"), [("sd", "ddpo"), ("sd", "flow_grpo"), ("sd3", "flow_grpo")])
def test_the_ratio_is_exactly_1_before_the_first_update(world, tmp_path, model, method, guidance, sampled):
    moves = 4 if model == "sd" else 3
    online = {"guidance": guidance, "batch_size": sampled, "updates": 1}
    train = {"steps": 2, "batch_size": 2, "accumulate": 2 * moves}
    result = diffalign.train(table(world, tmp_path / "run", model=model, method=method, online=online, train=train))
    steps = [line for line in metrics(result.folder) if "loss" in line]
    assert [step["ratio"] for step in steps] == [
        1.0,
        1.0,
    ]  # one update a round: all of it is on the policy that sampled
    assert [step["approx_kl"] for step in steps] == [0.0, 0.0]
    assert [step["clipfrac"] for step in steps] == [0.0, 0.0]
    if method == "flow_grpo":
        assert steps[0]["kl_loss"] == 0.0
        assert steps[1]["kl_loss"] > 0.0


def test_a_kl_inside_the_reward_is_0_while_policy_and_reference_agree(world, tmp_path):
    online = {"guidance": 2.0, "batch_size": 3, "updates": 1}
    lines = {}
    for weight in (0.0, 0.5):
        run = table(
            world, tmp_path / str(weight), model="sd3", online=online, optimizer={"lr": 1e-2},
            train={"steps": 2, "batch_size": 2, "accumulate": 6},
        )  # fmt: skip
        run["method"] = {"name": "flow_grpo", "kl": 0.0, "kl_reward": weight}
        lines[weight] = metrics(diffalign.train(run).folder)
    first, second = (line for line in lines[0.5] if "round" in line)
    assert first["log_ratio"] == 0.0
    assert second["log_ratio"] != 0.0
    plain, penalised = ([line for line in lines[w] if "loss" in line] for w in (0.0, 0.5))
    assert penalised[0] == plain[0]


def test_a_second_update_leaves_the_policy_that_sampled(world, tmp_path):
    train = {"steps": 2, "batch_size": 2, "accumulate": 4}
    run = table(world, tmp_path / "run", method="ddpo", train=train, optimizer={"lr": 1e-2})
    steps = [line for line in metrics(diffalign.train(run).folder) if "loss" in line]
    assert steps[0]["ratio"] == 1.0
    assert steps[1]["ratio"] != 1.0


@pytest.mark.parametrize("options", [{"trust": "guard"}, {"trust": "mask"}, {"step_weight": "longcat"}], ids=str)
def test_a_window_of_moves_with_noise_is_all_that_is_trained(world, tmp_path, options):
    online = {"steps": 6, "window": {"size": 2}, "updates": 1}
    train = {"steps": 2, "batch_size": 2, "accumulate": 4}
    run = table(world, tmp_path / "run", model="sd3", online=online, train=train)
    run["method"] = {"name": "flow_grpo", **options}
    result = diffalign.train(run)
    lines = [
        json.loads((result.folder / "rounds" / f"round-{n}" / "manifest.jsonl").read_text().splitlines()[0])
        for n in (1, 2)
    ]
    for line in lines:
        low, high = line["window"]
        assert high - low == 2
        assert 0 <= low <= 1


def test_past_scores_of_a_prompt_are_what_ddpo_looks_back_at(world, tmp_path):
    run = table(world, tmp_path / "run", method="ddpo", online={"prompts": 4}, train={"accumulate": 8})
    result = diffalign.train(run)
    history = [json.loads(file.read_text()) for file in sorted((result.folder / "rounds" / "history").iterdir())]
    assert len(history) == 2
    assert all(sorted(table["brightness"]) == sorted(PROMPTS) for table in history)
    assert all(len(scores) == 2 for table in history for scores in table["brightness"].values())


OWN = {
    "diffusion_nft": {"accumulate": 7},
    "awm": {"accumulate": 6},
    "crd": {"accumulate": 7},
    "dgpo": {"accumulate": 4},
    "online_dpo": {},
    "dragon": {},
    "curated": {},
}
"""Methods on clean images, and how many micro-batches an update has for all turns of two of them."""


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_every_method_on_its_own_images_trains(world, tmp_path, model, method, trainable):
    online = {"prompts": 2, "group": 2, "steps": 8, "updates": 2, "batch_size": 4}
    train = {"steps": 4, "batch_size": 2, "trainable": trainable, **OWN[method]}
    run = table(world, tmp_path / "run", model=model, method=method, online=online, train=train)
    if trainable == "full":
        del run["lora"]
    result = diffalign.train(run)
    lines = metrics(result.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["round"] for line in lines if "round" in line] == [1, 2]
    assert len({line["loss"] for line in lines if "loss" in line}) > 1


@pytest.mark.parametrize("spec", ["vendi", "frechet"])
def test_a_reward_of_sets_judges_a_round(world, tmp_path, spec):
    own = {"rewards": [], "set_reward": f"{spec}:clip:tiny-clip", "prompts": 2, "group": 4}
    if spec == "frechet":
        for i in range(4):
            (tmp_path / "ideal").mkdir(exist_ok=True)
            (tmp_path / "ideal" / f"{i}.png").write_bytes(worlds.png(i))
        own["set_reference"] = str(tmp_path / "ideal")
    result = diffalign.train(table(world, tmp_path / "run", method="dragon", online=own))
    first = rounds_of(result.folder)[0]
    assert first["kept"] > 0
    assert any("r(D+)" in name or "plus" in name for name in first), first


def test_a_round_on_disk_names_every_image_and_keeps_what_people_may_look_at(world, tmp_path):
    result = diffalign.train(table(world, tmp_path / "run", online={"guidance": 2.0}))
    folder = result.folder / "rounds" / "round-1"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["00000-0", "00000-1", "00001-0", "00001-1"]
    assert all((folder / line["image"]).is_file() for line in lines)
    assert {line["prompt"] for line in lines} <= set(PROMPTS)
    assert {line["kernel"] for line in lines} == {"ddim"}
    assert {line["guidance"] for line in lines} == {2.0}
    assert not list(folder.glob("part-*"))  # what only training needed went when the next round began
    assert list((result.folder / "rounds" / "round-2").glob("part-*"))


def test_a_report_draws_what_each_round_scored(world, tmp_path):
    result = diffalign.train(table(world, tmp_path / "run"))
    training = read_training(result.folder)
    assert training is not None
    assert [chart.title for chart in training.charts][:2] == ["Score by brightness", "Loss"]
    assert training.charts[0].legend == (("brightness", "one"),)


def test_images_of_a_prompt_share_their_noise_where_the_config_says_so(world, tmp_path):
    for shared in (False, True):
        run = table(world, tmp_path / str(shared), train={"steps": 2}, online={"shared_noise": shared})
        diffalign.train(run)
        lines = (tmp_path / str(shared) / "rounds" / "round-1" / "manifest.jsonl").read_text().splitlines()
        seeds = [json.loads(line)["noise_seed"] for line in lines]
        assert (seeds[0] == seeds[1]) is shared
        assert seeds[1] != seeds[2]


def test_prompts_take_turns(world, tmp_path):
    result = diffalign.train(table(world, tmp_path / "run"))
    seen = [
        json.loads(line)["prompt"]
        for number in (1, 2)
        for line in (result.folder / "rounds" / f"round-{number}" / "manifest.jsonl").read_text().splitlines()
    ]
    assert sorted(set(seen)) == sorted(PROMPTS)


@pytest.fixture
def first_phase():
    """Makes (parts, first phase, its micro-batches) of a run: sampled and judged, not trained."""
    books = []

    def make(cfg: dict):
        parts = assemble(parse(cfg))
        claim_folder(parts)
        books.append(Logbook(parts.folder / "metrics.jsonl", parts.accelerator, parts.metrics_offset))
        phase = next(own_phases(parts, books[-1]))
        t = parts.cfg.train
        return parts, phase, stream(phase.collator, batch_size=t.batch_size, accumulate=t.accumulate, share=parts.share)

    yield make
    for book in books:
        book.__exit__()


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_pairs_of_moves_are_those_of_the_better_and_the_worse_image(world, tmp_path, first_phase, model):
    parts, phase, batches = first_phase(table(world, tmp_path / "run", model=model))
    store: Store = phase.collator.store
    scores = store.scores()["brightness"]
    for _ in range(3):
        batch = next(batches)
        for row in range(len(batch)):
            step = int(batch.step[row])
            ways = [store.states([image], [step])[0][0] for image in range(4)]
            better = [i for i, x in enumerate(ways) if torch.equal(x, batch.x_t_w[row])]
            worse = [i for i, x in enumerate(ways) if torch.equal(x, batch.x_t_l[row])]
            assert len(better) == len(worse) == 1
            assert better[0] // 2 == worse[0] // 2
            assert scores[better[0]] > scores[worse[0]]
    assert parts.cfg.method.needs.items == phase.collator.kind


def test_a_block_of_rows_goes_over_all_its_moves_before_the_next(world, tmp_path, first_phase):
    _, phase, _ = first_phase(table(world, tmp_path / "run", train={"batch_size": 1}))
    order = phase.collator.order
    items = [order.item(i) for i in range(8)]
    rows = [item // order.moves for item in items]
    assert rows in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    assert sorted(item % order.moves for item in items[:4]) == [0, 1, 2, 3]


def test_a_stopped_run_goes_on_to_the_same_weights(world, tmp_path):
    whole = diffalign.train(table(world, tmp_path / "whole"))
    stopped = table(world, tmp_path / "stopped", train={"steps": 2})
    diffalign.train(stopped)
    diffalign.train(table(world, tmp_path / "stopped", resume="latest"))
    assert same(weights(whole.folder, 4), weights(tmp_path / "stopped", 4))
    assert metrics(whole.folder) == metrics(tmp_path / "stopped")


@pytest.mark.parametrize("lost", ["part-00001.safetensors", "scores-00000.json", "images/00001-0.png"])
def test_what_a_killed_round_lacks_is_made_again(world, tmp_path, lost):
    whole = diffalign.train(table(world, tmp_path / "whole", train={"steps": 2}))
    run = table(world, tmp_path / "run", train={"steps": 2})
    diffalign.train(run)
    folder = tmp_path / "run" / "rounds" / "round-1"
    (folder / lost).unlink()
    if lost.startswith("images"):
        (folder / "part-00001.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    diffalign.train({**run, "resume": "latest"})
    assert same(weights(whole.folder, 2), weights(tmp_path / "run", 2))


def test_people_judge_where_no_reward_does(world, tmp_path):
    run = table(world, tmp_path / "run", online={"rewards": []}, train={"steps": 2})
    with pytest.raises(RunError, match=r"round 1 waits for people: label the 4 images of .*images in .*labels\.jsonl"):
        diffalign.train(run)
    folder = tmp_path / "run" / "rounds" / "round-1"
    before = {file.name: file.read_bytes() for file in folder.glob("images/*.png")}
    ids = [json.loads(line)["id"] for line in (folder / "labels-template.jsonl").read_text().splitlines()]
    rows = [{"id": one, "label": label} for one, label in zip(ids, (1, 0, -1, 2), strict=True)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = diffalign.train({**run, "resume": "latest"})
    assert {file.name: file.read_bytes() for file in folder.glob("images/*.png")} == before
    assert rounds_of(result.folder)[0]["score/people"] == pytest.approx(0.5)


def test_labels_that_cannot_be_end_the_run_in_one_line_and_nothing_is_lost(world, tmp_path):
    run = table(world, tmp_path / "run", online={"rewards": []}, train={"steps": 2})
    with pytest.raises(RunError, match="waits for people"):
        diffalign.train(run)
    folder = tmp_path / "run" / "rounds" / "round-1"
    before = {file: file.read_bytes() for file in folder.glob("*/*.png")} | {
        file: file.read_bytes() for file in folder.glob("part-*")
    }
    ids = [json.loads(line)["id"] for line in (folder / "labels-template.jsonl").read_text().splitlines()]
    rows = [{"id": one, "label": label} for one, label in zip(ids, (1, 0, -1, 2), strict=True)]
    for bad, words in (
        ([*rows, {"id": "00009-0", "label": 1}], r"line 5: id must be an image of this round, got '00009-0'"),
        (rows[:-1], r"00001-1"),
    ):
        (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
        with pytest.raises(InputError, match=words):
            diffalign.train({**run, "resume": "latest"})
        assert {file: file.read_bytes() for file in before} == before
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    diffalign.train({**run, "resume": "latest"})
    assert {file: file.read_bytes() for file in before if file.suffix == ".png"} == {
        file: data for file, data in before.items() if file.suffix == ".png"
    }


def test_labels_do_what_the_reward_that_they_were_made_by_does(world, tmp_path):
    by_reward = diffalign.train(table(world, tmp_path / "reward", train={"steps": 2}))
    files = sorted((by_reward.folder / "rounds" / "round-1").glob("scores-*.json"))
    scores = [score for file in files for score in json.loads(file.read_text())["brightness"]]
    run = table(world, tmp_path / "people", online={"rewards": []}, train={"steps": 2})
    with pytest.raises(RunError, match="waits for people"):
        diffalign.train(run)
    folder = tmp_path / "people" / "rounds" / "round-1"
    ids = [json.loads(line)["id"] for line in (folder / "labels-template.jsonl").read_text().splitlines()]
    rows = [{"id": one, "label": score} for one, score in zip(ids, scores, strict=True)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    diffalign.train({**run, "resume": "latest"})
    assert same(weights(by_reward.folder, 2), weights(tmp_path / "people", 2))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("constant", r"reward 'constant' must tell images apart, got 0\.5 for all 4 of round 1"),
        ("blind", r"reward 'blind' could not judge 2 of 4 images"),
        ("short", r"reward 'short' must return one score per image, shape \(2,\), got \(1,\)"),
    ],
)
def test_a_reward_that_cannot_judge_ends_the_run_in_one_line(world, tmp_path, reward, words):
    run = table(world, tmp_path / "run", online={"rewards": [f"tests.online_rewards:{reward}"]})
    with pytest.raises((RunError, ValueError), match=words):
        diffalign.train(run)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"online": {"kernel": {"name": "ddim", "eta": 0.0}}}, r"online\.kernel must have noise"),
        ({"model": "sd3", "online": {"kernel": {"name": "flow_sde", "eta": 0.0}}}, r"online\.kernel must have noise"),
        ({"method": "ddpo", "online": {"kernel": {"name": "ode"}}}, r"online\.kernel must have noise"),
        ({"online": {"kernel": {"name": "flow_sde"}}}, r"kernel must fit a DDPM model, got 'flow_sde'"),
        ({"online": {"group": 1}}, r"config\.online\.group must be at least 2 with method 'd3po'"),
        ({"online": {"prompts": 5}}, r"data\.path must hold at least the 5 prompts of a round, got 4"),
        ({"online": {"updates": 3}}, r"config\.train\.steps must be a multiple of online\.updates, 3, got 4"),
        ({"online": {"weights": [1.0, 2.0]}}, r"online\.weights must be one for each of the 1 rewards, got 2"),
        ({"online": {"rewards": ["clpi"]}}, r"did you mean 'clip'"),
        ({"online": {"window": {"size": 3}}}, r"online\.window must have a size in \[1, 2\]"),
        ({"online": {"set_reward": "vendi"}}, r"config\.online\.set_reward must be left out with method 'd3po'"),
        ({"online": {"rewards": ["clap"]}}, r"online\.rewards must judge images and prompts alone, got 'clap'"),
        (
            {
                "method": {"name": "flow_grpo", "kl_reward": 0.1},
                "online": {"rewards": [f"tests.online_rewards:{r}" for r in ("brightness", "redness")]},
            },
            r"config\.online\.rewards must be one with method\.kl_reward, which each score would lose, got 2",
        ),
        ({"data": {"flip": True}}, r"config\.data\.flip must be left out with method 'd3po'"),
        ({"validation": {"every": 2}}, r"config\.validation must be left out with method 'd3po'"),
        ({"online": None}, r"config\.online must be there with method 'd3po'"),
        ({"method": "sft"}, r"config\.online must be left out with method 'sft'"),
    ],
)
def test_what_a_run_on_its_own_images_cannot_be_is_said_in_one_line(world, tmp_path, sections, words):
    found = table(world, tmp_path / "run", **({"method": "d3po"} | sections))
    found = {k: v for k, v in found.items() if v is not None}
    with pytest.raises(InputError, match=words):
        diffalign.train(found)
    assert not (tmp_path / "run" / "rounds").exists()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # Euler's scheduler
def test_a_method_that_noises_its_own_images_refuses_a_distilled_model(world, tmp_path):
    worlds.sdxl(tmp_path / "turbo", turbo=True)
    run = table(world, tmp_path / "run", method="diffusion_nft", model={"path": str(tmp_path / "turbo")})
    with pytest.raises(InputError, match="which was distilled to a few; take a method on moves"):
        diffalign.train(run)


def test_an_empty_list_of_prompts_is_one_line(world, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(InputError, match="prompts must hold at least one prompt"):
        diffalign.train(table(world, tmp_path / "run", data={"path": str(tmp_path / "none.txt")}))
