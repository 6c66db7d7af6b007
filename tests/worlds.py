"""Small random pipelines of the true classes and small preference data, for tests that walk a whole road."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 16
WORDS = "a the red green blue small large circle square on white black".split()


def tokenizer() -> Any:
    """A CLIP tokenizer of single letters: no merges, 514 entries, as the published one falls back to."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *[x + "</w>" for x in letters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={e: i for i, e in enumerate(entries)}, merges=[], model_max_length=24)


def _text(cls: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=514,
        max_position_embeddings=24,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return cls(config).eval()


def _vae(channels: int, **scaling: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **scaling,
    ).eval()


def sd(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A random StableDiffusionPipeline: 16x16 images, 8x8x4 latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_text(CLIPTextModel, 16),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path, seed: int = 0, second: int = 16, **changes: Any) -> Path:
    """A random StableDiffusion3Pipeline without T5: 16x16 images, 8x8x4 latents; `second` is its other CLIP's width."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16 + second,
        caption_projection_dim=16,
        pooled_projection_dim=16 + second,
        pos_embed_max_size=8,
        **changes,
    ).eval()
    pipeline = StableDiffusion3Pipeline(
        vae=_vae(4, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=_text(CLIPTextModelWithProjection, 16),
        tokenizer=tokenizer(),
        text_encoder_2=_text(CLIPTextModelWithProjection, second),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


def t5(width: int) -> tuple[Any, Any]:
    """A two-layer T5 encoder and its tokenizer: pieces of one letter, and the words of `WORDS`."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [("\u2581" + word, -1.0) for word in WORDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters, *words]
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def pixart(folder: Path, seed: int = 0, *, alpha: bool = False) -> Path:
    """A random PixArtSigmaPipeline, or alpha's at 1024 pixels, which is told sizes: 16x16 images, 8x8x4 latents."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(seed)
    encoder, pieces = t5(16)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if alpha else SIDE // 2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        interpolation_scale=1,
    ).eval()
    for parameter in transformer.parameters():  # the usual start lets the prompt weigh too little to be seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    cls = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    pipeline = cls(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=encoder,
        tokenizer=pieces,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipeline.save_pretrained(folder)
    return folder


def pixart_alpha(folder: Path, seed: int = 0) -> Path:
    """Alpha at 1024 pixels; only the sizes that it is told depend on its latents' 128."""
    return pixart(folder, seed, alpha=True)


def flux(folder: Path, seed: int = 0, *, guided: bool = True) -> Path:
    """A random FluxPipeline: 8x8x4 latents of 16x16 images; `guided` as dev, otherwise as schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    encoder, pieces = t5(16)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guided,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipeline = FluxPipeline(
        vae=_vae(4, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=_text(CLIPTextModel, 16),
        tokenizer=tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=pieces,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
    )
    pipeline.save_pretrained(folder)
    return folder


def flux_schnell(folder: Path, seed: int = 0) -> Path:
    """Without guidance embedding and shift."""
    return flux(folder, seed, guided=False)


def gemma(width: int) -> tuple[Any, Any]:
    """A two-layer T5Gemma encoder and its tokenizer: pieces of one letter."""
    from transformers import GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    module = T5GemmaModuleConfig(
        vocab_size=len(pieces), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=64,
        query_pre_attn_scalar=8, layer_types=["full_attention"] * 2, initializer_range=0.3,
    ).to_dict()  # fmt: skip
    config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, vocab_size=len(pieces))
    tokens = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=24)
    return T5GemmaEncoderModel(config).eval(), tokens


def stable_audio_3(folder: Path, seed: int = 0, *, channels: int = 1, scale: int = 1, distilled: bool = False) -> Path:
    """A random StableAudio3Pipeline: clips of up to 4 s at 16 kHz, 8 latents for every 256 samples.

    `scale` is what the network is told t times; `distilled` is the sampler of checkpoints of 8 steps.
    """
    from diffusers import (
        AutoencoderSAME,
        FlowMatchEulerDiscreteScheduler,
        StableAudio3DiTModel,
        StableAudio3Pipeline,
    )
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    torch.manual_seed(seed)
    encoder, pieces = gemma(16)
    vae = AutoencoderSAME(
        audio_channels=channels,
        patch_size=32,
        encoder_channels=8,
        encoder_c_mults=(4,),
        encoder_strides=(8,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=16,
        ff_mult=2,
        sampling_rate=16_000,
    ).eval()
    transformer = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=3,
    ).eval()
    for net in (vae, transformer):  # the usual start of either is nearly silent
        for parameter in net.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    pipeline = StableAudio3Pipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=pieces,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16, max_val=4.0),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=scale, stochastic_sampling=distilled),
    )
    pipeline.save_pretrained(folder)
    return folder


def dit(folder: Path, seed: int = 0) -> Path:
    """A random DiTPipeline of 1000 classes, of which WORDS have names: 16x16 images, 8x8x4 latents."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=SIDE // 2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    ).eval()
    for parameter in transformer.parameters():  # the usual start lets the class weigh too little to be seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = DiTPipeline(
        transformer=transformer,
        vae=_vae(4, scaling_factor=0.18215),
        scheduler=DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=False
        ),
    )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"  # the pipeline reads names from there and does not write them
    names = {str(i): f"{word}, word of {word}" for i, word in enumerate(WORDS)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return folder


def sd3_t5(folder: Path, seed: int = 0, second: int = 16) -> Path:
    """SD3 with its third text encoder."""
    from diffusers import StableDiffusion3Pipeline

    sd3(folder, seed, second)
    encoder, pieces = t5(16 + second)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=encoder, tokenizer_3=pieces)
    pipeline.save_pretrained(folder)
    return folder


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    ).eval()


def sdxl(folder: Path, seed: int = 0, *, turbo: bool = False) -> Path:
    """A random StableDiffusionXLPipeline: 16x16 images, 8x8x4 latents."""
    from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet = _unet(
        cross_attention_dim=48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = (
        EulerAncestralDiscreteScheduler(**schedule, timestep_spacing="trailing")
        if turbo
        else EulerDiscreteScheduler(**schedule, timestep_spacing="leading", steps_offset=1)
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=_text(CLIPTextModel, 16),
        text_encoder_2=_text(CLIPTextModelWithProjection, 32),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl_refiner(folder: Path, seed: int = 0) -> Path:
    """A random refiner: the second text encoder alone, and an aesthetic score among the sizes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=_text(CLIPTextModelWithProjection, 32),
        tokenizer=None,
        tokenizer_2=tokenizer(),
        unet=_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=5 * 8 + 32,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def png(seed: int, side: int = SIDE) -> bytes:
    """A square of encoded noise."""
    return noise(seed, side, side)


def noise(seed: int, width: int, height: int) -> bytes:
    """Encoded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def picture(width: int, height: int) -> bytes:
    """Encoded grey."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (127, 127, 127)).save(out, format="PNG")
    return out.getvalue()


def preference_rows(count: int, ties: int = 0) -> list[dict[str, Any]]:
    """Rows in Pick-a-Pic's columns; the last `ties` are ties. Four rows share a prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        label = 0.5 if i >= count - ties else float(i % 2)
        words = np.random.default_rng(1000 + i // 4).choice(WORDS, 3)
        rows.append(
            {
                "caption": " ".join(words) + f" {i // 4}",
                "jpg_0": png(2 * i),
                "jpg_1": png(2 * i + 1),
                "label_0": label,
                "label_1": 1 - label,
                "model_0": "random",
                "ranking_id": int(rng.integers(1 << 30)),
            }
        )
    return rows


def parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a parquet file."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file
