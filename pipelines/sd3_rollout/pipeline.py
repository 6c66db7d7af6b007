"""Stable Diffusion 3 and 3.5 whose images come with the way to them and its log-probs; see docs/pipelines.md."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline

from diffalign.denoisers import FAMILIES
from diffalign.sampling.calls import Ask, Generators, RolloutOutput, Window, encode, roll_out
from diffalign.sampling.kernels import Kernel
from diffalign.sampling.rollout import Keep
from diffalign.sampling.schedule import Table


class DiffalignPipeline(StableDiffusion3Pipeline):
    """The stock pipeline with the sampling loop of diffalign; a folder without T5 loads as it is."""

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]  # noqa: RUF012

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        *,
        kernel: str | Kernel = "flow_sde",
        eta: float | None = None,
        table: Table = "diffusers",
        seeds: Sequence[int] | int | None = None,
        variance_noise: torch.Tensor | None = None,
        window: Window | None = None,
        keep: Keep | None = None,
    ) -> RolloutOutput | tuple:
        """Images, their trajectory and its log-probs. Arguments of the stock pipeline mean what they mean there.

        Args:
            latents: Standard normal noise [B, C, H, W] to start from.
            max_sequence_length: None is the stock 256 with T5, and CLIP's own length without, as the model was trained;
                name one number here and there to compare with the stock pipeline.
            kernel: "flow_sde", "dance", "cps", "flow_ddim" or "ode", or one with its options, by
                `diffalign.sampling.kernels.kernel`.
            eta: None is the kernel's published value, 0.7 for Flow-SDE; 0 has no noise and no log-probs, and makes the
                images of the stock pipeline.
            table: The scheduler's own levels, or "analytic" ones, which are shifted once.
            seeds: One for each image, in place of a generator: its noise depends on nothing else.
            variance_noise: Standard normal noise [B, num_inference_steps, C, H, W] of the moves.
            window: Moves with noise, as range(2, 4) or (2, 4); the others are noise-free.
            keep: What the trajectory holds; None is every state, in float32.

        Returns:
            `RolloutOutput`; without `return_dict` images, trajectory and log-probs.

        Raises:
            InputError: An argument is wrong; the message says which and how.
        """
        family = FAMILIES["sd3"]
        length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        cond, uncond = encode(
            self,
            prompt,
            negative_prompt,
            guided=guidance_scale > 1,
            images=num_images_per_prompt,
            options={
                "device": self._execution_device,
                "prompt_2": prompt_2,
                "prompt_3": prompt_3,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "pooled_prompt_embeds": pooled_prompt_embeds,
                "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
                "clip_skip": clip_skip,
                **family.call_options(self),
                **length,
            },
        )
        ask = Ask(
            steps=num_inference_steps, guidance=guidance_scale, kernel=kernel, eta=eta, table=table, height=height,
            width=width, generator=generator, seeds=seeds, latents=latents, variance_noise=variance_noise,
            window=window, keep=keep,
        )  # fmt: skip
        made = roll_out(self, family, cond, uncond, ask, output_type=output_type)
        return made if return_dict else (made.images, made.trajectory, made.log_probs)
