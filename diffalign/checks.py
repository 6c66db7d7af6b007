"""What the sections of a run's config must not be together; every refusal says why."""

from diffalign.data.prepare import check_conditions
from diffalign.denoisers import Context, Family
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.models.load import load_context
from diffalign.models.lora import LoraSettings
from diffalign.online_checks import check_online
from diffalign.settings import TrainConfig
from diffalign.types import Method, ReferenceKind

REFERENCE_DECAY = 0.995
"""Of a moving reference, where the config names none."""


def reference_kind(config: TrainConfig) -> ReferenceKind:
    """What the policy is measured against: the config's choice, or else the method's own."""
    return config.train.reference or config.method.needs.references[0]


def method_name(method: Method) -> str:
    """The name of a method in `METHODS`."""
    return next(name for name, cls in METHODS.items() if isinstance(method, cls))


def check(config: TrainConfig) -> None:
    """Raises InputError for values that exclude each other, with the reason."""
    _check_method(config)
    _check_rounds(config)
    check_online(config)
    _check_guard(config)
    _check_fixed_draws(config)
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
    if config.data.cache is False:
        raise InputError("config.data.cache must not be false with train.fixed_draws, whose errors are kept there")


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


def context_of(config: TrainConfig, family: Family) -> Context:
    """What the denoiser is told beside prompts and t.

    Raises:
        InputError: The config asks for what the family does not have.
    """
    check_conditions(family, empty_prompt=config.data.empty_prompt, sizes=config.data.sizes)
    return load_context(config.model, family, resolution=config.data.resolution, guidance=config.train.guidance)
