"""The image front end: transformers, torchvision and Pillow as oracles, both roads against each other, the guards."""

import pytest
import torch
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards.frontend import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    FrontEnd,
    check_pixels,
    quantise,
)
from tests.pointwise import waves

CLIP = FrontEnd(224)


def noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def checkerboard(side: int) -> torch.Tensor:
    return ((torch.arange(side)[:, None] + torch.arange(side)) % 2 * 1.0).expand(1, 3, side, side)


def differences(front: FrontEnd, images: torch.Tensor, **options: bool) -> tuple[float, float]:
    """(mean, largest) difference of the two roads on the scale [0, 1]."""
    std = torch.tensor(front.std).view(1, 3, 1, 1)
    off = (front.differentiable(images, **options) - front.reference(images)).abs() * std
    return off.mean().item(), off.max().item()


# --- the reference road


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 201), (97, 160), (40, 64), (224, 225)])
@pytest.mark.parametrize(("edge", "crop", "resample"), [(64, 64, 3), (80, 64, 3), (64, 64, 2)])
def test_reference_is_what_the_processor_of_transformers_does(height, width, edge, crop, resample):
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop}, resample=resample
    )
    images = (noise(height, width) * 255).round() / 255
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(FrontEnd.of(processor).reference(images), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 201), (97, 161), (64, 67)])
def test_reference_is_what_torchvision_does(height, width):
    from PIL import Image
    from torchvision import transforms as tv

    images = (noise(height, width) * 255).round() / 255
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    bicubic = tv.InterpolationMode.BICUBIC
    chain = tv.Compose(
        [tv.Resize(64, bicubic), tv.CenterCrop(64), tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    front = FrontEnd(64, mean=IMAGENET_MEAN, std=IMAGENET_STD, odd_margin="even")
    torch.testing.assert_close(front.reference(images), chain(picture)[None], atol=1e-6, rtol=0)


def test_a_reference_on_floats_is_torchvisions_resize_of_a_float_tensor():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    images = noise(96, 96).round()
    expected = resize(images, [64, 64], InterpolationMode.BICUBIC, antialias=True)
    assert expected.max() > 1.01  # not clamped
    front = FrontEnd(64, "longest", mean=HALF, std=HALF, resized_as="floats")
    torch.testing.assert_close(front.reference(images) * 0.5 + 0.5, expected, atol=1e-6, rtol=0)


def test_no_images_give_no_pixels():
    assert CLIP.reference(torch.zeros(0, 3, 40, 40)).shape == (0, 3, 224, 224)


# --- the two roads


@pytest.mark.parametrize("front", [CLIP, FrontEnd(224, "longest", resized_as="floats"), FrontEnd(224, "stretch")])
def test_both_roads_agree_on_a_smooth_picture(front):
    mean, largest = differences(front, waves(512, 512))
    assert mean < 0.0012  # rewards.md 17, item 4, asks for 0.002
    assert largest < 0.0054


def test_both_roads_agree_on_noise():
    mean, largest = differences(CLIP, noise(512, 512))
    assert mean < 0.0012
    assert largest < 0.016


@pytest.mark.parametrize("images", [waves(512, 512), noise(512, 512)], ids=["smooth", "noise"])
def test_rounding_straight_through_comes_nearer_to_the_reference(images):
    assert differences(CLIP, images, quantised=True)[0] < 0.6 * differences(CLIP, images)[0]
    exact = FrontEnd(224, "longest", resized_as="floats")
    assert differences(exact, images, quantised=True) == (0.0, 0.0) < differences(exact, images)


def test_other_filters_miss_the_bound_on_a_fine_checkerboard():
    images = checkerboard(512)[..., :400]
    reference = CLIP.reference(images)
    assert differences(CLIP, images)[0] < 0.002
    assert differences(FrontEnd(224, filter="bilinear"), images)[0] < 0.002  # against its own reference
    std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    for options in ({"mode": "bicubic"}, {"mode": "bilinear"}, {"mode": "bicubic", "antialias": False}):
        blunt = F.interpolate(images, CLIP._resized(512, 400), align_corners=False, **options)
        assert ((CLIP._finish(blunt) - reference) * std).abs().mean() > 0.002
    detail = noise(512, 512)
    bilinear = FrontEnd(224, filter="bilinear").differentiable(detail)
    assert ((bilinear - CLIP.reference(detail)) * std).abs().mean() > 0.002


def test_quantise_has_the_value_of_the_8_bit_image_and_the_gradient_of_the_unrounded():
    images = noise(8, 8).requires_grad_()
    rounded = quantise(images)
    assert torch.equal(rounded, (images.detach() * 255).round() / 255)
    (rounded**2).sum().backward()
    torch.testing.assert_close(images.grad, 2 * rounded.detach())


@pytest.mark.parametrize("quantised", [False, True])
def test_sharp_edges_do_not_overshoot(quantised):
    front, edges = FrontEnd(64), (torch.arange(90) // 9 % 2 * 1.0).expand(1, 3, 90, 90)
    pixels = front.differentiable(edges, quantised=quantised)
    assert (pixels.min().item(), pixels.max().item()) == pytest.approx(front.range)
    assert differences(front, edges, quantised=quantised)[0] < 0.002


@pytest.mark.parametrize("resize", ["shortest", "longest", "stretch"])
@pytest.mark.parametrize("quantised", [False, True])
def test_gradient_reaches_every_pixel_that_is_not_cropped(resize, quantised):
    images = waves(48, 48).requires_grad_()
    FrontEnd(32, resize).differentiable(images, quantised=quantised).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad > 0).all()


def test_differentiable_is_linear_where_nothing_is_clamped():
    images, grey, step = waves(64, 48), torch.full((1, 3, 64, 48), 0.5), 0.05 * noise(64, 48)
    bright = CLIP.differentiable(images + step) - CLIP.differentiable(images)
    plain = CLIP.differentiable(grey + step) - CLIP.differentiable(grey)
    torch.testing.assert_close(bright, plain, atol=1e-5, rtol=0)


# --- letterbox


@pytest.mark.parametrize("road", ["reference", "differentiable"])
@pytest.mark.parametrize("resized_as", ["bytes", "floats"])
def test_a_letterbox_keeps_all_content_and_pads_with_black(road, resized_as):
    front = FrontEnd(32, "longest", resized_as=resized_as)
    images = torch.zeros(1, 3, 32, 64)
    images[:, 0, :, :2], images[:, 1, :, -2:] = 1, 1  # red at the left end, green at the right
    pixels = getattr(front, road)(images)
    black = (0 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    for rows in (pixels[0, :, :8], pixels[0, :, -8:]):
        torch.testing.assert_close(rows, black.view(3, 1, 1).expand_as(rows))
    units = pixels[0] * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert (units[0, 8:24, 0] > 0.8).all()
    assert (units[1, 8:24, -1] > 0.8).all()


def test_an_odd_padding_has_its_greater_half_below_and_right():
    pixels = FrontEnd(5, "longest", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).reference(torch.ones(1, 3, 2, 5))
    assert pixels[0, 0, :, 0].tolist() == [0, 1, 1, 0, 0]


def test_a_square_image_is_letterboxed_as_it_is_cropped():
    images = waves(96, 96)
    torch.testing.assert_close(FrontEnd(64, "longest").reference(images), FrontEnd(64).reference(images))


# --- constants and guards


def test_black_and_white_are_the_extremes():
    low, high = CLIP.range
    assert (low, high) == (pytest.approx(-1.792263, abs=1e-6), pytest.approx(2.145897, abs=1e-6))  # rewards.md 1.1
    both = CLIP.reference(torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]))
    assert both.min().item() == pytest.approx(low)
    assert both.max().item() == pytest.approx(high)
    check_pixels(both, CLIP)


@pytest.mark.parametrize("wrong", [lambda i: 2 * i - 1, lambda i: 255 * i, lambda i: i * torch.nan])
def test_wrong_ranges_are_refused(wrong):
    images = wrong(waves(64, 64))
    pixels = (images - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    for front in (CLIP, FrontEnd(64, resized_as="floats")):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            check_pixels(pixels, front)


def test_images_that_were_rescaled_twice_are_refused():
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    front, images = FrontEnd.of(processor), waves(64, 64, count=2)
    doubled = processor(list(images.numpy()), return_tensors="pt", do_resize=False)["pixel_values"]
    low, high = front.range
    assert low <= doubled.min()
    assert doubled.max() <= high  # the range alone does not tell
    with pytest.raises(InputError, match="divided by 255 twice"):
        check_pixels(doubled, front)
    with pytest.raises(InputError, match="divided by 255 twice"):
        check_pixels(front.reference(images / 255), front)


def test_real_pictures_black_ones_and_filters_that_overshoot_pass():
    for images in (waves(64, 64), torch.zeros(2, 3, 64, 64), checkerboard(64)):
        for front in (FrontEnd(32), FrontEnd(32, "longest", resized_as="floats")):
            check_pixels(front.reference(images), front)
            check_pixels(front.differentiable(images), front)
    edge = (torch.arange(90) // 9 % 2 * 1.0).expand(1, 3, 90, 90)
    sharp = FrontEnd(64, resized_as="floats")
    assert sharp.reference(edge).max() > sharp.range[1]
    check_pixels(sharp.reference(edge), sharp)


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"resample": 0},
        {"do_center_crop": False},
        {"size": {"height": 32, "width": 48}},
        {"crop_size": {"height": 16, "width": 32}},
        {"crop_size": {"height": 64, "width": 64}},
    ],
)
def test_a_processor_that_does_something_else_is_refused(options):
    from transformers import CLIPImageProcessorPil

    usual = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    with pytest.raises(InputError):
        FrontEnd.of(CLIPImageProcessorPil(**{**usual, **options}))


def test_processors_that_stretch_are_read():
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 48, "width": 48}, resample=3)
    assert FrontEnd.of(processor) == FrontEnd(48, "stretch", mean=HALF, std=HALF)
