"""Stable Diffusion after alignment: another LoRA in the negative branch of guidance, and the best of n images by a
reward. Versions 1.x, 2.x, 3 and 3.5; see docs/pipelines.md."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import BaseOutput
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.models.adapters import Adapters, branches
from diffalign.models.load import load_lora_into
from diffalign.rewards import move
from diffalign.rewards.best_of import RewardLike, best, image_reward, score_prompts
from diffalign.sampling.calls import (
    Ask,
    Generators,
    RolloutOutput,
    check_output,
    denoiser_of,
    roll_out_parts,
)
from diffalign.sampling.rollout import Keep
from diffalign.types import Reward


@dataclass
class AlignedOutput(BaseOutput):
    """Images, and what the reward said of them and of those that were not taken."""

    images: Any
    """Those of one prompt together, the best first where a reward judged."""
    scores: torch.Tensor | None
    """Of the images [B]; None without a reward."""
    candidate_scores: torch.Tensor | None
    """Of all images that were made [prompts, best_of], in the order of their noise."""
    chosen: torch.Tensor | None
    """Which of them `images` are [prompts, num_images_per_prompt]."""
    nsfw_content_detected: list[bool] | None


class DiffalignPipeline(DiffusionPipeline):
    """The stock pipeline's networks, sampled without noise as diffalign evaluates them: DDIM, or Euler on a flow.

    Paper: Wang et al., "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of
        Diffusion Models", ICLR 2025, for the negative branch.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->unet->transformer->vae"
    _optional_components = [  # noqa: RUF012
        *("unet", "transformer", "text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3"),
        *("safety_checker", "feature_extractor", "image_encoder"),
    ]
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel | None = None,
        transformer: SD3Transformer2DModel | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: PreTrainedModel | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None) or (unet is not None and text_encoder_2 is not None):
            raise InputError("pipeline 'aligned' must get a model of the families sd or sd3, got another")
        self.register_modules(
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            transformer=transformer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.family = FAMILIES["sd" if transformer is None else "sd3"]
        self.loaded_rewards: dict[str, Reward] = {}
        """By spec, so that a second call does not read them again."""
        self.set_progress_bar_config()

    @property
    def stock(self) -> Any:
        """The stock pipeline on the same networks: for texts, LoRA files, the VAE's images and the safety checker."""
        shared = {
            name: self.components[name]
            for name in ("vae", "scheduler", "text_encoder", "tokenizer", "feature_extractor", "image_encoder")
        }
        if self.transformer is None:
            made = StableDiffusionPipeline(
                **shared, unet=self.unet, safety_checker=self.safety_checker, requires_safety_checker=False
            )
        else:
            made = StableDiffusion3Pipeline(
                **shared,
                transformer=self.transformer,
                text_encoder_2=self.text_encoder_2,
                tokenizer_2=self.tokenizer_2,
                text_encoder_3=self.text_encoder_3,
                tokenizer_3=self.tokenizer_3,
            )
        made.set_progress_bar_config(**self._progress_bar_config)
        return made

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, weight_name: str | None = None
    ) -> None:
        """Adds a LoRA (folder, safetensors file or hub id) under a name, for `adapter` and `negative_adapter`.

        Args:
            adapter_name: None is "default_0", then "default_1", as in the stock pipeline.
            weight_name: Of the file, where a folder or a repository has several.

        Raises:
            InputError: It cannot be read.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what it is for
            if weight_name is not None and not Path(path).is_dir():
                self.family.load_lora(self.stock, str(path), weight_name, adapter_name)
                return
            place = Path(path) / weight_name if weight_name is not None else path
            load_lora_into(self.stock, self.family, str(place), adapter=adapter_name)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        best_of: int | None = None,
        reward: RewardLike | None = None,
        adapter: Adapters | None = None,
        negative_adapter: Adapters | None = None,
        seeds: Sequence[int] | int | None = None,
        batch_size: int | None = None,
    ) -> AlignedOutput | tuple:
        """Images of prompts, the best of those that were made.

        Args:
            num_inference_steps, guidance_scale: None are the family's: 50 and 7.5, or 28 and 7.
            num_images_per_prompt: That are returned.
            generator, latents, seeds: Noise of every image that is made, as in the rollout pipelines.
            best_of: Images made of each prompt; None is as many as are returned.
            reward: A spec such as "pickscore" or "clip:tiny-clip", a reward, or a function
                `f(images [B, 3, H, W] in [0, 1], prompts) -> scores [B]`; a spec's model is kept for the next call.
            adapter: LoRA of the conditional branch by the name it was loaded under, or several as {name: weight}; {} is
                the model without any. None is the model as it is; beside a negative adapter the only other one loaded.
            negative_adapter: That of the negative branch; None is the conditional branch's.
            batch_size: Images sampled at once; None is all.

        Returns:
            `AlignedOutput`; without `return_dict` images and scores.

        Raises:
            InputError: An argument is wrong; the message says which and how.
            RunError: The reward could not judge enough images of a prompt.
        """
        check_output(output_type)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        made_each = num_images_per_prompt if best_of is None else best_of
        _check_counts(prompts, num_images_per_prompt, made_each, batch_size, judged=reward is not None)
        judge = None if reward is None else self._judge(reward)
        ask = Ask(
            steps=self.family.steps if num_inference_steps is None else num_inference_steps,
            guidance=self.family.guidance if guidance_scale is None else guidance_scale,
            kernel="ode",
            height=height,
            width=width,
            generator=generator,
            seeds=seeds,
            latents=latents,
            keep=Keep(),
        )
        if negative_adapter is not None and ask.guidance <= 1:
            raise InputError(f"guidance_scale must be above 1 beside a negative_adapter, got {ask.guidance}")
        made = self._candidates(
            prompts, _negatives(negative_prompt, prompts), ask, made_each, (adapter, negative_adapter), batch_size,
            "latent" if judge is None and output_type == "latent" else "pt",
        )  # fmt: skip
        self.maybe_free_model_hooks()
        output = self._taken(made, judge, prompts, num_images_per_prompt, output_type)
        return output if return_dict else (output.images, output.scores)

    def _taken(
        self, made: list[RolloutOutput], judge: Reward | None, prompts: list[str], returned: int, output_type: str
    ) -> AlignedOutput:
        """Of the images that were made the best of each prompt by the judge; without one all of them."""
        images = torch.cat([one.images for one in made])
        found = [one.nsfw_content_detected for one in made]
        flagged = None if None in found else [flag for flags in found for flag in flags]
        scores = chosen = None
        places = torch.arange(len(images))
        if judge is not None:
            scores = score_prompts(judge, images.float(), prompts)
            black = torch.tensor(flagged or [False] * len(images)).view_as(scores)
            chosen = best(scores.masked_fill(black, -torch.inf), returned)
            places = (chosen + scores.shape[1] * torch.arange(len(prompts))[:, None]).flatten()
        taken = torch.cat([one.trajectory.x_0 for one in made]) if output_type == "latent" else images
        taken = taken[places.to(taken.device)]
        return AlignedOutput(
            images=self.stock.image_processor.postprocess(taken, output_type, do_denormalize=[False] * len(taken)),
            scores=None if scores is None else scores.flatten()[places],
            candidate_scores=scores,
            chosen=chosen,
            nsfw_content_detected=None if flagged is None else [flagged[place] for place in places.tolist()],
        )

    def _candidates(
        self,
        prompts: list[str],
        negatives: list[str],
        ask: Ask,
        each: int,
        adapters: tuple[Adapters | None, Adapters | None],
        batch_size: int | None,
        output_type: str,
    ) -> list[RolloutOutput]:
        """Batches of all images, `each` of one prompt together."""
        stock, family, device = self.stock, self.family, self._execution_device
        rows = torch.arange(len(prompts)).repeat_interleave(each)
        cond, uncond = (family.encode_prompts(stock, texts).rows(rows).to(device) for texts in (prompts, negatives))
        policy, negative = branches(denoiser_of(stock, family), self.components[family.net], *adapters)
        parts = roll_out_parts(
            stock,
            family,
            cond,
            uncond if ask.guidance > 1 else None,
            ask,
            size=batch_size,
            output_type=output_type,
            denoiser=policy,
            negative=negative,
        )
        return list(parts)

    def _judge(self, reward: RewardLike) -> Reward:
        """The reward of a call, on the pipeline's device."""
        if isinstance(reward, str) and reward not in self.loaded_rewards:
            self.loaded_rewards[reward] = image_reward(reward)
        judge = self.loaded_rewards[reward] if isinstance(reward, str) else image_reward(reward)
        move(judge, self._execution_device)
        return judge


def _negatives(negative_prompt: str | list[str] | None, prompts: list[str]) -> list[str]:
    """A negative prompt for each prompt."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * len(prompts)
    if len(negative_prompt) != len(prompts):
        raise InputError(
            f"negative_prompt must be one, or one for each of {len(prompts)} prompts, got {len(negative_prompt)}"
        )
    return list(negative_prompt)


def _check_counts(prompts: list[str], returned: int, made: int, batch_size: int | None, *, judged: bool) -> None:
    if not prompts:
        raise InputError("prompt must hold one prompt or more, got none")
    if returned < 1:
        raise InputError(f"num_images_per_prompt must be at least 1, got {returned}")
    if made < returned:
        raise InputError(f"best_of must be at least num_images_per_prompt, {returned}, got {made}")
    if made > returned and not judged:
        raise InputError(f"reward must be given to take the best of {made} images, got none")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
