"""Batches of a round: rollouts, their images, and log-probs of the policy that sampled as training will see them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.denoisers.guided import Guided
from diffalign.errors import RunError
from diffalign.online.collate import RoundCollator
from diffalign.online.parts import OnlineParts
from diffalign.online.store import Store
from diffalign.sampling.rollout import Keep, initial_noise, log_probs, rollout
from diffalign.types import Cond, Denoiser, Trajectory

Autocast = Callable[[], AbstractContextManager[None]]


def sample_part(
    online: OnlineParts,
    policy: Denoiser,
    store: Store,
    part: int,
    cond: Cond,
    uncond: Cond,
    *,
    window: range | None,
    device: torch.device,
    autocast: Autocast,
) -> tuple[Trajectory, Float[Tensor, " b *rest"]]:
    """One batch of a round: the way to its images, and the images in [0, 1], or its clips in [-1, 1].

    Args:
        cond: Of the round's prompts, by their place.
        uncond: Of the empty prompt, one row.

    Raises:
        RunError: An image is not finite.
    """
    entries = [store.entries[row] for row in store.rows(part)]
    guided = Guided(denoiser=policy, uncond=uncond.to(device), guidance=online.settings.guidance)
    x_init = initial_noise([entry.noise_seed for entry in entries], online.shape).to(device)
    with torch.no_grad(), autocast():
        walked = rollout(
            guided,
            online.walk.kernel,
            online.walk.schedule,
            cond.rows(torch.tensor([entry.group for entry in entries])).to(device),
            [entry.seed for entry in entries],
            x_init=x_init,
            window=window,
            keep=Keep(dtype=online.settings.store_dtype),
        )
    images = online.encoders.decode(walked.x_0, online.scale)
    bad = [entry.id for entry, image in zip(entries, images, strict=True) if not image.isfinite().all()]
    if bad:
        raise RunError(
            f"{online.medium.folder} of a round must be finite, got others for {bad}; their latents are, so look at "
            "the VAE"
        )
    return walked, images


def reference_log_probs(
    online: OnlineParts,
    reference: Denoiser,
    walked: Trajectory,
    uncond: Cond,
    *,
    device: torch.device,
    autocast: Autocast,
) -> Float[Tensor, "b n"]:
    """Log-probs of a batch's moves under the reference, guided as they were sampled and in the same batch shape: where
    reference and policy agree they are the rollout's own to the last bit."""
    guided = Guided(denoiser=reference, uncond=uncond.to(device), guidance=online.settings.guidance)
    with torch.no_grad(), autocast():
        return log_probs(guided, online.walk.kernel, online.walk.schedule, walked)


def remember_old(
    store: Store,
    parts: Sequence[int],
    collator: RoundCollator,
    policy: Denoiser,
    *,
    with_mean: bool,
    batch_size: int,
    device: torch.device,
    autocast: Autocast,
) -> None:
    """Writes log-probs of the moves of some batches under the policy as it is, in batches of the shape of training.

    The last batch is filled up with its own rows, so that every batch has `batch_size` of them.
    """
    moves = store.walk()[0]
    for part in parts:
        items = [(row, move) for row in store.rows(part) for move in moves]
        log_prob, mean = [], []
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            filled = [some[i % len(some)] for i in range(batch_size)]
            batch = collator.moves([row for row, _ in filled], [move for _, move in filled]).to(device)
            with torch.no_grad(), autocast():
                where = batch.walk.transition(policy, batch.x_t, batch.step, batch.cond)
                log_prob.append(batch.walk.log_prob(where, batch.x_s)[: len(some)].cpu())
            if with_mean:
                mean.append(where.mean[: len(some)].cpu())
        shape = (len(store.rows(part)), len(moves))
        tensors = {"log_prob": torch.cat(log_prob).reshape(shape)}
        if with_mean:
            means = torch.cat(mean)
            tensors["mean"] = means.reshape(*shape, *means.shape[1:])
        store.write_old(part, tensors)
