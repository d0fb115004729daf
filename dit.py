"""Noise to latents: the diffusion transformers DiT and DiT-DH, flow matching, guidance and the Euler sampler.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, sections 4 and 5.

Convention, everywhere: t = 0 is data, t = 1 is noise. x_t = (1 - t) x + t eps, and the model predicts the velocity
v = dx_t / dt = eps - x. x are latents normalised by `normalize`, eps ~ N(0, I).
Notation: B batch, C latent (token) channels, H x W latent grid, N = H W tokens, D model width, d width of a head.

Modules carry the names of the published checkpoints, so a state dict works here and in the authors' code alike.
This file needs torch and numpy; for hf: paths huggingface_hub, for .safetensors files timm.
"""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Trunk sizes; "-DH" adds the DDT head: 2 blocks, 2048 wide. Trainable parameters with C = 768 and 1000 classes, and the
# published gFID-50k on ImageNet 256 of the DH models after 80 epochs (XL: 1.51 after 800, 1.13 with AutoGuidance).
SIZES = {
    "DiT-S": dict(width=384, depth=12, heads=6),  # 33.6 M; with head 196.4 M, 6.07
    "DiT-B": dict(width=768, depth=12, heads=12),  # 131.7 M; with head 294.1 M, 3.38
    "DiT-L": dict(width=1024, depth=24, heads=16),  # 459.7 M; with head 621.5 M, 2.35
    "DiT-XL": dict(width=1152, depth=28, heads=16),  # 677.0 M; with head 838.4 M, 2.16
}
SIZES |= {name.replace("DiT", "DiT-DH"): size | dict(head_width=2048, head_depth=2, head_heads=16)
          for name, size in SIZES.items()}
# For one small GPU or a laptop, and for the demo; not the paper's.
SIZES["DiT-DH-Ti"] = dict(width=192, depth=12, heads=3, head_width=768, head_depth=2, head_heads=12)  # 32.3 M
SIZES["DiT-DH-tiny"] = dict(width=96, depth=2, heads=4, head_width=256, head_depth=1, head_heads=4)


# --- The model -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32 whatever the autocast dtype."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


def rope_2d(grid, d):
    """Rotary positions of a grid x grid image: cosines and sines (2, N, d/2) of one angle for each pair of channels.

    The first half of the pairs turns with the row, the second half with the column.
    """
    frequencies = 10000.0 ** (-torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))  # (d/4,)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, d/4)
    rows, columns = angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)  # (N, d/4) each
    angles = torch.cat([rows, columns], 1).float()  # (N, d/2)
    return torch.stack([angles.cos(), angles.sin()])  # (2, N, d/2)


def rotate(x, rope):
    """Turn the interleaved channel pairs (2i, 2i + 1) of x (B, heads, N, d) by the angles of `rope_2d`."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, heads, N, d) -> (B, heads, N, d).

    The fused kernel serves bfloat16 on CUDA and float32 on the CPU. The plain form serves the rest: in float32 on CUDA
    the fused kernel has no flash form, and its other form splits each product in three for TF32; in bfloat16 the CPU's
    fused kernel was slower where it was tried. On CUDA neither choice has been measured here. The plain form scales q,
    because Inductor would turn a scaled q k^T back into the fused kernel.
    """
    if (q.device.type, q.dtype) in [("cuda", torch.bfloat16), ("cpu", torch.float32)]:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)  # (B, N, hidden) each
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by c (adaLN-zero).

    c is (B, 1, D) in the trunk: one vector for an image; (B, N, D) in the DDT head: one for each token.
    """

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class LatentEmbedder(nn.Module):
    """Patch size 1: one linear map for each token, (B, C, H, W) -> (B, N, D); published as a 1 x 1 convolution."""

    def __init__(self, latent_dim, width):
        super().__init__()
        self.proj = nn.Conv2d(latent_dim, width, 1)
        nn.init.xavier_uniform_(self.proj.weight.view(width, latent_dim))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        return F.linear(x.flatten(2).mT, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class TimeEmbedder(nn.Module):
    """t (B,) -> (B, D): 256 fixed Gaussian frequencies, then an MLP, in float32 whatever the autocast dtype."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):
            angles = 2 * torch.pi * t.float()[:, None] * self.W  # (B, 256)
            return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


