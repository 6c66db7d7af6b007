"""How exactly Diffusion-DPO's logit is known, by the type that predictions come in: `python -m benchmarks.precision`.

The logit is a small difference of errors times thousands. Two sources of its error are measured apart, against float64:
rounding of what the network gives out (random predictions, at the latent sizes of true models), and everything before
that (the shipped tiny models under autocast). Both ways to form the difference are taken: of two averages, and element
by element before averaging, as `losses.error_gain` does. Takes seconds; writes benchmarks/precision.json.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses, paths
from diffalign.environment import describe
from diffalign.models.load import ModelSource, detect_family
from diffalign.models.lora import LoraSettings, adapter_layers, switched
from diffalign.models.policy import load_policy

OUT = Path(__file__).with_name("precision.json")
SLOPE = 2500.0
"""Logit per unit of error difference: half of beta 5000."""
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LATENTS = {"SD 1.5, 512 px": (4, 64, 64), "SDXL, 1024 px": (4, 128, 128), "SD 3.5, 512 px": (16, 64, 64)}
TINY = {"tiny-sd": ((8, 8, 8), (8, 32, 32)), "tiny-sd3": ((8, 8, 8), (8, 16, 16))}
"""Shipped models and the latent sizes they are run at: their own and a larger one."""
FORMS = ("averages", "elements")


def logits(pred: Tensor, pred_ref: Tensor, target: Tensor) -> dict[str, Float[Tensor, " b"]]:
    """The logit of each pair, winners first and then losers in every tensor, by how the difference is formed."""
    gains = {
        "averages": losses.squared_error(pred_ref, target) - losses.squared_error(pred, target),
        "elements": losses.error_gain(pred, pred_ref, target),
    }
    return {form: SLOPE * (w - lo).double() for form, (w, lo) in ((f, g.chunk(2)) for f, g in gains.items())}


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def of_outputs(shape: tuple[int, ...], *, pairs: int = 16) -> dict[str, Any]:
    """Errors of the logit where predictions are exact and then rounded to a type."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    target = normal(2 * pairs, *shape).float().double()
    off = 0.4 * normal(2 * pairs, *shape)
    pred_ref = target + off  # a mean squared error of 0.16
    pred = pred_ref + 1e-3 * paths.broadcast(normal(2 * pairs), off) * off + 0.01 * normal(2 * pairs, *shape)
    true = logits(pred, pred_ref, target)["elements"]
    found = {}
    for name, dtype in TYPES.items():
        rounded = logits(pred.to(dtype).float(), pred_ref.to(dtype).float(), target.float())
        found[name] = {form: rms(rounded[form] - true) for form in FORMS}
    return {"latent": list(shape), "pairs": pairs, "logit": rms(true), "error": found}


@torch.no_grad()
def of_network(model: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Errors of the logit of a shipped model and a LoRA on it, with its network run in a type by autocast."""
    source = ModelSource(path=model)
    family = detect_family(source)
    policy = load_policy(source, family, None, lora=LoraSettings(rank=4), seed=0)
    pairs = 2 if shape[-1] > 16 else 4
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(2 * pairs, *shape, generator=generator)
    eps = torch.randn(pairs, *shape, generator=generator).repeat(2, 1, 1, 1)
    t = policy.path.at((torch.arange(pairs) + 0.5) / pairs).repeat(2)
    x_t = paths.add_noise(policy.path, x_0, eps, t)
    target = paths.target(policy.path, policy.prediction, x_0, eps, t)
    inputs = _inputs(policy, len(x_0), t, generator)
    lora = {name: torch.randn(p.shape, generator=generator) for name, p in _lora_b(policy.net)}

    def run(net: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        exact = dtype == torch.float64
        cast = nullcontext() if dtype in (torch.float32, torch.float64) else torch.autocast("cpu", dtype)
        given = {k: v.double() if exact and v.is_floating_point() else v for k, v in inputs.items()}
        noised = x_t.double() if exact else x_t
        preds = []
        for off in (False, True):
            with cast, switched(adapter_layers(net), None) if off else nullcontext():
                out = net(noised, return_dict=False, **given)[0]
            preds.append(out if exact else out.float())
        return logits(*preds, target.double() if exact else target)

    def strengthen(net: Any, scale: float) -> None:
        for name, parameter in _lora_b(net):
            parameter.copy_(scale * lora[name])

    net64 = copy.deepcopy(policy.net).double()
    strengthen(net64, 1e-3)
    scale = 1e-3 / max(rms(run(net64, torch.float64)["elements"]), 1e-12)  # nearly linear: logits of about 1
    strengthen(net64, scale)
    strengthen(policy.net, scale)
    true = run(net64, torch.float64)["elements"]
    found = {name: run(policy.net, dtype) for name, dtype in TYPES.items()}
    error = {name: {form: rms(made[form] - true) for form in FORMS} for name, made in found.items()}
    return {"model": model, "latent": list(shape), "pairs": pairs, "logit": rms(true), "error": error}


def _inputs(policy: Any, size: int, t: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What the network takes beside noised latents; states of texts are random, a pair shares them."""
    config = policy.net.config

    def states(*shape: int) -> Tensor:
        return torch.randn(size // 2, *shape, generator=generator).repeat(2, *[1] * len(shape))

    if "cross_attention_dim" in config:
        return {"timestep": t, "encoder_hidden_states": states(32, config.cross_attention_dim)}
    return {
        "timestep": t * 1000,
        "encoder_hidden_states": states(32, config.joint_attention_dim),
        "pooled_projections": states(config.pooled_projection_dim),
    }


def _lora_b(net: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in net.named_parameters() if "lora_B" in name]


def rows(found: Mapping[str, Any]) -> list[str]:
    """The lines of the table in docs/precision.md."""
    lines = []
    for entry in [*found["outputs"], *found["networks"]]:
        what = entry.get("name") or f"{entry['model']}, whole network"
        size = "x".join(map(str, entry["latent"]))
        cells = [f"{entry['error'][t][form]:.1e}" for t in TYPES for form in FORMS]
        lines.append(f"| {what} | {size} | {entry['logit']:.2f} | {' | '.join(cells)} |")
    return lines


def measure() -> dict[str, Any]:
    """Everything, as it is written."""
    return {
        "version": 1,
        "environment": describe(torch.device("cpu")),
        "slope": SLOPE,
        "outputs": [{"name": f"{name}, outputs alone", **of_outputs(shape)} for name, shape in LATENTS.items()],
        "networks": [of_network(model, shape) for model, shapes in TINY.items() for shape in shapes],
    }


def main() -> None:
    """Measures, writes and prints."""
    found = measure()
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
