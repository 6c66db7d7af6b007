"""What a model's samples are, as files, as rewards take them, and in a report: pictures, or clips of sound.

The one place where the two part. Engines hold batches [B, ...] of samples, write and read them through a `Medium`, and
ask rewards with the batch that it makes. What can be measured of one kind alone, and what to call it, it says itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from diffalign.data.sounds import read_wav
from diffalign.denoisers import Context
from diffalign.errors import InputError
from diffalign.evaluate.clips import Clips as Clips
from diffalign.evaluate.clips import clip_files
from diffalign.evaluate.pictures import PICTURES as PICTURES
from diffalign.evaluate.showing import Shown
from diffalign.types import Modality, Reward, RewardBatch, SetReward


@runtime_checkable
class Medium(Protocol):
    """What samples are."""

    @property
    def modality(self) -> Modality: ...

    @property
    def folder(self) -> str:
        """Of the files; what messages call them too."""
        ...

    @property
    def one(self) -> str:
        """What messages call one of them."""
        ...

    @property
    def suffix(self) -> str: ...

    @property
    def accepts(self) -> frozenset[str]:
        """Suffixes of others' files that are taken over."""
        ...

    @property
    def fields(self) -> frozenset[str]:
        """What of a `RewardBatch` they fill."""
        ...

    @property
    def digest(self) -> str:
        """Column with the hash of a file."""
        ...

    @property
    def hearing(self) -> tuple[object, ...]:
        """What scores depend on beside the file, the prompt and the reward."""
        ...

    @property
    def checks(self) -> frozenset[str]:
        """Kinds of checks for hacking that make sense of them."""
        ...

    @property
    def words(self) -> Mapping[str, str]:
        """What `statistics` measures, by name."""
        ...

    @property
    def difference(self) -> str:
        """What `moved` measures."""
        ...

    @property
    def perturbations(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Small changes that leave a sample good."""
        ...

    @property
    def gallery(self) -> str:
        """Title of the samples in a report that nobody chose."""
        ...

    @property
    def prompts_shown(self) -> int:
        """Prompts there."""
        ...

    @property
    def changes_shown(self) -> int:
        """Prompts of each part of the largest changes."""
        ...

    @property
    def note(self) -> str:
        """How a report shows them, in words."""
        ...

    def stored(self, samples: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        """As they will be read back, so that rewards judge what lies on disk."""
        ...

    def encoded(self, sample: Float[Tensor, " *rest"]) -> bytes:
        """The bytes of a file."""
        ...

    def read(self, file: Path) -> Float[Tensor, " *rest"]:
        """A sample that was written; an unreadable or foreign file is an InputError."""
        ...

    def taken(self, file: Path) -> bytes:
        """The bytes of another's file as one of ours; an unreadable or foreign file is an InputError."""
        ...

    def asked(
        self,
        samples: Float[Tensor, " b *rest"],
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, object]] | None = None,
    ) -> RewardBatch:
        """What rewards and encoders are asked with."""
        ...

    def heard_at(self, rate_hz: int) -> "Medium":
        """The same for rewards that hear at another rate; of what is not heard, an InputError."""
        ...

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        """The files of a reference set; too few, or one that cannot be read, is an InputError."""
        ...

    def trial(self, shape: Sequence[int]) -> Float[Tensor, " *rest"]:
        """A sample to try rewards on before there is any."""
        ...

    def statistics(self, samples: Float[Tensor, " b *rest"]) -> dict[str, Float[Tensor, " b"]]:
        """What can be measured of them without any model."""
        ...

    def moved(self, one: Float[Tensor, " b *rest"], other: Float[Tensor, " b *rest"]) -> Float[Tensor, " b"]:
        """How far apart two samples of each row are, without any model."""
        ...

    def shown(self, file: Path, arms: int) -> Shown:
        """A file in a page, beside those of so many arms."""
        ...

    def facts(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """How large they are, for the head of a report, by the settings of results.json."""
        ...

    def size(self, settings: Mapping[str, Any]) -> str:
        """The same in a few words."""
        ...


def _pictures(context: Context, heard_hz: int | None, mono: bool, where: str) -> Medium:
    if heard_hz is not None or mono:
        named = f"heard_hz {heard_hz}" if heard_hz is not None else "mono"
        raise InputError(f"{where}heard_hz and {where}mono must be left out with a model of images, got {named}")
    return PICTURES


def _clips(context: Context, heard_hz: int | None, mono: bool, where: str) -> Medium:
    assert context.sample_rate_hz is not None, "a family of sound says how many samples a second it makes"
    return Clips(rate_hz=context.sample_rate_hz, heard_hz=heard_hz, mono=mono, where=where)


MEDIA: dict[Modality, Callable[[Context, int | None, bool, str], Medium]] = {"image": _pictures, "audio": _clips}


def medium_of(
    modality: Modality,
    context: Context,
    *,
    heard_hz: int | None = None,
    mono: bool = False,
    where: str = "online.",
) -> Medium:
    """What a family's samples are, and how rewards get them.

    Args:
        where: What stands before `heard_hz` and `mono` in a message.

    Raises:
        InputError: A way to hear images.
    """
    return MEDIA[modality](context, heard_hz, mono, where)


def _no_rate(folder: Path) -> Context:
    return Context()


def _rate_of(folder: Path) -> Context:
    """The rate of a folder's first clip."""
    return Context(sample_rate_hz=read_wav(clip_files(folder)[0])[1])


_FOUND: dict[Modality, Callable[[Path], Context]] = {"image": _no_rate, "audio": _rate_of}


def medium_of_files(modality: Modality, folder: Path, *, heard_hz: int | None = None, mono: bool = False) -> Medium:
    """The medium of files that no model of ours made; of clips the first says at which rate they are.

    Raises:
        InputError: No clips, or a way to hear images.
    """
    return medium_of(modality, _FOUND[modality](folder), heard_hz=heard_hz, mono=mono, where="")


def check_takes(reward: Reward | SetReward, where: str, medium: Medium = PICTURES) -> None:
    """Raises InputError for a reward, named at `where`, that looks at what samples do not have."""
    missing = sorted(reward.requires - medium.fields - {"prompts", "metadata"})
    if missing or reward.modality != medium.modality:
        what = f"{missing[0]}" if missing else reward.modality
        raise InputError(
            f"{where} must judge {medium.folder} and prompts alone, got {reward.name!r}, which also needs {what}"
        )
