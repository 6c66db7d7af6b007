"""The plain loop: Diffusion-DPO as the published scripts run it, VAE and text encoder in every step.

Written from scratch after the diffusers script for Stable Diffusion (research_projects/diffusion_dpo,
train_diffusion_dpo.py), with the work of its step and nothing added. It starts from pixels and token ids in memory:
decoding and cropping pictures is left out, as is Accelerate around the step.
"""

import copy
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from benchmarks.worlds import World

RANK = 4
SLOPE = 2500.0
"""Logit per unit of error difference: the script's `beta_dpo`, and half of our beta."""
LR = 1e-5
MAX_GRAD_NORM = 1.0
VAE_BATCH = 8
"""Images that the script encodes at a time."""

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Plain:
    """Eager LoRA, adapters toggled by the library call, winners and losers as one joined batch."""

    def __init__(self, world: World, device: torch.device, precision: Precision = "no") -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.device, self.dtype = device, DTYPES[precision]
        nets = (world.unet, world.vae, world.text)
        self.unet, self.vae, self.text = (copy.deepcopy(net).to(device) for net in nets)
        if precision != "no":
            for net in (self.unet, self.vae, self.text):
                net.to(self.dtype)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
        cast_training_params(self.unet, torch.float32)
        self.scheduler = DDPMScheduler.from_config(dict(world.scheduler))
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.pixels, self.ids = world.pixels.to(device, self.dtype), world.ids.to(device)

    @property
    def net(self) -> Any:
        """The network that is trained."""
        return self.unet

    def step(self) -> list[float]:
        """One optimizer step; returns what the script logs."""
        logs = self.backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return [value.item() for value in logs]

    def backward(self) -> list[Tensor]:
        """All but the update: loss and gradients at fresh latents, noise and t, the latter two shared in a pair."""
        x_0, text = self.latents(), self.embeddings()
        eps = torch.randn_like(x_0).chunk(2)[0]
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(eps),), device=self.device)
        loss, logs = self.loss(x_0, text, eps, t)
        self.scaler.scale(loss).backward()
        return logs

    @torch.no_grad()
    def latents(self) -> Float[Tensor, "2b c h w"]:
        """Fresh samples of the VAE's posterior, scaled."""
        parts = [self.vae.encode(some).latent_dist.sample() for some in self.pixels.split(VAE_BATCH)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def embeddings(self) -> Float[Tensor, "b l d"]:
        """Last hidden states of the text encoder, once a pair."""
        return self.text(self.ids)[0]

    def loss(
        self,
        x_0: Float[Tensor, "2b c h w"],
        text: Float[Tensor, "b l d"],
        eps: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """Diffusion-DPO on winners and losers, and four numbers for the log."""
        noise, t, text = eps.repeat(2, 1, 1, 1), t.repeat(2), text.repeat(2, 1, 1)
        x_t = self.scheduler.add_noise(x_0, noise, t)
        err = self._errors(x_t, t, text, noise)
        self.unet.disable_adapters()
        with torch.no_grad():
            err_ref = self._errors(x_t, t, text, noise)
        self.unet.enable_adapters()
        (err_w, err_l), (ref_w, ref_l) = err.chunk(2), err_ref.chunk(2)
        logit = SLOPE * ((ref_w - ref_l) - (err_w - err_l))
        loss = -functional.logsigmoid(logit).mean()
        return loss, [loss.detach(), err.detach().mean(), err_ref.mean(), (logit.detach() > 0).float().mean()]

    def _errors(self, x_t: Tensor, t: Tensor, text: Tensor, noise: Tensor) -> Float[Tensor, " 2b"]:
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype):
            pred = self.unet(x_t, t, text).sample
        return functional.mse_loss(pred.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
