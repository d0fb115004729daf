"""Latents to pixels: the ViT decoder; then images as uint8 and as a grid, and checkpoints.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Notation: B batch, C latent channels, H x W latent grid, N = H W tokens, D width, p patch, d width of an attention head.
Needs torch, numpy and Pillow; for hf: paths huggingface_hub, for .safetensors files timm.
"""

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
    "ViT-S": dict(width=384, depth=12, heads=6, mlp=1536),  # 21.9 M; for one small GPU, not in the paper
    "ViT-tiny": dict(width=256, depth=1, heads=4, mlp=1024),  # for the demo
}


class Block(nn.Module):
    """A pre-norm ViT block: (B, 1 + N, D) -> (B, 1 + N, D)."""

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
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, 1 + N, D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sincos_2d(grid, width):
    """MAE's fixed 2D positions (1, N, D): the first half from the column, the second from the row, each [sin, cos]."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]  # (N, D/4) each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(table).float()[None]


def patchify(images, patch):
    """Images (B, 3, H p, W p) -> patches (B, N, p p 3), in the order of the last layer's outputs."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, H, p, W, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p p 3)


def unpatchify(patches, patch):
    """The inverse of `patchify` for square images: (B, N, p p 3) -> (B, 3, H p, H p)."""
    grid = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, 3))  # (B, H, H, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, H p, H p)


