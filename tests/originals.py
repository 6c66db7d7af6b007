"""Tiny models in the layout of their authors, the way back from Diffusers' converters, and those at our width."""

import re
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
KINDS = ("weight", "bias")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor.clone().contiguous() for name, tensor in state.items()}


def unet(net: Any) -> State:
    """A U-Net of SD or SDXL: blocks in one row, samplers in the last of their level."""
    return {_unet_name(name, net.config): tensor for name, tensor in net.state_dict().items()}


def _unet_name(name: str, config: Any) -> str:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    if name.startswith("mid_block"):
        _, part, number, rest = name.split(".", 3)
        return f"middle_block.1.{rest}" if part == "attentions" else f"middle_block.{2 * int(number)}.{_resnet(rest)}"
    level, number, part, j, rest = re.fullmatch(r"(\w+)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    in_level = config.layers_per_block + 1
    at = int(number) * in_level + (in_level - 1 if part.endswith("samplers") else int(j))
    place = f"input_blocks.{at + 1}" if level == "down" else f"output_blocks.{at}"
    if part == "downsamplers":
        return f"{place}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"{place}.{2 if 'CrossAttn' in config.up_block_types[int(number)] else 1}.{rest}"
    return f"{place}.1.{rest}" if part == "attentions" else f"{place}.0.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    module, kind = rest.split(".")
    return f"{_RESNET[module]}.{kind}"


def vae(net: Any) -> State:
    """An AutoencoderKL: the decoder's levels are counted from the image, attention is of 1x1 convolutions."""
    levels = len(net.config.block_out_channels)
    state = {}
    for name, tensor in net.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        state[new] = tensor
    return state


def clip(model: nn.Module) -> State:
    """CLIP as transformers names it, without a projection."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    return prefixed("text_model.", {n: t for n, t in state.items() if not n.startswith("text_projection")})


def open_clip(model: nn.Module) -> State:
    """CLIP as open_clip names it: query, key and value in one, the projection transposed."""
    old = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    state = {
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "text_projection": old["text_projection.weight"].T,
    }
    for kind in KINDS:
        state[f"ln_final.{kind}"] = old[f"final_layer_norm.{kind}"]
        for i in range(model.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            state[f"{theirs}attn.in_proj_{kind}"] = torch.cat([old[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                state[f"{theirs}{b}.{kind}"] = old[f"{ours}{a}.{kind}"]
    return state


def _swap(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def sd3(net: Any) -> State:
    """An SD3Transformer2DModel as its authors' MMDiT."""
    old, last = net.state_dict(), net.config.num_layers - 1
    state = {"pos_embed": old["pos_embed.pos_embed"]}
    for kind in KINDS:
        state[f"x_embedder.proj.{kind}"] = old[f"pos_embed.proj.{kind}"]
        state[f"context_embedder.{kind}"] = old[f"context_embedder.{kind}"]
        for j, number in enumerate((0, 2)):
            state[f"t_embedder.mlp.{number}.{kind}"] = old[f"time_text_embed.timestep_embedder.linear_{j + 1}.{kind}"]
            state[f"y_embedder.mlp.{number}.{kind}"] = old[f"time_text_embed.text_embedder.linear_{j + 1}.{kind}"]
        state[f"final_layer.linear.{kind}"] = old[f"proj_out.{kind}"]
        state[f"final_layer.adaLN_modulation.1.{kind}"] = _swap(old[f"norm_out.linear.{kind}"])
        for i in range(last + 1):
            ours = f"transformer_blocks.{i}."
            x, c = f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block."
            state[f"{x}attn.qkv.{kind}"] = torch.cat([old[f"{ours}attn.to_{q}.{kind}"] for q in "qkv"])
            state[f"{c}attn.qkv.{kind}"] = torch.cat([old[f"{ours}attn.add_{q}_proj.{kind}"] for q in "qkv"])
            pairs = [
                (f"{x}attn.proj", "attn.to_out.0"), (f"{x}adaLN_modulation.1", "norm1.linear"),
                (f"{x}mlp.fc1", "ff.net.0.proj"), (f"{x}mlp.fc2", "ff.net.2"),
                (f"{c}attn.proj", "attn.to_add_out"), (f"{c}adaLN_modulation.1", "norm1_context.linear"),
                (f"{c}mlp.fc1", "ff_context.net.0.proj"), (f"{c}mlp.fc2", "ff_context.net.2"),
            ]  # fmt: skip
            if i in net.config.dual_attention_layers:
                state[f"{x}attn2.qkv.{kind}"] = torch.cat([old[f"{ours}attn2.to_{q}.{kind}"] for q in "qkv"])
                pairs.append((f"{x}attn2.proj", "attn2.to_out.0"))
            for theirs, module in pairs:
                if f"{ours}{module}.{kind}" in old:  # the last block has less of the text side
                    state[f"{theirs}.{kind}"] = old[f"{ours}{module}.{kind}"]
        shifted = f"joint_blocks.{last}.context_block.adaLN_modulation.1.{kind}"
        state[shifted] = _swap(state[shifted])
    for i in range(last + 1):
        norms = {"x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
                 "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
                 "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k"}  # fmt: skip
        for theirs, module in norms.items():
            if f"transformer_blocks.{i}.{module}.weight" in old:
                state[f"joint_blocks.{i}.{theirs}.weight"] = old[f"transformer_blocks.{i}.{module}.weight"]
    return state


def flux(net: Any) -> State:
    """A FluxTransformer2DModel as its authors have it: query, key, value and the way into the MLP in one."""
    old = net.state_dict()
    embedder = "time_text_embed."
    ends = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": f"{embedder}timestep_embedder.linear_1",
        "time_in.out_layer": f"{embedder}timestep_embedder.linear_2",
        "vector_in.in_layer": f"{embedder}text_embedder.linear_1",
        "vector_in.out_layer": f"{embedder}text_embedder.linear_2",
        "guidance_in.in_layer": f"{embedder}guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{embedder}guidance_embedder.linear_2",
    }  # fmt: skip
    state = {}
    for kind in KINDS:
        state |= {f"{new}.{kind}": old[f"{module}.{kind}"] for new, module in ends.items() if f"{module}.{kind}" in old}
        state[f"final_layer.adaLN_modulation.1.{kind}"] = _swap(old[f"norm_out.linear.{kind}"])
        for i in range(net.config.num_layers):
            ours, theirs = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            for side, q, out, ff, norm in (
                ("img", "attn.to_{}", "attn.to_out.0", "ff", "norm1"),
                ("txt", "attn.add_{}_proj", "attn.to_add_out", "ff_context", "norm1_context"),
            ):
                state[f"{theirs}{side}_attn.qkv.{kind}"] = torch.cat(
                    [old[f"{ours}{q.format(x)}.{kind}"] for x in "qkv"]
                )
                state[f"{theirs}{side}_attn.proj.{kind}"] = old[f"{ours}{out}.{kind}"]
                state[f"{theirs}{side}_mlp.0.{kind}"] = old[f"{ours}{ff}.net.0.proj.{kind}"]
                state[f"{theirs}{side}_mlp.2.{kind}"] = old[f"{ours}{ff}.net.2.{kind}"]
                state[f"{theirs}{side}_mod.lin.{kind}"] = old[f"{ours}{norm}.linear.{kind}"]
        for i in range(net.config.num_single_layers):
            ours, theirs = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
            parts = [old[f"{ours}attn.to_{x}.{kind}"] for x in "qkv"]
            state[f"{theirs}linear1.{kind}"] = torch.cat([*parts, old[f"{ours}proj_mlp.{kind}"]])
            state[f"{theirs}linear2.{kind}"] = old[f"{ours}proj_out.{kind}"]
            state[f"{theirs}modulation.lin.{kind}"] = old[f"{ours}norm.linear.{kind}"]
    for x, name in (("q", "query"), ("k", "key")):
        for i in range(net.config.num_layers):
            for side, norm in (("img", f"norm_{x}"), ("txt", f"norm_added_{x}")):
                scale = old[f"transformer_blocks.{i}.attn.{norm}.weight"]
                state[f"double_blocks.{i}.{side}_attn.norm.{name}_norm.scale"] = scale
        for i in range(net.config.num_single_layers):
            scale = old[f"single_transformer_blocks.{i}.attn.norm_{x}.weight"]
            state[f"single_blocks.{i}.norm.{name}_norm.scale"] = scale
    return state


