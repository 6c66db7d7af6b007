"""What one family of pipelines must tell: how it is recognised, loaded, conditioned, adapted and sampled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffalign.paths import TimestepSampling
from diffalign.types import Cond, Denoiser

MakeDenoiser = Callable[[nn.Module, Mapping[str, Any], TimestepSampling | None], Denoiser]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that differs between families; the only place where a family's names are known."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of Diffusers pipelines, as `model_index.json` says them."""
    net: str
    """Component of the pipeline that is trained."""
    text: tuple[str, ...]
    """Components that turn prompts into conditions."""
    lora_targets: tuple[str, ...]
    """Default modules that get a LoRA, by the end of their name."""
    net_class: Callable[[], type]
    """Class of the trained network; imported when asked."""
    make_denoiser: MakeDenoiser
    """(net, scheduler config, timestep sampling or None for the family's own) -> denoiser."""
    encode_prompts: Callable[[Any, Sequence[str]], Cond]
    """(pipeline with its text components, prompts) -> conditions, one row a prompt, without gradient."""
    use_sampler: Callable[[Any], None]
    """Puts the deterministic sampler of the evaluation protocol into a pipeline."""
    call_options: Callable[[Any], dict[str, Any]]
    """What a pipeline must be called with to see the conditions of `encode_prompts`."""
    save_lora: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    """(folder, adapter weights in peft's names, adapter metadata) -> a file that the pipeline loads."""
    steps: int
    """Sampling steps where nobody chose, as the evaluation protocol has them."""
    guidance: float
    """Weight w in uncond + w (cond - uncond) where nobody chose."""
