"""Pre-training of the tiny world's networks, each in the true class of its big sister.

One loop for all: AdamW with warm-up and cosine decay, an exponential moving average of the weights. Everything is
drawn from seeds; what came out is measured in `assets/tiny/README.md`.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from diffalign.progress import bar, over
from diffalign.tiny import scenes
from diffalign.tiny.scenes import Carelessness

PAINTER = Carelessness(slip=0.2, place_jitter=3.0, size_jitter=0.2)
"""How carelessly the pictures are drawn that the base models learn from."""
CATALOGUE = Carelessness(place_jitter=1.5, size_jitter=0.1)
"""How the pictures are drawn that tiny-clip learns from: nearly exact."""
TEXT_LENGTH = 32
"""Tokens of every prompt, start and end included."""


@dataclass(frozen=True)
class Pictures:
    """Pictures with their captions."""

    pixels: UInt8[np.ndarray, "n 64 64 3"]
    captions: list[str]

    def batch(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b 3 64 64"]:
        """The pictures of `rows` as RGB in [-1, 1]."""
        return torch.from_numpy(self.pixels[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(count: int, *, seed: int, split: scenes.Split, care: Carelessness | None) -> Pictures:
    """`count` captioned pictures of a split."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((count, scenes.SIDE, scenes.SIDE, 3), dtype=np.uint8)
    captions = []
    for i in over(range(count), f"drawing {split} pictures", count):
        scene = scenes.draw_scene(rng, split)
        captions.append(scenes.caption(scene, rng))
        pixels[i] = np.asarray(scenes.render(scene, rng, care))
    return Pictures(pixels, captions)


