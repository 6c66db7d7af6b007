"""Images a second of rewards with a network, at true size with random weights: ours in batches, the usual singly.

The usual road is what people write: the model's own processor and one call of transformers, open_clip or diffusers an
image. Both get the same 512 x 512 images, several of each prompt as an evaluation has them. Rewards of sets are in
`set_distances`. Writes benchmarks/rewards.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import set_distances, true_size
from diffalign.environment import describe
from diffalign.progress import bar
from diffalign.rewards.aesthetic import AestheticReward
from diffalign.rewards.clip import CLIPEncoder, CLIPParts, CLIPReward
from diffalign.rewards.dino import DINOEncoder
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.hpsv2 import HPSv2Reward
from diffalign.rewards.image_similarity import ImageSimilarityReward
from diffalign.rewards.imagereward import ImageRewardReward
from diffalign.rewards.openclip import OpenCLIPEncoder, OpenCLIPParts, OpenCLIPReward
from diffalign.rewards.pickscore import PickScoreReward
from diffalign.rewards.safety import SafetyReward
from diffalign.types import RewardBatch

FILE = Path(__file__).with_name("rewards.json")
SIDE = 512
PER_PROMPT = 4
"""Images of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A reward in batches, and the usual road for one image."""

    ours: Callable[[RewardBatch], Any]
    singly: Callable[[Image.Image, str], Any]


def clip(dtype: str, place: Path) -> Rival:
    """CLIP ViT-L/14 by transformers."""
    parts = true_size.clip_parts(true_size.vit_l_14())
    return Rival(
        ours=CLIPReward(encoder=CLIPEncoder(parts=parts, dtype=dtype)).score, singly=_clip_singly(parts, place)
    )


def pickscore(dtype: str, place: Path) -> Rival:
    """PickScore's ViT-H/14 by transformers."""
    parts = true_size.clip_parts(true_size.vit_h_14())
    reward = PickScoreReward(encoder=CLIPEncoder(parts=parts, dtype=dtype))
    return Rival(ours=reward.score, singly=_clip_singly(parts, place))


def aesthetic(dtype: str, place: Path) -> Rival:
    """A head of the first LAION predictor's shape on CLIP ViT-L/14."""
    parts = true_size.clip_parts(true_size.vit_l_14())
    head = torch.nn.Linear(768, 1)
    save_file(dict(head.state_dict()), place / "head.safetensors")
    reward = AestheticReward(str(place / "head.safetensors"), encoder=CLIPEncoder(parts=parts, dtype=dtype))

    def singly(image: Image.Image, prompt: str) -> Any:
        pixels = parts.processor(image, return_tensors="pt")["pixel_values"]
        features = parts.net.get_image_features(pixel_values=pixels.to(parts.net.dtype)).pooler_output.float()
        return head(features / features.norm(dim=-1, keepdim=True))

    return Rival(ours=reward.score, singly=singly)


def openclip(dtype: str, place: Path) -> Rival:
    """ViT-H-14 by open_clip."""
    parts = _openclip_parts()
    reward = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts, dtype=dtype))
    return Rival(ours=reward.score, singly=_openclip_singly(parts))


def hpsv2(dtype: str, place: Path) -> Rival:
    """HPSv2's ViT-H-14 by open_clip."""
    parts = _openclip_parts()
    reward = HPSv2Reward(encoder=OpenCLIPEncoder(parts=parts, dtype=dtype))
    return Rival(ours=reward.score, singly=_openclip_singly(parts))


def imagereward(dtype: str, place: Path) -> Rival:
    """ImageReward, whose own package asks for old versions of everything: our module one image at a time."""
    reward = ImageRewardReward(parts=true_size.imagereward_parts())

    def singly(image: Image.Image, prompt: str) -> Any:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return reward.score(RewardBatch(images=pixels, prompts=[prompt])).scores

    return Rival(ours=reward.score, singly=singly)


def safety(dtype: str, place: Path) -> Rival:
    """The safety checker by diffusers; it has no other dtype of ours."""
    from transformers import CLIPImageProcessorPil

    net, processor = true_size.safety_checker(), CLIPImageProcessorPil()

    def singly(image: Image.Image, prompt: str) -> Any:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        return net(clip_input=pixels, images=[torch.zeros(3, SIDE, SIDE).permute(1, 2, 0).numpy()])

    return Rival(ours=SafetyReward(net=net).score, singly=singly)


