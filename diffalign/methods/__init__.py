"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.cpo import CPO
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.diffusion_kto import DiffusionKTO
from diffalign.methods.dmpo import DMPO
from diffalign.methods.linear_dpo import LinearDPO
from diffalign.methods.mapo import MaPO
from diffalign.methods.sft import SFT

METHODS: dict[str, type] = {
    "cpo": CPO,
    "diffusion_dpo": DiffusionDPO,
    "diffusion_kto": DiffusionKTO,
    "dmpo": DMPO,
    "linear_dpo": LinearDPO,
    "mapo": MaPO,
    "sft": SFT,
}
