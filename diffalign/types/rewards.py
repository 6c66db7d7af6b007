"""What a reward gets and gives, of one sample or of a set; what an encoder is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable  # 3.11's own isinstance runs properties, which read weights

Modality = Literal["image", "audio"]

Credit = Literal["loo", "influence", "self"]
"""How a set's number is shared out: exactly, by leaving each sample out; to first order; each sample as a set."""


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """What a reward may look at; fields that a reward does not need may be absent; those there have one length."""

    images: Float[Tensor, "b 3 h w"] | None = None
    """RGB float32 in [0, 1]."""
    prompts: Sequence[str] | None = None
    audio: Sequence[Float[Tensor, "c _"]] | None = None
    """Clips, which may differ in length: float32 samples in [-1, 1], channels first."""
    sample_rate: int | None = None
    """Samples a second of all clips."""
    references: Sequence[Sequence[Float[Tensor, "3 _ _"]]] | None = None
    """For each sample the images that it should resemble, RGB in [0, 1]."""
    group_ids: Sequence[int] | None = None
    """Samples of one prompt share a number."""
    metadata: Sequence[Mapping[str, object]] | None = None

    def __len__(self) -> int:
        """Samples."""
        held = (self.images, self.audio, self.prompts, self.references, self.group_ids, self.metadata)
        return next((len(values) for values in held if values is not None), 0)


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Scores of a batch: higher is better, NaN and not `valid` where a sample could not be judged."""

    scores: Float[Tensor, " b"]
    raw: dict[str, Float[Tensor, " b"]] = field(default_factory=dict)
    """Components and native values by name, in their native sign."""
    valid: Bool[Tensor, " b"] | None = None

    def __post_init__(self) -> None:
        if self.valid is None:
            object.__setattr__(self, "valid", ~self.scores.isnan())


@runtime_checkable
class Reward(Protocol):
    """A pointwise reward plug-in: a sample's score depends on that sample alone."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Model id, revision and scale: what must be equal for two numbers to be comparable."""
        ...

    @property
    def modality(self) -> Modality: ...

    @property
    def requires(self) -> frozenset[str]:
        """Fields of `RewardBatch` that must be there."""
        ...

    @property
    def range(self) -> tuple[float, float]: ...

    @property
    def differentiable(self) -> bool:
        """Whether it has `differentiable_score`."""
        ...

    @property
    def licence(self) -> str:
        """Of the weights; "-" where there are none."""
        ...

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores without gradient, by the reference preprocessing, float32."""
        ...


@runtime_checkable
class DifferentiableReward(Reward, Protocol):
    """A reward with a gradient to the pixels."""

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by a tensor preprocessing that keeps the graph."""
        ...


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings of a batch: one row a sample, or several for encoders that cut a clip into frames."""

    rows: Float[Tensor, "n d"]
    counts: tuple[int, ...]
    """Rows of each sample; they lie together, in the samples' order."""

    def __post_init__(self) -> None:
        if sum(self.counts) != len(self.rows):
            raise ValueError(f"counts must add up to the {len(self.rows)} rows, got {sum(self.counts)}")

    def take(self, samples: Sequence[int]) -> "Embedded":
        """Some of the samples, by their place; at least one."""
        parts = self.rows.split(list(self.counts))
        return Embedded(rows=torch.cat([parts[i] for i in samples]), counts=tuple(self.counts[i] for i in samples))


@runtime_checkable
class MediaEncoder(Protocol):
    """Turns images or audio into embeddings, for sets and similarities.

    Nothing that it declares may need the weights: checking an object against this protocol looks at each attribute.
    """

    @property
    def version(self) -> str:
        """Model id, revision, layer and normalisation: embeddings of another version are not comparable."""
        ...

    @property
    def modality(self) -> Modality: ...

    def embed(self, batch: RewardBatch) -> Embedded:
        """Rows by the reference preprocessing, without gradient, float32, on the media's device."""
        ...

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """Rows with gradient to the media."""
        ...


@dataclass(frozen=True, kw_only=True)
class SetOutput:
    """One number for a set: higher is better."""

    score: float
    raw: dict[str, float] = field(default_factory=dict)
    """Native values by name, in their native sign: a distance is positive here."""
    samples: int
    """Samples in the set; numbers of sets of different size are not comparable."""


@runtime_checkable
class SetReward(Protocol):
    """A reward of a whole set of samples, against a reference set or by itself.

    Where a reward is given a way to gather rows over processes, each process brings its share of the batches to
    `fit_reference` and `score_set`, all must call them, and all get the whole set's number.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def modality(self) -> Modality: ...

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def range(self) -> tuple[float, float]: ...

    @property
    def licence(self) -> str: ...

    def fit_reference(self, batches: Iterable[RewardBatch]) -> None:
        """Takes the reference set."""
        ...

    def save_reference(self, file: str | Path) -> None:
        """Writes what was made of the reference set, with the encoder's version, as safetensors."""
        ...

    def load_reference(self, file: str | Path) -> None:
        """Reads it; another encoder's file is an InputError."""
        ...

    def score_set(self, batches: Iterable[RewardBatch]) -> SetOutput:
        """The number of the set that the batches make up together."""
        ...

    def embed(self, batch: RewardBatch) -> Embedded:
        """A batch in the space in which sets are measured, of this process alone."""
        ...

    def of_rows(self, embedded: Embedded) -> SetOutput:
        """The number of a set whose samples are all here, as `embed` gave them."""
        ...

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, ""]:
        """The number of the set that one batch is, with gradient to its media."""
        ...

    def credit(self, batch: RewardBatch, mode: Credit = "loo") -> Float[Tensor, " b"]:
        """What each sample does for the set that the batch is; higher is better."""
        ...


@runtime_checkable
class SharedReward(SetReward, Protocol):
    """A reward of sets that tells what each sample did for a set whose rows are here."""

    def credit_rows(self, embedded: Embedded, mode: Credit = "loo") -> Float[Tensor, " b"]:
        """`credit` of a set, as `embed` gave it."""
        ...


@runtime_checkable
class SetTally(Protocol):
    """What a set of some of a pool's samples is worth, kept up while they are exchanged for others of the pool."""

    @property
    def score(self) -> float:
        """Higher is better."""
        ...

    def exchange(self, out: int, into: int) -> "SetTally":
        """With another of the pool's samples in the place of one of the set's; itself unchanged."""
        ...


@runtime_checkable
class TalliedReward(SetReward, Protocol):
    """A reward of sets that knows what an exchange does without counting the whole set anew."""

    def tally(self, pool: Embedded, members: Sequence[int]) -> SetTally:
        """Of the set of these samples of a pool, by their places; its score is that of all rows, as credit is."""
        ...


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A plain `f(images, prompts) -> scores` as a reward plug-in."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]]
    version: str = "function"
    requires: frozenset[str] = frozenset({"images", "prompts"})
    range: tuple[float, float] = (float("-inf"), float("inf"))
    modality: Modality = "image"
    differentiable: bool = False
    licence: str = "-"

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        assert batch.images is not None, "a function scores images"
        scores = torch.as_tensor(self.function(batch.images, batch.prompts or []), dtype=torch.float32)
        if scores.shape != (len(batch.images),):
            raise ValueError(
                f"reward {self.name!r} must return one score per image, shape ({len(batch.images)},), "
                f"got {tuple(scores.shape)}"
            )
        return RewardOutput(scores=scores)
