"""Sounds made of formulas, and tiny random audio models of the true classes."""

from typing import Any

import numpy as np
import torch

from diffalign.rewards.clap import CLAPParts
from diffalign.rewards.vggish import VGGish
from diffalign.types import RewardBatch

TINY_RATE = 48_000


def tone(hertz: float, samples: int, rate_hz: int, level: float = 0.5) -> torch.Tensor:
    """A sine, [1, samples]."""
    time = np.arange(samples) / rate_hz
    return torch.tensor(level * np.sin(2 * np.pi * hertz * time), dtype=torch.float32)[None]


def noise(seed: int, samples: int, level: float = 0.1) -> torch.Tensor:
    """Uniform noise, [1, samples]."""
    drawn = np.random.default_rng(seed).uniform(-level, level, samples)
    return torch.tensor(drawn, dtype=torch.float32)[None]


def audio_batch(*clips: torch.Tensor, rate_hz: int, prompts: list[str] | None = None) -> RewardBatch:
    return RewardBatch(audio=list(clips), sample_rate=rate_hz, prompts=prompts)


def tiny_vggish(seed: int = 0) -> VGGish:
    """VGGish with few channels, and 6 elements a row."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = VGGish(channels=(2, 3, 4, 5), hidden=8, width=6)
        for parameter in net.parameters():  # the usual start is so small that all embeddings look alike
            if parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter)
    return net


def tiny_roberta_tokenizer() -> Any:
    """A `RobertaTokenizer` of the 256 byte symbols, without merges."""
    from transformers import RobertaTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    return RobertaTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=512)


def tiny_clap(seed: int = 0, *, fused: bool = False, rate_hz: int = TINY_RATE) -> CLAPParts:
    """A two-stage `ClapModel` on windows of 1 s and 16 bands, with its front ends."""
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    audio = ClapAudioConfig(
        window_size=4,
        num_mel_bins=16,
        spec_size=64,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        enable_fusion=fused,
    )
    text = ClapTextConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
    )
    config = ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ClapModel(config).eval().requires_grad_(False)
        for parameter in net.parameters():  # the usual start is so small that all embeddings look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        net.logit_scale_a.fill_(2.0)  # as far apart as training leaves them
        net.logit_scale_t.fill_(3.0)
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=rate_hz,
        max_length_s=1,
        frequency_min=50,
        frequency_max=min(14_000, rate_hz // 2),
        truncation="fusion" if fused else "rand_trunc",
    )
    return CLAPParts(net=net, extractor=extractor, tokenizer=tiny_roberta_tokenizer())
