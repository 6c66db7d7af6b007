"""The pictures of the tiny world: captioned scenes, drawn from a seed.

A scene is one to three things (shape, colour, size, place) on a plain background. `caption` says it in varied wording,
`parse` reads a caption back, `render` draws it as 64x64 RGB. All shapes of one size cover nearly the same area, so size
can be measured from pixels. Combinations of shape, colour and place are split once into training and held-out ones.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Height and width of every picture, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 225, 60),
    "green": (45, 165, 70),
    "cyan": (70, 205, 215),
    "blue": (45, 85, 215),
    "purple": (140, 55, 175),
    "pink": (250, 145, 195),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (18, 18, 18), "brown": (100, 62, 32)}
SIZES = {"small": 6.0, "large": 10.0}
"""Radius in pixels of the circle of equal area."""
PLACES = {
    f"{row} {column}".replace("middle middle", "center").replace("middle ", "").replace(" middle", ""): (x, y)
    for row, y in (("top", 13.5), ("middle", 32.0), ("bottom", 50.5))
    for column, x in (("left", 13.5), ("middle", 32.0), ("right", 50.5))
}
"""Centre (x, y) in pixels by name: "top left", "top", ..., "left", "center", "right", ..."""

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_SUPERSAMPLING = 4
_GAP = 1.5
_HELD_OUT_ONE_IN = 6

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene, by the names of the tables above."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One to three things on a plain background."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Carelessness:
    """How far a careless painter strays from what the caption asks.

    Pre-training pictures are drawn carelessly, as pictures on the web are captioned: the base model learns the
    mistakes, and preferences can teach it better.
    """

    slip: float = 0.0
    """Probability that one attribute (shape, colour, size, place, background) is replaced by another of its kind."""
    place_jitter: float = 0.0
    """Standard deviation of the centre, in pixels and per axis."""
    size_jitter: float = 0.0
    """Standard deviation of the logarithm of the radius."""


def is_held_out(thing: Thing) -> bool:
    """Whether the combination of shape, colour and place is kept out of all training captions."""
    digest = hashlib.sha256(f"{thing.shape}|{thing.colour}|{thing.place}".encode()).digest()
    return digest[0] % _HELD_OUT_ONE_IN == 0


def split_of(scene: Scene) -> Split:
    """`held_out` if any thing of the scene is a held-out combination."""
    return "held_out" if any(is_held_out(thing) for thing in scene.things) else "train"


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A random scene of a split: one thing in 55 % of draws, two in 30 %, three in 15 %; nothing overlaps."""
    count = int(rng.choice([1, 2, 3], p=[0.55, 0.30, 0.15]))
    while True:
        colours = rng.choice(list(COLOURS), size=count, replace=False)
        things = tuple(
            Thing(str(rng.choice(SHAPES)), str(c), str(rng.choice(list(SIZES))), str(rng.choice(list(PLACES))))
            for c in colours
        )
        scene = Scene(things, str(rng.choice(list(BACKGROUNDS))))
        if _fits(scene) and split_of(scene) == split:
            return scene


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in words; wording and order of things vary with `rng`."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    terse = rng.random() < 0.3
    parts = [_describe(thing, rng, terse=terse) for thing in things]
    if terse:
        return ", ".join([*parts, f"{scene.background} background"])
    joined = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if rng.random() < 0.5:
        return f"{joined} on a {scene.background} background"
    return f"{scene.background} background with {joined}"


def parse(text: str) -> Scene:
    """The scene that a caption of this world describes.

    Raises:
        ValueError: The text is not a caption of this world.
    """
    sizes = {word: size for size, words in _SIZE_WORDS.items() for word in words}
    places = "|".join(sorted(PLACES, key=len, reverse=True))
    pattern = rf"({'|'.join(sizes)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: (?:at|in) the)? ({places})\b"
    things = tuple(Thing(m[3], m[2], sizes[m[1]], m[4]) for m in re.finditer(pattern, text.lower()))
    background = re.search(rf"({'|'.join(BACKGROUNDS)}) background", text.lower())
    if not things or background is None:
        raise ValueError(f"prompt must be a caption of the tiny world, such as {_EXAMPLE!r}, got {text!r}")
    return Scene(things, background[1])


