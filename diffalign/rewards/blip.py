"""BLIP's image-grounded text encoder, made of transformers' parts and loaded by the names of the published files.

A ViT turns the image into tokens; a BERT without a pooler reads the prompt, and in each of its layers every word
attends to all words and then to all image tokens. The feature is the last hidden state of the first token, [CLS]:
BLIP's own [ENC] token is for its matching head and is not used here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.errors import InputError

_PUBLISHED = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.qkv", ".attn.qkv"),
    (".self_attn.projection", ".attn.proj"),
    ("post_layernorm", "norm"),
)
"""Parts of transformers' names in the visual encoder, and of the published ones; the text encoder's names agree."""


@dataclass(frozen=True, kw_only=True)
class BLIPSizes:
    """Sizes of the two towers; as they stand, ViT-L/16 at 224 and BERT-base with two tokens more."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 30_524
    positions: int = 512


class BLIP(nn.Module):
    """Image and prompt to the hidden state of [CLS]; without dropout, so that `train()` changes nothing."""

    def __init__(self, sizes: BLIPSizes) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.sizes = sizes
        vision = BlipVisionConfig(
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
        )
        text = BlipTextConfig(
            vocab_size=sizes.vocabulary,
            max_position_embeddings=sizes.positions,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,  # gives the layers their cross-attention; self-attention stays two-way, see `forward`
        )
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(
        self, pixels: Float[Tensor, "b 3 r r"], tokens: Int[Tensor, "b l"], mask: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b d"]:
        """Features of pairs: row i of `pixels` with row i of `tokens`; `mask` is 0 on padding."""
        seen = self.visual_encoder(pixel_values=pixels).last_hidden_state
        read = self.text_encoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, use_cache=False, is_decoder=False
        )
        return read.last_hidden_state[:, 0].float()


def published_shapes(sizes: BLIPSizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a published file, without a prefix."""
    return {_published(name): tuple(value.shape) for name, value in _empty(sizes).state_dict().items()}


def load_blip(state: Mapping[str, Tensor], sizes: BLIPSizes) -> BLIP:
    """A network that holds the tensors of a state dict with the names and shapes of `published_shapes`, in float32."""
    net = _empty(sizes)
    own = {name: state[_published(name)].float() for name in net.state_dict()}
    net.load_state_dict(own, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], parts: tuple[str, ...], where: str
) -> None:
    """Checks that a file holds all weights that a score is computed from, in their shapes, and no more in its parts.

    Args:
        parts: Beginnings of names under which nothing unexpected may lie: what is there would belong to another
            network.

    Raises:
        InputError: A weight is missing, unexpected or of another shape.
    """
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise InputError(f"{where} must hold {len(expected)} weights, got a file without {_some(missing)}")
    surplus = sorted(name for name in state.keys() - expected.keys() if name.startswith(parts))
    if surplus:
        raise InputError(f"{where} must hold no weights of another network, got {_some(surplus)}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"{where} must have {name} of shape {shape}, got {tuple(state[name].shape)}")


def _empty(sizes: BLIPSizes) -> BLIP:
    """The network with its buffers, but weights without memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return BLIP(sizes)


def _published(name: str) -> str:
    if name.startswith("visual_encoder."):
        for own, published in _PUBLISHED:
            name = name.replace(own, published)
    return name


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
