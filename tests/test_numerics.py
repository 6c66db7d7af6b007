"""One step in float32 against a plain loop in float64, written from the paper; the margin of compiled networks."""

import copy
import math

import pytest
import torch

from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.load import ModelSource, detect_family
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import load_policy, make_reference
from diffalign.models.save import trainable
from diffalign.rng import SampleRng
from tests import worlds
from tests.test_lora import batch, grow
from tests.toys import sd_alpha_bar

RNG = SampleRng(0, (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return worlds.sd(tmp_path_factory.mktemp("numerics") / "sd")


def policy(folder):
    source = ModelSource(path=str(folder))
    return load_policy(source, detect_family(source), None, lora=LoraSettings(rank=4), seed=0)


def plain_loss(unet, pair, t, eps, beta: float):
    """Mean over pairs of -log sigmoid(-beta / 2 (gain of the winner's error - gain of the loser's)), image by image."""
    losses = []
    for i in range(len(t)):
        bar = sd_alpha_bar()[t[i]]
        gains = []
        for x_0 in (pair.x_w[i], pair.x_l[i]):
            x_t = (bar.sqrt() * x_0.double() + (1 - bar).sqrt() * eps[i].double())[None]
            text, errors = pair.cond["prompt_embeds"][i : i + 1].double(), []
            for adapted in (True, False):
                unet.enable_adapters() if adapted else unet.disable_adapters()
                errors.append((unet(x_t, t[i], text).sample[0] - eps[i].double()).square().mean())
            unet.enable_adapters()
            gains.append(errors[0] - errors[1].detach())
        losses.append(torch.log1p(torch.exp(beta / 2 * (gains[0] - gains[1]))))
    return sum(losses) / len(losses)


def test_loss_and_gradients_of_a_step_are_those_of_a_plain_loop_in_float64(folder):
    ours, beta = policy(folder), 2000.0
    grow(ours.net)
    wide = copy.deepcopy(ours.net).double()
    pair = batch("sd")
    out = DiffusionDPO(beta=beta)(ours, make_reference(ours, adapted=True).denoiser, pair, RNG)
    out.loss.mean().backward()
    loss = plain_loss(wide, pair, ours.path.sample_t(RNG), RNG.normal(pair.x_w, "noise"), beta)
    loss.backward()
    assert abs(loss.item() - math.log(2)) > 0.01
    assert out.loss.mean().item() == pytest.approx(loss.item(), rel=1e-4)
    true, found = ({n: p.grad.double() for n, p in trainable(net).items()} for net in (wide, ours.net))
    size = torch.stack([g.norm() for g in true.values()]).norm()
    gap = torch.stack([(found[n] - g).norm() for n, g in true.items()]).norm()
    print("loss", out.loss.mean().item(), loss.item(), "gradient gap", (gap / size).item())
    assert gap < 1e-4 * size


@pytest.mark.slow
def test_a_compiled_network_has_a_margin_of_nearly_0_at_equal_weights(folder):
    ours = policy(folder)
    ours.net.compile(dynamic=False)
    out = DiffusionDPO(beta=5000.0)(ours, make_reference(ours, adapted=True).denoiser, batch("sd"), RNG)
    margins = out.metrics["rewards/margins"].abs()
    print("margins", margins.tolist())
    assert margins.max() < 0.01
