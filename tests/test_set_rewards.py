"""Set rewards end to end: encoders, streams, reference files, processes, credit, and what they refuse."""

import json
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import rewards
from diffalign.errors import InputError, RunError
from diffalign.evaluate.score import write_image
from diffalign.rewards.fad import FADReward, fad_infinity
from diffalign.rewards.frechet import FrechetReward
from diffalign.rewards.gaussians import Gaussian, frechet_distance
from diffalign.rewards.kernels import CMMDReward, KADReward, KIDReward
from diffalign.rewards.mmd import cmmd, kad, kid
from diffalign.rewards.statistics import Moments
from diffalign.rewards.vendi import VendiReward, vendi
from diffalign.types import Embedded, RewardBatch, SetReward
from tests.sets import PixelEncoder, SampleEncoder, batches, pictures

DISTANCES = {"frechet": FrechetReward, "kid": KIDReward, "cmmd": CMMDReward, "kad": KADReward}
PURE = {"frechet": frechet_distance, "kid": kid, "cmmd": cmmd, "kad": kad}
REFERENCE, SET = pictures(60, 1), pictures(40, 2, shift=0.1)


def fitted(name: str, encoder: object = None, images: torch.Tensor = REFERENCE, **options: object) -> SetReward:
    reward = DISTANCES[name](encoder or PixelEncoder(), **options)
    reward.fit_reference(batches(images))
    return reward


def rows_of(images: torch.Tensor, width: int = 6) -> torch.Tensor:
    return images.flatten(1)[:, :width]


def clips(n: int, seed: int, frames: int = 4) -> RewardBatch:
    rng = torch.Generator().manual_seed(seed)
    audio = [torch.rand(1, 6 * (frames + i % 2) + 3, generator=rng) - 0.5 for i in range(n)]
    return RewardBatch(audio=audio, sample_rate=16000)


# --- numbers


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("count", "width"), [(40, 6), (5, 20)], ids=["N > D", "N < D"])
def test_a_set_reward_is_minus_the_distance_of_its_embeddings(name, count, width):
    reward = fitted(name, PixelEncoder(width))
    out = reward.score_set(batches(SET[:count]))
    expected = PURE[name](rows_of(SET[:count], width), rows_of(REFERENCE, width)).item()
    key = "distance" if name == "frechet" else name
    assert out.samples == count
    if name != "kid":  # its number is of subsets
        assert out.score == pytest.approx(-expected, rel=1e-6)
    assert out.raw[key] == pytest.approx(-out.score)
    assert isinstance(reward, SetReward)
    assert (reward.modality, reward.requires, reward.needs_reference) == ("image", {"images"}, True)
    assert reward.range[0] <= out.score <= reward.range[1]


def test_kid_of_a_small_set_averages_subsets_of_the_reference():
    reward = fitted("kid", subsets=400)
    out = reward.score_set(batches(SET))
    assert out.score == pytest.approx(-kid(rows_of(SET), rows_of(REFERENCE)).item(), abs=out.raw["kid_std"] / 4)
    assert out.score != reward.score_set(batches(SET[:39])).score


@pytest.mark.parametrize("name", [*DISTANCES, "vendi"])
@pytest.mark.parametrize("frames", [1, 3])
def test_numbers_do_not_depend_on_the_size_or_order_of_batches(name, frames):
    encoder = PixelEncoder(6, frames)
    reward = VendiReward(encoder) if name == "vendi" else fitted(name, encoder)
    whole = reward.score_set([RewardBatch(images=SET)])
    for size in (1, 7, 40):
        out = reward.score_set(iter(batches(SET.flip(0), size)))
        assert out.score == pytest.approx(whole.score, rel=1e-9)
        assert out.samples == 40


def test_terms_of_the_frechet_distance_are_logged():
    raw = fitted("frechet").score_set(batches(SET)).raw
    total = raw["mean_term"] + raw["trace"] + raw["trace_reference"] - 2 * raw["nuclear_norm"]
    assert raw["distance"] == pytest.approx(total)
    assert min(raw.values()) > 0


