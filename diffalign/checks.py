"""What the sections of a run's config must not be together; every refusal says why."""

import torch

from diffalign.data.buckets import STEP, Size, bucket_table
from diffalign.data.prepare import check_conditions
from diffalign.denoisers import Context, Family
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.models.load import load_context
from diffalign.models.lora import LoraSettings
from diffalign.models.quantized import Rounding
from diffalign.online_checks import check_online
from diffalign.settings import TrainConfig
from diffalign.types import Method, ReferenceKind

REFERENCE_DECAY = 0.995
"""Of a moving reference, where the config names none."""
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What networks run in; None is as they are, in float32."""


def reference_kind(config: TrainConfig) -> ReferenceKind:
    """What the policy is measured against: the config's choice, or else the method's own."""
    return config.train.reference or config.method.needs.references[0]


def method_name(method: Method) -> str:
    """The name of a method in `METHODS`."""
    return next(name for name, cls in METHODS.items() if isinstance(method, cls))


def text_dtype_of(config: TrainConfig, device: str) -> torch.dtype:
    """What text encoders run in on "cpu" or "cuda"; where float16 is too narrow, they take bfloat16 in its place."""
    if config.data.text_encoder_dtype != "auto":
        return torch.bfloat16 if config.data.text_encoder_dtype == "bfloat16" else torch.float32
    return (PRECISIONS[config.train.precision] if device == "cuda" else None) or torch.float32


def rounding_of(config: TrainConfig, device: torch.device) -> Rounding | None:
    """How the frozen network is rounded; None where it is not."""
    bits = config.train.quantize
    if bits == "none":
        return None
    return Rounding(bits=bits, dtype=PRECISIONS[config.train.precision] or torch.float32, device=device)


def check(config: TrainConfig) -> None:
    """Raises InputError for values that exclude each other, with the reason."""
    _check_method(config)
    _check_rounds(config)
    check_online(config)
    _check_guard(config)
    _check_fixed_draws(config)
    _check_buckets(config)
    _check_shard(config)
    _check_ranges(config)
    _check_sections(config)
    _check_checkpointing(config)


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
    if needs.float32_features and config.train.quantize != "none":
        raise InputError(
            f"config.train.quantize must be 'none' with method {name!r}, whose features lie too close together for "
            f"rounded weights; got {config.train.quantize!r}"
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


def _check_guard(config: TrainConfig) -> None:
    """Looks that happen, between rounds, and held-out rewards that are held out."""
    guard, online = config.guard, config.online
    if guard is None:
        return
    if guard.every > config.train.steps:
        raise InputError(
            f"config.guard.every must be at most train.steps, {config.train.steps}, or there is no look; got "
            f"{guard.every}"
        )
    if online is not None and guard.every % online.updates:
        raise InputError(
            f"config.guard.every must be a multiple of online.updates, {online.updates}, got {guard.every}"
        )
    if online is not None and online.rewards and guard.trained:
        raise InputError(
            "config.guard.trained must be left out with online.rewards, which are what is trained; got "
            f"{', '.join(guard.trained)}"
        )


def _check_fixed_draws(config: TrainConfig) -> None:
    """Errors of the reference may be computed beforehand where it stays as it is and nothing else of it is asked."""
    draws, kind, name = config.train.fixed_draws, reference_kind(config), method_name(config.method)
    if draws is None:
        return
    if draws < 1:
        raise InputError(f"config.train.fixed_draws must be at least 1, got {draws}")
    left_out = f"config.train.fixed_draws must be left out with method {name!r}"
    if kind == "none":
        raise InputError(f"{left_out}, which measures against no reference; got {draws}")
    if config.method.needs.data == "prompts":
        raise InputError(f"{left_out}, which trains on new images of its own; got {draws}")
    if kind != "start":
        stays = '; set train.reference = "start"' if "start" in config.method.needs.references else ""
        raise InputError(
            f"config.train.fixed_draws must be left out with a reference that moves, got {draws} and {kind!r}{stays}"
        )
    if config.method.needs.errors is None:
        raise InputError(f"{left_out}, which asks more of its reference than its errors at a draw; got {draws}")
    if config.train.quantize == "8bit":
        raise InputError(
            "config.train.quantize must be 'none' or '4bit' with train.fixed_draws, got '8bit', under which an error "
            "depends on the rest of its batch too"
        )
    if config.data.cache is False:
        raise InputError("config.data.cache must not be false with train.fixed_draws, whose errors are kept there")


def _check_buckets(config: TrainConfig) -> None:
    """Shapes that change from step to step, where everything takes them."""
    data = config.data
    if data.buckets is False:
        for key, value, unset in (
            ("bucket_step", data.bucket_step, STEP),
            ("bucket_min", data.bucket_min, None),
            ("bucket_max", data.bucket_max, None),
        ):
            if value != unset:
                raise InputError(f"config.data.{key} must be left out without data.buckets, got {value}")
        return
    for key, taken, why in (
        ("[rounds]", config.rounds is not None, "whose images are sampled as squares"),
        (
            "train.fixed_draws",
            config.train.fixed_draws is not None,
            "whose errors are computed in batches of one shape",
        ),
        ("train.compile", config.train.compile, "which would compile the network anew for every shape"),
        ("data.positive_ratio", data.positive_ratio is not None, "which draws images whatever their shape"),
    ):
        if taken:
            got = "true" if data.buckets is True else list(data.buckets)
            raise InputError(f"config.data.buckets must be false with {key}, {why}; got {got}")


def _check_shard(config: TrainConfig) -> None:
    """Processes gather sharded weights together, so each must run its networks whole and as often as the others."""
    t, needs, name = config.train, config.method.needs, method_name(config.method)
    if not t.shard:
        return
    must = "config.train.shard must be false with"
    if t.trainable != "full":
        raise InputError(f'{must} train.trainable = "lora", whose gradients and optimizer states are small; got true')
    plain = needs.errors is not None or needs.references == ("none",)
    if needs.data == "prompts" or needs.replay is not None or not plain:
        raise InputError(
            f"{must} method {name!r}, which asks more of its networks than one whole forward pass of each a batch; "
            "got true"
        )
    for there, what, why in (
        (t.precision == "fp16", 'train.precision = "fp16"', "whose gradient scaling is for whole gradients"),
        (config.optimizer.name == "adamw8bit", 'optimizer.name = "adamw8bit"', "whose states are of whole tensors"),
        (t.compile, "train.compile", "which is not known to go together"),
        (t.channels_last, "train.channels_last", "whose weights do not lie in rows"),
        (
            t.gradient_checkpointing == "selective",
            'train.gradient_checkpointing = "selective"',
            "whose tape would keep gathered weights",
        ),
        (t.fixed_draws is not None, "train.fixed_draws", "whose errors each process computes by itself"),
        (config.samples is not None, "[samples]", "which the main process makes by itself"),
        (config.guard is not None, "[guard]", "whose images each process makes by itself"),
    ):
        if there:
            raise InputError(f"{must} {what}, {why}; got true")


def check_shard(config: TrainConfig, processes: int) -> None:
    """Raises InputError where there is nobody to share weights with."""
    if config.train.shard and processes < 2:
        raise InputError(
            f"config.train.shard must be false on {processes} process, which has nobody to share with, got true; start "
            "several with accelerate launch or torchrun"
        )


def _check_ranges(config: TrainConfig) -> None:
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
    if config.train.ema_decay is not None and not 0 < config.train.ema_decay < 1:
        raise InputError(f"config.train.ema_decay must be in (0, 1), got {config.train.ema_decay}")


def _check_sections(config: TrainConfig) -> None:
    if config.train.trainable == "full" and config.lora != LoraSettings():
        raise InputError('config.lora must be left out with train.trainable = "full"; it shapes a LoRA only')
    if config.train.trainable == "full" and config.train.quantize != "none":
        raise InputError(
            'config.train.quantize must be "none" with train.trainable = "full", which trains the weights themselves; '
            f'got {config.train.quantize!r}, or set train.trainable = "lora"'
        )
    if config.train.trainable == "full" and config.model.lora is not None:
        raise InputError(
            'config.model.lora must be left out with train.trainable = "full"; fuse it into a denoiser first and '
            "name that as model.denoiser"
        )
    if config.data.cache is False and (config.data.variants != 1 or config.data.streaming):
        raise InputError(
            "config.data.cache must not be false with data.variants or data.streaming; both need the cache"
        )
    if config.data.cache is False and config.train.offload:
        raise InputError(
            "config.train.offload must be false with data.cache = false, which encodes at every step; leave data.cache "
            "out, and steps need no encoders"
        )
    random = config.data.flip or config.data.crop == "random"
    if random and config.data.cache is not False and config.data.variants < 2:
        raise InputError(
            "config.data.variants must be at least 2 with random crop or flip and the cache on, "
            f"got {config.data.variants}; or set data.cache = false"
        )
    if config.checkpoint.best is not None and config.validation is None:
        raise InputError("config.checkpoint.best must be left out without [validation], which measures it")


def _check_checkpointing(config: TrainConfig) -> None:
    if config.train.gradient_checkpointing == "selective" and config.train.compile:
        raise InputError(
            "config.train.gradient_checkpointing must be true or false with train.compile, whose graphs choose for "
            "themselves what to compute again; got 'selective'"
        )


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raises InputError where a mean over a micro-batch would be one over a single sample."""
    size = config.train.batch_size
    if config.method.needs.batch_statistics and size * processes < 2:
        raise InputError(
            "config.train.batch_size must be at least 2 over all processes with method "
            f"{method_name(config.method)!r}, "
            f"whose baseline is a mean over the batch; got {size} on {processes} process"
        )


