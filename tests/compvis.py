"""CompVis' latent-diffusion networks, run from their yaml and their weights' names alone: the oracle of the conversion.

Weights are made from their names when they are first used, and kept: after one forward pass they are a checkpoint.
"""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F


def loud(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep the variance, so that attention is far from uniform and a wrong head shows."""
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return noise * np.float32(math.prod(shape[1:]) ** -0.5)
    return (1 + 0.1 * noise if key.endswith(".weight") else 0.1 * noise).astype(np.float32)


class Network:
    """Layers by name. All tensors are [B, C, H, W], those of transformers [B, N, C]."""

    def __init__(self, make: Callable[[str, tuple[int, ...]], np.ndarray] = loud) -> None:
        self.make = make
        self.weights: dict[str, Tensor] = {}

    def weight(self, key: str, *shape: int) -> Tensor:
        if key not in self.weights:
            self.weights[key] = torch.from_numpy(self.make(key, shape))
        assert self.weights[key].shape == shape
        return self.weights[key]

    def conv(self, name: str, x: Tensor, width: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> Tensor:
        weight, bias = self.weight(f"{name}.weight", width, x.shape[1], kernel, kernel), self.weight(f"{name}.bias", width)
        return F.conv2d(x, weight, bias, stride, kernel // 2 if padding is None else padding)

    def flat_conv(self, name: str, x: Tensor, width: int) -> Tensor:
        """[B, C, N]"""
        return F.conv1d(x, self.weight(f"{name}.weight", width, x.shape[1], 1), self.weight(f"{name}.bias", width))

    def linear(self, name: str, x: Tensor, width: int, bias: bool = True) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight", width, x.shape[-1]), self.weight(f"{name}.bias", width) if bias else None)

    def group_norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.group_norm(x, 32, self.weight(f"{name}.weight", x.shape[1]), self.weight(f"{name}.bias", x.shape[1]), eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight(f"{name}.weight", x.shape[-1]), self.weight(f"{name}.bias", x.shape[-1]))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., N, D]"""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


# --- U-Net ----------------------------------------------------------------------------------------------------------


def unet(net: Network, params: dict[str, Any], x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    p = {"num_heads": -1, "num_head_channels": -1, "num_heads_upsample": -1, "legacy": True, "channel_mult": [1, 2, 4, 8], **params}
    base, mult, layers, name = p["model_channels"], p["channel_mult"], p["num_res_blocks"], "model.diffusion_model"
    frequencies = torch.exp(-math.log(10000) * torch.arange(base // 2) / (base // 2))
    angles = t[:, None].float() * frequencies
    time = net.linear(f"{name}.time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=-1), 4 * base)
    time = net.linear(f"{name}.time_embed.2", F.silu(time), 4 * base)
    skips = [h := net.conv(f"{name}.input_blocks.0.0", x, base)]
    for level, m in enumerate(mult):
        for _ in range(layers):
            place = f"{name}.input_blocks.{len(skips)}"
            h = _resnet(net, p, f"{place}.0", h, time, base * m)
            if 2**level in p["attention_resolutions"]:
                h = _attention(net, p, f"{place}.1", h, context, up=False)
            skips.append(h)
        if level < len(mult) - 1:
            skips.append(h := _resample(net, p, f"{name}.input_blocks.{len(skips)}.0", h, time, "down"))
    h = _resnet(net, p, f"{name}.middle_block.0", h, time, h.shape[1])
    h = _attention(net, p, f"{name}.middle_block.1", h, context, up=False)
    h = _resnet(net, p, f"{name}.middle_block.2", h, time, h.shape[1])
    for i in range(len(mult) * (layers + 1)):
        level, place = len(mult) - 1 - i // (layers + 1), f"{name}.output_blocks.{i}"
        h = _resnet(net, p, f"{place}.0", torch.cat([h, skips.pop()], dim=1), time, base * mult[level])
        attends = 2**level in p["attention_resolutions"]
        if attends:
            h = _attention(net, p, f"{place}.1", h, context, up=True)
        if level and i % (layers + 1) == layers:
            h = _resample(net, p, f"{place}.{1 + attends}", h, time, "up")
    return net.conv(f"{name}.out.2", F.silu(net.group_norm(f"{name}.out.0", h)), p["out_channels"])


def _resized(h: Tensor, way: str) -> Tensor:
    return {"down": lambda: F.avg_pool2d(h, 2), "up": lambda: F.interpolate(h, scale_factor=2, mode="nearest"), "": lambda: h}[way]()


def _resample(net: Network, p: dict[str, Any], name: str, h: Tensor, time: Tensor, way: str) -> Tensor:
    if p.get("resblock_updown"):
        return _resnet(net, p, name, h, time, h.shape[1], way)
    if way == "down":
        return net.conv(f"{name}.op", h, h.shape[1], stride=2)
    return net.conv(f"{name}.conv", _resized(h, "up"), h.shape[1])


def _resnet(net: Network, p: dict[str, Any], name: str, x: Tensor, time: Tensor, width: int, way: str = "") -> Tensor:
    h = _resized(F.silu(net.group_norm(f"{name}.in_layers.0", x)), way)
    h, x = net.conv(f"{name}.in_layers.2", h, width), _resized(x, way)
    shift = p.get("use_scale_shift_norm", False)
    told = net.linear(f"{name}.emb_layers.1", F.silu(time), width * (2 if shift else 1))[..., None, None]
    if shift:
        h = net.group_norm(f"{name}.out_layers.0", h) * (1 + told[:, :width]) + told[:, width:]
    else:
        h = net.group_norm(f"{name}.out_layers.0", h + told)
    h = net.conv(f"{name}.out_layers.3", F.silu(h), width)
    return h + (x if x.shape[1] == width else net.conv(f"{name}.skip_connection", x, width, kernel=1))


def _attention(net: Network, p: dict[str, Any], name: str, x: Tensor, context: Tensor | None, up: bool) -> Tensor:
    batch, width, height, across = x.shape
    heads = p["num_heads"] if p["num_head_channels"] == -1 else width // p["num_head_channels"]
    if p.get("use_spatial_transformer"):
        return _transformer(net, p, name, x, context, heads)
    if up and p["legacy"] and p["num_head_channels"] == -1 and p["num_heads_upsample"] != -1:
        heads = p["num_heads_upsample"]
    qkv = net.flat_conv(f"{name}.qkv", net.group_norm(f"{name}.norm", x).flatten(2), 3 * width).transpose(1, 2)
    if p.get("use_new_attention_order"):
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = qkv.reshape(batch, -1, heads, 3, width // heads).permute(3, 0, 2, 1, 4)
    h = attend(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2)
    return x + net.flat_conv(f"{name}.proj_out", h, width).reshape(batch, width, height, across)


def _transformer(net: Network, p: dict[str, Any], name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    batch, width, height, across = x.shape
    h = net.conv(f"{name}.proj_in", net.group_norm(f"{name}.norm", x, eps=1e-6), width, kernel=1).flatten(2).transpose(1, 2)

    def attention(place: str, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            net.linear(f"{place}.to_{letter}", tokens, width, bias=False).unflatten(-1, (heads, -1)).transpose(1, 2)
            for letter, tokens in (("q", x), ("k", source), ("v", source))
        )
        return net.linear(f"{place}.to_out.0", attend(q, k, v).transpose(1, 2).flatten(2), width)

    for depth in range(p.get("transformer_depth", 1)):
        block = f"{name}.transformer_blocks.{depth}"
        normed = net.layer_norm(f"{block}.norm1", h)
        h = h + attention(f"{block}.attn1", normed, normed)
        h = h + attention(f"{block}.attn2", net.layer_norm(f"{block}.norm2", h), context)
        wide, gate = net.linear(f"{block}.ff.net.0.proj", net.layer_norm(f"{block}.norm3", h), 8 * width).chunk(2, dim=-1)
        h = h + net.linear(f"{block}.ff.net.2", wide * F.gelu(gate), width)
    return x + net.conv(f"{name}.proj_out", h.transpose(1, 2).reshape(batch, width, height, across), width, kernel=1)


# --- first stage ----------------------------------------------------------------------------------------------------


def encode(net: Network, params: dict[str, Any], image: Tensor) -> Tensor:
    """Mean and log-variance stacked (KL), or the latents before quantisation (VQ)."""
    p, name = params["ddconfig"], "first_stage_model.encoder"
    h = net.conv(f"{name}.conv_in", image, p["ch"])
    for level, m in enumerate(p["ch_mult"]):
        for layer in range(p["num_res_blocks"]):
            h = _first_stage_layer(net, p, f"{name}.down.{level}", layer, h, level, p["ch"] * m)
        if level < len(p["ch_mult"]) - 1:
            h = net.conv(f"{name}.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), h.shape[1], stride=2, padding=0)
    h = F.silu(net.group_norm(f"{name}.norm_out", _first_stage_middle(net, name, h), eps=1e-6))
    twice = 2 if p["double_z"] else 1
    return net.conv(
        "first_stage_model.quant_conv", net.conv(f"{name}.conv_out", h, twice * p["z_channels"]), twice * params["embed_dim"], 1
    )


def decode(net: Network, params: dict[str, Any], latents: Tensor) -> Tensor:
    p, name = params["ddconfig"], "first_stage_model.decoder"
    if params.get("n_embed"):
        codes = net.weight("first_stage_model.quantize.embedding.weight", params["n_embed"], params["embed_dim"])
        nearest = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(-1)
        latents = codes[nearest].reshape(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    h = net.conv("first_stage_model.post_quant_conv", latents, p["z_channels"], 1)
    h = _first_stage_middle(net, name, net.conv(f"{name}.conv_in", h, p["ch"] * p["ch_mult"][-1]))
    for level, m in reversed([*enumerate(p["ch_mult"])]):
        for layer in range(p["num_res_blocks"] + 1):
            h = _first_stage_layer(net, p, f"{name}.up.{level}", layer, h, level, p["ch"] * m)
        if level:
            h = net.conv(f"{name}.up.{level}.upsample.conv", _resized(h, "up"), h.shape[1])
    return net.conv(f"{name}.conv_out", F.silu(net.group_norm(f"{name}.norm_out", h, eps=1e-6)), p["out_ch"])


def _first_stage_layer(net: Network, p: dict[str, Any], name: str, layer: int, h: Tensor, level: int, width: int) -> Tensor:
    h = _first_stage_resnet(net, f"{name}.block.{layer}", h, width)
    return _first_stage_attention(net, f"{name}.attn.{layer}", h) if p["resolution"] >> level in p["attn_resolutions"] else h


def _first_stage_middle(net: Network, name: str, h: Tensor) -> Tensor:
    h = _first_stage_attention(net, f"{name}.mid.attn_1", _first_stage_resnet(net, f"{name}.mid.block_1", h, h.shape[1]))
    return _first_stage_resnet(net, f"{name}.mid.block_2", h, h.shape[1])


def _first_stage_resnet(net: Network, name: str, x: Tensor, width: int) -> Tensor:
    h = net.conv(f"{name}.conv1", F.silu(net.group_norm(f"{name}.norm1", x, eps=1e-6)), width)
    h = net.conv(f"{name}.conv2", F.silu(net.group_norm(f"{name}.norm2", h, eps=1e-6)), width)
    return h + (x if x.shape[1] == width else net.conv(f"{name}.nin_shortcut", x, width, kernel=1))


def _first_stage_attention(net: Network, name: str, x: Tensor) -> Tensor:
    h = net.group_norm(f"{name}.norm", x, eps=1e-6)
    q, k, v = (net.conv(f"{name}.{letter}", h, h.shape[1], kernel=1).flatten(2).transpose(1, 2) for letter in "qkv")
    return x + net.conv(f"{name}.proj_out", attend(q, k, v).transpose(1, 2).reshape(x.shape), x.shape[1], kernel=1)


# --- files ----------------------------------------------------------------------------------------------------------


def settings(unet_config: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A whole yaml in CompVis' layout."""
    return {
        "model": {
            "base_learning_rate": 2.0e-06,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **{"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "first_stage_key": "image"},
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_config},
                **params,
            },
        },
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 48}},
    }


def write(folder: Path, weights: dict[str, Any], config: dict[str, Any]) -> tuple[Path, Path]:
    """(checkpoint, yaml)"""
    checkpoint, yaml_file = folder / "model.ckpt", folder / "config.yaml"
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2"}, checkpoint)
    yaml_file.write_text(yaml.safe_dump(config))
    return checkpoint, yaml_file