def test_vendi_of_prompts_is_the_mean_over_prompts():
    groups = [0, 1, 2, 0] * 10
    out = VendiReward(PixelEncoder()).score_set(batches(SET, 7, groups))
    ids = torch.tensor(groups)
    expected = torch.stack([vendi(rows_of(SET[ids == g])) for g in range(3)]).mean().item()
    assert out.score == pytest.approx(expected, rel=1e-9)
    assert out.raw["prompts"] == 3
    assert out.raw["vendi_set"] == pytest.approx(vendi(rows_of(SET)).item(), rel=1e-6)
    assert VendiReward(PixelEncoder(), q=2).score_set(batches(SET)).score == pytest.approx(
        vendi(rows_of(SET), 2).item()
    )


@pytest.mark.parametrize("name", [*DISTANCES, "vendi"])
@pytest.mark.parametrize("count", [4, 20])
def test_the_differentiable_score_is_the_score_with_its_slope(name, count):
    reward = VendiReward(PixelEncoder(8)) if name == "vendi" else fitted(name, PixelEncoder(8))
    images = SET[:count].clone().requires_grad_()
    score = reward.differentiable_score(RewardBatch(images=images))
    score.backward()
    if name != "kid":
        assert score.item() == pytest.approx(reward.score_set(batches(SET[:count])).score, rel=1e-5)
    stepped = SET[:count] + 1e-2 * images.grad / images.grad.norm()
    gained = reward.differentiable_score(RewardBatch(images=stepped)).item() - score.item()
    assert gained == pytest.approx(1e-2 * images.grad.norm().item(), rel=0.15)


# --- credit


@pytest.mark.parametrize("name", [*DISTANCES, "vendi"])
def test_leaving_one_out_is_the_change_of_the_score(name):
    reward = VendiReward(PixelEncoder()) if name == "vendi" else fitted(name)
    images = SET[:12]
    credit = reward.credit(RewardBatch(images=images))
    whole = reward.differentiable_score(RewardBatch(images=images)).item()
    for i in (0, 5, 11):
        rest = torch.cat([images[:i], images[i + 1 :]])
        without = reward.differentiable_score(RewardBatch(images=rest)).item()
        assert credit[i].item() == pytest.approx(whole - without, abs=2e-5)
    assert credit.dtype == torch.float32
    first = reward.credit(RewardBatch(images=images), "influence")
    assert torch.corrcoef(torch.stack([credit, first]))[0, 1] > 0.9


@pytest.mark.parametrize("name", [*DISTANCES, "vendi"])
def test_a_sample_alone_is_scored_as_a_set(name):
    encoder = PixelEncoder(6, frames=4)
    reward = VendiReward(encoder) if name == "vendi" else fitted(name, encoder)
    credit = reward.credit(RewardBatch(images=SET[:3]), "self")
    for i in range(3):
        alone = reward.differentiable_score(RewardBatch(images=SET[i : i + 1])).item()
        assert credit[i].item() == pytest.approx(alone, rel=1e-5)
    flat = VendiReward(PixelEncoder()) if name == "vendi" else fitted(name)
    if name == "cmmd":
        assert flat.credit(RewardBatch(images=SET[:3]), "self").shape == (3,)
        return
    with pytest.raises(InputError, match="at least 2 embeddings to be a set of its own"):
        flat.credit(RewardBatch(images=SET[:3]), "self")


@pytest.mark.parametrize("name", DISTANCES)
def test_a_new_reference_leaves_nothing_of_the_old_one(name):
    encoder, batch = PixelEncoder(6, frames=4), RewardBatch(images=SET[:3])
    reward = fitted(name, encoder)
    reward.credit(batch, "self")
    reward.fit_reference(batches(SET[20:]))
    torch.testing.assert_close(reward.credit(batch, "self"), fitted(name, encoder, SET[20:]).credit(batch, "self"))