def render(scene: Scene, rng: np.random.Generator | None = None, care: Carelessness | None = None) -> Image.Image:
    """The picture of a scene, 64x64 RGB; exact without `care`, strayed by `rng` as far as `care` says."""
    if care is None:
        return _draw(scene, [(*PLACES[t.place], SIZES[t.size]) for t in scene.things])
    if rng is None:
        raise ValueError("render must get rng when care is given")
    strayed = _slip(scene, rng, care.slip)
    spots = []
    for thing in strayed.things:
        x, y = rng.normal(PLACES[thing.place], care.place_jitter)
        spots.append((x, y, SIZES[thing.size] * math.exp(rng.normal(0.0, care.size_jitter))))
    return _draw(strayed, spots)


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape that covers the area of a circle of `radius` around its centroid (x, y), in pixels."""
    area = math.pi * radius**2
    if shape == "circle":
        return _ring(x, y, [radius] * 48, 0.0)
    if shape == "square":
        return _ring(x, y, [math.sqrt(area / 2)] * 4, math.pi / 4)
    if shape == "triangle":
        return _ring(x, y, [math.sqrt(area * 4 / (3 * math.sqrt(3)))] * 3, -math.pi / 2)
    if shape == "star":
        outer = math.sqrt(area / (5 * 0.45 * math.sin(math.pi / 5)))
        return _ring(x, y, [outer, 0.45 * outer] * 5, -math.pi / 2)
    if shape == "cross":
        arm = math.sqrt(area / (8 * 0.36 - 4 * 0.36**2))
        half = 0.36 * arm
        turns = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
        quarter = [(arm, -half), (half, -half), (half, -arm)]
        return [(x + a * u + b * v, y + c * u + d * v) for a, b, c, d in turns for u, v in quarter]
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def _ring(x: float, y: float, radii: list[float], start: float) -> list[tuple[float, float]]:
    turn = 2 * math.pi / len(radii)
    return [(x + r * math.cos(start + i * turn), y + r * math.sin(start + i * turn)) for i, r in enumerate(radii)]


def _draw(scene: Scene, spots: list[tuple[float, float, float]]) -> Image.Image:
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing, (x, y, radius) in zip(scene.things, spots, strict=True):
        points = outline(thing.shape, x, y, radius)
        pen.polygon([(scale * px - 0.5, scale * py - 0.5) for px, py in points], fill=COLOURS[thing.colour])
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _slip(scene: Scene, rng: np.random.Generator, slip: float) -> Scene:
    def other(value: str, choices: list[str]) -> str:
        return str(rng.choice([c for c in choices if c != value])) if rng.random() < slip else value

    things = tuple(
        replace(
            thing,
            shape=other(thing.shape, list(SHAPES)),
            colour=other(thing.colour, list(COLOURS)),
            size=other(thing.size, list(SIZES)),
            place=other(thing.place, list(PLACES)),
        )
        for thing in scene.things
    )
    return Scene(things, other(scene.background, list(BACKGROUNDS)))


def _fits(scene: Scene) -> bool:
    for i, a in enumerate(scene.things):
        for b in scene.things[:i]:
            distance = math.dist(PLACES[a.place], PLACES[b.place])
            if distance < _GAP * (SIZES[a.size] + SIZES[b.size]):
                return False
    return True


def _describe(thing: Thing, rng: np.random.Generator, *, terse: bool) -> str:
    size = str(rng.choice(_SIZE_WORDS[thing.size]))
    if terse:
        return f"{size} {thing.colour} {thing.shape} {thing.place}"
    preposition = "in" if thing.place == "center" else "at"
    return f"a {size} {thing.colour} {thing.shape} {preposition} the {thing.place}"


_EXAMPLE = "a large red circle at the top left on a white background"