class Decoder(nn.Module):
    """Latents (B, C, H, W), not normalised -> images (B, 3, H p, W p), nominally in [0, 1], not clamped.

    Args: latent_dim C; grid H = W; patch p: 16 for 256 px from a 16 x 16 grid, 32 for the paper's decoder upsampling to
    512 px; mean, std: shift and scale of the output, the encoder's pixel mean and deviation, three values each.
    Set `checkpointing` to recompute the blocks in backward: less memory, about a third more time.
    """

    def __init__(self, latent_dim=768, grid=16, patch=16, width=1152, depth=28, heads=16, mlp=4096,
                 mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch=patch, width=width, depth=depth, heads=heads,
                           mlp=mlp, mean=list(mean), std=list(std))
        self.latent_shape, self.image_size, self.patch = (latent_dim, grid, grid), grid * patch, patch
        self.checkpointing = False
        # PyTorch's default initialisation, as in the authors' code; CLS is zero.
        self.embed = nn.Linear(latent_dim, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.to_pixels = nn.Linear(width, patch * patch * 3)
        positions = F.pad(sincos_2d(grid, width), (0, 0, 1, 0))  # (1, 1 + N, D); zeros for CLS
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, z, return_hidden=False):
        """Decode z (B, C, H, W) -> images (B, 3, H p, W p), float32.

        With return_hidden also the last layer's input h (B, N, D), which stage 1's adaptive GAN weight needs.
        Raises ValueError if the shape differs.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are {tuple(z.shape)}, this decoder needs (B, C, H, W) of {self.latent_shape}")
        x = self.embed(z.flatten(2).mT)  # (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions  # (B, 1 + N, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                x = block(x)  # (B, 1 + N, D)
        h = self.norm(x[:, 1:])  # (B, N, D); CLS is dropped
        x = unpatchify(self.to_pixels(h), self.patch)  # (B, 3, H p, W p)
        images = x.float() * self.std + self.mean
        return (images, h) if return_hidden else images


def to_uint8(images):
    """Images (B, 3, H, W), nominally in [0, 1] -> uint8 (B, H, W, 3): clamped and rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def image_grid(images, columns, gap=2):
    """Images uint8 (n, H, W, 3), row by row -> one PIL image with `columns` columns and white gaps of `gap` pixels."""
    columns = min(columns, len(images))
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows = [np.hstack(images[i : i + columns]) for i in range(0, len(images), columns)]
    canvas = np.vstack(rows)  # (rows (H + gap), columns (W + gap), 3)
    return Image.fromarray(canvas[: len(canvas) - gap, : canvas.shape[1] - gap])


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Read a .pt or .safetensors file -> (the checkpoint, its state dict: the EMA weights, if there are any).

    hf:OWNER/REPO/PATH is a file on the Hugging Face hub, downloaded once. The prefixes of DDP and torch.compile are
    removed from keys. Raises ValueError if the file cannot be read.
    """
    try:
        file = str(path)
        if file.startswith("hf:"):
            from huggingface_hub import hf_hub_download

            owner, repository, name = file.removeprefix("hf:").split("/", 2)
            file = hf_hub_download(f"{owner}/{repository}", name)
        if file.endswith(".safetensors"):
            from timm.models import load_state_dict

            checkpoint = load_state_dict(file)
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        states = [checkpoint[key] for key in ("ema", "model", "state_dict") if isinstance(checkpoint.get(key), dict)]
    except Exception as error:  # damaged files and the hub's client raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0][:200]
        raise ValueError(f"cannot read {path} ({reason}): give a checkpoint, or hf:OWNER/REPO/PATH") from None
    state = states[0] if states else checkpoint
    return checkpoint, {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in state.items()}


def load_weights(model, state, path):
    """Load a state dict into a model. Raises ValueError if a value is not finite or not floating-point."""
    for key, value in state.items():
        if not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{path}: {key} ({value.dtype}) has values that are not finite or not floating-point")
    model.load_state_dict(state)


PUBLISHED_NAMES = {  # parts of the published keys -> ours, replaced in this order
    "trainable_cls_token": "cls", "decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "to_pixels",
    "decoder_layers": "blocks", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "attention.attention.query": "q", "attention.attention.key": "k", "attention.attention.value": "v",
    "attention.output.dense": "proj", "intermediate.dense": "fc1", "output.dense": "fc2",
    "attention.to_q": "q", "attention.to_k": "k", "attention.to_v": "v", "attention.to_out.0": "proj",  # diffusers
}


def from_published(state, grid=16):
    """A published state dict, with the key names of Hugging Face or diffusers -> (arguments of `Decoder`, our state).

    It may be a whole autoencoder. grid: of the latents, for diffusers' files, which do not store it.
    """
    pixels = {key: state[f"encoder_{key}"].flatten().tolist() for key in ("mean", "std") if f"encoder_{key}" in state}
    if "decoder.decoder_embed.weight" in state:
        state = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    if "decoder_pos_embed" in state:
        grid = round((state["decoder_pos_embed"].shape[1] - 1) ** 0.5)
    ours = {}
    for key, value in state.items():
        for theirs, name in PUBLISHED_NAMES.items():
            key = key.replace(theirs, name)
        if key.startswith(("cls", "embed.", "blocks.", "norm.", "to_pixels.")):
            ours[key] = value
    depth = sum(key.endswith("norm1.weight") for key in ours)
    for name in [f"blocks.{i}.{{}}.{kind}" for i in range(depth) for kind in ("weight", "bias")]:
        ours[name.format("qkv")] = torch.cat([ours.pop(name.format(part)) for part in "qkv"])
    width, latent_dim = ours["embed.weight"].shape
    heads = {size["width"]: size["heads"] for size in SIZES.values()}  # no tensor gives their number
    return dict(latent_dim=latent_dim, grid=grid, patch=round((len(ours["to_pixels.bias"]) / 3) ** 0.5), width=width,
                depth=depth, heads=heads.get(width), mlp=len(ours["blocks.0.fc1.bias"]), **pixels), ours


def load_decoder(path, pixels=None, grid=16):
    """Read a decoder.pt, {"config": arguments of `Decoder`, "model": weights, ...}, or a published decoder.

    path: a file, or hf:OWNER/REPO/PATH. For published files, which may lack them: pixels, {"mean", "std"}, shift and
    scale of the output, three values each; grid, of the latents.
    Returns (decoder on the CPU, in eval mode, without gradients; info). info is the rest of the file: "encoder" (its
    name, image size, layers, pixel mean and std), "tau" (scale of the noise in training), "epoch".
    Raises ValueError if the file cannot be read or contains no decoder.
    """
    checkpoint, state = read_checkpoint(path)
    if any(key.endswith("decoder_embed.weight") for key in state):
        config, state = from_published(state, grid)
        if config["heads"] is None:
            raise ValueError(f"{path} has width {config['width']}: the known decoders are {', '.join(SIZES)}")
    elif checkpoint.get("kind") == "decoder":
        config = checkpoint["config"]
    else:
        raise ValueError(f"{path} is not a decoder: give a decoder.pt of train_decoder.py, or a published decoder")
    model = Decoder(**(pixels or {}) | config)
    load_weights(model, state, path)
    info = {key: checkpoint[key] for key in ("encoder", "tau", "epoch") if key in checkpoint}
    return model.eval().requires_grad_(False), info
