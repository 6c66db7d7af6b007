"""The sections of a run's config: frozen dataclasses, some of which belong to the parts that use them."""

from dataclasses import dataclass, field
from typing import Literal

from diffalign.attention import Attention
from diffalign.data.buckets import STEP
from diffalign.data.selfsampled import RoundSettings
from diffalign.data.sources import PairSource
from diffalign.guard.settings import GuardSettings
from diffalign.models.load import ModelSource
from diffalign.models.lora import LoraSettings
from diffalign.online.settings import OnlineSettings
from diffalign.paths import TimestepSampling
from diffalign.recompute import Checkpointing
from diffalign.types import Method


@dataclass(frozen=True, kw_only=True)
class DataSettings(PairSource):
    """Preference data, how images are made to fit, and where their encodings are kept."""

    resolution: int | None = None
    """Side in pixels; None takes the model's own. With buckets the side of the square that has their largest area."""
    buckets: bool | tuple[str, ...] = False
    """Train at the images' own aspect ratios: every pair at the size, of those that bucket_step gives or of a list
    such as ["1024x1024", "1216x832"], that is nearest to its winner's. A step has pairs of one size."""
    bucket_step: int = STEP
    """Sides of buckets are multiples of so many pixels (kohya's bucket_reso_steps)."""
    bucket_min: int | None = None
    """Shortest side of a bucket (min_bucket_reso); None is half the resolution, in whole steps."""
    bucket_max: int | None = None
    """Longest side of a bucket (max_bucket_reso); None is twice the resolution."""
    seconds: float | None = None
    """Length of a clip, for models of sound, which need it."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror pairs at random; falsifies captions that name a side."""
    variants: int = 1
    """Random variants of each pair in the cache, with random crop or flip."""
    prompt_dropout: float = 0.0
    """Probability that a pair trains with the empty prompt (Diffusion-DPO: 0.2)."""
    empty_prompt: Literal["encode", "zeros"] = "encode"
    """What stands for the empty prompt: its encoding, as in all trainers, or zeros, as in SDXL's own sampling."""
    sizes: Literal["target", "original"] = "target"
    """What SDXL is told of a pair: an uncropped image of the side trained on (Diffusion-DPO), or the winner's stored
    size and where it was cropped (MaPO, NCP)."""
    latents: Literal["sample", "mean"] = "sample"
    """Draw latents from the VAE's posterior at every step, or take its mean."""
    swap_labels: bool = False
    """Winners and losers change places, with their scores; good and bad images too (Diffusion-NPO trains so)."""
    positive_ratio: float | None = None
    """For methods on labelled images: probability that a sample is a good one, drawn with replacement (Diffusion-KTO:
    0.8); None takes every image once an epoch."""
    cache: str | bool = True
    """Folder of the cache; true takes `cache` in the run's folder, false encodes at every step."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """How VAE moments are stored."""
    encode_batch_size: int = 8
    """Images or prompts that are encoded at a time."""
    text_encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What text encoders are stored and run in; what they say is kept as float32. "auto" is the type of train.precision
    on a GPU, where float16 is for CLIP alone (T5 and Gemma leave its range and take bfloat16), and float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loop."""

    steps: int
    """Optimizer steps; may grow on resume."""
    batch_size: int = 1
    """Pairs (or images) per device and forward."""
    accumulate: int = 1
    """Micro-batches per optimizer step; batch_size x accumulate x processes is the global batch size."""
    trainable: Literal["lora", "full"] = "lora"
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward passes; trained weights, errors and losses stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    shard: bool = False
    """Share weights, gradients, optimizer states and the reference out over the processes (FSDP2): for full
    fine-tuning of what does not fit on one device."""
    gradient_checkpointing: Checkpointing = False
    """What is computed again in the backward pass to save memory: true all of every block, "selective" norms,
    activations and other results that are cheap to have again; gradients are the same to the last bit."""
    channels_last: bool = False
    compile: bool = False
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """How linear layers of the frozen network under a LoRA are stored: as loaded, LLM.int8, or NF4 (bitsandbytes). The
    reference is the same network, so margins start at 0; what is exported is a LoRA for the weights as they were."""
    offload: bool = False
    """VAE, text encoders and judges wait on the CPU, and one at a time is on the device while it runs: slower where
    images are sampled or a cache is built, the same at steps from a cache, which need none of them."""
    attention: Attention = "sdpa"
    """Kernel of attention, the same for policy and reference; "auto" measures which is the quickest here."""
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    """Keep a moving average of the trained weights, and export it."""
    reference: Literal["none", "start", "ema", "pool"] | None = None
    """The policy as it started, a moving average of it, or as it was when the round began ("pool"); None is what the
    method chooses."""
    reference_decay: float | None = None
    """Decay of a moving reference per optimizer step; None takes 0.995."""
    fixed_draws: int | None = None
    """Draws of t, noise, latents and prompt dropout that every pair (or image) trains at, the same ones again and
    again; the reference's errors there are computed once and kept in the cache, and steps run the policy alone. None
    draws afresh at every sample. For references that stay as they are and methods that take nothing but their errors.
    """
    guidance: float | None = None
    """What a network with a guidance embedding is told in training, the reference too; None is 3.5 (FLUX.1)."""
    log_every: int = 1
    """Steps from one line of metrics.jsonl to the next; in the others nothing waits for the device."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    lr: float
    name: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to 0 at the last step."""
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Held-out pairs: the method's own loss and metrics at fixed noise, in every decile of the noise range."""

    every: int
    """Optimizer steps from one validation to the next."""
    fraction: float = 0.05
    """Share of the prompts that is held out, with all their pairs."""
    pairs: int = 64
    """At most so many held-out pairs are used."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How often a run can be resumed from."""

    every: int = 500
    """Optimizer steps from one checkpoint to the next; the last step is always one."""
    keep_last: int = 2
    best: str | None = None
    """Held-out measure, such as "rewards/accuracies" or "loss", whose best checkpoint is kept and exported."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Pictures of fixed prompts at fixed seeds while training goes on."""

    every: int
    """Optimizer steps from one grid to the next."""
    prompts: tuple[str, ...]
    steps: int = 20
    guidance: float = 7.5


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is handed out at the end."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of full weights; a LoRA stays float32."""
    push_to_hub: str | None = None
    """Hub id to upload the export to."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, whole."""

    output: str
    """Folder of the run."""
    seed: int = 0
    resume: str = "never"
    """"never", "latest", or the name of a checkpoint ("step-500") in the run's folder."""
    track: tuple[str, ...] = ()
    """Trackers by accelerate's names, such as "tensorboard" or "wandb"."""
    model: ModelSource
    data: DataSettings
    method: Method
    train: TrainSettings
    optimizer: OptimizerSettings
    timesteps: TimestepSampling | None = None
    """None is the family's own: uniform for DDPM, logit-normal for flow."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings | None = None
    samples: SampleSettings | None = None
    rounds: RoundSettings | None = None
    """Where the method needs them: the losers of a round are sampled before it."""
    online: OnlineSettings | None = None
    """Where the method trains on its own images: prompts are those of data.path."""
    guard: GuardSettings | None = None
    """Watches for training that pleases its own reward alone."""
    export: ExportSettings = field(default_factory=ExportSettings)
