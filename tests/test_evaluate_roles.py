"""Roles of rewards: from runs' configs and data cards, and what a caller says before them."""

import json
from pathlib import Path

import pytest

from diffalign import shipped
from diffalign.config import load
from diffalign.data.cards import card_file, pass_on, read_card
from diffalign.errors import InputError
from diffalign.evaluate.arms import Arm
from diffalign.evaluate.comparison import Judge
from diffalign.evaluate.results import RewardResult
from diffalign.evaluate.roles import assign, encoder_of, optimised, read_runs
from diffalign.methods import METHODS
from diffalign.rewards.clip import CLIPReward
from diffalign.rewards.oracle import OracleReward
from diffalign.types import FunctionReward

ORACLE, CLIP = OracleReward(), CLIPReward("tiny-clip")
EYE = FunctionReward(name="eye", function=lambda images, prompts: [0.0] * len(images))


def run(
    folder: Path, method: str = "diffusion_dpo", data: str = "tiny-sd-pairs", extra: str = "", model: str = ""
) -> Path:
    folder.mkdir(parents=True)
    text = (
        f'seed = 0\n[model]\npath = "tiny-sd"\n{model}\n[data]\npath = "{data}"\n[method]\nname = "{method}"\n{extra}\n'
    )
    (folder / "config.toml").write_text(text)
    return folder


def roles(*runs: Path, **declared: str) -> dict[str, tuple[str, bool, str]]:
    """(role, declared, reason) of oracle, clip and eye in a comparison of runs with a plain base."""
    loaded = [ORACLE, CLIP, EYE]
    judges = [
        Judge(
            name=r.name, spec={"clip": "clip:tiny-clip"}.get(r.name, r.name), version=r.version,
            role=declared.get(r.name, "held_out"), role_declared=r.name in declared,
        )
        for r in loaded
    ]  # fmt: skip
    arms = [Arm(name="base", spec="tiny-sd", source=None), *(Arm(name=p.name, spec=str(p), source=None) for p in runs)]
    found = assign(judges, loaded, declared, arms)
    return {j.name: (j.role, j.role_declared, j.role_reason) for j in found}


def test_the_shipped_pairs_were_labelled_by_the_oracle(tmp_path):
    found = roles(run(tmp_path / "a"))
    assert found["oracle"][:2] == ("labeller", True)
    assert "labelled tiny-sd-pairs" in found["oracle"][2]
    assert found["clip"][:2] == found["eye"][:2] == ("held_out", True)
    assert "neither by the config" in found["eye"][2]


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ("frechet:clip:tiny-clip", True),
        ("vendi:clip:tiny-clip", True),
        ("frechet:clip:other", False),
        ("frechet:dino", False),
    ],
)
def test_a_distance_of_sets_was_trained_on_if_its_encoder_was(tmp_path, spec, seen):
    trained = run(tmp_path / "a", "dragon", "tiny-train", '[online]\nset_reward = "frechet:clip:tiny-clip"')
    arms = [Arm(name="base", spec="tiny-sd", source=None), Arm(name="a", spec=str(trained), source=None)]
    assert optimised(spec, arms) is seen
    assert not optimised(spec, arms[:1])


@pytest.mark.parametrize(
    "line",
    [
        'set_reward = "frechet:clip:tiny-clip"',
        'set_reward = "vendi:clip:tiny-clip"',
        'rewards = ["per_sample:frechet:clip:tiny-clip@reference.safetensors"]',
    ],
)
def test_who_looks_through_an_encoder_that_was_trained_on_is_not_held_out(tmp_path, line):
    found = roles(run(tmp_path / "a", "dragon", "tiny-train", f"[online]\n{line}"))
    assert found["clip"][:2] == ("trained_on", True)
    assert "through its encoder" in found["clip"][2]
    assert found["oracle"][0] == "held_out"


@pytest.mark.parametrize(
    ("spec", "encoder"),
    [
        ("fad:clap", "clap"),
        ("per_sample:fad:log_mel:frames@x:y.safetensors", "log_mel:frames"),
        ("clip:tiny-clip", None),
        ("fad", None),
        ("per_sample:jpeg", None),
    ],
)
def test_a_spec_names_its_encoder(spec, encoder):
    assert encoder_of(spec) == encoder


@pytest.mark.parametrize(
    ("method", "extra"), [("smpo", ""), ("diffusion_dpo", '[method.scores]\nuse = "soft"')], ids=["smpo", "soft labels"]
)
def test_a_method_that_learns_from_scores_was_trained_on_their_judge(tmp_path, method, extra):
    found = roles(run(tmp_path / "a", method, extra=extra))
    assert found["clip"][:2] == ("trained_on", True)
    assert "learned from its scores" in found["clip"][2]
    assert found["oracle"][0] == "labeller"


