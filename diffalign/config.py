"""Run configs: TOML files that map one to one onto frozen dataclasses, loaded strictly.

An unknown key, a missing key and a wrong type are errors with the full path of the key. Sections are the dataclasses
of the parts that use them: `[model]` is `models.load.ModelSource`, `[method]` a method's own class, and so on.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffalign import losses
from diffalign.data.selfsampled import RoundSettings
from diffalign.data.sources import PairSource
from diffalign.errors import InputError, near_match
from diffalign.methods import METHODS
from diffalign.models.load import ModelSource
from diffalign.models.lora import LoraSettings
from diffalign.paths import TimestepSampling
from diffalign.shipped import configs
from diffalign.strict import apply_override, build, check_keys, section_class, typed
from diffalign.types import Method, ReferenceKind


@dataclass(frozen=True, kw_only=True)
class DataSettings(PairSource):
    """Preference data, how images are made to fit, and where their encodings are kept."""

    resolution: int | None = None
    """Side in pixels; None takes the model's own."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror pairs at random; falsifies captions that name a side."""
    variants: int = 1
    """Random variants of each pair in the cache, with random crop or flip."""
    prompt_dropout: float = 0.0
    """Probability that a pair trains with the empty prompt (Diffusion-DPO: 0.2)."""
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
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    """Keep a moving average of the trained weights, and export it."""
    reference: Literal["none", "start", "ema"] | None = None
    """The policy as it started, or a moving average of it; None is what the method chooses."""
    reference_decay: float | None = None
    """Decay of a moving reference per optimizer step; None takes 0.995."""
    log_every: int = 1
    """Steps from one line of metrics.jsonl to the next."""


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
    export: ExportSettings = field(default_factory=ExportSettings)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run config by path or by the bare name of a shipped one, with `section.key=value` overrides.

    Raises:
        InputError: No such file, broken TOML, unknown or missing key, wrong type, or values that exclude each other.
    """
    file = find(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {str(file)!r} must be valid TOML: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return parse(table)


def find(path: str | Path) -> Path:
    """The file of a config: a path, or the bare name of a shipped config."""
    for file in (Path(path), configs() / path, configs() / f"{path}.toml"):
        if file.is_file():
            return file
    names = [file.stem for file in configs().glob("*.toml")]
    raise InputError(f"config must be a file or a shipped name, got {str(path)!r}{near_match(Path(path).stem, names)}")


def parse(table: Mapping[str, Any]) -> TrainConfig:
    """A config from a table as TOML gives it."""
    table = dict(table)
    method = _method(table.pop("method", None))
    check_keys(TrainConfig, {**table, "method": {}}, "config", skip=("method",))
    values = dict(table)
    sections = {f.name: section_class(f.type) for f in dataclasses.fields(TrainConfig)}
    for name, value in table.items():
        cls = sections[name]
        values[name] = build(cls, value, f"config.{name}") if cls is not None else _scalar(name, value)
    try:
        config = TrainConfig(method=method, **values)
    except TypeError as error:
        raise InputError(f"config: {error}") from error
    _check(config)
    return config


def dump(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as a table for TOML: every key, defaults too; None is left out."""
    table: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "method":
            table["method"] = {"name": method_name(value), **_plain(value)}
        elif dataclasses.is_dataclass(value):
            table[item.name] = _plain(value)
        elif value is not None:
            table[item.name] = list(value) if isinstance(value, tuple) else value
    return table


def _method(table: Any) -> Method:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise InputError(f"config.method.name must name a method: {', '.join(sorted(METHODS))}, got {table!r}")
    options = dict(table)
    name = options.pop("name")
    if name not in METHODS:
        raise InputError(f"config.method.name must be a known method, got {name!r}{near_match(name, METHODS)}")
    cls = METHODS[name]
    own = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key in _ABSENT and key not in own:
            raise InputError(f"config.method.{key} must be left out with method {name!r}: {_ABSENT[key]}")
    if "link" in own & options.keys():
        link = options["link"]
        spec = dict(link) if isinstance(link, Mapping) else {"name": link}
        if not isinstance(spec.get("name"), str):
            raise InputError(f"config.method.link must be a name or a table with a name, got {link!r}")
        options["link"] = losses.link(spec.pop("name"), **spec)
    return typing.cast(Method, build(cls, options, "config.method"))


def _scalar(name: str, value: Any) -> Any:
    return typed(typing.get_type_hints(TrainConfig)[name], value, f"config.{name}")


REFERENCE_DECAY = 0.995
"""Of a moving reference, where the config names none."""

_ABSENT = {
    "link": "its loss is not a link on two implicit rewards",
    "beta": "it has no KL strength",
    "safeguard": "it has no winner and loser at one shared noise, whose residuals could be compared",
    "scores": "it does not weigh one image against another by a link",
    "share_noise": "its noise is not a choice",
}
"""Why a method may lack an option that others have."""


def reference_kind(config: TrainConfig) -> ReferenceKind:
    """What the policy is measured against: the config's choice, or else the method's own."""
    return config.train.reference or config.method.needs.references[0]


