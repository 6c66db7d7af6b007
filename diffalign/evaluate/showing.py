"""Samples in a page that fetches nothing: pictures and clips as data, small enough for a page of many."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from diffalign.data.sounds import wav
from diffalign.evaluate.sound_pictures import clip_picture
from diffalign.rewards.audio import resample, to_mono

SECONDS = 10
"""Of a clip that a page plays; the whole of it is drawn, and lies in its file."""
RATE_HZ = 24_000
"""At most, of a clip in a page."""

_PIXELATED_SIDE = 128
"""Images up to this side are shown enlarged, pixel by pixel."""
_COLOURS = 64
"""Of the drawing of a clip."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One sample in a page."""

    uri: str
    """Of its picture."""
    width: int | None = None
    """Shown width of a small image, a whole multiple of its own; None lets the page decide."""
    sound: str | None = None
    """What a player plays; None for what makes none."""


def show_picture(file: Path, side: int) -> Shown:
    """An image inline: its own bytes if it is small, else shrunk to `side`, as JPEG."""
    from PIL import Image

    data, kind = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        longest = max(image.size)
        if longest > side:
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
        width = image.width * max(1, _PIXELATED_SIDE // longest) if longest <= _PIXELATED_SIDE else None
    return Shown(uri=_uri(f"image/{kind}", data), width=width)


def show_clip(clip: Float[Tensor, "c s"], rate_hz: int) -> Shown:
    """A clip inline: its waveform and bands, and a player of its first seconds, mono, at a whole part of its rate."""
    buffer = io.BytesIO()
    clip_picture(clip, rate_hz).quantize(_COLOURS).save(buffer, "PNG", optimize=True)
    low = -(-rate_hz // RATE_HZ)
    heard = to_mono(clip)[:, : SECONDS * rate_hz]
    if low > 1 and rate_hz % low == 0:
        heard, rate_hz = resample(heard, rate_hz, rate_hz // low), rate_hz // low
    return Shown(uri=_uri("image/png", buffer.getvalue()), sound=_uri("audio/wav", wav(heard, rate_hz)))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
