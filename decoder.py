"""Latents to pixels: the ViT decoder, its sizes and checkpoints, and pictures on disk.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Letters: B batch, C latent channels, H x W latent grid, N = H W tokens, D width, p patch, d width of an attention head.
This file needs torch, numpy and Pillow only.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

# Trainable parameters with C = 768, patch 16; published rFID-50k on DINOv2-B without noise (ViT-XL with tau 0.8: 0.57).
SIZES = {
    "ViT-B": dict(width=768, depth=12, heads=12, mlp=3072),  # 86.2 M, 0.58
    "ViT-L": dict(width=1024, depth=24, heads=16, mlp=4096),  # 303.9 M, 0.50
    "ViT-XL": dict(width=1152, depth=28, heads=16, mlp=4096),  # 415.1 M, 0.49
    "ViT-tiny": dict(width=128, depth=3, heads=4, mlp=512),  # the demo's
}


class Block(nn.Module):
    """A pre-norm ViT block: x (B, 1 + N, D) -> the same."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, 1 + N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, 1 + N, d) each
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sincos_2d(grid, width):
    """MAE's fixed 2D positions (1, N, D): first half from the column, second half from the row, each [sin, cos]."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]  # (N, D/4) each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(table).float()[None]


class Decoder(nn.Module):
    """Latents (B, C, H, W), un-normalised -> images (B, 3, H p, W p), nominally in [0, 1], not clamped.

    Args: latent_dim C; grid H = W; patch p: 16 for 256 px from a 16 x 16 grid, 32 for the paper's decoder upsampling to
    512 px; mean, std: the encoder's three pixel means and deviations, which the output is scaled by.
    """

    def __init__(self, latent_dim=768, grid=16, patch=16, width=1152, depth=28, heads=16, mlp=4096,
                 mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):  # fmt: skip
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch=patch, width=width, depth=depth, heads=heads,
                           mlp=mlp, mean=list(mean), std=list(std))  # fmt: skip
        self.image_size, self.patch = grid * patch, patch
        self.checkpointing = False  # recompute the blocks in backward: less memory, about a third more time
        self.embed = nn.Linear(latent_dim, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.to_pixels = nn.Linear(width, patch * patch * 3)
        positions = F.pad(sincos_2d(grid, width), (0, 0, 1, 0))  # (1, 1 + N, D); zeros for CLS
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, z):
        grid = z.shape[-2:]
        x = self.embed(z.flatten(2).mT)  # (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions  # (B, 1 + N, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.to_pixels(self.norm(x))[:, 1:]  # (B, N, p p 3)
        x = x.unflatten(1, grid).unflatten(3, (self.patch, self.patch, 3))  # (B, H, W, p, p, 3)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, H p, W p)
        return x.float() * self.std + self.mean


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def from_published(state):
    """A published state dict (Hugging Face's ViT key names) -> (arguments of `Decoder` but mean and std, our state)."""
    heads = {size["width"]: size["heads"] for size in SIZES.values()}  # no tensor tells their number
    width, latent_dim = state["decoder_embed.weight"].shape
    layers = {int(match[1]) for key in state if (match := re.match(r"decoder_layers\.(\d+)\.", key))}
    config = dict(latent_dim=latent_dim, width=width, depth=len(layers), heads=heads.get(width),
                  grid=round((state["decoder_pos_embed"].shape[1] - 1) ** 0.5),
                  patch=round((len(state["decoder_pred.bias"]) / 3) ** 0.5),
                  mlp=len(state["decoder_layers.0.intermediate.dense.bias"]))  # fmt: skip
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "proj",
             "intermediate.dense": "fc1", "output.dense": "fc2"}  # fmt: skip
    ours = {"cls": state["trainable_cls_token"]}
    for kind in ("weight", "bias"):
        for theirs, name in {"embed": "embed", "norm": "norm", "pred": "to_pixels"}.items():
            ours[f"{name}.{kind}"] = state[f"decoder_{theirs}.{kind}"]
        for i in layers:
            attention = f"decoder_layers.{i}.attention.attention"
            qkv = [state[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"blocks.{i}.qkv.{kind}"] = torch.cat(qkv)
            for theirs, name in names.items():
                ours[f"blocks.{i}.{name}.{kind}"] = state[f"decoder_layers.{i}.{theirs}.{kind}"]
    return config, ours


def load_decoder(path, pixels=None):
    """Read a decoder: our decoder.pt, or a published model.pt, to which `pixels` gives the encoder's mean and std.

    Returns (decoder on the CPU, in eval mode, without gradients; info). info has "encoder" (its name, image size, pixel
    mean and std) for our files, and is empty for published ones.
    Raises FileNotFoundError, and ValueError for a file that is neither or is damaged; in one line.
    """
    fix = "give --decoder a decoder.pt of train_decoder.py or a published model.pt"
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no decoder at {path}: {fix}") from None
    except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
        reason = f"not a checkpoint of tensors and plain values ({type(error).__name__})"
        raise ValueError(f"{path} is {reason}: {fix}") from None
    file = file if isinstance(file, dict) else {"kind": type(file).__name__}
    state = next((file[key] for key in ("ema", "model", "state_dict") if isinstance(file.get(key), dict)), file)
    published = "kind" not in file and "decoder_embed.weight" in state
    if not published and file.get("kind") != "decoder":
        found = file.get("kind", f"the keys {list(state)[:3]}")
        raise ValueError(f"{path} is not a decoder, ours or published; found in it: {found}; {fix}")
    try:
        config, state = from_published(state) if published else (file["config"], state)
        if published and config["heads"] is None:
            raise ValueError(f"width {config['width']} is that of none of the sizes {', '.join(SIZES)}")
        model = Decoder(**config, **(pixels or {} if published else {}))
        model.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("its weights are not finite")
        info = {} if published else {"encoder": file["encoder"]}
    except Exception as error:  # a key is missing, or a size is not as it should be
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{path} is damaged or of another version ({reason}): {fix}") from None
    return model.eval().requires_grad_(False), info


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(images):
    """Images (B, 3, H, W), nominally in [0, 1] -> uint8 (B, H, W, 3): clamped and rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def image_grid(images, columns, gap=2):
    """uint8 images (n, H, W, 3), row by row -> one PIL image with `columns` columns and white gaps."""
    images = np.asarray(images)
    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
