"""Pre-training of the tiny world's sound models, each in the true class of its big sister.

An autoencoder of clips, a CLAP-like pair of encoders, and a transformer on the autoencoder's latents. The loop is that
of the pictures; everything is drawn from seeds, and what came out is measured in `assets/tiny/README.md`.
"""

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor, nn

from diffalign.progress import over
from diffalign.rewards.clap import log_mel
from diffalign.rewards.log_mel import htk_filters, magnitudes
from diffalign.tiny import playing, sounds
from diffalign.tiny.playing import Carelessness
from diffalign.tiny.pretrain import descend

PLAYER = Carelessness(slip=0.15, detune=0.5, stagger=0.01)
"""How carelessly the clips are played that the base model learns from."""
FRAME, CHANNELS = 512, 24
"""Samples of a frame of latents, and numbers in it: 48 frames a clip."""
TEXT_LENGTH, TEXT_WIDTH = 16, 96
"""Tokens of every prompt, and the width of the base model's text encoder."""
BANDS = 64
"""Log-mel bands that tiny-clap hears, and frames of them."""

_FFT = 2048


@dataclass(frozen=True)
class Clips:
    """Clips with their captions."""

    waves: Float32[np.ndarray, "n s"]
    captions: list[str]


def draw(count: int, *, seed: int, split: sounds.Split, care: Carelessness | None) -> Clips:
    """`count` captioned clips of a split."""
    rng = np.random.default_rng(seed)
    waves = np.empty((count, sounds.SAMPLES), dtype=np.float32)
    captions = []
    for i in over(range(count), f"playing {split} sounds", count):
        sound = sounds.draw_sound(rng, split)
        captions.append(sounds.caption(sound, rng))
        waves[i] = playing.render(sound, rng, care)
    return Clips(waves, captions)


@dataclass(frozen=True)
class Code:
    """What a frame of latents means: principal components of the log-mel bands around it, the first ones largest."""

    mean: Float[Tensor, " m"]
    axes: Float[Tensor, "m c"]

    def of(self, waves: Float[Tensor, "b s"]) -> Float[Tensor, "b c f"]:
        """Latents of clips."""
        return ((bands_of(waves) - self.mean) @ self.axes).transpose(1, 2)


def draw_captions(count: int, *, seed: int, split: sounds.Split) -> list[str]:
    """Captions of a split, without their clips."""
    rng = np.random.default_rng(seed)
    return [sounds.caption(sounds.draw_sound(rng, split), rng) for _ in range(count)]


def bands_of(waves: Float[Tensor, "b s"]) -> Float[Tensor, "b f m"]:
    """Log-mel bands of every frame, with a floor at -50 dB."""
    filters = htk_filters(rate_hz=sounds.RATE_HZ, fft=_FFT, bands=80, low_hz=80.0, high_hz=7600.0)
    return (_spectra(waves) @ filters / FRAME + 3e-3).log().float()


