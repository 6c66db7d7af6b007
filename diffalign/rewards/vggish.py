"""VGGish: the audio network on whose embeddings most published Fréchet audio distances stand.

16 kHz mono is cut into frames of 400 samples (25 ms) every 160 (10 ms); 64 log-mel bands of a frame are ln(m + 0.01),
m the magnitudes of a 512-point FFT under HTK's triangles from 125 to 7500 Hz; 96 frames are an example, examples do not
overlap, and each gives one row of 128. n samples have f = 1 + floor((n - 400) / 160) frames and
1 + floor((f - 96) / 96) examples: 15,600 samples (0.975 s) is the shortest clip, and 0.96 s has no example.
"""

import hashlib
import itertools
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.rewards.audio import mono_clips
from diffalign.rewards.log_mel import htk_filters, magnitudes
from diffalign.rewards.networks import read_state
from diffalign.types import Embedded, Modality, RewardBatch

RATE_HZ = 16_000
BANDS = 64
SHORTEST = 15_600
"""Samples of one example: 400 + 95 · 160."""
_WINDOW, _HOP, _FFT, _FRAMES = 400, 160, 512, 96

_PCA_KEYS = (("pca_eigen_vectors", "pca_means"), ("pproc.pca_matrix", "pproc.pca_means"))
"""(matrix, means) in the published file of their own, and in a whole model's state dict."""
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ARRAY_PARTS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype("float32")),
    type(np.dtype("float64")),
]
"""What a pickle of numpy arrays is made of: data only, as tensors are."""


def stft_frames(samples: int) -> int:
    """Frames of a clip of 16 kHz samples."""
    return max(0, 1 + (samples - _WINDOW) // _HOP)


def examples(samples: int) -> int:
    """Examples of a clip of 16 kHz samples, one row each; what is left at its end is not heard."""
    return max(0, 1 + (stft_frames(samples) - _FRAMES) // _FRAMES)


def log_mel(samples: Float[Tensor, " s"]) -> Float[Tensor, "f 64"]:
    """Log-mel frames of a 16 kHz clip, with gradient to its samples."""
    filters = htk_filters(rate_hz=RATE_HZ, fft=_FFT, bands=BANDS, low_hz=125.0, high_hz=7500.0)
    spectrum = magnitudes(samples, window=_WINDOW, hop=_HOP, fft=_FFT)
    return torch.log(spectrum @ filters.to(samples.device) + 0.01).float()


class VGGish(nn.Module):
    """The network, with the state-dict keys of harritaylor/torchvggish; the last ReLU is left to the caller."""

    def __init__(
        self, channels: tuple[int, int, int, int] = (64, 128, 256, 512), hidden: int = 4096, width: int = 128
    ) -> None:
        """Takes other sizes for tests."""
        super().__init__()
        self.width = width
        a, b, c, d = channels
        layers: list[nn.Module] = []
        for sizes in ((1, a), (a, b), (b, c, c), (c, d, d)):
            for i, o in itertools.pairwise(sizes):
                layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(d * 6 * 4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, log_mels: Float[Tensor, "n 1 96 64"]) -> Float[Tensor, "n d"]:
        """Embeddings of examples."""
        maps = self.features(log_mels)  # [n, d, 6, 4]
        return self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))  # channels last, as in TensorFlow