def test_the_same_reward_by_another_spec_is_recognised_and_another_model_is_not(tmp_path):
    folder = run(tmp_path / "a", "smpo")
    arms = [Arm(name="a", spec=str(folder), source=None)]

    def role(reward: CLIPReward, spec: str) -> str:
        judge = Judge(name="clip", spec=spec, version=reward.version, role="held_out", role_declared=False)
        return assign([judge], [reward], {}, arms)[0].role

    assert role(CLIPReward("tiny-clip"), "clip") == "trained_on"
    assert role(CLIPReward("openai/clip-vit-base-patch32"), "clip:openai/clip-vit-base-patch32") == "held_out"


def test_what_the_caller_says_wins(tmp_path):
    found = roles(run(tmp_path / "a"), oracle="held_out")
    assert found["oracle"] == ("held_out", True, "declared")


def test_without_a_run_or_a_card_nobody_declared_it(tmp_path):
    assert roles()["oracle"] == ("held_out", False, "nobody declared it")
    unknown = roles(run(tmp_path / "a", data=str(tmp_path / "mine.parquet")))
    assert {u[:2] for u in unknown.values()} == {("held_out", False)}


def test_a_run_that_started_from_another_has_its_history_too(tmp_path):
    first = run(tmp_path / "first", "smpo")
    (first / "export" / "unet").mkdir(parents=True)
    for number, place in enumerate((first / "export", first / "export" / "unet")):
        second = run(tmp_path / f"second-{number}", model=f'denoiser = "{place}"')
        assert roles(second)["clip"][0] == "trained_on"
        assert len(read_runs(second)) == 2
    third = run(tmp_path / "third", model=f'lora = "{tmp_path / "third"}"')
    assert len(read_runs(third)) == 1  # no end without this


def test_of_two_arms_the_role_that_says_less_counts(tmp_path):
    found = roles(run(tmp_path / "a"), run(tmp_path / "b", "smpo"))
    assert (found["oracle"][0], found["clip"][0]) == ("labeller", "trained_on")


def test_a_card_beside_own_data_is_read_and_a_broken_one_is_named(tmp_path):
    data = tmp_path / "mine.parquet"
    card_file(data).write_text(json.dumps({"labels": "eye"}))
    assert card_file(data).name == "mine.card.json"
    assert roles(run(tmp_path / "a", data=str(data)))["eye"][0] == "labeller"
    scored = roles(run(tmp_path / "b", "smpo", data=str(data)))
    assert scored["clip"][:2] == ("held_out", False)  # whose scores smpo learned from is not said
    card_file(data).write_text("[1]")
    with pytest.raises(InputError, match="must be an object of texts"):
        read_card(str(data))
    card_file(data).write_text("{")
    with pytest.raises(InputError, match="must be JSON"):
        read_card(str(data))


def test_pairs_of_pick_a_pic_were_labelled_by_pickscores_teachers(tmp_path):
    [history] = read_runs(run(tmp_path / "a", data="yuvalkirstain/pickapic_v2"))
    assert [(s.spec, s.role) for s in history.seen] == [("pickscore", "labeller")]


def test_a_card_is_passed_on_with_what_has_changed(tmp_path):
    scored, relabelled = tmp_path / "scored.parquet", tmp_path / "relabelled.parquet"
    pass_on("yuvalkirstain/pickapic_v2", scored, scores="hpsv2")
    [history] = read_runs(run(tmp_path / "a", "smpo", data=str(scored)))
    assert {s.spec: s.role for s in history.seen} == {"pickscore": "labeller", "hpsv2": "trained_on"}
    assert history.complete
    pass_on(str(scored), relabelled, scores="hpsv2", labels="hpsv2")
    [history] = read_runs(run(tmp_path / "b", data=str(relabelled)))
    assert [(s.spec, s.role) for s in history.seen] == [("hpsv2", "labeller")]


def test_every_method_says_whether_it_takes_scores_without_options():
    assert {name for name, method in METHODS.items() if method().needs.scores} >= {"smpo"}


def test_the_shipped_data_have_cards():
    for name in shipped.DATASETS:
        assert read_card(name) == {"labels": "oracle", "scores": "clip:tiny-clip"}


def test_shipped_configs_have_histories(tmp_path):
    from diffalign.config import dump
    from diffalign.strict import to_toml

    for name in ("tiny_sd_diffusion_dpo", "tiny_sd_smpo", "tiny_sd_spin", "tiny_sd_sft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(to_toml(dump(load(name))))
        [history] = read_runs(tmp_path / name)
        assert history.complete
        assert {s.role for s in history.seen} == ({"labeller", "trained_on"} if "smpo" in name else {"labeller"})


def test_the_reason_has_its_place_in_the_results():
    assert RewardResult.__dataclass_fields__["role_reason"].default == "declared"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_reward_that_labelled_one_arm_and_drove_the_other_was_trained_on(tmp_path, order):
    data = tmp_path / "mine.parquet"
    card_file(data).write_text(json.dumps({"labels": "clip:tiny-clip", "scores": "oracle"}))
    runs = run(tmp_path / "a"), run(tmp_path / "b", "smpo", data=str(data))
    assert roles(*(runs[i] for i in order))["oracle"][0] == "trained_on"
