"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.ncp_cpo import NCPCPO
from diffalign.methods.ncp_dpo import NCPDPO
from diffalign.methods.ncp_sft import NCPSFT
from diffalign.methods.sft import SFT

METHODS: dict[str, type] = {
    "diffusion_dpo": DiffusionDPO,
    "ncp_cpo": NCPCPO,
    "ncp_dpo": NCPDPO,
    "ncp_sft": NCPSFT,
    "sft": SFT,
}
