"""Networks of published sizes with random weights, made in seconds: for benchmarks, and for tests at full size."""

from collections.abc import Callable, Mapping
from string import ascii_lowercase
from typing import Any

import torch

from diffalign.rewards.blip import BLIPSizes
from diffalign.rewards.clip import CLIPParts
from diffalign.rewards.imagereward import ImageRewardParts, assemble, expected_shapes


def filled(make: Callable[[], torch.nn.Module]) -> Any:
    """A network of full size with random weights, in seconds: one draw of a million numbers, again and again."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        net = make()
    drawn = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            count, shape = parameter.numel(), parameter.shape
            value = drawn.repeat(-(-count // len(drawn)))[:count].view(shape)
            if isinstance(module, torch.nn.LayerNorm):
                value = torch.full(shape, float(name == "weight"))
            setattr(module, name, torch.nn.Parameter(value.clone(), requires_grad=False))
    return net


def vit_l_14() -> dict[str, Any]:
    """Sizes of openai/clip-vit-large-patch14."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": 768}


def vit_h_14() -> dict[str, Any]:
    """Sizes of yuvalkirstain/PickScore_v1, LAION's ViT-H/14."""
    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": 1024}


def clip_parts(sizes: Mapping[str, Any]) -> CLIPParts:
    """A CLIP model of these sizes with the shipped tokenizer, whose captions end earlier than OpenAI's."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from diffalign.shipped import MODELS, resolve

    net = filled(lambda: CLIPModel(CLIPConfig(**sizes))).eval()
    tokenizer = CLIPTokenizer.from_pretrained(resolve("tiny-clip", MODELS))
    net.text_model.eos_token_id = tokenizer.eos_token_id
    return CLIPParts(net=net, processor=CLIPImageProcessorPil(), tokenizer=tokenizer)


def imagereward_parts() -> ImageRewardParts:
    """ImageReward with a tokenizer of single letters."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase, *(f"##{c}" for c in ascii_lowercase)]
    rng = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=rng) for name, shape in expected_shapes(BLIPSizes()).items()}
    return assemble(state, BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}))


def safety_checker() -> Any:
    """Stable Diffusion's safety checker, with random concepts."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    sizes = vit_l_14()
    vision = sizes["vision_config"]
    return filled(lambda: StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768))).eval()
