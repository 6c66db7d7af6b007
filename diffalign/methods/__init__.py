"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.sft import SFT

METHODS: dict[str, type] = {"diffusion_dpo": DiffusionDPO, "sft": SFT}