class VGGishEncoder:
    """VGGish, one row of 128 per 0.96 s of 16 kHz mono audio, for comparison with published FADs.

    The weights are a file of the user's: `vggish-10086976.pth` of harritaylor/torchvggish (release v0.1, Apache-2.0),
    read without running code, or the same state dict as .safetensors. As in the FAD toolkits the last ReLU is dropped
    and nothing follows it; `use_activation` keeps it, and `pca` names the file of AudioSet's whitening
    (`vggish_pca_params-970ea276.pth`), which rounds to 0..255 and so has no gradient. Silence has a row like any sound.

    Paper: Hershey et al., "CNN Architectures for Large-Scale Audio Classification", arXiv 1609.09430.
    """

    modality: Modality = "audio"

    def __init__(
        self,
        model: str | None = None,
        *,
        use_activation: bool = False,
        pca: str | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        net: VGGish | None = None,
    ) -> None:
        """Names the file of the weights, or takes a loaded `net` as it is."""
        if model is None and net is None:
            raise InputError(
                "encoder vggish must get a file of weights: vggish-10086976.pth of harritaylor/torchvggish, or its "
                'state dict as .safetensors ("vggish:weights.pth"), got none'
            )
        self.file = None if model is None else _existing(model)
        self.use_activation = use_activation
        self.pca_file = None if pca is None else _existing(pca)
        self.batch_size = batch_size
        self.device = torch.device(device)
        if net is not None:
            self.net = net.eval().requires_grad_(False).to(self.device)

    @cached_property
    def net(self) -> VGGish:
        assert self.file is not None, "a file or a net is given"
        state = {key: value for key, value in _read(self.file).items() if not key.startswith("pproc.")}
        with torch.device("meta"):
            net = VGGish()
        _check_state(state, net, self.file)
        net.load_state_dict({key: value.float().clone() for key, value in state.items()}, assign=True)
        return net.eval().requires_grad_(False).to(self.device)

    @cached_property
    def version(self) -> str:
        name = "vggish" if self.file is None else f"vggish {_digest(self.file)}"
        end = "last ReLU" if self.use_activation else "no last ReLU"
        return f"{name}, {end}" + (f", PCA {_digest(self.pca_file)}" if self.pca_file else "")

    @property
    def width(self) -> int:
        return self.net.width

    def to(self, device: torch.device | str) -> "VGGishEncoder":
        self.device = torch.device(device)
        if "net" in self.__dict__:
            self.net.to(self.device)
        return self

    @torch.no_grad()
    def embed(self, batch: RewardBatch) -> Embedded:
        """One row per 0.96 s."""
        embedded = self._embed(batch)
        return embedded if self.pca_file is None else Embedded(rows=self._whiten(embedded), counts=embedded.counts)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """One row per 0.96 s, with gradient to the samples."""
        if self.pca_file is not None:
            raise InputError("encoder vggish must have no pca for a gradient, which rounding stops, got one")
        return self._embed(batch)

    def _embed(self, batch: RewardBatch) -> Embedded:
        clips = mono_clips(batch, "vggish", rate_hz=RATE_HZ, shortest=SHORTEST)
        home = clips[0].device if clips else self.device
        counts = tuple(examples(len(clip)) for clip in clips)
        rows = [torch.zeros(0, self.width, device=self.device)]
        if clips:
            pieces = torch.cat([_examples_of(clip.to(self.device)) for clip in clips])
            with torch.autocast(self.device.type, enabled=False):
                rows += [self.net(chunk) for chunk in pieces.split(self.batch_size)]
        joined = torch.cat(rows).to(home)
        return Embedded(rows=joined.relu() if self.use_activation else joined, counts=counts)

    @cached_property
    def _pca(self) -> tuple[Tensor, Tensor]:
        """(matrix, means) of AudioSet's whitening."""
        assert self.pca_file is not None, "asked for by name"
        state = _read(self.pca_file)
        found = next(((state[m], state[b]) for m, b in _PCA_KEYS if m in state and b in state), None)
        shape = (self.width, self.width)
        if found is None or found[0].shape != shape or found[1].numel() != self.width:
            raise InputError(
                f"encoder vggish must have a pca file with pca_eigen_vectors {shape} and pca_means {shape[:1]}, got "
                f"{_listed(state)} in {str(self.pca_file)!r}"
            )
        return found[0].float(), found[1].float().flatten()

    def _whiten(self, embedded: Embedded) -> Float[Tensor, "n d"]:
        """matrix (row - means), clipped to [-2, 2] and rounded to 0..255."""
        matrix, means = (part.to(embedded.rows.device) for part in self._pca)
        return (((embedded.rows - means) @ matrix.T).clamp(-2, 2).add(2) * (255 / 4)).round()


def _examples_of(clip: Float[Tensor, " s"]) -> Float[Tensor, "n 1 96 64"]:
    count = examples(len(clip))
    return log_mel(clip)[: count * _FRAMES].view(count, 1, _FRAMES, BANDS)


def _check_state(state: dict[str, Tensor], net: VGGish, file: Path) -> None:
    wanted = net.state_dict()
    missing, other = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or other:
        raise InputError(
            f"encoder vggish must have the keys of torchvggish, got {str(file)!r} without {', '.join(missing[:3])}"
            if missing
            else f"encoder vggish must have the keys of torchvggish, got also {', '.join(other[:3])} in {str(file)!r}"
        )
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise InputError(
                f"encoder vggish must have {key} of shape {tuple(value.shape)}, got {tuple(state[key].shape)} in "
                f"{str(file)!r}"
            )


def _existing(name: str) -> Path:
    if not Path(name).is_file():
        raise InputError(f"encoder vggish must have weights in a file, got {name!r}, which is missing")
    return Path(name)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return f"{file.name} (sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()[:12]})"


def _read(file: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals(_ARRAY_PARTS):
        return read_state(file, "encoder vggish: file")


def _listed(state: dict[str, Tensor]) -> str:
    return ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3]) or "nothing"
