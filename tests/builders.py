"""Tiny random models of the true classes, built in code: no weights, no network."""

from pathlib import Path
from typing import Any

import torch

from diffalign.rewards.clip import CLIPParts


def tiny_tokenizer() -> Any:
    """A `CLIPTokenizer` of the 256 byte symbols, without merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=77)


def tiny_text_config() -> dict[str, Any]:
    """Sizes of a two-layer CLIP text tower for `tiny_tokenizer`."""
    return {
        "vocab_size": 514,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
        "max_position_embeddings": 77,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


def tiny_clip(seed: int = 0) -> CLIPParts:
    """A two-layer `CLIPModel` on 32x32 images, with its processor and tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vision = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(text_config=tiny_text_config(), vision_config=vision, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CLIPModel(config).eval().requires_grad_(False)
        for parameter in net.parameters():  # the usual start is so small that all embeddings look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPParts(net=net, processor=processor, tokenizer=tiny_tokenizer())


def save_clip(parts: CLIPParts, folder: Path) -> None:
    """Writes a CLIP model as transformers lays it out."""
    from transformers import CLIPProcessor

    parts.net.save_pretrained(folder)
    CLIPProcessor(image_processor=parts.processor, tokenizer=parts.tokenizer).save_pretrained(folder)


def tiny_sd_pipeline(seed: int = 0) -> Any:
    """A `StableDiffusionPipeline` for 64x64 images with random weights, in eval mode."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
        text = CLIPTextModel(CLIPTextConfig(**tiny_text_config()))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tiny_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_lora(model: str, folder: Path, seed: int) -> Path:
    """A LoRA for a shipped tiny model that changes what it makes, as training exports it."""
    from diffalign.denoisers import FAMILIES
    from diffalign.models.load import ModelSource, load_pipeline
    from diffalign.models.lora import LoraSettings, add_lora
    from diffalign.models.save import export_lora

    family = FAMILIES[model]
    net = load_pipeline(ModelSource(path=f"tiny-{model}"), only=(family.net,)).components[family.net]
    add_lora(net, LoraSettings(rank=2), ("to_q", "to_v"), seed=seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_lora(net, family, folder)
    return folder