def in_phase(waves: Float[Tensor, "b s"], tonal: Bool[Tensor, " b"]) -> Float[Tensor, "b s"]:
    """Clips of the same magnitudes whose phases are nobody's choice, so that a code of magnitudes can be played.

    The magnitudes of a frame's spectrum, put back together without its phases, are the windowed frame as a sum of
    cosines in phase in its middle; divided by the window they are the frame of a tone. Higher tones come a little
    later, up to 5 ms at 8 kHz, so that the sum is less peaked. Noise in phase would be a click: its phases are drawn
    once for all frames, which spreads it evenly over the length of the transform.
    """
    place = torch.arange(_FFT // 2 + 1, dtype=torch.float64) / _FFT
    drawn = torch.rand(len(place), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.arange(-FRAME // 2, FRAME // 2)
    window = 0.5 + 0.5 * torch.cos(math.pi * time.double() / FRAME)
    spread = (0.375 * 2 * FRAME / _FFT) ** 0.5  # 0.375 is the mean square of the window
    spectra = _spectra(waves)
    tones, noise = (
        torch.fft.irfft(spectra * torch.exp(-1j * math.pi * turn), n=_FFT)[..., time] / level
        for turn, level in ((160 * place**2, window), (2 * drawn, spread))
    )
    return torch.where(tonal[:, None, None], tones, noise).flatten(1).float()


def _spectra(waves: Float[Tensor, "b s"]) -> Float64[Tensor, "b f n"]:
    """Magnitudes of two frames' length around the middle of every frame."""
    padded = nn.functional.pad(waves, (FRAME // 2, FRAME // 2))
    return magnitudes(padded, window=2 * FRAME, hop=FRAME, fft=_FFT)


def make_code(clips: Clips) -> Code:
    """The code whose first numbers say most of these clips; its mean variance is 1.

    A component is divided by the square root of its deviation: whitened, what is mere noise would weigh as much as the
    pitch, and left as it is, loudness would drown the rest.
    """
    found = torch.cat([bands_of(torch.from_numpy(clips.waves[i : i + 64])) for i in range(0, len(clips.waves), 64)])
    flat = found.flatten(0, 1)
    mean = flat.mean(0)
    variance, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    variance, axes = variance.flip(0)[:CHANNELS], axes.flip(1)[:, :CHANNELS]
    return Code(mean, axes * (variance**-0.25 / variance.sqrt().mean().sqrt()))


def train_autoencoder(clips: Clips, code: Code, *, steps: int = 3500, batch_size: int = 16, seed: int = 5) -> Any:
    """An `AutoencoderSAME` of 24 numbers for every 32 ms.

    Its encoder learns to write the code, its decoder to play it, in phase and with the magnitudes of the clip. A little
    noise on the code makes it bear with the errors of the encoder and of a model of latents.
    """
    from diffusers import AutoencoderSAME

    torch.manual_seed(seed)
    net = AutoencoderSAME(
        audio_channels=1,
        patch_size=FRAME,
        encoder_channels=192,
        encoder_c_mults=[1],
        encoder_strides=[1],
        encoder_transformer_depths=[2],
        latent_dim=CHANNELS,
        use_differential_attention=False,
        dim_heads=48,
        sampling_rate=sounds.RATE_HZ,
    )
    for name, weight in net.named_parameters():  # as they are made, blocks do nothing, and all latents are alike
        if name.endswith(("to_out.weight", "proj_out.weight")):
            nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    with torch.no_grad():
        net(torch.zeros(1, 1, FRAME))  # the products of weight_norm, without a graph: so the network can be copied
    waves = torch.from_numpy(clips.waves)
    tonal = torch.tensor([bool(sounds.TIMBRES[sounds.parse(caption).timbre]) for caption in clips.captions])
    starts = range(0, len(waves), 64)
    codes = torch.cat([code.of(waves[i : i + 64]) for i in starts])
    targets = torch.cat([in_phase(waves[i : i + 64], tonal[i : i + 64]) for i in starts])
    level = waves.square().mean(1, keepdim=True).sqrt()
    frames = codes.shape[2] // 4

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(waves), (batch_size,), generator=rng)
        starts = torch.randint(codes.shape[2] - frames + 1, (batch_size,), generator=rng).tolist()
        cut = list(zip(rows.tolist(), starts, strict=True))
        z = torch.stack([codes[i, :, k : k + frames] for i, k in cut])
        x, y = (
            torch.stack([some[i, k * FRAME : (k + frames) * FRAME] for i, k in cut]) / level[rows]
            for some in (waves, targets)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            written = net.encode((x * level[rows])[:, None]).latents.float()
            played = net.decode(z + 0.1 * torch.randn(z.shape, generator=rng)).sample[:, 0].float() / level[rows]
        unlike = torch.stack([_unlike(x, played, window) for window in (256, 512, 1024)]).mean()
        return (written - z).square().mean() + (played - y).square().mean() + 0.5 * unlike

    return descend([net], loss, steps=steps, lr=2e-3, seed=seed, name="tiny sound autoencoder")[0]


def _unlike(x: Float[Tensor, "b s"], y: Float[Tensor, "b s"], window: int) -> Tensor:
    """How far the magnitudes of two spectra are apart, and their logarithms above a floor."""
    hann = torch.hann_window(window)
    mine, made = (
        torch.stft(wave, window, hop_length=window // 4, window=hann, return_complex=True).abs() / hann.norm()
        for wave in (x, y)
    )
    return (mine - made).abs().mean() + 0.5 * ((mine + 0.03).log() - (made + 0.03).log()).abs().mean()


def learn_merges(captions: Sequence[str], pieces: Any) -> list[tuple[str, str]]:
    """Byte-pair merges by which a word of the captions is one token; `pieces` cuts a caption into words."""
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pieces
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=1024, show_progress=False, min_frequency=2))
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def make_roberta_tokenizer(captions: Sequence[str]) -> Any:
    """The tokenizer of CLAP's class for these captions."""
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    merges = learn_merges(captions, pre_tokenizers.ByteLevel(add_prefix_space=False))
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, "<mask>"]))}
    return RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def make_gemma_tokenizer(captions: Sequence[str]) -> Any:
    """The tokenizer of T5Gemma's class for these captions: a caption begins where its padding ends."""
    from tokenizers import pre_tokenizers
    from transformers import GemmaTokenizer

    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    merges = learn_merges(captions, pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()]))
    letters = sorted({"▁", ",", *string.ascii_lowercase})
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *map("".join, merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Int[Tensor, "n l"], Int[Tensor, "n l"]]:
    """(token ids padded to the tokenizer's length, their mask), as the pipeline pads them."""
    out = tokenizer(list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def make_extractor() -> Any:
    """CLAP's front end for clips of the world: 64 log-mel bands in 64 frames."""
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(
        feature_size=BANDS,
        sampling_rate=sounds.RATE_HZ,
        hop_length=sounds.SAMPLES // (BANDS - 1),
        max_length_s=sounds.SAMPLES / sounds.RATE_HZ,
        fft_window_size=1024,
        frequency_min=50,
        frequency_max=sounds.RATE_HZ // 2,
        truncation="rand_trunc",
    )


def train_clap(
    clips: Clips, tokenizer: Any, extractor: Any, *, steps: int = 500, batch_size: int = 64, seed: int = 6
) -> Any:
    """A `ClapModel` trained contrastively: a Swin transformer of two stages hears the bands, RoBERTa reads."""
    from transformers import ClapAudioConfig, ClapConfig, ClapModel, ClapTextConfig

    torch.manual_seed(seed)
    audio = ClapAudioConfig(
        window_size=4,
        num_mel_bins=BANDS,
        spec_size=BANDS,
        depths=[2, 2],
        num_attention_heads=[2, 4],
        patch_embeds_hidden_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        projection_dim=64,
        hidden_dropout_prob=0.0,
    )
    text = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=TEXT_LENGTH + 2,  # places are counted from the padding's id on
        projection_dim=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    clap = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=64))
    ids, mask = tokenize(tokenizer, clips.captions)
    with torch.no_grad():
        mels = torch.cat(
            [log_mel(torch.from_numpy(clips.waves[i : i + 64]), extractor) for i in range(0, len(ids), 64)]
        )

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (batch_size,), generator=rng)
        heard = (mels[rows] + 2 * torch.randn(mels[rows].shape, generator=rng))[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = clap(input_ids=ids[rows], attention_mask=mask[rows], input_features=heard, return_loss=True)
        return out.loss.float()

    made = descend([clap], loss, steps=steps, lr=1e-3, seed=seed, name="tiny-clap")[0]
    for average, recent in zip(made.buffers(), clap.buffers(), strict=True):  # statistics of its batch normalisation
        average.copy_(recent)
    return made


@dataclass(frozen=True)
class Latents:
    """Latents of clips, with the tokens of their captions."""

    values: Float[Tensor, "n c f"]
    ids: Int[Tensor, "n l"]
    mask: Int[Tensor, "n l"]


def train_transformer(
    latents: Latents, words: int, *, steps: int = 5000, batch_size: int = 16, seed: int = 7
) -> tuple[Any, Any, Any]:
    """(transformer, text encoder, embedder of the length), learned together by flow matching.

    The logarithm of (1 - t) / t is normal around where the pipeline's sampler walks most. One prompt in ten is empty:
    all of it padding, for which the transformer has an embedding of its own.
    """
    from diffusers import StableAudio3DiTModel
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
    from transformers import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    torch.manual_seed(seed)
    module = T5GemmaModuleConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=TEXT_LENGTH,
        sliding_window=TEXT_LENGTH,
        query_pre_attn_scalar=24,
        layer_types=["full_attention"],
    ).to_dict()
    text = T5GemmaEncoderModel(
        T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, vocab_size=words)
    )
    length = StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=32, max_val=4.0)
    net = StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=128,
        depth=4,
        num_heads=4,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=TEXT_WIDTH,
        local_add_cond_dim=CHANNELS + 1,
        timestep_features_dim=64,
        ff_mult=2.0,
        num_memory_tokens=2,
        use_differential_attention=False,
    )
    nn.init.zeros_(net.proj_out.weight)
    seconds = torch.full((batch_size,), sounds.SAMPLES / sounds.RATE_HZ)

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents.ids), (batch_size,), generator=rng)
        x_0 = latents.values[rows]
        eps = torch.randn(x_0.shape, generator=rng)
        t = torch.sigmoid(1.0 + 1.5 * torch.randn(batch_size, generator=rng))
        x_t = (1 - t).view(-1, 1, 1) * x_0 + t.view(-1, 1, 1) * eps
        kept = (torch.rand(batch_size, 1, generator=rng) >= 0.1).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = text(latents.ids[rows], attention_mask=latents.mask[rows]).last_hidden_state
            told = length(seconds)
            tokens = torch.cat([states, told[:, None].to(states)], dim=1)
            mask = torch.cat([latents.mask[rows] * kept, torch.ones_like(kept)], dim=1)
            pred = net(x_t, t, tokens, told, mask).sample.float()
        return (pred - (eps - x_0)).square().mean()

    return tuple(descend([net, text, length], loss, steps=steps, lr=2e-3, seed=seed, name="tiny-audio"))
