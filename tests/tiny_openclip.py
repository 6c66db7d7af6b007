"""A tiny random model of open_clip's true class, under the name "tiny" in the package's own tables."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory, pretrained

from diffalign.rewards.frontend import HALF, FrontEnd
from diffalign.rewards.openclip import OpenCLIPParts

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def tiny_net(seed: int = 0, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = open_clip.CLIP(**CONFIG, **options).eval().requires_grad_(False)
        for parameter in net.parameters():  # the usual start is so small that all embeddings look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return net


def tiny_openclip(front: FrontEnd | None = None, **options: Any) -> OpenCLIPParts:
    front = front or FrontEnd(32, odd_margin="even")
    return OpenCLIPParts(net=tiny_net(**options), tokenizer=open_clip.SimpleTokenizer(), front=front)


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Puts "tiny" into the tables, with the tags `openai` (QuickGELU) and `laion` (0.5 constants); gives its file."""
    file = folder / "tiny.pt"
    torch.save({"state_dict": tiny_net().state_dict()}, file)
    tags = {
        "openai": pretrained._pcfg(file=str(file), quick_gelu=True),
        "laion": pretrained._pcfg(file=str(file), mean=HALF, std=HALF),
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    return file
