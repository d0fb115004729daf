"""Latents to pixels: the ViT decoder, its sizes and checkpoints, and pictures on disk.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3.
Notation: B batch, C latent channels, H x W latent grid, N = H W tokens, D width, p patch, d width of an attention head.
This file needs torch, numpy and Pillow; for hf: paths huggingface_hub, for .safetensors files timm.
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
    "ViT-S": dict(width=384, depth=12, heads=6, mlp=1536),  # 21.9 M; for one small GPU, not the paper's
    "ViT-tiny": dict(width=256, depth=1, heads=4, mlp=1024),  # demo
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
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, 1 + N, D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sincos_2d(grid, width):
    """MAE's fixed 2D positions (1, N, D): first half from the column, second half from the row, each [sin, cos]."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]  # (N, D/4) each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(table).float()[None]


def patchify(images, patch):
    """Images (B, 3, H p, W p) -> their patches (B, N, p p 3), in the order of the last layer's outputs."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, H, p, W, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p p 3)


def unpatchify(patches, patch):
    """The inverse of `patchify` for square images: (B, N, p p 3) -> (B, 3, H p, H p)."""
    grid = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, 3))  # (B, H, H, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, H p, H p)


class Decoder(nn.Module):
    """Latents (B, C, H, W), un-normalised -> images (B, 3, H p, W p), nominally in [0, 1], not clamped.

    Args: latent_dim C; grid H = W; patch p: 16 for 256 px from a 16 x 16 grid, 32 for the paper's decoder upsampling to
    512 px; mean, std: the encoder's pixel means and deviations, three each.
    """

    def __init__(self, latent_dim=768, grid=16, patch=16, width=1152, depth=28, heads=16, mlp=4096,
                 mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch=patch, width=width, depth=depth, heads=heads,
                           mlp=mlp, mean=list(mean), std=list(std))
        self.latent_shape, self.image_size, self.patch = (latent_dim, grid, grid), grid * patch, patch
        self.checkpointing = False  # recompute the blocks in backward: less memory, about a third more time
        # PyTorch's own initialisation, as in the authors' code; CLS is zero.
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
        """Images, float32; with return_hidden, also the last layer's input h (B, N, D).

        The adaptive GAN weight of stage 1 needs h.
        Raises ValueError for latents of another shape than (B, C, H, W) of this decoder.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {tuple(z.shape)} are not (B, C, H, W) with this decoder's {self.latent_shape}")
        x = self.embed(z.flatten(2).mT)  # (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions  # (B, 1 + N, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                x = block(x)  # (B, 1 + N, D)
        h = self.norm(x[:, 1:])  # (B, N, D), without CLS
        x = unpatchify(self.to_pixels(h), self.patch)  # (B, 3, H p, W p)
        images = x.float() * self.std + self.mean
        return (images, h) if return_hidden else images


