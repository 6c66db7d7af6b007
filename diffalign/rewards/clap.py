"""CLAP score: the cosine between the embeddings of a clip and of its prompt; CLAP as an encoder of sets.

The model hears windows of 10 s. transformers' feature extractor takes a random crop of anything longer (and, for the
fused checkpoint, three random crops): here a longer clip is cut into windows at fixed places, so that a number is the
same twice. Log-mel bands are computed in torch with the extractor's own filters, and agree with it to the last bits of
float32: 8e-6 dB is the largest difference measured. So scores and gradients have one front end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError, near_match
from diffalign.rewards.audio import mono_clips, silent
from diffalign.rewards.cosine import SCALES, scale_of
from diffalign.rewards.inputs import check_batch
from diffalign.rewards.log_mel import magnitudes
from diffalign.rewards.networks import pinned, reading, whole_network
from diffalign.shipped import MODELS, resolve
from diffalign.types import Embedded, Modality, RewardBatch, RewardOutput

DEFAULT_MODEL = "laion/clap-htsat-unfused"

_POOLINGS = ("windows", "mean")


@dataclass(frozen=True, kw_only=True)
class CLAPParts:
    """A loaded CLAP model and its two front ends."""

    net: Any
    """A transformers `ClapModel` in eval mode, float32."""
    extractor: Any
    """A `ClapFeatureExtractor`: its constants and filters are used, its random crops are not."""
    tokenizer: Any


class CLAPEncoder:
    """CLAP's unit embeddings of 48 kHz mono clips and of prompts, one row per window of 10 s.

    Models: laion/clap-htsat-unfused, laion/larger_clap_general, laion/larger_clap_music,
    laion/larger_clap_music_and_speech (Apache-2.0), tiny-clap (of the tiny world's sounds: clips at 16 kHz, windows of
    1.536 s), or a folder. Weights are read at the first use, from safetensors.

    A clip of at most one window is repeated and zero padded to it, as in the published front ends ("repeatpad"). A
    longer one is cut every `hop_seconds` (a window's length by default); the last window ends with the clip, so all of
    it is heard and nothing padded: a clip of 10.1 s has two rows that overlap. `pooling` "mean" gives one row a clip,
    the unit mean of its windows. Silence has an embedding like any sound. Networks stay in float32, also under
    autocast: the audio tower begins with a BatchNorm.

    Departs: A fused checkpoint (laion/clap-htsat-fused) never sees more than one window, so its fusion, which needs
    random crops, is not used. Prompts are cut at the text tower's 512 tokens as in transformers; laion_clap cuts at 77.
    """

    modality: Modality = "audio"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        pooling: str = "windows",
        hop_seconds: float | None = None,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        parts: CLAPParts | None = None,
    ) -> None:
        """Names a model: a shipped name ("tiny-clap"), a folder or a hub id; or takes loaded `parts` as they are."""
        if pooling not in _POOLINGS:
            raise InputError(f"encoder clap: pooling must be known, got {pooling!r}{near_match(pooling, _POOLINGS)}")
        self.model, self.revision = model, revision
        self.pooling, self.hop_seconds = pooling, hop_seconds
        self.batch_size = batch_size
        self.device = torch.device(device)
        if parts is not None:
            _check_parts(parts, model)
            self.parts = parts
            self.to(device)

    @cached_property
    def parts(self) -> CLAPParts:
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        path = resolve(self.model, MODELS)
        kind, read = "a CLAP model in safetensors", partial(ClapModel.from_pretrained, use_safetensors=True)
        net = whole_network(read, path, self.revision, where="reward model", kind=kind)
        with reading(f"reward model must be {kind}", path):
            extractor = ClapFeatureExtractor.from_pretrained(path, revision=self.revision)
            tokenizer = AutoTokenizer.from_pretrained(path, revision=self.revision)
        parts = CLAPParts(net=net.to(self.device), extractor=extractor, tokenizer=tokenizer)
        _check_parts(parts, self.model)
        return parts

    @property
    def version(self) -> str:
        hop = "end to end" if self.hop_seconds is None else f"every {self.hop_seconds:g} s"
        return f"{pinned(self.model, self.revision)}, {self.pooling}, {hop}"

    @property
    def width(self) -> int:
        return int(self.parts.net.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """exp of the model's learned log temperature of audio against texts."""
        return float(self.parts.net.logit_scale_a.exp())

    def to(self, device: torch.device | str) -> "CLAPEncoder":
        self.device = torch.device(device)
        if "parts" in self.__dict__:
            self.parts.net.to(self.device)
        return self

    @torch.no_grad()
    def embed(self, batch: RewardBatch) -> Embedded:
        """Unit rows, without gradient."""
        return self.embed_with_graph(batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """Unit rows, with gradient to the samples."""
        extractor = self.parts.extractor
        rate, shortest = extractor.sampling_rate, extractor.fft_window_size
        clips = mono_clips(batch, self.version, rate_hz=rate, shortest=shortest)
        home = clips[0].device if clips else self.device
        cut = [self._cut(clip) for clip in clips]
        windows = [window for clip in cut for window in clip]
        rows = [torch.zeros(0, self.width, device=self.device)]
        for i in range(0, len(windows), self.batch_size):
            rows.append(self._audio_features(torch.stack(windows[i : i + self.batch_size]).to(self.device)))
        embedded = Embedded(rows=torch.cat(rows).to(home), counts=tuple(len(clip) for clip in cut))
        if self.pooling == "windows":
            return embedded
        return Embedded(rows=unit_means(embedded), counts=(1,) * len(clips))

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of prompts; equal prompts are encoded once."""
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(unique)
        rows = [torch.zeros(0, self.width, device=self.device)]
        rows += [self._text_features(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return torch.cat(rows)[[unique[prompt] for prompt in prompts]]

    def _cut(self, clip: Float[Tensor, " s"]) -> list[Float[Tensor, " w"]]:
        extractor = self.parts.extractor
        window = int(extractor.nb_max_samples)
        hop = window if self.hop_seconds is None else round(self.hop_seconds * extractor.sampling_rate)
        starts = window_starts(len(clip), window=window, hop=hop)
        return [_padded(clip[start : start + window], window, extractor.padding) for start in starts]

    def _audio_features(self, windows: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        mels = log_mel(windows, self.parts.extractor)[:, None]  # [n, 1, f, m]
        if self.parts.net.config.audio_config.enable_fusion:
            mels = mels.expand(-1, 4, -1, -1)
        longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=mels.device)
        with torch.autocast(self.device.type, enabled=False):
            output = self.parts.net.get_audio_features(input_features=mels, is_longer=longer)
        return F.normalize(_pooled(output).float(), dim=1)

    def _text_features(self, texts: list[str]) -> Float[Tensor, "n d"]:
        config = self.parts.net.config.text_config
        length = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts places from its padding on
        tokens = self.parts.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False):
            output = self.parts.net.get_text_features(
                input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
            )
        return F.normalize(_pooled(output).float(), dim=1)


class CLAPReward:
    """Cosine of CLAP's audio and prompt embeddings; 100 x cosine unless `scale` says otherwise.

    `scale` is "x100", "cos", or "logit" (times the model's own exp(logit_scale_a)). A clip longer than a window is
    judged by the unit mean of its windows. `raw` holds `cos`, and `silent`: 1 for a clip below -80 dB throughout, whose
    score is that of silence and says nothing of the prompt. It hears what sounds are there better than their order or
    number. Models: see `CLAPEncoder`.

    Paper: Wu et al., "Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption
    Augmentation", arXiv 2211.06687.
    """

    name = "clap"
    requires = frozenset({"audio", "prompts", "sample_rate"})
    modality: Modality = "audio"
    differentiable = True
    licence = "Apache-2.0 (weights of LAION)"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        scale: str = "x100",
        encoder: CLAPEncoder | None = None,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a model, or takes an `encoder` as it is."""
        self.scale, self._scale = scale, scale_of(self.name, scale, SCALES)
        self.encoder = encoder or CLAPEncoder(model, revision=revision, batch_size=batch_size, device=device)

    @property
    def version(self) -> str:
        return f"{self.encoder.version}, {self.scale}"

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded for "logit", whose factor is the model's."""
        return self._scale.range

    def to(self, device: torch.device | str) -> "CLAPReward":
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the clips' device."""
        cos = self._cos(batch)
        return RewardOutput(scores=self._factor * cos, raw={"cos": cos, "silent": silent(batch.audio or ()).to(cos)})

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores with gradient to the samples."""
        return self._factor * self._cos(batch)

    @property
    def _factor(self) -> float:
        return self.encoder.logit_scale if self._scale.learned else self._scale.factor

    def _cos(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        check_batch(batch, self.name, self.requires)
        embedded = unit_means(self.encoder.embed_with_graph(batch))
        return (embedded * self.encoder.embed_texts(batch.prompts or []).to(embedded.device)).sum(1)


def window_starts(samples: int, *, window: int, hop: int) -> list[int]:
    """First samples of the windows of a clip: one if it fits, else every `hop`, the last one ending with the clip.

    Raises:
        InputError: A hop that is not positive, or longer than the window, so that part of the clip is not heard.
    """
    if not 0 < hop <= window:
        raise InputError(f"encoder clap: the hop must be from 1 to the window's {window} samples, got {hop}")
    if samples <= window:
        return [0]
    return [*range(0, samples - window, hop), samples - window]


def log_mel(windows: Float[Tensor, "n w"], extractor: Any) -> Float[Tensor, "n f m"]:
    """The extractor's log-mel bands, in dB with a floor of -100, with gradient to the samples."""
    edge = extractor.fft_window_size // 2
    padded = F.pad(windows.double(), (edge, edge), mode="reflect")
    size, hop = extractor.fft_window_size, extractor.hop_length
    power = magnitudes(padded, window=size, hop=hop, fft=size).square()
    filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
    bands = power @ torch.as_tensor(filters, dtype=torch.float64, device=power.device)
    return (10 * bands.clamp(min=1e-10).log10()).float()


def unit_means(embedded: Embedded) -> Float[Tensor, "b d"]:
    """The unit mean of each clip's rows."""
    if not embedded.counts:
        return embedded.rows
    means = [rows.mean(0) for rows in embedded.rows.split(list(embedded.counts))]
    return F.normalize(torch.stack(means), dim=1)


def _padded(clip: Float[Tensor, " s"], window: int, padding: str) -> Float[Tensor, " w"]:
    """A clip of at most one window filled up to it, as the extractor's `padding` says."""
    repeats = {"repeatpad": window // len(clip), "repeat": window // len(clip) + 1, "pad": 1}
    if padding not in repeats:
        raise InputError(f"reward model must pad clips by {', '.join(repeats)}, got {padding!r} in its front end")
    filled = clip.repeat(repeats[padding])[:window]
    return F.pad(filled, (0, window - len(filled)))


def _check_parts(parts: CLAPParts, model: str) -> None:
    fused, cut = parts.net.config.audio_config.enable_fusion, parts.extractor.truncation
    if fused != (cut == "fusion"):
        raise InputError(
            f"reward model must have a front end for a{' fused' if fused else 'n unfused'} network, got truncation "
            f"{cut!r} in {model!r}"
        )


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it, older ones return it."""
    return output if isinstance(output, Tensor) else output.pooler_output