def dino(dtype: str, place: Path) -> Rival:
    """DINO ViT-S/16 by transformers: an image and its reference."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    net = true_size.filled(lambda: ViTModel(ViTConfig(**sizes), add_pooling_layer=False)).eval()
    processor, reward = ViTImageProcessorPil(), ImageSimilarityReward(encoder=DINOEncoder(net=net))
    reference = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    as_image = _pictures(reference[None])[0]

    def ours(batch: RewardBatch) -> Any:
        return reward.score(RewardBatch(images=batch.images, references=[[reference]] * len(batch)))

    def singly(image: Image.Image, prompt: str) -> Any:
        a, b = (net(**processor(one, return_tensors="pt")).last_hidden_state[:, 0] for one in (image, as_image))
        return torch.nn.functional.cosine_similarity(a, b)

    return Rival(ours=ours, singly=singly)


RIVALS: dict[str, Callable[[str, Path], Rival]] = {
    "clip": clip,
    "aesthetic": aesthetic,
    "pickscore": pickscore,
    "openclip": openclip,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "safety": safety,
    "image_similarity:dino": dino,
}
FLOAT32_ONLY = frozenset({"imagereward", "safety", "image_similarity:dino"})


@torch.no_grad()
def measure(
    names: list[str], *, images: int, rounds: int, threads: int, dtypes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A row per reward and dtype; the two roads are timed in turn, medians of images a second."""
    torch.set_num_threads(threads)
    batch = batch_of(images)
    assert batch.images is not None, "it is a batch of images"
    pictures, prompts = _pictures(batch.images), list(batch.prompts or [])
    cells = [(n, d) for n in names for d in dtypes if d == "float32" or n not in FLOAT32_ONLY]
    rows = []
    with tempfile.TemporaryDirectory() as place, bar("rewards", len(cells)) as shown:
        for name, dtype in cells:
            rival = RIVALS[name](dtype, Path(place))
            timed: dict[str, list[float]] = {"ours": [], "singly": []}
            for _ in range(rounds):
                timed["ours"].append(_seconds(partial(rival.ours, batch)))
                timed["singly"].append(_seconds(partial(_one_by_one, rival, pictures, prompts)))
            ratios = [b / a for a, b in zip(timed["ours"], timed["singly"], strict=True)]
            rows.append(
                {
                    "reward": name,
                    "dtype": dtype,
                    "images_a_second": images / statistics.median(timed["ours"]),
                    "images_a_second_singly": images / statistics.median(timed["singly"]),
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
            )
            shown.advance(note=f"{name} {dtype}")
            del rival
    return rows


def batch_of(images: int) -> RewardBatch:
    """Noisy pictures of the usual size, several a prompt."""
    rng = torch.Generator().manual_seed(0)
    prompts = [f"a photo of thing number {i // PER_PROMPT}, red, on a table" for i in range(images)]
    return RewardBatch(images=torch.rand(images, 3, SIDE, SIDE, generator=rng), prompts=prompts)


def _one_by_one(rival: Rival, pictures: list[Image.Image], prompts: list[str]) -> None:
    for image, prompt in zip(pictures, prompts, strict=True):
        rival.singly(image, prompt)


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def _clip_singly(parts: CLIPParts, place: Path) -> Callable[[Image.Image, str], Any]:
    def singly(image: Image.Image, prompt: str) -> Any:
        pixels = parts.processor(image, return_tensors="pt")["pixel_values"].to(parts.net.dtype)
        tokens = parts.tokenizer([prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
        return parts.net(pixel_values=pixels, **tokens).logits_per_image

    return singly


def _openclip_parts() -> OpenCLIPParts:
    import open_clip

    net = true_size.filled(lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))).eval()
    return OpenCLIPParts(net=net, tokenizer=open_clip.get_tokenizer("ViT-H-14"), front=FrontEnd(224, odd_margin="even"))


def _openclip_singly(parts: OpenCLIPParts) -> Callable[[Image.Image, str], Any]:
    import open_clip

    transform = open_clip.image_transform(224, is_train=False)

    def singly(image: Image.Image, prompt: str) -> Any:
        dtype = next(parts.net.parameters()).dtype
        a = parts.net.encode_image(transform(image)[None].to(dtype), normalize=True)
        b = parts.net.encode_text(parts.tokenizer([prompt]), normalize=True)
        return (a * b).sum()

    return singly


def show(table: dict[str, Any]) -> None:
    """Prints both tables."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("reward", "dtype", "images/s", "singly", "ratio", title="Rewards at true size")
    for row in table["rewards"]:
        low, high = row["ratio_range"]
        shown.add_row(
            row["reward"],
            row["dtype"],
            f"{row['images_a_second']:.3g}",
            f"{row['images_a_second_singly']:.3g}",
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        )
    Console().print(shown)
    set_distances.show(table["sets"])


def main() -> None:
    """Measures all, or some, and writes the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rewards", nargs="+", choices=RIVALS, default=list(RIVALS))
    options.add_argument("--images", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options.add_argument("--sets", type=Path, help="a file that benchmarks.set_distances wrote; measured if left out")
    options.add_argument("--out", type=Path, default=FILE)
    asked = options.parse_args()
    sets = json.loads(asked.sets.read_text()) if asked.sets else set_distances.measure()
    rows = measure(
        asked.rewards, images=asked.images, rounds=asked.rounds, threads=asked.threads, dtypes=tuple(asked.dtypes)
    )
    table = {
        "images": asked.images,
        "side": SIDE,
        "images_a_prompt": PER_PROMPT,
        "rounds": asked.rounds,
        "threads": asked.threads,
        "weights": "random",
        "environment": describe(torch.device("cpu")),
        "rewards": rows,
        "sets": sets,
    }
    show(table)
    asked.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