def sd_file(pipeline: Any) -> State:
    return {
        **prefixed("model.diffusion_model.", unet(pipeline.unet)),
        **prefixed("first_stage_model.", vae(pipeline.vae)),
        **prefixed("cond_stage_model.transformer.", clip(pipeline.text_encoder)),
    }


def sdxl_file(pipeline: Any) -> State:
    return {
        **prefixed("model.diffusion_model.", unet(pipeline.unet)),
        **prefixed("first_stage_model.", vae(pipeline.vae)),
        **prefixed("conditioner.embedders.0.transformer.", clip(pipeline.text_encoder)),
        **prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2)),
    }


def refiner_file(pipeline: Any) -> State:
    return {
        **prefixed("model.diffusion_model.", unet(pipeline.unet)),
        **prefixed("first_stage_model.", vae(pipeline.vae)),
        **prefixed("conditioner.embedders.0.model.", open_clip(pipeline.text_encoder_2)),
    }


def sd3_file(pipeline: Any) -> State:
    """With all three text encoders; the first one's projection is the identity, which the layout leaves out."""
    second = {**clip(pipeline.text_encoder_2), "text_projection.weight": pipeline.text_encoder_2.text_projection.weight}
    return {
        **prefixed("model.diffusion_model.", sd3(pipeline.transformer)),
        **prefixed("first_stage_model.", vae(pipeline.vae)),
        **prefixed("text_encoders.clip_l.transformer.", clip(pipeline.text_encoder)),
        **prefixed("text_encoders.clip_g.transformer.", second),
        **prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict()),
    }


def flux_file(pipeline: Any) -> State:
    """The transformer alone, as it is published."""
    return prefixed("", flux(pipeline.transformer))


def at_width(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], width: int) -> None:
    """Runs Diffusers' converters of FLUX, which know the true model's width alone, at another one."""
    sizes = {3072: width, 12288: 4 * width}

    def changed(value: Any) -> Any:
        if isinstance(value, CodeType):
            return value.replace(co_consts=tuple(changed(v) for v in value.co_consts))
        if isinstance(value, tuple):
            return tuple(changed(v) for v in value)
        return sizes.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    monkeypatch.setattr(function, "__code__", changed(function.__code__))
