"""Stable Diffusion 1.x and 2.x whose images come with the way to them and its log-probs; see docs/pipelines.md."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from diffalign.denoisers import FAMILIES
from diffalign.sampling.calls import Ask, Generators, RolloutOutput, Window, encode, roll_out
from diffalign.sampling.kernels import Kernel
from diffalign.sampling.rollout import Keep


class DiffalignPipeline(StableDiffusionPipeline):
    """The stock pipeline with the sampling loop of diffalign."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        *,
        kernel: str | Kernel = "ddim",
        seeds: Sequence[int] | int | None = None,
        variance_noise: torch.Tensor | None = None,
        window: Window | None = None,
        keep: Keep | None = None,
    ) -> RolloutOutput | tuple:
        """Images, their trajectory and its log-probs. Arguments of the stock pipeline mean what they mean there.

        Args:
            eta: None is the kernel's published value, 1 for DDIM; 0 has no noise and no log-probs, and makes the images
                of the stock pipeline with DDIMScheduler.
            latents: Standard normal noise [B, C, H, W] to start from.
            kernel: "ddim", "ddpm", "euler_ancestral" or "ode", or one with its options, by
                `diffalign.sampling.kernels.kernel`.
            seeds: One for each image, in place of a generator: its noise depends on nothing else.
            variance_noise: Standard normal noise [B, num_inference_steps, C, H, W] of the moves.
            window: Moves with noise, as range(2, 4) or (2, 4); the others are noise-free.
            keep: What the trajectory holds; None is every state, in float32.

        Returns:
            `RolloutOutput`; without `return_dict` images, trajectory and log-probs.

        Raises:
            InputError: An argument is wrong; the message says which and how.
        """
        cond, uncond = encode(
            self,
            prompt,
            negative_prompt,
            guided=guidance_scale > 1,
            images=num_images_per_prompt,
            options={
                "device": self._execution_device,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "clip_skip": clip_skip,
            },
        )
        ask = Ask(
            steps=num_inference_steps,
            guidance=guidance_scale,
            kernel=kernel,
            eta=eta,
            height=height,
            width=width,
            generator=generator,
            seeds=seeds,
            latents=latents,
            variance_noise=variance_noise,
            window=window,
            keep=keep,
        )
        made = roll_out(self, FAMILIES["sd"], cond, uncond, ask, output_type=output_type)
        return made if return_dict else (made.images, made.trajectory, made.log_probs)
