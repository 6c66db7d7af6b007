"""The plain loop on own images: D3PO as its script runs it, image by image, with two U-Nets that recompute log-probs.

Written from scratch after the published way of working: every image is one call of the stock pipeline, whose prompt is
encoded anew; a training item runs the policy and a frozen copy on the better and on the worse image in turn, with
guidance, and gradients are added up item by item until the update.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from benchmarks.plain import LR, MAX_GRAD_NORM, RANK
from benchmarks.worlds import World

BETA = 0.1
CLIP = 0.1


def sampler_config(world: World) -> dict[str, Any]:
    """Of the world's schedule under DDIM as Stable Diffusion has it."""
    as_sd = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    return {**world.scheduler, "_class_name": "DDIMScheduler", **as_sd}


class PlainRollouts:
    """Eager LoRA beside a second network, the stock pipeline with DDIM and eta 1, a batch of one."""

    def __init__(self, world: World, device: torch.device, *, steps: int, guidance: float) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.device, self.steps, self.guidance = device, steps, guidance
        nets = (world.unet, world.unet, world.vae, world.text)
        self.unet, self.reference, self.vae, self.text = (copy.deepcopy(net).to(device) for net in nets)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
        cast_training_params(self.unet, torch.float32)
        self.scheduler = DDIMScheduler.from_config(sampler_config(world))
        self.pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        self.ids = world.ids.to(device)
        self.walked: list[list[Tensor]] = []

    def sample(self) -> list[Float[Tensor, "1 3 h w"]]:
        """One image a prompt, and a second one; every state of the way is kept."""
        self.walked, images = [], []
        for row in range(2 * len(self.ids)):
            text, uncond = self.conditions(row % len(self.ids))
            way: list[Tensor] = []
            size, channels = self.unet.config.sample_size, self.unet.config.in_channels
            way.append(torch.randn(1, channels, size, size, device=self.device))
            images.append(
                self.pipeline(
                    prompt_embeds=text,
                    negative_prompt_embeds=uncond,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    eta=1.0,
                    latents=way[0],
                    output_type="pt",
                    callback_on_step_end=_keeping(way),
                ).images
            )
            self.walked.append(way)
        return images

    def train(self, moves: Sequence[int]) -> float:
        """One update on one move of every pair; the first image of a prompt is taken for the better one."""
        if not self.walked:
            self.sample()
        half = len(self.walked) // 2
        total = 0.0
        for pair, move in enumerate(moves):
            better, worse = self.walked[pair], self.walked[half + pair]
            text, uncond = self.conditions(pair)
            states = (better[move], better[move + 1], worse[move], worse[move + 1])
            loss = self.loss(*states, move, text, uncond)
            (loss / len(moves)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / len(moves)

    @torch.no_grad()
    def conditions(self, pair: int) -> tuple[Float[Tensor, "1 l d"], Float[Tensor, "1 l d"]]:
        """Last hidden states of a prompt and of no prompt."""
        row = self.ids[pair : pair + 1]
        return self.text(row)[0], self.text(torch.zeros_like(row))[0]

    def loss(
        self,
        x_t_w: Float[Tensor, "1 c h w"],
        x_s_w: Float[Tensor, "1 c h w"],
        x_t_l: Float[Tensor, "1 c h w"],
        x_s_l: Float[Tensor, "1 c h w"],
        move: int,
        text: Float[Tensor, "1 l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Float[Tensor, ""]:
        """D3PO's loss of one move of one pair, from four runs of two networks."""
        ratios = []
        for x_t, x_s in ((x_t_w, x_s_w), (x_t_l, x_s_l)):
            log_prob = self.log_prob(self.unet, x_t, x_s, move, text, uncond)
            with torch.no_grad():
                log_prob_ref = self.log_prob(self.reference, x_t, x_s, move, text, uncond)
            ratios.append((log_prob - log_prob_ref).exp().clamp(1 - CLIP, 1 + CLIP).log())
        return -functional.logsigmoid(BETA * (ratios[0] - ratios[1])).mean()

    def log_prob(self, net: Any, x_t: Tensor, x_s: Tensor, move: int, text: Tensor, uncond: Tensor) -> Tensor:
        """log p(x_s | x_t) of a DDIM step with eta 1, averaged over elements."""
        self.scheduler.set_timesteps(self.steps, device=self.device)
        t = self.scheduler.timesteps[move]
        s = int(t) - self.scheduler.config.num_train_timesteps // self.steps
        bar = self.scheduler.alphas_cumprod.to(self.device)
        bar_t, bar_s = bar[t], bar[s] if s >= 0 else self.scheduler.final_alpha_cumprod
        of_none, of_text = net(torch.cat([x_t] * 2), t, torch.cat([uncond, text])).sample.chunk(2)
        eps = of_none + self.guidance * (of_text - of_none)
        x_0 = (x_t - (1 - bar_t).sqrt() * eps) / bar_t.sqrt()
        std = ((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)).sqrt()
        mean = bar_s.sqrt() * x_0 + (1 - bar_s - std**2).sqrt() * eps
        log_prob = -((x_s - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return log_prob.mean(dim=(1, 2, 3))


def _keeping(way: list[Tensor]) -> Any:
    def keep(pipeline: Any, number: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        way.append(given["latents"].clone())
        return given

    return keep