def test_credit_of_vendi_stays_within_a_prompt():
    reward = VendiReward(PixelEncoder())
    groups = [5, 2, 5, 2, 5]
    credit = reward.credit(RewardBatch(images=SET[:5], group_ids=groups))
    whole = reward.score_set([RewardBatch(images=SET[:5], group_ids=groups)]).score
    kept = [0, 1, 3, 4]
    rest = reward.score_set([RewardBatch(images=SET[kept], group_ids=[groups[i] for i in kept])]).score
    assert credit[2].item() == pytest.approx(whole - rest, abs=1e-6)


# --- reference files


@pytest.mark.parametrize("name", DISTANCES)
def test_a_saved_reference_scores_as_the_fitted_one(name, tmp_path):
    reward = fitted(name)
    file = tmp_path / "new folder" / "reference.safetensors"
    reward.save_reference(file)
    other = DISTANCES[name](PixelEncoder())
    other.load_reference(file)
    assert other.score_set(batches(SET)).score == pytest.approx(reward.score_set(batches(SET)).score, rel=1e-9)
    assert [f.name for f in file.parent.iterdir()] == ["reference.safetensors"]
    torch.testing.assert_close(
        other.credit(RewardBatch(images=SET[:6])), reward.credit(RewardBatch(images=SET[:6])), rtol=1e-6, atol=1e-7
    )


def test_frechet_and_kernel_rewards_share_references_among_themselves(tmp_path):
    fitted("frechet").save_reference(tmp_path / "gaussian.safetensors")
    fitted("kid").save_reference(tmp_path / "rows.safetensors")
    for name in ("cmmd", "kad"):
        DISTANCES[name](PixelEncoder()).load_reference(tmp_path / "rows.safetensors")
    with pytest.raises(InputError, match=r"must have kind 'gaussian' .* got 'rows'"):
        FrechetReward(PixelEncoder()).load_reference(tmp_path / "rows.safetensors")


@pytest.mark.parametrize("name", ["frechet", "kid"])
def test_a_reference_of_another_encoder_is_refused(name, tmp_path):
    fitted(name).save_reference(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match=r"must have encoder 'pixels, 2' .* got 'pixels, 1'"):
        DISTANCES[name](PixelEncoder(name="pixels, 2")).load_reference(tmp_path / "r.safetensors")
    other = DISTANCES[name](PixelEncoder(5))
    other.load_reference(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="reference of width 5, got 6"):
        other.score_set(batches(SET))


def test_a_damaged_reference_is_refused(tmp_path):
    file = tmp_path / "r.safetensors"
    fitted("frechet").save_reference(file)
    whole = file.read_bytes()
    reward = FrechetReward(PixelEncoder())
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="readable safetensors file"):
        reward.load_reference(file)
    file.write_bytes(whole[:-3] + b"\x00\x00\x01")
    with pytest.raises(InputError, match="it is damaged"):
        reward.load_reference(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="readable safetensors file"):
        reward.load_reference(file)
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        reward.load_reference(tmp_path / "gone.safetensors")
    save_file({"mean": torch.zeros(6)}, file)
    with pytest.raises(InputError, match=r"must have diffalign 'set reference' .* got None"):
        reward.load_reference(file)
    assert reward.reference is None


# --- a real encoder


def test_clip_embeddings_from_fit_to_load(tmp_path):
    images = pictures(9, 3, side=64)
    for name in ("frechet", "kid", "cmmd", "vendi"):
        reward = rewards.load_set(f"{name}:clip:tiny-clip")
        assert reward.version.startswith("tiny-clip")
        if name != "vendi":
            reward.fit_reference(batches(pictures(12, 4, shift=0.2, side=64), 5))
            reward.save_reference(tmp_path / name)
            again = rewards.load_set(name, encoder="clip:tiny-clip")
            again.load_reference(tmp_path / name)
            assert again.score_set(batches(images, 4)).score == pytest.approx(
                reward.score_set(batches(images, 4)).score, rel=1e-6
            )
        assert reward.credit(RewardBatch(images=images)).isfinite().all()
        pixels = images.clone().requires_grad_()
        reward.differentiable_score(RewardBatch(images=pixels)).backward()
        assert pixels.grad.isfinite().all()
        assert pixels.grad.abs().max() > 0


