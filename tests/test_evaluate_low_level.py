"""Statistics of pixels on images whose numbers are known by hand, and Pillow as oracle for colour spaces."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluate import low_level


def flat(*colours: tuple[float, float, float], size: int = 8) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, size, size).contiguous()


def noise(seed: int = 0, n: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def checkerboard(low: float = 0.0, high: float = 1.0, size: int = 8) -> torch.Tensor:
    board = (torch.arange(size)[:, None] + torch.arange(size)[None]) % 2
    return (low + (high - low) * board).expand(1, 3, size, size)


def test_saturation_of_known_colours():
    images = flat((0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0.8, 0.4, 0.6), (0.2, 0.1, 0.1))
    assert low_level.saturation(images).tolist() == pytest.approx([0, 0, 0, 1, 0.5, 0.5])


def test_saturation_agrees_with_pillows_hsv():
    images = (noise() * 255).round() / 255
    for image, ours in zip(images, low_level.saturation(images), strict=True):
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        theirs = np.asarray(picture.convert("HSV"), dtype=np.float64)[..., 1].mean() / 255
        assert ours.item() == pytest.approx(theirs, abs=0.5 / 255)  # Pillow cuts to whole numbers


def test_contrast_of_a_flat_image_is_zero_and_of_a_black_and_white_board_one_half():
    assert low_level.contrast(flat((0.3, 0.9, 0.1))).item() == pytest.approx(0, abs=1e-6)
    assert low_level.contrast(checkerboard()).item() == pytest.approx(0.5)
    assert low_level.contrast(checkerboard(0.25, 0.75)).item() == pytest.approx(0.25)


def test_luma_is_pillows_gray():
    image = (noise(n=1) * 255).round() / 255
    picture = Image.fromarray((image[0] * 255).byte().permute(1, 2, 0).numpy()).convert("L")
    difference = low_level.luma(image)[0].numpy() * 255 - np.asarray(picture, dtype=np.float64)
    assert np.abs(difference).max() <= 0.51  # Pillow rounds


def test_clipped_counts_pixels_with_a_channel_at_either_end():
    images = flat((0.5, 0.5, 0.5), (1, 0.5, 0.5), (0.5, 0, 0.5), (0, 0, 0), (0.0015, 0.5, 0.5), (0.0025, 0.5, 0.5))
    assert low_level.clipped(images).tolist() == [0, 1, 1, 1, 1, 0]
    images[0, 0, 0, :4] = 1.0
    assert low_level.clipped(images[:1]).item() == pytest.approx(4 / 64)


def test_detail_is_zero_on_a_ramp_and_known_on_a_board():
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert low_level.detail(ramp).item() == pytest.approx(0, abs=1e-10)
    # every inner pixel's neighbours differ from it by 1: the Laplacian is +4 or -4, half of each
    assert low_level.detail(checkerboard()).item() == pytest.approx(16, rel=1e-5)
    assert low_level.detail(checkerboard(0.25, 0.75)).item() == pytest.approx(4, rel=1e-5)
    assert low_level.detail(noise(size=2)).tolist() == [0, 0, 0]


def test_jpeg_sizes_are_ordered_and_in_thousands_of_bytes():
    smooth = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64)
    constant, board = flat((0.5, 0.5, 0.5), size=64), noise(n=1, size=64)
    sizes = [low_level.jpeg_kb(image).item() for image in (constant, smooth, board)]
    assert sizes == sorted(sizes)
    assert low_level.jpeg_kb(board, quality=50).item() < sizes[2]
    held = io.BytesIO()
    Image.fromarray((board[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(held, "JPEG", quality=95)
    assert sizes[2] == pytest.approx(len(held.getvalue()) / 1000)


def test_statistics_do_not_depend_on_the_other_images():
    images = noise(n=4)
    whole = low_level.low_level(images)
    for row in range(4):
        alone = low_level.low_level(images[row : row + 1])
        for name, values in whole.items():
            torch.testing.assert_close(alone[name][0], values[row])