def sincos_2d(grid, width):
    """MAE's fixed 2D positions (1, N, D): first half from the column, second half from the row, each [sin, cos]."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]  # (N, D/4) each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(table).float()[None]


class DiT(nn.Module):
    """The diffusion transformer (LightningDiT's blocks), with the paper's wide shallow DDT head where head_depth > 0.

    Plain DiT: embed, `depth` blocks modulated by time and class, final layer. DiT-DH (section 5): the same blocks are
    the trunk. The head, `head_depth` blocks of `head_width`, reads x_t and writes v; the trunk's output and the time
    modulate it for each token. Theorem 1: what reads x_t and writes v must be at least C wide, or the sum of a token's
    loss stays above the sum of the C - D smallest eigenvalues of Cov(eps - x), however deep the model is.

    Args: latent_dim C; grid H = W; num_classes: classes besides the null class, 0 for an unconditional model;
    qk_norm: RMSNorm on queries and keys, advised for bf16 training. Warns of a model that is narrower than its tokens.
    """

    def __init__(self, latent_dim=768, grid=16, num_classes=1000, width=1152, depth=28, heads=16,
                 head_width=0, head_depth=0, head_heads=0, qk_norm=False):
        super().__init__()
        if (head_width or width) < latent_dim:
            warnings.warn(f"a model of width {head_width or width} cannot represent velocities of {latent_dim}-wide "
                          "tokens (Theorem 1 of the paper): prefer a DiT-DH, whose head is wide", stacklevel=2)
        self.config = dict(latent_dim=latent_dim, grid=grid, num_classes=num_classes, width=width, depth=depth,
                           heads=heads, head_width=head_width, head_depth=head_depth, head_heads=head_heads,
                           qk_norm=qk_norm)
        self.latent_shape = (latent_dim, grid, grid)
        self.num_classes = self.null_class = num_classes
        self.depth, self.has_head = depth, head_depth > 0
        self.checkpointing = False  # recompute the blocks in backward: less memory, about a third more time

        self.register_buffer("pos_embed", sincos_2d(grid, width), persistent=False)
        self.register_buffer("rope", rope_2d(grid, width // heads), persistent=False)
        self.t_embedder = TimeEmbedder(width)
        # The last row of the class table is the null class, "no label".
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(num_classes + 1, width)))
        if self.has_head:
            self.s_embedder = LatentEmbedder(latent_dim, width)
            self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
            self.register_buffer("head_rope", rope_2d(grid, head_width // head_heads), persistent=False)
        self.x_embedder = LatentEmbedder(latent_dim, head_width or width)
        sizes = [(width, heads)] * depth + [(head_width, head_heads)] * head_depth
        self.blocks = nn.ModuleList([Block(*size, qk_norm) for size in sizes])
        self.final_layer = FinalLayer(head_width or width, latent_dim)
        self.initialize_weights()

    def initialize_weights(self):
        """As in the released code. The latent embedders are Xavier-uniform in both kinds of model."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not self.has_head:  # a DiT-DH keeps torch's default
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]:
            nn.init.normal_(module.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the model as v = 0.
        modulations = [module.adaLN_modulation[1] for module in [*self.blocks, self.final_layer]]
        for module in [*modulations, self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def run_blocks(self, blocks, x, c, rope):
        for block in blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                x = block(x, c, rope)
        return x

    def forward(self, x, t, y):
        """Velocity v (B, C, H, W), float32 outside autocast, of x_t (B, C, H, W) at times t (B,) for labels y (B,).

        Raises ValueError for latents of another shape than (B, C, H, W) of this model.
        """
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {tuple(x.shape)} are not (B, C, H, W) with this model's {self.latent_shape}")
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        y_emb = self.y_embedder.embedding_table(y)[:, None]  # (B, 1, D)
        if self.has_head:  # section 5: the trunk turns x_t, t and y into s; the wide head turns x_t, t and s into v
            c = F.silu(t_emb + y_emb)  # (B, 1, D); each adaLN applies its own SiLU too, as in the released code
            s = self.s_embedder(x) + self.pos_embed  # (B, N, D)
            s = self.run_blocks(self.blocks[: self.depth], s, c, self.rope)  # (B, N, D)
            c = self.s_projector(F.silu(t_emb + s))  # (B, N, D_head); modulates each token by itself
            x = self.x_embedder(x).float()  # (B, N, D_head); the residual stream stays in float32
            x = self.run_blocks(self.blocks[self.depth :], x, c, self.head_rope)  # (B, N, D_head)
        else:
            c = t_emb + y_emb  # (B, 1, D)
            x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
            x = self.run_blocks(self.blocks, x, c, self.rope)  # (B, N, D)
        x = self.final_layer(x, c)  # (B, N, C)
        return x.mT.unflatten(2, self.latent_shape[1:])  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching, in the order of a training step, and sampling. Training draws t = sigmoid(n), n ~ N(0, 1), for each
# image (`draw` in train_dit.py) and then shifts it (section 4).


def normalize(z, stats):
    """Encoder latents z (B, C, H, W) -> zero mean and unit variance for each element; stats: {"mean", "var"}."""
    return (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt()


def denormalize(x, stats):
    """The inverse of `normalize`: what the diffusion model draws -> what the decoder reads."""
    return x * (stats["var"] + 1e-5).sqrt() + stats["mean"]


def shift_strength(latent_shape, base=4096):
    """Strength a >= 1 of the time shift: sqrt(C H W / base) (section 4). For C = 768: 6.93 at 256 px, 13.86 at 512."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / base))


def time_shift(t, a):
    """t' = a t / (1 + (a - 1) t): moves times towards noise and keeps 0 and 1 (section 4)."""
    return (a * t / (1 + (a - 1) * t)).clamp(max=1)  # float32 rounding may exceed 1


def flow_matching_loss(model, x, y, t, noise):
    """Mean squared error of the velocity, one value for each image (B,), float32 (section 2).

    x, noise (B, C, H, W): normalised latents and N(0, I); y (B,): labels, some already dropped to the null class;
    t (B,): times, already shifted.
    """
    level = t[:, None, None, None]  # (B, 1, 1, 1)
    x_t = (1 - level) * x + level * noise  # (B, C, H, W)
    v = model(x_t, t, y).float()  # (B, C, H, W)
    return (v - (noise - x)).square().mean((1, 2, 3))  # (B,)


def guided(model, y, scale=1.0, guide=None, interval=(0.0, 1.0)):
    """The velocity field v(x, t) that `sample` integrates: weak + scale (model - weak), for labels y (B,).

    The weak field is `guide`, a smaller or less trained model (AutoGuidance, arXiv 2406.02507); or, without one, the
    same model with the null class (classifier-free guidance). Outside the closed `interval` of t, and with scale 1, the
    weak field is not evaluated. t is the shifted time, as the model gets it. The published numbers guide all of [0, 1].
    """
    weak, weak_y = (guide, y) if guide is not None else (model, torch.full_like(y, model.null_class))

    def velocity(x, t):
        times = x.new_full((len(x),), t.item())  # (B,)
        v = model(x, times, y).float()  # (B, C, H, W)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return v
        v_weak = weak(x, times, weak_y).float()  # (B, C, H, W)
        return v_weak + scale * (v - v_weak)

    return velocity


def sample_noise(seed, indices, shape):
    """Starting noise (B, *shape) of the samples `indices`: that of sample i is a function of (seed, i) alone."""
    noise = [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(noise))


@torch.no_grad()
def sample(velocity, noise, steps=50, shift=1.0, watch=None):
    """Integrate dx/dt = velocity(x, t) from noise (t = 1) to data (t = 0) by Euler's method on steps + 1 shifted times.

    noise (B, C, H, W): N(0, I) -> normalised latents (B, C, H, W). `velocity` gets t as a 0-dimensional float32 tensor
    on the CPU, so no step waits for the GPU. watch(step, estimate), where given, is called in each step from 0 to
    steps - 1 with the estimate x_t - t v of the clean latents (B, C, H, W); the last one is the sample itself.
    """
    times = time_shift(torch.linspace(1, 0, steps + 1), shift)  # (steps + 1,)
    x = noise
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = velocity(x, t)  # (B, C, H, W)
        if watch is not None:
            watch(step, x - t.item() * v)
        x = x + (t_next - t).item() * v
    return x


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


def config_from_state(state):
    """The arguments of `DiT` for a published state dict. Shapes tell all but the head counts; those go by width."""
    heads = {size[f"{part}width"]: size[f"{part}heads"] for size in SIZES.values() for part in ("", "head_")
             if f"{part}width" in size}
    rows, width = state["y_embedder.embedding_table.weight"].shape
    head_width, latent_dim = state["x_embedder.proj.weight"].shape[:2]
    if not {width, head_width} <= heads.keys():
        raise ValueError(f"no known size has blocks of widths {width} and {head_width}; known: {', '.join(SIZES)}")
    blocks = [len(value) for key, value in state.items() if key.startswith("blocks.") and key.endswith(".norm1.weight")]
    config = dict(latent_dim=latent_dim, grid=round(state["pos_embed"].shape[1] ** 0.5), num_classes=rows - 1,
                  width=width, depth=blocks.count(width), heads=heads[width],
                  qk_norm="blocks.0.attn.q_norm.weight" in state)
    if head_width != width:
        config |= dict(head_width=head_width, head_depth=blocks.count(head_width), head_heads=heads[head_width])
    return config


def load_dit(path):
    """Read a diffusion model: {"config": arguments of `DiT`, "model": weights, ...}, or a published stage-2 state dict.

    path: a file, or hf:OWNER/REPO/PATH on the Hugging Face hub.
    Returns (model on the CPU, in eval mode, without gradients; info). info has what else the file holds of "stats" (the
    latent statistics {"mean", "var"}, (C, H, W) each), "encoder" (its name, image size, layers, pixel mean and std),
    "shift" (a of the time shift), "label_dropout", "epoch" and "classes" (their names).
    Raises ValueError, in one line, for a file that is missing, damaged or no diffusion model.
    """
    try:
        file, state = read_checkpoint(path)
        model = DiT(**config_from_state(state) if "pos_embed" in state else file["config"])
        model.load_state_dict({k: v for k, v in state.items() if k != "pos_embed" and "feat_rope" not in k})
        optional = ("stats", "encoder", "shift", "label_dropout", "epoch", "classes")
        info = {key: file[key] for key in optional if key in file}
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("it has values that are not finite")
    except Exception as error:  # such files fail in many ways; the first sentence names the cause
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:200]}"
        raise ValueError(f"cannot load {path} as a diffusion model ({reason}): give a dit.pt of train_dit.py or a "
                         "published stage2_model.pt") from None
    return model.eval().requires_grad_(False), info


def load_stats(path, shape):
    """Read latent statistics for latents of `shape` (C, H, W) -> {"mean", "var"}, (C, H, W) each.

    path: a stat.pt, ours or published, whose mean may be None for 0; or the file of a diffusers decoder, which holds
    the mean and sqrt(var + 1e-5); or either as hf:OWNER/REPO/PATH.
    Raises ValueError, in one line, where there are none, or none that fit and make sense.
    """
    try:
        file, _ = read_checkpoint(path)
        if "_latents_std" in file:
            file = {"mean": file["_latents_mean"], "var": (file["_latents_std"].square() - 1e-5).clamp(min=0)}
        var = file["var"].float()
        mean = torch.zeros_like(var) if file["mean"] is None else file["mean"].float()
        if mean.shape != tuple(shape) or var.shape != tuple(shape):
            raise ValueError(f"shape {tuple(var.shape)}, the model needs {tuple(shape)}")
        if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
            raise ValueError("it has values that are not finite, or negative variances")
    except Exception as error:  # what a damaged or foreign file raises differs between versions of torch
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:200]}"
        raise ValueError(f"--stats {path} holds no latent statistics for this model ({reason}): give a stat.pt, ours "
                         "or published") from None
    return {"mean": mean, "var": var}