def test_making_a_set_reward_reads_no_weights():
    for name in ("frechet", "kid", "vendi"):
        assert rewards.load_set(f"{name}:clip:no/such/folder").version.startswith("no/such/folder")
    assert rewards.load_set("cmmd").version == "openai/clip-vit-large-patch14-336, sigma 10, x1000"
    given = rewards.load_set("frechet", encoder="clip", encoder_options={"revision": "abc"}, device="cpu")
    assert given.version == "openai/clip-vit-large-patch14@abc"
    assert given.to("cpu") is given


# --- audio


def test_fad_is_the_frechet_distance_of_all_frames_of_all_clips():
    reward = FADReward(SampleEncoder())
    reward.fit_reference([clips(20, 1), clips(11, 2)])
    out = reward.score_set([clips(8, 3), clips(5, 4)])
    encoder = SampleEncoder()
    x, y = (
        torch.cat([encoder.embed(c).rows for c in cs])
        for cs in ([clips(8, 3), clips(5, 4)], [clips(20, 1), clips(11, 2)])
    )
    assert out.score == pytest.approx(-frechet_distance(x, y).item(), rel=1e-6)
    assert (out.samples, reward.requires, reward.version) == (13, {"audio"}, "samples, 1")


def test_fad_of_single_clips_and_of_endless_sets(tmp_path):
    reward = FADReward(SampleEncoder())
    reward.fit_reference([clips(40, 1)])
    reward.save_reference(tmp_path / "r")
    reward.load_reference(tmp_path / "r")
    batch = clips(6, 3)
    embedded = SampleEncoder().embed(batch)
    y = SampleEncoder().embed(clips(40, 1)).rows
    expected = [frechet_distance(x, y, route="rows").item() for x in embedded.rows.split(embedded.counts)]
    assert reward.per_clip(batch).tolist() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(reward.credit(batch, "self"), -reward.per_clip(batch))
    assert reward.credit(batch).shape == reward.credit(batch, "influence").shape == (6,)
    assert reward.differentiable_score(batch).item() == pytest.approx(reward.score_set([batch]).score, rel=1e-6)
    found = reward.infinity([clips(30, 5), clips(10, 6)], points=5, shuffles=2)
    whole = Embedded(
        rows=torch.cat([SampleEncoder().embed(c).rows for c in (clips(30, 5), clips(10, 6))]),
        counts=SampleEncoder().embed(clips(30, 5)).counts + SampleEncoder().embed(clips(10, 6)).counts,
    )
    assert found.value == pytest.approx(fad_infinity(whole, Gaussian.of(y), points=5, shuffles=2).value, abs=1e-7)
    assert reward.to("cpu") is reward
    with pytest.raises(InputError, match="at least 2 embeddings"):
        reward.per_clip(clips(3, 1, frames=1))


def test_fad_speaks_under_its_own_name():
    with pytest.raises(InputError, match="'fad' must get a reference set first"):
        FADReward(SampleEncoder()).score_set([clips(6, 3)])


def test_fad_takes_encoders_of_audio_only():
    with pytest.raises(InputError, match="must get an encoder of audio, got 'pixels, 1'; use 'frechet'"):
        FADReward(PixelEncoder())


# --- processes