def buckets_of(config: TrainConfig, family: Family) -> tuple[Size, ...]:
    """The sizes that images are fitted to, width first; none for squares.

    Raises:
        InputError: The family takes squares alone, or the sizes are not what its network and VAE take.
    """
    data, context = config.data, context_of(config, family)
    if data.buckets is False:
        return ()
    if family.square:
        raise InputError(
            f"config.data.buckets must be false with the family {family.name!r}, whose network takes squares alone"
        )
    token = context.vae_factor * family.patch
    if data.bucket_step % token:
        raise InputError(
            f"config.data.bucket_step must be a multiple of {token} with this model, got {data.bucket_step}"
        )
    names = None if data.buckets is True else data.buckets
    return bucket_table(context.resolution, names, step=data.bucket_step, low=data.bucket_min, high=data.bucket_max)


def context_of(config: TrainConfig, family: Family) -> Context:
    """What the denoiser is told beside prompts and t.

    Raises:
        InputError: The config asks for what the family does not have.
    """
    check_conditions(family, empty_prompt=config.data.empty_prompt, sizes=config.data.sizes)
    if family.modality != "image":
        _check_without_images(config, family)
    return load_context(
        config.model,
        family,
        resolution=config.data.resolution,
        seconds=config.data.seconds,
        guidance=config.train.guidance,
    )


def _check_without_images(config: TrainConfig, family: Family) -> None:
    """Data on disk, grids and the guard are of images."""
    if config.online is None:
        raise InputError(
            f"config.method must be one on prompts with the family {family.name!r}, since data are read as images; got "
            f"{method_name(config.method)!r}; take one that makes its own samples, such as 'dragon' or 'ddpo'"
        )
    if config.method.needs.real:
        raise InputError(
            f"config.method must mix in no images of the data with the family {family.name!r}, which makes none; got "
            f"{method_name(config.method)!r} with real_share or real_weight"
        )
    for name, section in (("samples", config.samples), ("guard", config.guard)):
        if section is not None:
            raise InputError(
                f"config.{name} must be left out with the family {family.name!r}, which makes no images; its samples "
                "lie in the run's rounds/"
            )
