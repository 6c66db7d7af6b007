"""Pictures of fixed prompts at fixed seeds, one grid a milestone: how the model changes, to the eye."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from diffalign.denoisers import Family
from diffalign.models.load import ModelSource, load_pipeline
from diffalign.models.offload import placed
from diffalign.settings import SampleSettings

_LEAST_SIDE = 128
_CAPTION = 12


def save_grid(
    folder: Path,
    step: int,
    source: ModelSource,
    family: Family,
    net: Any,
    settings: SampleSettings,
    *,
    offload: bool = False,
) -> Path:
    """Samples the prompts with the network as it is and writes `step-N.png`; other components are loaded and let go.

    Args:
        offload: The others are on the network's device one at a time.
    """
    import torch

    from diffalign.evaluate.generate import generate

    with placed(load_pipeline(source, only=("vae", *family.text), net=net), net, offload=offload) as pipeline:
        samples = generate(
            pipeline,
            family,
            list(settings.prompts),
            images_per_prompt=1,
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=4,
        )
        images = [(s.image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy() for s in samples]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{step:06d}.png"
    grid([Image.fromarray(image) for image in images], settings.prompts).save(file)
    return file


def grid(images: list[Image.Image], captions: tuple[str, ...], columns: int = 4) -> Image.Image:
    """Pictures in rows, each with its caption below, small ones enlarged."""
    side = max(_LEAST_SIDE, images[0].width)
    rows = -(-len(images) // columns)
    wide = min(columns, len(images))
    lines = [_wrap(caption, side // 6) for caption in captions]
    below = _CAPTION * max(len(text) for text in lines) + 4
    canvas = Image.new("RGB", (wide * (side + 8) + 8, rows * (side + below + 8) + 8), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + below + 8)
        canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(text):
            pen.text((x, y + side + 2 + n * _CAPTION), line, fill=(40, 40, 40))
    return canvas


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]