def test_processes_with_shares_of_a_set_get_the_number_of_the_whole():
    """Two threads as processes: rows are exchanged at a barrier."""
    barrier, held = threading.Barrier(2), [None, None]

    def process(me: int, results: list) -> None:
        def gather(rows: torch.Tensor) -> torch.Tensor:
            held[me] = rows
            barrier.wait(timeout=20)
            joined = torch.cat(list(held))
            barrier.wait(timeout=20)
            return joined

        for name, images in [(n, i) for n in (*DISTANCES, "vendi") for i in (SET[:20], SET[:5], SET[:2])]:
            share = images[:2] if me == 0 else images[2:]
            reward = (
                VendiReward(PixelEncoder(7), gather=gather)
                if name == "vendi"
                else DISTANCES[name](PixelEncoder(7), gather=gather)
            )
            if name != "vendi":
                reward.fit_reference(batches(REFERENCE[me::2]))
            results.append(reward.score_set(batches(share)))

    outcomes: list[list] = [[], []]
    threads = [threading.Thread(target=process, args=(me, outcomes[me])) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes[0]) == len(outcomes[1]) == 15
    cases = iter(zip(*outcomes, strict=True))
    for name in (*DISTANCES, "vendi"):
        for images in (SET[:20], SET[:5], SET[:2]):
            alone = VendiReward(PixelEncoder(7)) if name == "vendi" else fitted(name, PixelEncoder(7))
            expected = alone.score_set(batches(images))
            for out in next(cases):
                assert out.score == pytest.approx(expected.score, rel=1e-9, abs=1e-12)
                assert out.samples == len(images)


