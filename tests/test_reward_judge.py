"""The judge: what replies mean, and an endpoint on this machine that replies well, badly or not at all."""

import base64
import io
import json
import logging
import math

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.errors import InputError, RunError
from diffalign.rewards.judge import JudgeReward
from diffalign.rewards.replies import Scale, parse_score, parse_yes_no
from diffalign.rewards.transport import Network
from diffalign.types import RewardBatch
from tests.loopback import Said, closed_url, scripted

FAST = Network(timeout_seconds=2.0, retries=2, first_delay_seconds=0.002, longest_delay_seconds=0.05)
KEY = "sk-test-0123456789"


def top(**probabilities: float) -> list[dict]:
    return [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]


def tokens(probabilities: dict[str, float]) -> list[dict]:
    return top(**probabilities)


def said_tokens(probabilities: dict[str, float]) -> Said:
    listed = tokens(probabilities)
    first = {**listed[0], "top_logprobs": listed}
    return Said({"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [first]}}]})


def said_text(text, finish: str = "stop") -> Said:
    return Said({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})


def pictures(count: int, size: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)) / 255


def batch(count: int = 3) -> RewardBatch:
    return RewardBatch(images=pictures(count), prompts=[f"prompt {i}" for i in range(count)])


def question(asked) -> str:
    return asked.body["messages"][0]["content"][1]["text"]


# --- what a reply means


def test_yes_and_no_are_weighed_against_each_other_alone():
    judged = parse_yes_no(tokens({"Yes": 0.6, "No": 0.2, "Maybe": 0.1}))
    assert judged.score == pytest.approx(0.75, abs=1e-12)
    assert judged.raw == pytest.approx({"logprob_yes": math.log(0.6), "logprob_no": math.log(0.2)})
    assert parse_yes_no(tokens({"Yes": 0.2, "No": 0.6})).score == pytest.approx(0.25, abs=1e-12)


def test_spellings_are_added_up_before_they_are_weighed():
    spelt = {"Yes": 0.3, " yes": 0.2, "YES": 0.1, "▁Yes": 0.05, "No": 0.1, "ĠNO": 0.05, "Yesterday": 0.15}
    assert parse_yes_no(tokens(spelt)).score == pytest.approx(0.65 / 0.8, abs=1e-12)


def test_a_word_that_is_not_listed_is_bounded_by_the_least_that_is():
    assert parse_yes_no(tokens({"Yes": 0.9, "It": 0.06, "Of": 0.02})).score == pytest.approx(0.9 / 0.92, abs=1e-12)
    assert parse_yes_no(tokens({"no": 0.9, "It": 0.06, "Of": 0.02})).score == pytest.approx(0.02 / 0.92, abs=1e-12)


def test_log_probabilities_far_from_zero_do_not_overflow():
    far = [{"token": "No", "logprob": 0.0}, {"token": "Yes", "logprob": -9999.0}]
    assert parse_yes_no(far).score == 0.0
    far[0]["token"], far[1]["token"] = "Yes", "No"
    assert parse_yes_no(far).score == 1.0


@pytest.mark.parametrize(
    "listed",
    [
        [],
        tokens({"Maybe": 0.5, "Perhaps": 0.3}),
        tokens({"Yes": 0.99}),
        tokens({"Yes": 0.6, " yes": 0.3}),
        [{"token": "Yes"}],
        [{"token": "Yes", "logprob": None}, {"token": "No", "logprob": -1.0}],
        [{"token": "Yes", "logprob": math.nan}, {"token": "No", "logprob": -1.0}],
        [{"token": "Yes", "logprob": 0.7}, {"token": "No", "logprob": -1.0}],
        [{"logprob": -1.0}],
        ["Yes", "No"],
    ],
)
def test_tokens_that_do_not_tell_are_no_judgement(listed):
    judged = parse_yes_no(listed)
    assert math.isnan(judged.score)
    assert judged.failure == "malformed"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Final Score: 1", 0.0),
        ("Fine picture.\nFinal Score: 5", 1.0),
        ("final score : 3", 0.5),
        ("**Final Score:** 4.5", 0.875),
        ("Final Score: **2**", 0.25),
        ("I think of Final Score: 2 first.\nFinal Score: 4", 0.75),
    ],
)
def test_a_grade_is_brought_from_its_bounds_to_0_and_1(reply, score):
    judged = parse_score(reply)
    assert judged.score == pytest.approx(score, abs=1e-12)
    assert judged.raw == {"native": 1 + 4 * score}


