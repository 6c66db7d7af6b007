"""What the audio table measures: clips of held-out captions, by judges of single clips and by numbers of sets.

Every arm plays each caption once, from noise that belongs to the caption, so sets are of equal size and share their
draws of captions. Distances are to one folder of clean clips, in the encoder that some runs are trained on and in a
second one that no run has seen.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import online_measures
from benchmarks.method_measures import LEVELS, PROMPT_SEED, diversity
from benchmarks.method_runs import CACHE, digest
from diffalign import losses, paths, rewards
from diffalign.data.prompts import read_prompts
from diffalign.data.sounds import rounded
from diffalign.evaluate.generate import initial_latents, prompt_seed
from diffalign.evaluate.media import Clips
from diffalign.models.load import ModelSource, detect_family, load_context, load_pipeline
from diffalign.rewards.fad import FADReward
from diffalign.rewards.gaussians import frechet_distance
from diffalign.rewards.per_sample import PerSampleReward
from diffalign.rng import SampleRng
from diffalign.tiny import sounds
from diffalign.tiny.exemplars import is_written, write_clips
from diffalign.types import Cond, Denoiser, RewardBatch

CAPTIONS = "tiny-sounds"
PROMPTS = 256
"""Held-out captions, one clip each."""
SECONDS = sounds.SAMPLES / sounds.RATE_HZ
SAMPLER_STEPS = 10
GUIDANCE = 3.0
CLIP_BATCH = 64
DRIFT_CLIPS = 64
"""Clips of the base model on whose way predictions are compared."""
EXEMPLARS: dict[str, Any] = {"count": 512, "seed": 20, "style": {}}
"""The reference set: `python -m diffalign.tiny sounds`, played with care."""
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clap": ("clap:tiny-clap", {}),
    "log_mel": ("log_mel", {"bands": 16, "rises": True}),
}
"""Specs and options by the name of the distance: the one that runs are trained on, and one that no run has seen."""
FRAMES: tuple[str, dict[str, Any]] = ("log_mel:frames", {})
"""Encoder of distances of single clips."""
JUDGES = {"oracle": "sound_oracle", "clap": "clap:tiny-clap"}
"""Rewards of single clips by name; `per_clip`, minus the FAD of each clip by itself, comes to them."""
SETS = (*(f"fad_{name}" for name in ENCODERS), "vendi")
"""Numbers of sets; Vendi is in the space of the first encoder."""
SCORED = (*JUDGES, "per_clip")
LOOKED = (*SETS[:-1], *SCORED)
"""What is measured of the clips of every round."""

Waves = Float[Tensor, "n 1 s"]


def encoder(name: str) -> Any:
    """One of `ENCODERS`, or that of single clips."""
    spec, options = FRAMES if name == "per_clip" else ENCODERS[name]
    return rewards.load_encoder(spec, **options)


@cache
def captions(seed: int = PROMPT_SEED) -> tuple[str, ...]:
    """The shipped held-out captions; of a trial others, of held-out combinations too."""
    shipped = tuple(read_prompts(CAPTIONS).prompts)
    if seed == PROMPT_SEED:
        return shipped[:PROMPTS]
    rng, found = np.random.default_rng(seed), dict[str, None]()
    while len(found) < PROMPTS:
        text = sounds.caption(sounds.draw_sound(rng, "held_out"), rng)
        if text not in shipped:
            found[text] = None
    return tuple(found)


def clips_folder() -> Path:
    """The folder with the reference clips, written if it is not there yet."""
    folder = CACHE / f"sounds-{digest(EXEMPLARS)}"
    if not is_written(folder):
        write_clips(folder, **EXEMPLARS)
    return folder


def reference_file(name: str) -> Path:
    """Statistics of the reference clips in the space of an encoder, computed if they are not there yet."""
    folder = clips_folder()
    file = folder.with_name(f"{folder.name}-{name}.safetensors")
    if not file.is_file():
        fad = FADReward(encoder(name))
        fad.fit_reference(medium().exemplars(folder))
        fad.save_reference(file)
    return file


def distance(name: str) -> FADReward:
    """FAD to the reference clips by an encoder."""
    fad = FADReward(encoder(name))
    fad.load_reference(reference_file(name))
    return fad


def medium() -> Clips:
    return Clips(rate_hz=sounds.RATE_HZ)


@torch.no_grad()
def make_clips(
    source: ModelSource, prompts: Sequence[str], net: nn.Module | None = None, *, decoded: bool = True
) -> Float[Tensor, "n _c _s *rest"]:
    """A clip a prompt by a model, or by a network in its place, from noise that belongs to the prompt; or latents."""
    family, pipeline = detect_family(source), load_pipeline(source, net=net)
    context = load_context(source, family, seconds=SECONDS)
    family.use_sampler(pipeline)
    made = []
    for start in range(0, len(prompts), CLIP_BATCH):
        some = prompts[start : start + CLIP_BATCH]
        noise = initial_latents(context.latents, [prompt_seed(prompt, 0) for prompt in some])
        asked: dict[str, Any] = {"steps": SAMPLER_STEPS, "guidance": GUIDANCE, "decoded": decoded, "context": context}
        made.append(family.sample(pipeline, some, noise, **asked))
    found = torch.cat(made)
    return rounded(found) if decoded else found


def batch_of(clips: Waves, prompts: Sequence[str]) -> RewardBatch:
    return RewardBatch(audio=list(clips), sample_rate=sounds.RATE_HZ, prompts=list(prompts))


class Ear:
    """Everything that listens, loaded once."""

    def __init__(self) -> None:
        self.judges: dict[str, Any] = {name: rewards.load(spec) for name, spec in JUDGES.items()}
        self.judges["per_clip"] = PerSampleReward(distance("per_clip"))
        self.distances = {name: distance(name) for name in ENCODERS}

    def judge(self, clips: Waves, prompts: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """(scores by reward, the oracle's attributes by name), one number a clip."""
        asked = batch_of(clips, prompts)
        outputs = {name: judge.score(asked) for name, judge in self.judges.items()}
        raw = {name: values for name, values in outputs["oracle"].raw.items() if name != "silent"}
        return {name: _rounded(out.scores) for name, out in outputs.items()}, {k: _rounded(v) for k, v in raw.items()}

    def embed(self, clips: Waves) -> dict[str, Float[Tensor, "n _d"]]:
        """Rows by encoder, one a clip."""
        asked = batch_of(clips, [""] * len(clips))
        found = {name: fad.embed(asked) for name, fad in self.distances.items()}
        assert all(set(one.counts) == {1} for one in found.values()), "a clip is one embedding"
        return {name: one.rows for name, one in found.items()}

    def numbers(self) -> dict[str, dict[str, Callable[[Float[Tensor, "n _d"]], float]]]:
        """By encoder: numbers of sets of its rows."""
        found: dict[str, dict[str, Callable[[Tensor], float]]] = {}
        for name, fad in self.distances.items():
            held = fad.held()
            found[name] = {f"fad_{name}": lambda rows, held=held: float(frechet_distance(rows, held))}
        first = next(iter(ENCODERS))
        found[first]["vendi"] = lambda rows: diversity(rows)["vendi"]
        return found

    def sets(self, clips: Waves) -> dict[str, float]:
        """The numbers of a set of clips."""
        rows = self.embed(clips)
        return {name: number(rows[of]) for of, some in self.numbers().items() for name, number in some.items()}

    def set_changes(
        self, arm: Waves, base: Waves, *, resamples: int = online_measures.RESAMPLES
    ) -> dict[str, dict[str, float]]:
        """By number of sets: both sets' own, the change, and its paired 95 % interval over captions."""
        mine, theirs = self.embed(arm), self.embed(base)
        found: dict[str, dict[str, float]] = {}
        for of, numbers in self.numbers().items():
            found |= online_measures.set_changes(mine[of], theirs[of], numbers, resamples=resamples)
        return {name: basic(one) for name, one in found.items()}

    def look(self, place: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What is said of the clips of a round."""
        clips = torch.stack([medium().read(place / entry["audio"]) for entry in entries])
        scores, _ = self.judge(clips, [entry["prompt"] for entry in entries])
        seen = {name: float(np.mean(values)) for name, values in scores.items()}
        return {name: round(value, 6) for name, value in (self.sets(clips) | seen).items() if name in LOOKED}


def basic(found: Mapping[str, float]) -> dict[str, float]:
    """A change with the interval of the basic bootstrap in the place of its percentiles.

    A set with captions that were drawn twice is further from the reference, by more where it is spread wider;
    reflecting the draws at the change takes off what that does to it.
    """
    change, low, high = (found[name] for name in ("change", "low", "high"))
    return {**found, "low": 2 * change - high, "high": 2 * change - low}


@torch.no_grad()
def drift(
    policy: Denoiser, base: Denoiser, x_0: Float[Tensor, "n c f 1"], cond: Cond, levels: Sequence[float] = LEVELS
) -> float:
    """Mean squared difference of the predictions of policy and base on the same latents and noise."""
    moved = []
    for i, level in enumerate(levels):
        eps = SampleRng(PROMPT_SEED, tuple(i * len(x_0) + row for row in range(len(x_0)))).normal(x_0, "noise")
        t = policy.path.at(torch.full((len(x_0),), level, dtype=torch.float64))
        x_t = paths.add_noise(policy.path, x_0, eps, t)
        moved.append(losses.squared_error(policy(x_t, t, cond), base(x_t, t, cond)))
    return float(torch.stack(moved).mean())


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
