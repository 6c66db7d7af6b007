"""What an online run must not be: settings of data that it does not read, rounds that do not come out even."""

from dataclasses import fields

from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.online.collate import turns_of
from diffalign.online.settings import OnlineSettings
from diffalign.sampling.rollout import noisy_steps
from diffalign.sampling.walk import KernelWalk
from diffalign.settings import DataSettings, TrainConfig
from diffalign.types import OnlineMethod

_READ = ("path", "limit", "resolution", "seconds", "empty_prompt", "encode_batch_size", "text_encoder_dtype")
"""Keys of [data] that mean something where data are prompts."""
_NOT_REAL = (
    *("buckets", "bucket_step", "bucket_min", "bucket_max", "sizes", "seconds"),
    *("streaming", "swap_labels", "positive_ratio"),
)
"""Keys of [data] that mean nothing for rows among own images, which have one size, and of which winners are taken."""


def check_online(config: TrainConfig) -> None:
    """Raises InputError where [online] and the method do not belong together, or a round would not come out even."""
    name = next(n for n, cls in METHODS.items() if isinstance(config.method, cls))
    needs, online = config.method.needs, config.online
    if needs.data != "prompts":
        if online is not None:
            raise InputError(f"config.online must be left out with method {name!r}, which trains on images of the data")
        return
    if online is None:
        raise InputError(
            f"config.online must be there with method {name!r}, which trains on its own images; set its rewards"
        )
    _check_data(config.data, name, real=needs.real)
    if config.validation is not None:
        raise InputError(
            f"config.validation must be left out with method {name!r}, for which no pairs are held out; use [samples]"
        )
    if online.group < needs.group_at_least:
        raise InputError(
            f"config.online.group must be at least {needs.group_at_least} with method {name!r}, which compares images "
            f"of one prompt; got {online.group}"
        )
    if config.train.steps % online.updates:
        raise InputError(
            f"config.train.steps must be a multiple of online.updates, {online.updates}, got {config.train.steps}"
        )
    if needs.whole_groups and config.train.batch_size % online.group:
        raise InputError(
            f"config.train.batch_size must be a multiple of online.group, {online.group}, with method {name!r}, which "
            f"compares whole groups; got {config.train.batch_size}"
        )
    if needs.log_ratio and len(online.rewards) > 1:
        raise InputError(
            f"config.online.rewards must be one with method.kl_reward, which each score would lose, got "
            f"{len(online.rewards)}; make one of them with diffalign.rewards.composite"
        )
    if online.set_reward is not None and not needs.of_sets:
        raise InputError(
            f"config.online.set_reward must be left out with method {name!r}, which scores images one by one"
        )


def _check_data(data: DataSettings, name: str, *, real: bool) -> None:
    plain = DataSettings(path=data.path)
    for item in fields(data):
        read = item.name not in _NOT_REAL if real else item.name in _READ
        if not read and getattr(data, item.name) != getattr(plain, item.name):
            why = "takes winners of one size among its own images" if real else "makes its own images"
            raise InputError(
                f"config.data.{item.name} must be left out with method {name!r}, which {why}; got "
                f"{getattr(data, item.name)!r}"
            )


def check_work(config: TrainConfig, settings: OnlineSettings, walk: KernelWalk, processes: int) -> None:
    """Raises InputError where the updates of a round would see some of its images more often than others."""
    method = config.method
    assert isinstance(method, OnlineMethod), "a method on prompts selects"
    items = method.needs.items
    if items not in ("transitions", "images") or method.needs.real_share > 0:
        return  # how many pairs there are is known when they are judged, and a share is not whole
    low = settings.window
    noisy = noisy_steps(walk.kernel, walk.schedule)
    levels = turns_of(method, noisy, len(walk.schedule))[0] if low is None else low.size
    whole = settings.images * levels
    t = config.train
    slots = settings.updates * t.accumulate * t.batch_size * processes
    if slots % whole:
        per_update = settings.updates * t.batch_size * processes
        fitting = (
            f"set train.accumulate to {whole // per_update}"
            if whole % per_update == 0
            else "change online.prompts, online.group or train.batch_size"
        )
        what = f"{settings.images} images" + (f" at {levels} moves" if levels > 1 else "")
        raise InputError(
            f"config: the updates of a round must see all of its {what} equally often, so online.updates x "
            f"train.accumulate x train.batch_size x processes must be a multiple of {whole}, got {slots}; {fitting}"
        )