def _check_reference(config: TrainConfig, name: str) -> None:
    allowed = config.method.needs.references
    kind = reference_kind(config)
    if kind not in allowed:
        reasons: dict[tuple[str, ...], str] = {
            ("none",): "measures against no reference",
            ("pool",): "takes its references from its own earlier rounds",
        }
        why = reasons.get(allowed, "measures the policy against a reference")
        choices = " or ".join(repr(k) for k in allowed if k not in ("none", "pool"))
        remedy = f"must be {choices}" if choices else "must be left out"
        raise InputError(f"config.train.reference {remedy} with method {name!r}, which {why}; got {kind!r}")
    decay = config.train.reference_decay
    if decay is not None and kind != "ema":
        raise InputError(f"config.train.reference_decay must be left out unless the reference is 'ema', got {decay}")
    if decay is not None and not 0 <= decay < 1:
        raise InputError(f"config.train.reference_decay must be in [0, 1), got {decay}")


def _check_method(config: TrainConfig) -> None:
    """What the method needs against what the run gives it."""
    name = method_name(config.method)
    needs = config.method.needs
    _check_reference(config, name)
    ratio = config.data.positive_ratio
    if ratio is not None and needs.data != "labelled":
        takes = "pairs, of which each has a good image and a bad one" if needs.data == "pairs" else "good images alone"
        raise InputError(f"config.data.positive_ratio must be left out with method {name!r}, which takes {takes}")
    if ratio is not None and not 0 < ratio < 1:
        raise InputError(f"config.data.positive_ratio must be in (0, 1), got {ratio}; leave it out to take each once")
    if needs.float32_features and config.train.precision == "bf16":
        raise InputError(
            f"config.train.precision must be 'no' or 'fp16' with method {name!r}, whose features lie closer together "
            "than bf16 resolves; got 'bf16'"
        )


def _check_rounds(config: TrainConfig) -> None:
    """Rounds where the method samples its own losers, and nowhere else."""
    name, rounds = method_name(config.method), config.rounds
    if config.method.needs.replay is None:
        if rounds is not None:
            raise InputError(
                f"config.rounds must be left out with method {name!r}, which trains on the images of the data alone"
            )
        return
    if rounds is None:
        raise InputError(
            f"config.rounds must be there with method {name!r}, whose losers are images of an earlier policy; set its "
            "count, a divisor of train.steps"
        )
    if config.data.swap_labels:
        raise InputError(
            f"config.data.swap_labels must be false with method {name!r}, whose losers are its own samples"
        )
    if config.train.steps % rounds.count:
        raise InputError(
            f"config.train.steps must be a multiple of rounds.count, {rounds.count}, got {config.train.steps}"
        )
    if config.checkpoint.best not in (None, "err_w"):
        raise InputError(
            "config.checkpoint.best must be 'err_w' or left out with [rounds], where every other measure is against a "
            f"reference and losers of one round; got {config.checkpoint.best!r}"
        )


def method_name(method: Method) -> str:
    """The name of a method in `METHODS`."""
    return next(name for name, cls in METHODS.items() if isinstance(method, cls))


def _check(config: TrainConfig) -> None:
    """Values that exclude each other, each with the reason."""
    _check_method(config)
    _check_rounds(config)
    for name, value, least in (
        ("train.steps", config.train.steps, 1),
        ("train.batch_size", config.train.batch_size, 1),
        ("train.accumulate", config.train.accumulate, 1),
        ("train.log_every", config.train.log_every, 1),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, 0),
        ("data.encode_batch_size", config.data.encode_batch_size, 1),
        ("seed", config.seed, 0),
    ):
        if value < least:
            raise InputError(f"config.{name} must be at least {least}, got {value}")
    for name, number in (("optimizer.lr", config.optimizer.lr), ("train.max_grad_norm", config.train.max_grad_norm)):
        if not number > 0:
            raise InputError(f"config.{name} must be positive, got {number}")
    if config.train.trainable == "full" and config.lora != LoraSettings():
        raise InputError('config.lora must be left out with train.trainable = "full"; it shapes a LoRA only')
    if config.train.trainable == "full" and config.model.lora is not None:
        raise InputError(
            'config.model.lora must be left out with train.trainable = "full"; fuse it into a denoiser first and '
            "name that as model.denoiser"
        )
    if config.data.cache is False and (config.data.variants != 1 or config.data.streaming):
        raise InputError(
            "config.data.cache must not be false with data.variants or data.streaming; both need the cache"
        )
    random = config.data.flip or config.data.crop == "random"
    if random and config.data.cache is not False and config.data.variants < 2:
        raise InputError(
            "config.data.variants must be at least 2 with random crop or flip and the cache on, "
            f"got {config.data.variants}; or set data.cache = false"
        )
    if config.checkpoint.best is not None and config.validation is None:
        raise InputError("config.checkpoint.best must be left out without [validation], which measures it")
    if config.train.ema_decay is not None and not 0 < config.train.ema_decay < 1:
        raise InputError(f"config.train.ema_decay must be in (0, 1), got {config.train.ema_decay}")


def _plain(value: Any) -> dict[str, Any]:
    out = {}
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if callable(inner):
            inner = _link_table(inner)
        elif dataclasses.is_dataclass(inner):
            inner = _plain(inner)
        if inner is not None and inner != {}:
            out[item.name] = list(inner) if isinstance(inner, tuple) else inner
    return out


def _link_table(link: Any) -> str | dict[str, Any]:
    name = losses.link_name(link)
    return {"name": name, **link.keywords} if isinstance(link, partial) else name
