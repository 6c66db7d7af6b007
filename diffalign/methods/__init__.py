"""Methods: one paper, one file, one line in `METHODS`."""

from diffalign.methods.awm import AWM
from diffalign.methods.cpo import CPO
from diffalign.methods.crd import CRD
from diffalign.methods.curated import Curated
from diffalign.methods.d3po import D3PO
from diffalign.methods.ddpo import DDPO
from diffalign.methods.dgpo import DGPO
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.diffusion_kto import DiffusionKTO
from diffalign.methods.diffusion_nft import DiffusionNFT
from diffalign.methods.dmpo import DMPO
from diffalign.methods.dragon import Dragon
from diffalign.methods.flow_grpo import FlowGRPO
from diffalign.methods.inpo import InPO
from diffalign.methods.linear_dpo import LinearDPO
from diffalign.methods.mapo import MaPO
from diffalign.methods.ncp_cpo import NCPCPO
from diffalign.methods.ncp_dpo import NCPDPO
from diffalign.methods.ncp_sft import NCPSFT
from diffalign.methods.online_dpo import OnlineDPO
from diffalign.methods.seppo import SePPO
from diffalign.methods.sft import SFT
from diffalign.methods.smpo import SmPO
from diffalign.methods.spin import SPINDiffusion

METHODS: dict[str, type] = {
    "awm": AWM,
    "cpo": CPO,
    "crd": CRD,
    "curated": Curated,
    "d3po": D3PO,
    "ddpo": DDPO,
    "dgpo": DGPO,
    "diffusion_dpo": DiffusionDPO,
    "diffusion_kto": DiffusionKTO,
    "diffusion_nft": DiffusionNFT,
    "dmpo": DMPO,
    "dragon": Dragon,
    "flow_grpo": FlowGRPO,
    "inpo": InPO,
    "linear_dpo": LinearDPO,
    "mapo": MaPO,
    "ncp_cpo": NCPCPO,
    "ncp_dpo": NCPDPO,
    "ncp_sft": NCPSFT,
    "online_dpo": OnlineDPO,
    "seppo": SePPO,
    "sft": SFT,
    "smpo": SmPO,
    "spin": SPINDiffusion,
}