@pytest.mark.parametrize(
    "reply", ["", "   ", "A fine picture.", "Final Score: good", "Final Score:", "Final Score: 0", "Final Score: 6",
              "Final Score: -3", "Score: 3"]
)  # fmt: skip
def test_a_grade_that_is_not_there_or_out_of_bounds_is_no_judgement(reply):
    judged = parse_score(reply)
    assert math.isnan(judged.score)
    assert judged.failure == "malformed"
    assert judged.raw == {}


AXES = {axis: rf"{axis} Score \(1-5\): ([\d.]+)" for axis in ("Alignment", "Coherence", "Style")}


def test_axes_are_averaged_and_all_of_them_are_needed():
    lines = ["Alignment Score (1-5): 4.5", "Coherence Score (1-5): 3", "Style Score (1-5): 1.5"]
    judged = parse_score("\n".join(lines), pattern=AXES)
    assert judged.score == pytest.approx(0.5, abs=1e-12)
    assert judged.raw == {"Alignment": 4.5, "Coherence": 3.0, "Style": 1.5}
    for missing in range(3):
        judged = parse_score("\n".join(line for i, line in enumerate(lines) if i != missing), pattern=AXES)
        assert math.isnan(judged.score)
    assert math.isnan(parse_score("\n".join(lines).replace("1.5", "1..5"), pattern=AXES).score)


def test_other_bounds_and_tags_are_read():
    assert parse_score("<Score>4</Score>", pattern=r"<Score>(\d)</Score>", low=0.0, high=5.0).score == pytest.approx(
        0.8
    )


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"pattern": "score"}, "must have one group, the number, got 0"),
        ({"pattern": r"(\d)(\d)"}, "must have one group, the number, got 2"),
        ({"pattern": "("}, "must be a regular expression, got '\\('"),
        ({"pattern": {}}, "must have a pattern"),
        ({"low": 5.0, "high": 5.0}, r"low < high, got 5\.0 and 5\.0"),
        ({"high": math.nan}, "low < high"),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused(scale, message):
    with pytest.raises(InputError, match=message):
        Scale(**scale)


# --- an endpoint that replies


