"""LoRAs in PEFT's own form, for networks that Diffusers has no LoRA loader for.

A folder with `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained(network, folder)`
reads; alpha stands in the config.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

PREFIX = "base_model.model."
"""What PEFT puts before the names of a network's modules."""
RECIPE = (
    "from peft import PeftModel\n"
    'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "path/to/this/folder")'
)
"""How others load such a folder, for the model card."""
WEIGHTS = "adapter_model.safetensors"


def save_peft(folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes adapter weights, named as in the bare network, and the adapter's config."""
    from peft import PeftConfig
    from safetensors.torch import save_file

    config: Any = PeftConfig.from_peft_type(**{**metadata, "inference_mode": True})
    config.save_pretrained(folder)
    save_file({PREFIX + name: tensor for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def load_peft(pipeline: Any, place: str, file: str | None, adapter: str | None) -> None:
    """Adds the adapter of such a folder or hub id to a pipeline's transformer.

    Raises:
        ValueError: The weights are not those of an adapter on this network.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors.torch import load_file

    net, name = pipeline.transformer, adapter or "default"
    config: Any = LoraConfig.from_pretrained(place)
    weights = load_peft_weights(place, device="cpu") if file is None else load_file(Path(place) / file)
    inject_adapter_in_model(config, net, adapter_name=name)
    found: Any = set_peft_model_state_dict(
        net, {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}, adapter_name=name
    )
    lacking = [key for key in found.missing_keys if f".{name}." in key]
    if found.unexpected_keys or lacking:
        raise ValueError(f"its weights do not fit the network: {[*found.unexpected_keys, *lacking][0]!r}")
