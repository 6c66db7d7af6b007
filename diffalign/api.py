"""The Python road: the same calls as the command line, in one place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.evaluate.results import Results
    from diffalign.settings import TrainConfig
    from diffalign.train import RunResult


def train(config: "str | Path | Mapping[str, Any] | TrainConfig", *overrides: str) -> "RunResult":
    """Trains as a config says.

    Args:
        config: A TOML file, the bare name of a shipped config, a table of the same keys, or a `TrainConfig`.
        overrides: `section.key=value`, for a file or a name.

    Raises:
        InputError: Something in config, data or model is wrong; one line says what.
    """
    from diffalign.config import load, parse
    from diffalign.errors import InputError
    from diffalign.settings import TrainConfig
    from diffalign.train import run

    if overrides and not isinstance(config, (str, Path)):
        raise InputError(f"overrides must come with a config file or name, got {type(config).__name__}")
    if isinstance(config, TrainConfig):
        return run(config)
    return run(parse(config) if isinstance(config, Mapping) else load(config, overrides))


class Scorer:
    """A reward as a function of images and prompts."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __call__(self, images: Any, prompts: Sequence[str] | None = None) -> Any:
        """Scores [B], higher is better, on the scale that the reward's docstring names.

        Args:
            images: PIL images, paths, or a float tensor [B, 3, H, W] in [0, 1].
            prompts: One per image, for rewards that need them.
        """
        import torch

        from diffalign.data.images import to_tensor
        from diffalign.types import RewardBatch

        if isinstance(images, torch.Tensor):
            return self.reward.score(RewardBatch(images=images, prompts=prompts)).scores
        scores = []
        for i, image in enumerate(images):
            one = None if prompts is None else [prompts[i]]
            scores.append(self.reward.score(RewardBatch(images=to_tensor(image)[None], prompts=one)).scores)
        return torch.cat(scores)


def load_reward(spec: str, **options: Any) -> Scorer:
    """A reward by name ("clip", "clip:tiny-clip") or by "package.module:object", ready to be called."""
    from diffalign import rewards

    return Scorer(rewards.load(spec, **options))


def evaluate(
    base: str,
    aligned: str | Sequence[str] | Mapping[str, str],
    prompts: str | Sequence[str] = "tiny",
    *,
    rewards: Sequence[str],
    output: str | Path,
    roles: Mapping[str, str] | None = None,
    **settings: Any,
) -> "Results":
    """Compares models on the same prompts from the same initial noise.

    Args:
        base: A pipeline: folder, hub id or shipped name; or a folder of finished images.
        aligned: A pipeline, a LoRA, a denoiser, the folder of a run, or finished images; several as a list or by name.
        prompts: A prompt set by name or file, or the prompts.
        rewards: Specs as `load_reward` takes them.
        output: Folder for results.json, report.html, scores.parquet and images/; what is there is not made again.
        roles: By reward name: "labeller", "trained_on" or "held_out"; else what runs and data cards say.
        settings: Fields of `diffalign.evaluate.EvaluationSettings`, such as steps and guidance.
    """
    from diffalign.errors import InputError, near_match
    from diffalign.evaluate import EvaluationSettings
    from diffalign.evaluate import evaluate as compare

    known = EvaluationSettings.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise InputError(f"evaluate: unknown setting {name!r}{near_match(name, known)}")
    chosen = EvaluationSettings(**settings)
    return compare(base, aligned, prompts, rewards=rewards, output=output, roles=roles, settings=chosen)
