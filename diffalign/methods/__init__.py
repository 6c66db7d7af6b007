"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.inpo import InPO
from diffalign.methods.sft import SFT
from diffalign.methods.smpo import SmPO

METHODS: dict[str, type] = {"diffusion_dpo": DiffusionDPO, "inpo": InPO, "sft": SFT, "smpo": SmPO}
