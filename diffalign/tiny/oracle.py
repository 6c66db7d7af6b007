"""The taste of the tiny world's simulated person: measures from pixels what a caption asked for.

No network. The background is the median colour of the picture's frame; whatever differs from it falls into connected
blobs; each blob has a colour (median), a place (centroid), a size (radius of the circle of equal area) and a shape
(overlap with drawn templates). Asked things and found blobs are matched so that the sum of scores is largest; a thing
that is missing scores 0 on all its attributes. Every attribute is in [0, 1], and so is `total`, their mean.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw
from scipy import ndimage, optimize

from diffalign.tiny import scenes
from diffalign.tiny.scenes import Scene, Thing

ATTRIBUTES = ("shape", "colour", "size", "place", "background", "count")

_FOREGROUND_DISTANCE = 70.0
_SMALLEST_BLOB = 20
_COLOUR_SPREAD = 25.0
_SIZE_SPREAD = 0.25
_PLACE_SPREAD = 6.0
_SHAPE_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Blob:
    """One connected region that stands out from the background; the measured counterpart of a `Thing`."""

    colour: tuple[float, float, float]
    x: float
    y: float
    radius: float
    overlap: dict[str, float]
    """Intersection over union with a template of each shape at the same centroid and area."""


def judge(image: Float[np.ndarray, "h w 3"], prompt: str) -> dict[str, float]:
    """How well a picture shows what its caption asks, per attribute and in `total`.

    Args:
        image: RGB in [0, 1], 64x64.
        prompt: A caption of the tiny world.

    Returns:
        Scores in [0, 1] under the names in `ATTRIBUTES`, and their mean as `total`; higher is better.

    Raises:
        ValueError: The prompt is not a caption of this world, or the image is not 64x64 RGB.
    """
    if image.shape != (scenes.SIDE, scenes.SIDE, 3):
        raise ValueError(f"image must have shape ({scenes.SIDE}, {scenes.SIDE}, 3), got {image.shape}")
    scene = scenes.parse(prompt)
    background, blobs = measure(image)
    scores = _match(scene, blobs)
    scores["background"] = _nearness(background, scenes.BACKGROUNDS[scene.background], list(_ALL_COLOURS.values()))
    scores["count"] = max(0.0, 1.0 - 0.5 * abs(len(blobs) - len(scene.things)))
    return {name: scores[name] for name in ATTRIBUTES} | {"total": float(np.mean([scores[n] for n in ATTRIBUTES]))}


def measure(image: Float[np.ndarray, "h w 3"]) -> tuple[tuple[float, float, float], list[Blob]]:
    """Background colour (RGB in 0..255) and blobs of a picture in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float64) * 255
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(frame, axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    labels, count = ndimage.label(distance > _FOREGROUND_DISTANCE)
    blobs = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() >= _SMALLEST_BLOB:
            blobs.append(_blob(pixels, mask))
    return tuple(background), blobs


def nearest_colour(colour: tuple[float, ...]) -> str:
    """The named colour, of things or of backgrounds, that an RGB triple in 0..255 is nearest to."""
    return min(_ALL_COLOURS, key=lambda name: math.dist(colour, _ALL_COLOURS[name]))


def _blob(pixels: np.ndarray, mask: np.ndarray) -> Blob:
    core = ndimage.binary_erosion(mask)
    colour = np.median(pixels[core if core.sum() >= 5 else mask], axis=0)
    y, x = (c + 0.5 for c in ndimage.center_of_mass(mask))
    radius = math.sqrt(mask.sum() / math.pi)
    overlap = {}
    for shape in scenes.SHAPES:
        template = _template(shape, round(x * 4), round(y * 4), round(radius * 8))
        overlap[shape] = float((template & mask).sum() / (template | mask).sum())
    return Blob(tuple(colour), x, y, radius, overlap)


def _match(scene: Scene, blobs: list[Blob]) -> dict[str, float]:
    """Mean score per attribute over the scene's things, under the best matching of things to blobs."""
    names = ("shape", "colour", "size", "place")
    table = np.zeros((len(scene.things), max(len(blobs), 1), len(names)))
    for i, thing in enumerate(scene.things):
        for j, blob in enumerate(blobs):
            table[i, j] = _compare(thing, blob)
    rows, columns = optimize.linear_sum_assignment(-table.sum(axis=2))
    means = table[rows, columns].sum(axis=0) / len(scene.things)
    return dict(zip(names, (float(m) for m in means), strict=True))


def _compare(thing: Thing, blob: Blob) -> tuple[float, float, float, float]:
    best = max(blob.overlap.values())
    weights = {shape: math.exp((v - best) / _SHAPE_TEMPERATURE) for shape, v in blob.overlap.items()}
    shape = weights[thing.shape] / sum(weights.values())
    colour = _nearness(blob.colour, scenes.COLOURS[thing.colour], list(_ALL_COLOURS.values()))
    size = math.exp(-0.5 * (math.log(blob.radius / scenes.SIZES[thing.size]) / _SIZE_SPREAD) ** 2)
    distance = math.dist((blob.x, blob.y), scenes.PLACES[thing.place])
    return shape, colour, size, math.exp(-0.5 * (distance / _PLACE_SPREAD) ** 2)


def _nearness(colour: tuple[float, ...], asked: tuple[int, ...], named: list[tuple[int, int, int]]) -> float:
    """Share of the asked colour among all named ones, by a Gaussian of the RGB distance."""
    logits = [-0.5 * (math.dist(colour, c) / _COLOUR_SPREAD) ** 2 for c in named]
    top = max(logits)
    return math.exp(-0.5 * (math.dist(colour, asked) / _COLOUR_SPREAD) ** 2 - top) / sum(
        math.exp(v - top) for v in logits
    )


@cache
def _template(shape: str, x4: int, y4: int, r8: int) -> np.ndarray:
    """Mask of a shape at (x4 / 4, y4 / 4) with radius r8 / 8, in pixels; cached on a quarter-pixel grid."""
    scale = 4
    canvas = Image.new("L", (scenes.SIDE * scale, scenes.SIDE * scale))
    points = scenes.outline(shape, x4 / 4, y4 / 4, r8 / 8)
    ImageDraw.Draw(canvas).polygon([(scale * px - 0.5, scale * py - 0.5) for px, py in points], fill=255)
    return np.asarray(canvas.resize((scenes.SIDE, scenes.SIDE), Image.Resampling.BOX)) > 127


_ALL_COLOURS = scenes.COLOURS | scenes.BACKGROUNDS
