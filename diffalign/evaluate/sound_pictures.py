"""Pictures of clips: the waveform above its log-mel bands, and sheets of many.

All pictures have one scale: full scale is the height of a waveform, and a full-scale tone has the darkest colour, 70 dB
below it the lightest. So a quiet clip looks quiet beside a loud one.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign.errors import InputError
from diffalign.evaluate.charts import tick_label, ticks
from diffalign.rewards.audio import to_mono
from diffalign.rewards.log_mel import htk_filters, magnitudes

_CARD, _INK, _SOFT, _LINE, _BLUE = "#ffffff", "#1c1b1a", "#67635d", "#e4e0d9", "#2f5fb3"
_RAMP = ("#f8f9fc", "#dbe6f7", "#7fa6ea", "#2f5fb3", "#1b2f63", "#0d1226")
_WIDTH, _WAVE, _MEL = 400, 56, 150
"""Of the drawing within its margins, in pixels."""
_LEFT, _RIGHT, _GAP, _BELOW, _TEXT = 40, 12, 8, 28, 14
_BANDS, _LOWEST_HZ, _DEPTH_DB = 75, 60.0, 70.0
_WINDOW_SECONDS, _ZEROS = 0.04, 4
_HERTZ = (125, 250, 500, 1000, 2000, 4000, 8000, 16_000)


def clip_picture(clip: Float[Tensor, "c s"], rate_hz: int, title: str = "") -> Image.Image:
    """The mean of a clip's channels: its waveform, and its log-mel bands below, over seconds.

    Raises:
        InputError: A clip shorter than the 40 ms of a frame, or a rate below 1,000.
    """
    if rate_hz < 1000 or clip.shape[1] < round(rate_hz * _WINDOW_SECONDS):
        raise InputError(
            f"clip must have 40 ms or more at 1000 samples a second or more, got {clip.shape[1]} samples at {rate_hz}"
        )
    samples = to_mono(clip.detach().cpu())[0]
    lines = textwrap.wrap(title, _WIDTH // 6)
    top = _GAP + _TEXT * len(lines)
    size = (_LEFT + _WIDTH + _RIGHT, top + _WAVE + _GAP + _MEL + _BELOW)
    canvas = Image.new("RGB", size, _CARD)
    canvas.paste(_waveform(samples), (_LEFT, top))
    canvas.paste(_mel(samples, rate_hz), (_LEFT, top + _WAVE + _GAP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for row, line in enumerate(lines):
        pen.text((_LEFT, _GAP // 2 + row * _TEXT), line, fill=_INK, font=ImageFont.load_default(12))
    bottom = top + _WAVE + _GAP + _MEL
    pen.line((_LEFT, bottom, _LEFT + _WIDTH, bottom), fill=_LINE)
    free = float(bottom)
    for hertz in _HERTZ:
        height = _height(float(hertz), rate_hz)
        y = bottom - height * _MEL
        if height < 1 and y < free:
            free = y - _TEXT
            pen.line((_LEFT - 4, y, _LEFT - 1, y), fill=_SOFT)
            named = f"{hertz // 1000}k" if hertz >= 1000 else str(hertz)
            pen.text((_LEFT - 7, y), named, fill=_SOFT, font=font, anchor="rm")
    seconds = len(samples) / rate_hz
    for tick in ticks(0.0, seconds, 4):
        x = _LEFT + tick / seconds * _WIDTH
        if tick <= seconds:
            pen.line((x, bottom + 1, x, bottom + 4), fill=_SOFT)
            pen.text((x, bottom + 5), f"{tick_label(tick)} s", fill=_SOFT, font=font, anchor="ma")
    return canvas


def sheet(clips: Sequence[Float[Tensor, "c _"]], titles: Sequence[str], rate_hz: int, columns: int = 3) -> Image.Image:
    """Pictures of clips in rows, each with its title.

    Raises:
        InputError: No clips, or another number of titles.
    """
    if not clips or len(titles) != len(clips):
        raise InputError(f"sheet must have clips with a title each, got {len(clips)} clips and {len(titles)} titles")
    pictures = [clip_picture(clip, rate_hz, title) for clip, title in zip(clips, titles, strict=True)]
    wide, high = pictures[0].width, max(picture.height for picture in pictures)
    across = min(columns, len(pictures))
    canvas = Image.new("RGB", (across * wide, -(-len(pictures) // columns) * high), _CARD)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        canvas.paste(picture, (column * wide, row * high + high - picture.height))
    return canvas


def _waveform(samples: Float[Tensor, " s"]) -> Image.Image:
    """From the least to the greatest sample of every column, on a line at 0."""
    edges = np.linspace(0, len(samples), _WIDTH + 1).astype(int)
    values = samples.clamp(-1, 1).numpy()
    canvas = Image.new("RGB", (_WIDTH, _WAVE), _CARD)
    pen, middle = ImageDraw.Draw(canvas), (_WAVE - 1) / 2
    pen.line((0, round(middle), _WIDTH, round(middle)), fill=_LINE)
    for x in range(_WIDTH):
        part = values[edges[x] : max(edges[x + 1], edges[x] + 1)]
        pen.line((x, round(middle * (1 - part.max())), x, round(middle * (1 - part.min()))), fill=_BLUE)
    return canvas


def _mel(samples: Float[Tensor, " s"], rate_hz: int) -> Image.Image:
    """Bands from `_LOWEST_HZ` to 15/16 of what the rate can hold, the highest on top."""
    window = round(rate_hz * _WINDOW_SECONDS)
    fft = _ZEROS << (window - 1).bit_length()
    padded = torch.nn.functional.pad(samples, (window // 2, window - window // 2))
    hop = max(1, len(samples) // _WIDTH)
    filters = htk_filters(rate_hz=rate_hz, fft=fft, bands=_BANDS, low_hz=_LOWEST_HZ, high_hz=_highest(rate_hz))
    tone = (
        window / 4 * 2 * fft / window
    )  # a full-scale tone: half the window's sum, in two bins' width of the padded FFT
    bands = magnitudes(padded, window=window, hop=hop, fft=fft) @ filters / tone
    level = 1 + 20 * torch.log10(bands + 1e-9) / _DEPTH_DB
    grid = Image.fromarray(level.T.flip(0).clamp(0, 1).float().numpy())
    smooth = np.asarray(grid.resize((_WIDTH, _MEL), Image.Resampling.BILINEAR)).clip(0, 1)
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _RAMP], dtype=float)
    colours = [np.interp(smooth, np.linspace(0, 1, len(_RAMP)), stops[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(colours, axis=-1).round().astype(np.uint8))


def _highest(rate_hz: int) -> float:
    return rate_hz * 15 / 32


def _height(hertz: float, rate_hz: int) -> float:
    """Where a frequency lies between the lowest and the highest band, in [0, 1]."""
    low, here, high = (float(np.log1p(f / 700)) for f in (_LOWEST_HZ, hertz, _highest(rate_hz)))
    return (here - low) / (high - low)