def to_uint8(images):
    """Images (B, 3, H, W), nominally in [0, 1] -> uint8 (B, H, W, 3): clamped and rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def image_grid(images, columns, gap=2):
    """uint8 images (n, H, W, 3), row by row -> one PIL image with `columns` columns and white gaps, in pixels."""
    columns = min(columns, len(images))
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows = [np.hstack(images[i : i + columns]) for i in range(0, len(images), columns)]
    canvas = np.vstack(rows)  # (rows (H + gap), columns (W + gap), 3)
    return Image.fromarray(canvas[: len(canvas) - gap, : canvas.shape[1] - gap])


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Read a .pt or .safetensors file -> (what it holds, the state dict in it).

    hf:OWNER/REPO/PATH is a file on the Hugging Face hub, fetched once into its cache. Of several state dicts the
    average comes first. The prefixes that DDP and torch.compile put before every key are dropped.
    """
    if str(path).startswith("hf:"):
        from huggingface_hub import hf_hub_download

        if str(path).count("/") < 2:
            raise ValueError("a file on the hub is hf:OWNER/REPO/PATH")
        owner, repository, file_name = str(path).removeprefix("hf:").split("/", 2)
        path = hf_hub_download(f"{owner}/{repository}", file_name)
    if str(path).endswith(".safetensors"):
        from timm.models import load_state_dict

        file = load_state_dict(str(path))
    else:
        file = torch.load(path, map_location="cpu", weights_only=True)
    if "settings" in file:
        raise ValueError("it is a last.pt: give the decoder.pt or dit.pt beside it")
    state = next((file[key] for key in ("ema", "model", "state_dict") if isinstance(file.get(key), dict)), file)
    for prefix in ("module.", "_orig_mod.", "module."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return file, state


def from_published(state, grid=16):
    """A published state dict -> (arguments of `Decoder`, our state dict).

    It has the key names of Hugging Face's ViT or of diffusers' AutoencoderRAE. It may be a whole autoencoder, of which
    the decoder is taken. grid: the grid of latents, for diffusers' files, which do not store it.
    """
    pixels = {ours: state[key].flatten().tolist() for key, ours in (("encoder_mean", "mean"), ("encoder_std", "std"))
              if key in state}
    if "decoder.decoder_embed.weight" in state:
        state = {key.removeprefix("decoder."): x for key, x in state.items() if key.startswith("decoder.")}
    diffusers = {"to_q": "attention.query", "to_k": "attention.key", "to_v": "attention.value",
                 "to_out.0": "output.dense"}
    for theirs, name in diffusers.items():
        state = {key.replace(f".attention.{theirs}.", f".attention.{name}."): x for key, x in state.items()}
    heads = {size["width"]: size["heads"] for size in SIZES.values()}  # no tensor tells their number
    width, latent_dim = state["decoder_embed.weight"].shape
    depth = sum(key.endswith("layernorm_before.weight") for key in state)
    if "decoder_pos_embed" in state:
        grid = round((state["decoder_pos_embed"].shape[1] - 1) ** 0.5)
    config = dict(latent_dim=latent_dim, width=width, depth=depth, heads=heads.get(width), grid=grid,
                  patch=round((len(state["decoder_pred.bias"]) / 3) ** 0.5),
                  mlp=len(state["decoder_layers.0.intermediate.dense.bias"]), **pixels)
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "proj",
             "intermediate.dense": "fc1", "output.dense": "fc2"}
    ours = {"cls": state["trainable_cls_token"]}
    for kind in ("weight", "bias"):
        for published, name in {"embed": "embed", "norm": "norm", "pred": "to_pixels"}.items():
            ours[f"{name}.{kind}"] = state[f"decoder_{published}.{kind}"]
        for i in range(depth):
            layer = f"decoder_layers.{i}"
            qkv = [state[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"blocks.{i}.qkv.{kind}"] = torch.cat(qkv)
            for published, name in names.items():
                ours[f"blocks.{i}.{name}.{kind}"] = state[f"{layer}.{published}.{kind}"]
    return config, ours


def load_decoder(path, pixels=None, grid=16):
    """Read a decoder: {"config": arguments of `Decoder`, "model": weights, ...}, or a published state dict.

    path: a file, or hf:OWNER/REPO/PATH on the Hugging Face hub. For a published file that does not tell them: pixels,
    {"mean", "std"}, three values each, by which its output is scaled; grid, that of its latents.
    Returns (decoder on the CPU, in eval mode, without gradients; info). info has what else the file holds of "encoder"
    (its name, image size, layers, pixel mean and std), "tau" (scale of the noise in training) and "epoch".
    Raises ValueError, in one line, for a file that is missing, damaged or no decoder.
    """
    try:
        file, state = read_checkpoint(path)
        published = any(key.endswith("decoder_embed.weight") for key in state)
        config, state = from_published(state, grid) if published else (file["config"], state)
        if published and config["heads"] is None:
            raise ValueError(f"no known size is {config['width']} wide; known: {', '.join(SIZES)}")
        model = Decoder(**(pixels or {}) | config)
        model.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("it has values that are not finite")
        info = {key: file[key] for key in ("encoder", "tau", "epoch") if key in file}
    except Exception as error:  # such files fail in many ways; the first sentence names the cause
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:200]}"
        raise ValueError(f"cannot load {path} as a decoder ({reason}): give a decoder.pt of train_decoder.py or a "
                         "published decoder") from None
    return model.eval().requires_grad_(False), info