def descend(
    nets: Sequence[nn.Module], loss: Callable[[torch.Generator], Tensor], *, steps: int, lr: float, seed: int, name: str
) -> list[Any]:
    """Minimises `loss` over the parameters of `nets`; returns their averages over the last steps, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = [p for net in nets for p in net.parameters() if p.requires_grad]
    averages = [copy.deepcopy(net).eval().requires_grad_(False) for net in nets]
    targets = [a for net, avg in zip(nets, averages, strict=True) for a, p in _twins(avg, net) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    warmup = max(1, min(200, steps // 10))
    recent = math.nan
    torch.set_flush_denormal(True)  # tiny softmax probabilities would slow the matrix products tenfold
    for net in nets:
        net.train()
    with bar(name, steps) as shown:
        for step in range(steps):
            rate = min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            value = loss(rng)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(targets, parameters, 1 - decay)
            recent = value.item() if math.isnan(recent) else 0.98 * recent + 0.02 * value.item()
            shown.advance(note=f"loss {recent:.5f}")
    return averages


def make_tokenizer(captions: Sequence[str]) -> Any:
    """A `CLIPTokenizer` whose byte-pair merges are learned from captions, so that a word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*symbols, *[s + "</w>" for s in symbols], *["".join(m) for m in merges]]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Int[Tensor, "n l"]:
    """Token ids padded to the tokenizer's length, as the pipelines pad them."""
    return tokenizer(
        list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def train_vae(pictures: Pictures, *, steps: int = 5000, batch_size: int = 32, seed: int = 1) -> Any:
    """An 8x `AutoencoderKL` with 8 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=scenes.SIDE,
    )

    def loss(rng: torch.Generator) -> Tensor:
        x = pictures.batch(torch.randint(len(pictures.captions), (batch_size,), generator=rng))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(rng)).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return (decoded - x).square().mean() + 0.1 * (decoded - x).abs().mean() + 3e-4 * kl

    return descend([vae], loss, steps=steps, lr=1e-3, seed=seed, name="tiny VAE")[0]


def train_clip(pictures: Pictures, tokenizer: Any, *, steps: int = 1500, batch_size: int = 128, seed: int = 2) -> Any:
    """A `CLIPModel` trained contrastively on nearly exact pictures."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    shared = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "projection_dim": 64}
    text = {
        **shared,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": 4, "image_size": scenes.SIDE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    ids = tokenize(tokenizer, pictures.captions)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (batch_size,), generator=rng)
        pixels = (pictures.batch(rows) + 1) / 2
        pixels = pixels + 0.03 * torch.randn(pixels.shape, generator=rng)
        out = clip(input_ids=ids[rows], pixel_values=(pixels - mean) / std, return_loss=True)
        return out.loss

    return descend([clip], loss, steps=steps, lr=1e-3, seed=seed, name="tiny-clip")[0]


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Latents:
    """Posterior moments of pictures, scaled, with their token ids and how many things each caption asks for."""

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    ids: Int[Tensor, "n l"]
    things: Int[Tensor, " n"]

    def draw(self, rows: Int[Tensor, " b"], rng: torch.Generator) -> Float[Tensor, "b c h w"]:
        """Fresh samples of the posterior."""
        return self.mean[rows] + self.std[rows] * torch.randn(self.mean[rows].shape, generator=rng)


@torch.no_grad()
def encode(vae: Any, pictures: Pictures, ids: Int[Tensor, "n l"]) -> Latents:
    """Moments of all pictures, scaled by the VAE's config."""
    parts = []
    rows = torch.arange(len(pictures.captions))
    for some in over(rows.split(128), "encoding pictures", -(-len(rows) // 128)):
        posterior = vae.encode(pictures.batch(some)).latent_dist
        parts.append((posterior.mean, posterior.std))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mean, std = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    things = torch.tensor([len(scenes.parse(caption).things) for caption in pictures.captions])
    return Latents((mean - shift) * scale, std * scale, ids, things)


def train_unet(
    latents: Latents, clip: Any, scheduler: Any, *, lesson: int, steps: int, batch_size: int = 64, seed: int = 3
) -> tuple[Any, Any]:
    """(U-Net, text encoder): the text encoder is tiny-clip's own, frozen; one prompt in ten is empty.

    A lesson comes first, of `lesson` steps: pictures of one thing, at noise so high that little more than its place and
    the background can be told. Without it the U-Net, which is given no positions, long ignores what a caption says of
    them. The error of the noise is weighted by 1 / alpha_bar, as the velocity's is: prompts count at high noise.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    text = _text_encoder(clip).eval().requires_grad_(False)
    unet = UNet2DConditionModel(
        sample_size=latents.mean.shape[-1],
        in_channels=latents.mean.shape[1],
        out_channels=latents.mean.shape[1],
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=clip.config.text_config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    empty = _empty(latents)
    weight = 1 / scheduler.alphas_cumprod

    def learn(unet: Any, rows: Int[Tensor, " k"], lowest: int, steps: int, seed: int) -> Any:
        fast = torch.compile(unet.requires_grad_(True))

        def loss(rng: torch.Generator) -> Tensor:
            x_0, ids = _some(latents, empty, batch_size, rng, rows)
            eps = torch.randn(x_0.shape, generator=rng)
            t = torch.randint(lowest, scheduler.config.num_train_timesteps, (batch_size,), generator=rng)
            with torch.no_grad():
                tokens = text(ids).last_hidden_state
            pred = fast(scheduler.add_noise(x_0, eps, t), t, tokens).sample
            return (weight[t].view(-1, 1, 1, 1) * (pred - eps).square()).mean()

        return descend([unet], loss, steps=steps, lr=1e-3, seed=seed, name="tiny-sd")[0]

    rows = torch.arange(len(latents.ids))
    unet = learn(unet, rows[latents.things == 1], 700, lesson, seed)
    return learn(unet, rows, 0, steps, seed + 100), text


def train_transformer(latents: Latents, clip: Any, *, steps: int, batch_size: int = 64, seed: int = 4) -> Any:
    """(transformer, second text encoder): flow matching, logit-normal t; the first text encoder is tiny-clip's own."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    frozen = _text_encoder(clip, projected=True).requires_grad_(False).eval()
    learned = _text_encoder(clip, projected=True)
    width = clip.config.text_config.hidden_size
    net = SD3Transformer2DModel(
        sample_size=latents.mean.shape[-1],
        patch_size=1,
        in_channels=latents.mean.shape[1],
        out_channels=latents.mean.shape[1],
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * width,
        caption_projection_dim=128,
        pooled_projection_dim=2 * clip.config.projection_dim,
        pos_embed_max_size=16,
    )
    _start_at_identity(net)
    fast = torch.compile(net)
    empty = _empty(latents)

    def loss(rng: torch.Generator) -> Tensor:
        x_0, ids = _some(latents, empty, batch_size, rng)
        eps = torch.randn(x_0.shape, generator=rng)
        t = torch.sigmoid(torch.randn(batch_size, generator=rng))
        x_t = (1 - t).view(-1, 1, 1, 1) * x_0 + t.view(-1, 1, 1, 1) * eps
        tokens, pooled = join_text([frozen, learned], ids)
        pred = fast(x_t, tokens, pooled, t * 1000).sample
        return (pred - (eps - x_0)).square().mean()

    return tuple(descend([net, learned], loss, steps=steps, lr=1e-3, seed=seed, name="tiny-sd3"))


def _start_at_identity(net: Any) -> None:
    """Zero modulations and a zero output, as DiT starts (adaLN-Zero); diffusers leaves them random."""
    for block in net.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    for linear in (net.norm_out.linear, net.proj_out):
        nn.init.zeros_(linear.weight)
    for name, bias in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(bias)


def join_text(encoders: Sequence[Any], ids: Int[Tensor, "b l"]) -> tuple[Tensor, Tensor]:
    """Token states side by side, followed by the zeros that stand for T5, and pooled states side by side.

    This is what `StableDiffusion3Pipeline.encode_prompt` gives for the same encoders without T5, asked for as many
    tokens in its place as CLIP has.
    """
    outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    return torch.cat([tokens, torch.zeros_like(tokens)], dim=1), torch.cat([out.text_embeds for out in outs], dim=-1)


def _text_encoder(clip: Any, *, projected: bool = False) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = clip.config.text_config
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    weights = {k: v for k, v in clip.state_dict().items() if k.startswith(("text_model.", "text_projection."))}
    names = encoder.state_dict().keys()
    return _loaded(encoder, {k if k in names else k.removeprefix("text_model."): v for k, v in weights.items()})


def _loaded(encoder: Any, weights: dict[str, Tensor]) -> Any:
    known = {k: v for k, v in weights.items() if k in encoder.state_dict()}
    encoder.load_state_dict(known, strict=True)
    return encoder


def _empty(latents: Latents) -> Int[Tensor, " l"]:
    """Token ids of the empty prompt: start, end, padding (which is the end token too)."""
    end = latents.ids[0, -1]
    return torch.cat([latents.ids[0, :1], end.repeat(latents.ids.shape[1] - 1)])


def _some(
    latents: Latents, empty: Tensor, size: int, rng: torch.Generator, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(latents.ids if among is None else among), (size,), generator=rng)
    rows = rows if among is None else among[rows]
    dropped = torch.rand(size, generator=rng) < 0.1
    return latents.draw(rows, rng), torch.where(dropped[:, None], empty, latents.ids[rows])


def _twins(average: nn.Module, net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(average.parameters(), net.parameters(), strict=True))
