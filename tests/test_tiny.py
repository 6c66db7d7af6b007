"""The tiny world's pictures and its person: captions, renderer, splits, and an oracle that can be trusted."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.shipped import assets
from diffalign.tiny import build, oracle, pretrain, scenes
from diffalign.tiny.scenes import Carelessness, Scene, Thing


def draw(count: int, split: scenes.Split = "train", care: Carelessness | None = None, seed: int = 0):
    """(scene, caption, pixels in [0, 1]) of random scenes."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        scene = scenes.draw_scene(rng, split)
        out.append((scene, scenes.caption(scene, rng), np.asarray(scenes.render(scene, rng, care)) / 255))
    return out


def test_a_caption_reads_back_as_its_scene():
    for scene, text, _ in draw(300):
        found = scenes.parse(text)
        assert set(found.things) == set(scene.things)
        assert found.background == scene.background


def test_captions_are_worded_in_many_ways():
    scene = draw(1)[0][0]
    rng = np.random.default_rng(1)
    assert len({scenes.caption(scene, rng) for _ in range(60)}) >= 6


@pytest.mark.parametrize("text", ["a photo of a cat", "a large red circle", "white background", ""])
def test_a_text_that_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="must be a caption of the tiny world"):
        scenes.parse(text)


def test_held_out_combinations_never_occur_in_training():
    trained = {(t.shape, t.colour, t.place) for s, _, _ in draw(2000) for t in s.things}
    assert not any(scenes.is_held_out(Thing(a, b, "small", c)) for a, b, c in trained)
    assert all(any(scenes.is_held_out(t) for t in s.things) for s, _, _ in draw(200, "held_out"))


def test_the_same_seed_draws_the_same_picture():
    care = Carelessness(slip=0.3, place_jitter=3.0, size_jitter=0.2)
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(draw(5, care=care), draw(5, care=care), strict=True))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_of_one_size_covers_the_same_area(shape):
    picture = np.asarray(scenes.render(Scene((Thing(shape, "red", "large", "center"),), "white")), dtype=float)
    covered = (picture[..., 2] - 245).sum() / (40 - 245)
    assert covered == pytest.approx(np.pi * scenes.SIZES["large"] ** 2, rel=0.06)  # the pen is half a pixel wide


def test_the_oracle_gives_exact_renders_nearly_full_marks():
    totals = [oracle.judge(pixels, text)["total"] for _, text, pixels in draw(150)]
    assert np.mean(totals) > 0.98
    assert min(totals) > 0.9


CLEAN = Scene((Thing("circle", "red", "large", "top left"), Thing("star", "blue", "small", "bottom right")), "white")
TEXT = "a large red circle at the top left and a small blue star at the bottom right on a white background"


@pytest.mark.parametrize(
    ("attribute", "wrong"),
    [
        ("shape", Scene((Thing("square", "red", "large", "top left"), CLEAN.things[1]), "white")),
        ("colour", Scene((Thing("circle", "green", "large", "top left"), CLEAN.things[1]), "white")),
        ("size", Scene((Thing("circle", "red", "small", "top left"), CLEAN.things[1]), "white")),
        ("place", Scene((Thing("circle", "red", "large", "left"), CLEAN.things[1]), "white")),
        ("background", Scene(CLEAN.things, "black")),
        ("count", Scene((*CLEAN.things, Thing("cross", "green", "small", "bottom left")), "white")),
    ],
)
def test_the_oracle_sees_which_attribute_is_wrong(attribute, wrong):
    right, found = (oracle.judge(np.asarray(scenes.render(s)) / 255, TEXT) for s in (CLEAN, wrong))
    lost = {name: right[name] - found[name] for name in oracle.ATTRIBUTES}
    assert lost[attribute] > 0.25
    assert all(lost[name] < 0.05 for name in oracle.ATTRIBUTES if name != attribute)
    assert found["total"] < right["total"]


def test_a_missing_thing_scores_nothing():
    alone = Scene(CLEAN.things[:1], "white")
    scores = oracle.judge(np.asarray(scenes.render(alone)) / 255, TEXT)
    assert scores["colour"] == pytest.approx(0.5, abs=0.02)
    assert scores["count"] == 0.5
    empty = oracle.judge(np.ones((64, 64, 3)) * 245 / 255, TEXT)
    assert empty["shape"] == empty["colour"] == 0
    assert empty["background"] > 0.99


def test_the_order_in_which_a_caption_names_things_does_not_matter():
    other = "white background with a little blue star at the bottom right and a big red circle at the top left"
    pixels = np.asarray(scenes.render(CLEAN)) / 255
    assert oracle.judge(pixels, TEXT) == oracle.judge(pixels, other)


def test_more_carelessness_scores_less():
    totals = [
        np.mean(
            [oracle.judge(p, text)["total"] for _, text, p in draw(80, care=Carelessness(slip=s, place_jitter=8 * s))]
        )
        for s in (0.0, 0.2, 0.5)
    ]
    assert totals[0] > totals[1] + 0.1 > totals[2] + 0.2


def test_the_oracle_refuses_pictures_of_another_size():
    with pytest.raises(ValueError, match="image must have shape"):
        oracle.judge(np.zeros((32, 32, 3)), TEXT)


def test_both_base_models_can_be_made_again(request, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)  # a minute each, and the same numbers
    request.addfinalizer(lambda: torch.set_flush_denormal(False))  # pre-training sets it, for the whole process
    here = assets() / "tiny"
    clip, tokenizer = build.load_clip(here)
    pictures = pretrain.draw(64, seed=31, split="train", care=pretrain.PAINTER)
    latents = pretrain.encode(build.load_vae(here), pictures, pretrain.tokenize(tokenizer, pictures.captions))
    assert set(latents.things.tolist()) == {1, 2, 3}
    scheduler = DDIMScheduler.from_pretrained(here / "sd" / "scheduler")
    unet, text = pretrain.train_unet(latents, clip, scheduler, lesson=2, steps=2, batch_size=8)
    for mine, clips in zip(text.parameters(), clip.text_model.parameters(), strict=True):
        assert torch.equal(mine, clips)
    assert not any(p.requires_grad or p.grad_fn for p in unet.parameters())
    net, second = pretrain.train_transformer(latents, clip, steps=2, batch_size=8)
    assert net.proj_out.weight.abs().max() > 0  # it starts at zero
    assert not torch.equal(next(second.parameters()), next(clip.text_model.parameters()))