@pytest.mark.slow
def test_two_processes_of_gloo_get_the_number_of_one(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            import torch
            from torch import distributed
            import diffalign
            from diffalign.rewards.statistics import gather_rows
            from tests.sets import PixelEncoder, batches
            from tests.test_set_rewards import DISTANCES, REFERENCE, SET, VendiReward

            torch.set_num_threads(1)
            distributed.init_process_group("gloo")
            me, of = distributed.get_rank(), distributed.get_world_size()
            found = {}
            for name in (*DISTANCES, "vendi"):
                for count in (2, 5, 40):
                    kind = VendiReward if name == "vendi" else DISTANCES[name]
                    reward = kind(PixelEncoder(7), gather=gather_rows)
                    if name != "vendi":
                        reward.fit_reference(batches(REFERENCE[me::of]))
                    groups = [0, 0, 1, 1, 1] * 8
                    mine = slice(0, count) if of == 1 else slice(0, 2) if me == 0 else slice(2, count)
                    out = reward.score_set(batches(SET[mine], 7, groups[mine]))
                    found[f"{name} {count}"] = [out.score, out.samples]
            print(json.dumps(found)) if me == 0 else None
            distributed.destroy_process_group()
            """
        )
    )
    found = []
    for processes in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)]
        result = subprocess.run(launcher, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(json.loads(result.stdout.strip().splitlines()[-1]))
    assert found[0].keys() == found[1].keys()
    for key, (score, samples) in found[0].items():
        assert found[1][key] == [pytest.approx(score, rel=1e-9, abs=1e-12), samples]


# --- bad input


@pytest.mark.parametrize("name", [*DISTANCES, "vendi"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_image_or_one_is_no_set(name, count):
    reward = VendiReward(PixelEncoder()) if name == "vendi" else fitted(name)
    message = f"'{name}' must get a set of at least 2 embeddings, got {count}"
    with pytest.raises(InputError, match=message):
        reward.score_set(batches(SET[:count]))
    with pytest.raises(InputError, match="at least"):
        reward.credit(RewardBatch(images=SET[:count]))
    if name != "vendi":
        with pytest.raises(InputError, match=message):
            reward.fit_reference(batches(SET[:count]))
    with pytest.raises(InputError, match=message):
        reward.differentiable_score(RewardBatch(images=SET[:count]))


@pytest.mark.parametrize("name", DISTANCES)
def test_scoring_before_there_is_a_reference_is_refused(name, tmp_path):
    reward = DISTANCES[name](PixelEncoder())
    for use in (
        lambda: reward.score_set(batches(SET)),
        lambda: reward.credit(RewardBatch(images=SET)),
        lambda: reward.differentiable_score(RewardBatch(images=SET)),
        lambda: reward.save_reference(tmp_path / "r"),
    ):
        with pytest.raises(InputError, match=f"'{name}' must get a reference set first"):
            use()


def test_vendi_has_no_reference_and_no_single_samples(tmp_path):
    reward = VendiReward(PixelEncoder())
    assert not reward.needs_reference
    for use in (reward.fit_reference, reward.save_reference, reward.load_reference):
        with pytest.raises(InputError, match="without a reference set"):
            use([] if use == reward.fit_reference else tmp_path / "r")
    with pytest.raises(InputError, match=r"at least 2 samples, got 1 for group_ids \[3\]"):
        reward.score_set([RewardBatch(images=SET[:3], group_ids=[1, 1, 3])])
    with pytest.raises(InputError, match="with every batch or with none, got them for 2 of 4"):
        reward.score_set([RewardBatch(images=SET[:2], group_ids=[1, 1]), RewardBatch(images=SET[:2])])


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="'frechet' must get an encoder by name"):
        FrechetReward(PixelEncoder(), encoder_options={"revision": "x"})
    with pytest.raises(InputError, match="subsets must be at least 1 of size 2"):
        KIDReward(PixelEncoder(), subsets=0)
    with pytest.raises(InputError, match="bandwidth must be above 0"):
        KADReward(PixelEncoder(), bandwidth=0.0)
    with pytest.raises(InputError, match="q must be at least 0"):
        VendiReward(PixelEncoder(), q=-1.0)
    with pytest.raises(InputError, match="credit must be one of loo, influence, self, got 'lou'; did you mean 'loo'"):
        fitted("frechet").credit(RewardBatch(images=SET), "lou")


def test_an_encoder_that_returns_nan_is_named_with_its_samples():
    class Broken(PixelEncoder):
        def embed(self, batch):
            found = super().embed(batch)
            rows = found.rows.clone()
            rows[3] = torch.nan
            return replace(found, rows=rows)

    with pytest.raises(RunError, match=r"encoder 'pixels, 1' returned NaN or infinity for samples \[1\] of 7"):
        VendiReward(Broken(6, frames=2)).score_set(batches(SET))


def test_what_is_written_can_be_read_by_others(tmp_path):
    fitted("frechet").save_reference(tmp_path / "r.safetensors")
    held = load_file(tmp_path / "r.safetensors")
    moments = Moments.of(rows_of(REFERENCE))
    torch.testing.assert_close(held["factor"] @ held["factor"].T, moments.covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(held["mean"], moments.mean, rtol=1e-12, atol=0)


def test_a_reference_set_is_kept_by_one_command_and_serves_an_evaluation(tmp_path):
    from typer.testing import CliRunner

    from diffalign import cli, evaluate

    rng, texts = torch.Generator().manual_seed(0), ["a scene", "another scene", "a third"]
    for name, count in (("reference", 6), ("base", 3), ("arm", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            write_image(torch.rand(3, 32, 32, generator=rng), tmp_path / name / f"{i:05d}-0.png")
    spec, file = "frechet:clip:tiny-clip", tmp_path / "reference.safetensors"
    asked = ["reference", str(tmp_path / "reference"), "--reward", spec, "--out", str(file), "--device", "cpu"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    assert "6 images" in done.output
    results = evaluate(
        str(tmp_path / "base"),
        str(tmp_path / "arm"),
        texts,
        rewards=[spec, "clip:tiny-clip"],
        output=tmp_path / "out",
        images_per_prompt=1,
        device="cpu",
        reference=str(file),
    )
    assert [(one.arm, one.samples) for one in results.sets] == [("base", 3), ("aligned", 3)]
    assert all(one.score < 0 < one.raw["mean_term"] for one in results.sets)
    for wrong, message in (
        (["--reward", "vendi:clip:tiny-clip", "--out", str(file)], "needs a reference set"),
        (["--reward", spec, "--out", str(tmp_path / "x.pt")], r"\.safetensors"),
    ):
        refused = CliRunner().invoke(cli.app, ["reference", str(tmp_path / "reference"), *wrong])
        assert re.search(message, str(refused.exception))
