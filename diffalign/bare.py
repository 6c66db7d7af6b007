"""The networks of a model's own configs without weights: the denoiser, and what VAE and text encoders give and cost.

VAE and text encoders are run on fake tensors, since they say what the denoiser is conditioned on. Only configs and
tokenizers are read.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.checks import buckets_of, context_of, text_dtype_of
from diffalign.counting import Memory, count_flop, fake_mode, make_fake, net_bytes
from diffalign.denoisers import Family
from diffalign.models.load import home, load_net_config, load_scheduler_config, load_vae_config, native_resolution
from diffalign.models.text import in_float32, text_dtypes
from diffalign.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What VAE and text encoders cost, and what they give."""

    latent: tuple[int, ...]
    """Channels, height and width."""
    cond: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and type of one prompt's conditions by name."""
    image_flop: int
    """Of encoding an image; of decoding an image or a clip where a run makes its own."""
    prompt_flop: int
    weights: int
    """Bytes of VAE and text encoders."""
    largest: int
    """Of the largest of them."""
    peak: int
    """Most bytes at a time beside the weights: with `data.encode_batch_size` images, or with the images that are
    sampled at a time and all prompts of a round."""
    sample_bytes: int = 0
    """Of an image of a run's own before compression, 8 bit; of a clip, 16 bit."""

    @property
    def prompt_bytes(self) -> int:
        """Conditions of one prompt."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.cond.values())


def encoding(cfg: TrainConfig, family: Family, index: Mapping[str, Any], *, device: str = "cpu") -> Encoding:
    """Runs VAE and text encoders of a `model_index.json` on fake tensors, as they run on a "cpu" or "cuda" device."""
    own, context = cfg.online, context_of(cfg, family)
    vae = bare_vae(cfg)
    pipeline = _text_pipeline(cfg, family, index, text_dtype_of(cfg, device))
    texts = [part for name in family.text if isinstance(part := pipeline.components[name], nn.Module)]
    count = cfg.data.encode_batch_size if own is None else own.batch_size
    prompts = ["a"] * (1 if own is None else own.prompts + 1)
    with torch.no_grad(), fake_mode():
        for net in (vae, *texts, pipeline.components[family.net]):
            make_fake(net)
        known = [t for net in (vae, *texts) for t in (*net.parameters(), *net.buffers())]
        latent: tuple[int, ...] = context.latents
        made: list[Tensor] = []
        with Memory(known) as memory:
            if own is None:
                width, height = _largest_size(cfg, family)
                flop = count_flop(lambda: made.append(_moments(vae, torch.empty(count, 3, height, width))))
                latent = tuple(made[0].shape[1:])
            else:
                z = torch.empty(count, *latent)
                flop = count_flop(lambda: made.append(family.decode(vae, z, context)))
            width_of_sample = 1 if family.modality == "image" else 2
            sample_bytes = 0 if own is None else width_of_sample * made[0][0].numel()
            made.clear()
            cond: list[Any] = []
            prompt_flop = count_flop(lambda: cond.append(in_float32(family.encode_prompts(pipeline, prompts, context))))
    return Encoding(
        latent=latent,
        cond={name: (tuple(t.shape[1:]), t.dtype) for name, t in cond[0].tensors.items()},
        image_flop=flop // count,
        prompt_flop=prompt_flop // len(prompts),
        weights=sum(net_bytes(net) for net in (vae, *texts)),
        largest=max(net_bytes(net) for net in (vae, *texts)),
        peak=memory.peak,
        sample_bytes=sample_bytes,
    )


def bare_net(cfg: TrainConfig, family: Family) -> Any:
    """The denoiser of the true config on the meta device, frozen."""
    net_class: Any = family.net_class()
    with torch.device("meta"):
        net = net_class.from_config(load_net_config(cfg.model, family))
    return net.eval().requires_grad_(False)


def bare_vae(cfg: TrainConfig, device: str = "meta") -> Any:
    """The VAE of the true config, frozen, with random weights on any other device than meta."""
    import diffusers

    config = load_vae_config(cfg.model)
    vae_class = getattr(diffusers, config.get("_class_name", "AutoencoderKL"))
    with torch.device(device):
        return vae_class.from_config(config).eval().requires_grad_(False)


def _largest_size(cfg: TrainConfig, family: Family) -> tuple[int, int]:
    """Width and height of the images that have the most pixels."""
    side = cfg.data.resolution or native_resolution(cfg.model, family)
    return max(buckets_of(cfg, family), key=lambda size: (math.prod(size), -max(size)), default=(side, side))


def _moments(vae: Any, pixels: Tensor) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    return torch.stack([posterior.mean, posterior.std])[0]


def _text_pipeline(cfg: TrainConfig, family: Family, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline with text encoders and denoiser on the meta device, and its tokenizers."""
    import diffusers

    place = {"pretrained_model_name_or_path": home(cfg.model)[1], "revision": cfg.model.revision}
    cls = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = dict.fromkeys(cls._get_signature_keys(cls)[0])
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_config(load_scheduler_config(cfg.model))
    parts[family.net] = bare_net(cfg, family)
    narrow = text_dtypes(family, index, dtype)
    for name in family.text:
        library, class_name = index.get(name) or (None, None)
        if library is not None and class_name is not None:
            part = _bare_part(library, class_name, {**place, "subfolder": name})
            parts[name] = part.to(narrow[name]) if name in narrow else part
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    return cls(**parts)


def _bare_part(library: str, class_name: str, place: Mapping[str, Any]) -> Any:
    """A tokenizer, or a network on the meta device: of transformers, or of the pipeline's own module in Diffusers."""
    import transformers

    if library != "transformers":
        own: Any = getattr(importlib.import_module(f"diffusers.pipelines.{library}"), class_name)
        with torch.device("meta"):
            return own.from_config(own.load_config(**place)).eval().requires_grad_(False)
    part = getattr(transformers, class_name)
    if not issubclass(part, nn.Module):
        return part.from_pretrained(**place)
    config = part.config_class.from_pretrained(**place)
    with torch.device("meta"):
        return part(config).eval().requires_grad_(False)
