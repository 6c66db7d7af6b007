"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.seppo import SePPO
from diffalign.methods.sft import SFT
from diffalign.methods.spin import SPINDiffusion

METHODS: dict[str, type] = {
    "diffusion_dpo": DiffusionDPO,
    "seppo": SePPO,
    "sft": SFT,
    "spin": SPINDiffusion,
}