def test_the_request_is_one_picture_and_one_question_decoded_greedily():
    with scripted(lambda asked: said_tokens({"Yes": 0.8, "No": 0.1})) as server:
        JudgeReward("vlm", endpoint=f"{server.url}/v1/", network=FAST).score(batch(1))
    [asked] = server.asked
    assert asked.path == "/v1/chat/completions"
    assert {k: v for k, v in asked.body.items() if k != "messages"} == {
        "model": "vlm", "temperature": 0, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip
    [message] = asked.body["messages"]
    image, text = message["content"]
    assert message["role"] == "user"
    assert text == {"type": "text", "text": 'Does this figure show "prompt 0"? Please answer yes or no.'}
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(data))) as seen:
        assert np.array_equal(np.asarray(seen), (pictures(1)[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert "Authorization" not in asked.headers


def test_scores_are_in_the_order_of_the_batch_however_they_come_in():
    def answer(asked):
        number = int(question(asked).split('"')[1].split()[1])
        said = said_tokens({"Yes": 0.1 + 0.08 * number, "No": 0.9 - 0.08 * number})
        return Said(said.body, delay_seconds=0.05 if number == 0 else 0.0)

    with scripted(answer) as server:
        judge = JudgeReward("vlm", endpoint=server.url, network=Network(concurrency=4))
        out = judge.score(batch(9))
    torch.testing.assert_close(out.scores, 0.1 + 0.08 * torch.arange(9))
    torch.testing.assert_close(out.raw["logprob_yes"].exp(), out.scores)
    assert 2 <= server.most_under_way <= 4


def test_a_judgement_does_not_depend_on_its_neighbours_and_order():
    def answer(asked):
        url = asked.body["messages"][0]["content"][0]["image_url"]["url"]
        grade = 1 + (sum(url.encode()) + len(question(asked))) % 5
        return said_text(f"Final Score: {grade}")

    with scripted(answer) as server:

        def score(order: list[int]) -> torch.Tensor:
            judge = JudgeReward("vlm", endpoint=server.url, mode="score")
            images, prompts = pictures(5)[order], ["p" * i for i in order]
            return judge.score(RewardBatch(images=images, prompts=prompts)).scores

        whole = score([0, 1, 2, 3, 4])
        assert torch.equal(score([4, 2, 0, 1, 3]), whole[[4, 2, 0, 1, 3]])
        assert torch.equal(score([1, 1, 3]), whole[[1, 1, 3]])


def test_a_malformed_reply_is_nan_and_counted_and_the_others_are_judged():
    def answer(asked):
        return said_text({"prompt 0": "Final Score: 4", "prompt 1": "No idea.", "prompt 2": "Final Score: 9",
                          "prompt 3": "", "prompt 4": None}[question(asked).split('"')[1]])  # fmt: skip

    with scripted(answer) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", network=FAST)
        out = judge.score(batch(5))
    assert out.valid.tolist() == [True, False, False, False, False]
    assert out.scores[0] == 0.75
    assert out.scores[1:].isnan().all()
    assert out.raw["native"].isnan().tolist() == [False, True, True, True, True]
    assert judge.failures == {"malformed": 4}


def test_a_reply_that_was_cut_off_is_not_read():
    with scripted(lambda asked: said_text("Final Score: 1", finish="length")) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", network=FAST)
        assert judge.score(batch(1)).scores.isnan().all()
    assert judge.failures == {"malformed": 1}


@pytest.mark.parametrize(
    ("trouble", "kind", "requests"),
    [
        (Said({}, status=500), "status 500", 3),
        (Said({}, status=429), "status 429", 3),
        (Said({"error": {"message": "content filter"}}, status=400), "status 400", 1),
        (Said({}, delay_seconds=0.4), "timeout", 1),
        (Said(b"<html>"), "nonsense", 1),
        (Said({"choices": []}), "nonsense", 1),
        (Said({"choices": [{"message": {"content": "Yes"}}]}), "nonsense", 1),
        (Said({"choices": [{"logprobs": {"content": [{"token": "Yes"}]}}]}), "nonsense", 1),
        (Said({"choices": [{"logprobs": {"content": []}}]}), "malformed", 1),
    ],
)
def test_one_sample_in_trouble_is_nan_and_counted_by_its_reason(trouble, kind, requests):
    def answer(asked):
        return trouble if '"prompt 1"' in question(asked) else said_tokens({"Yes": 0.5, "No": 0.5})

    network = Network(timeout_seconds=0.2, retries=2, first_delay_seconds=0.002)
    with scripted(answer) as server:
        judge = JudgeReward("vlm", endpoint=server.url, network=network)
        out = judge.score(batch(3))
    assert out.valid.tolist() == [True, False, True]
    assert out.scores.isnan().tolist() == [False, True, False]
    assert judge.failures == {kind: 1}
    assert len(server.asked) == 2 + requests


def test_a_passing_trouble_is_tried_again_and_leaves_no_trace():
    def answer(asked):
        return (
            Said({}, status=429, headers={"Retry-After": "0.01"}) if asked.index == 0 else said_text("Final Score: 3")
        )

    with scripted(answer) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", network=FAST)
        assert judge.score(batch(2)).scores.tolist() == [0.5, 0.5]
    assert judge.failures == {}
    assert len(server.asked) == 3


def test_an_endpoint_that_never_gave_a_usable_reply_is_an_error_with_its_reason():
    with scripted(lambda asked: Said({"error": {"message": "logprobs are not supported"}}, status=400)) as server:
        with pytest.raises(RunError, match=r"no usable reply: .*status 400: logprobs are not supported"):
            JudgeReward("vlm", endpoint=server.url, network=FAST).score(batch())
    with scripted(lambda asked: said_text("Yes")) as server:
        with pytest.raises(RunError, match="no usable reply: no logprobs, which mode 'yes_no' reads"):
            JudgeReward("vlm", endpoint=server.url, network=FAST).score(batch())


def test_an_endpoint_that_is_down_is_an_error():
    with pytest.raises(RunError, match=r"reward 'judge': .*no connection .* after 3 attempts"):
        JudgeReward("vlm", endpoint=closed_url(), network=FAST).score(batch())


def test_an_unknown_model_is_an_error_even_after_good_replies():
    def answer(asked):
        return (
            said_tokens({"Yes": 0.5, "No": 0.5}) if asked.index == 0 else Said({"error": "no model 'vlm'"}, status=404)
        )

    with scripted(answer) as server:
        judge = JudgeReward("vlm", endpoint=server.url, network=FAST)
        judge.score(batch(1))
        with pytest.raises(RunError, match="status 404: no model 'vlm'"):
            judge.score(batch(2))


def test_the_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)

    def answer(asked):
        if asked.headers["Authorization"] != f"Bearer {KEY}" or '"prompt 0"' not in question(asked):
            return Said({"error": {"message": f"wrong key {KEY}" + " x" * 120 + f" {KEY}"}}, status=401)
        return said_text(f"You sent {KEY[:0]}. Final Score: 5")

    with scripted(answer) as server:
        judge = JudgeReward(
            "vlm", endpoint=server.url, mode="score", key_variable="MY_KEY", cache=tmp_path, network=FAST
        )
        assert judge.score(batch(1)).scores.tolist() == [1.0]
        with pytest.raises(RunError, match=r"status 401: wrong key \*\*\* x .*; the key is read from MY_KEY") as caught:
            judge.score(batch(2))
    shown = [judge.version, str(caught.value), repr(vars(judge)), caplog.text, str(server.asked[0].body)]
    shown += [file.read_text() for file in tmp_path.rglob("*.json")]
    assert not any(KEY[:8] in text for text in shown)
    assert caught.value.__cause__ is None


def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-geheim\nX-Other: 1")
    with pytest.raises(InputError, match="environment variable OPENAI_API_KEY must hold a key") as caught:
        JudgeReward("vlm", endpoint=closed_url(), network=FAST).score(batch())
    assert "geheim" not in str(caught.value)


def test_raw_replies_are_in_the_debug_log(caplog):
    with scripted(lambda asked: said_text("What a picture! Final Score: 2")) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", network=FAST)
        with caplog.at_level(logging.DEBUG, "diffalign.rewards.judge"):
            judge.score(batch(1))
    assert "What a picture!" in caplog.text


def test_equal_questions_are_asked_once_and_failures_again(tmp_path):
    replies = iter(["nothing", "Final Score: 2", "Final Score: 3", "Final Score: 4"])
    with scripted(lambda asked: said_text(next(replies))) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", network=FAST)
        twice = RewardBatch(images=pictures(1).repeat(2, 1, 1, 1), prompts=["a", "a"])
        assert judge.score(twice).valid.tolist() == [False, False]
        assert judge.failures == {"malformed": 2}
        assert judge.score(twice).scores.tolist() == [0.25, 0.25]
        assert judge.score(twice).scores.tolist() == [0.25, 0.25]
        assert len(server.asked) == 2
        judge.score(RewardBatch(images=pictures(2)[1:], prompts=["a"]))
        judge.score(RewardBatch(images=pictures(1), prompts=["b"]))
    assert len(server.asked) == 4


def test_a_folder_keeps_judgements_for_the_next_run(tmp_path):
    with scripted(lambda asked: said_tokens({"Yes": 0.3, "No": 0.1})) as server:
        options = {"endpoint": server.url, "cache": tmp_path / "kept", "network": FAST}
        first = JudgeReward("vlm", **options).score(batch())
        assert len(server.asked) == 3
        again = JudgeReward("vlm", **options).score(batch())
        assert torch.equal(first.scores, again.scores)
        assert torch.equal(first.raw["logprob_no"], again.raw["logprob_no"])
        assert len(server.asked) == 3
        for other in ({"model": "vlm-2"}, {"template": "Is it {prompt}? Yes or no."}):
            before = len(server.asked)
            JudgeReward(**{"model": "vlm", **options, **other}).score(batch())
            assert len(server.asked) == before + 3
    files = sorted((tmp_path / "kept").rglob("*"))
    assert {file.suffix for file in files if file.is_file()} == {".json"}
    for file in files:
        if file.is_file():
            file.write_text("{")
    with pytest.raises(RunError, match=r"must be a kept judgement, got .*delete it"):
        JudgeReward("vlm", **options).score(batch())


def test_the_version_follows_all_that_makes_a_score():
    made = [
        JudgeReward("a"),
        JudgeReward("b"),
        JudgeReward("a", mode="score"),
        JudgeReward("a", mode="score", scale={"high": 10}),
        JudgeReward("a", mode="score", scale={"pattern": r"(\d)"}),
        JudgeReward("a", template="{prompt}?"),
    ]
    assert len({judge.version for judge in made}) == len(made)
    assert JudgeReward("a", endpoint="http://localhost:1").version == made[0].version


def test_a_template_without_a_place_is_asked_of_the_image_alone():
    with scripted(lambda asked: said_text("Final Score: 5")) as server:
        judge = JudgeReward("vlm", endpoint=server.url, mode="score", template="How fine? {", network=FAST)
        assert judge.requires == {"images"}
        assert judge.score(RewardBatch(images=pictures(1))).scores.tolist() == [1.0]
    assert question(server.asked[0]) == "How fine? {"


def test_a_prompt_with_braces_is_asked_as_it_is():
    with scripted(lambda asked: said_tokens({"Yes": 0.5, "No": 0.5})) as server:
        judge = JudgeReward("vlm", endpoint=server.url, template="{prompt}?", limit_key="max_tokens", network=FAST)
        judge.score(RewardBatch(images=pictures(1), prompts=["{prompt} {x} 100 %s \\1"]))
    assert question(server.asked[0]) == "{prompt} {x} 100 %s \\1?"
    assert server.asked[0].body["max_tokens"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "yes"}, "mode must be yes_no or score, got 'yes'"),
        ({"scale": {"high": 3}}, "scale must be left out in mode 'yes_no'"),
        ({"mode": "score", "scale": {"hihg": 3}}, "scale: unknown key 'hihg'; did you mean 'high'"),
        ({"mode": "score", "scale": {"pattern": 3}}, r"scale\.pattern must be"),
        ({"template": "Is it {promt}?"}, "with the place {prompt}, got .*did you mean 'prompt'"),
        ({"template": " "}, "must be a question"),
        ({"endpoint": "api.example.com/v1"}, "endpoint must be a URL"),
        ({"endpoint": "http://127.0.0.1/v1/chat/completions"}, "must end before /chat/completions"),
        ({"key_variable": "sk-secret"}, "must be the name of an environment variable, not a key"),
        ({"network": {"rate": 3}}, "network: unknown key 'rate'"),
        ({"colour": 1}, "must get options that its class takes"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        rewards.load("diffalign.rewards.judge:JudgeReward", **options)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("images", [pictures(2) * 255, pictures(2) * 2 - 1, pictures(2) * torch.nan])
def test_images_that_are_wrong_are_not_sent(images):
    with scripted(lambda asked: said_text("")) as server, pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        JudgeReward("vlm", endpoint=server.url).score(RewardBatch(images=images, prompts=["a", "b"]))
    assert server.asked == []


def test_an_empty_batch_asks_nobody():
    judge = JudgeReward("vlm", endpoint=closed_url())
    out = judge.score(RewardBatch(images=torch.zeros(0, 3, 4, 4), prompts=[]))
    assert out.scores.shape == (0,)
    assert json.dumps(sorted(out.raw)) == '["logprob_no", "logprob_yes"]'
