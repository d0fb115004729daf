"""Noise to latents: the diffusion transformers DiT and DiT-DH, flow matching, guidance and the Euler sampler.

Paper: "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, sections 4 and 5.

Convention: t = 0 is data, t = 1 is noise. x_t = (1 - t) x + t eps, and the model predicts the velocity
v = dx_t / dt = eps - x, for latents x normalised by `normalize` and eps ~ N(0, I).
Notation: B batch, C latent (token) channels, H x W latent grid, N = H W tokens, D model width, d width of a head.

Modules have the names of the published checkpoints, so state dicts load here and in the authors' code.
Needs torch and numpy; for hf: paths huggingface_hub, for .safetensors files timm.
"""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Trunk sizes; "-DH" adds the DDT head: 2 blocks of width 2048. Trainable parameters with C = 768 and 1000 classes, and
# published gFID-50k on ImageNet 256 of the DH models after 80 epochs (XL: 1.51 after 800, 1.13 with AutoGuidance).
SIZES = {
    "DiT-S": dict(width=384, depth=12, heads=6),  # 33.6 M; with head 196.4 M, 6.07
    "DiT-B": dict(width=768, depth=12, heads=12),  # 131.7 M; with head 294.1 M, 3.38
    "DiT-L": dict(width=1024, depth=24, heads=16),  # 459.7 M; with head 621.5 M, 2.35
    "DiT-XL": dict(width=1152, depth=28, heads=16),  # 677.0 M; with head 838.4 M, 2.16
}
SIZES |= {name.replace("DiT", "DiT-DH"): size | dict(head_width=2048, head_depth=2, head_heads=16)
          for name, size in SIZES.items()}
# For one small GPU or a laptop, and for the demo; not in the paper.
SIZES["DiT-DH-Ti"] = dict(width=192, depth=12, heads=3, head_width=768, head_depth=2, head_heads=12)  # 32.3 M
SIZES["DiT-DH-tiny"] = dict(width=96, depth=2, heads=4, head_width=256, head_depth=1, head_heads=4)


# --- The model -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


def rope_2d(grid, d):
    """Rotary position embedding of a grid x grid image: cosines and sines (2, N, d/2), one angle per pair of channels.

    The angles of the first half of the pairs grow with the row, those of the second half with the column.
    """
    frequencies = 10000.0 ** (-torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))  # (d/4,)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, d/4)
    rows, columns = angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)  # (N, d/4) each
    angles = torch.cat([rows, columns], 1).float()  # (N, d/2)
    return torch.stack([angles.cos(), angles.sin()])  # (2, N, d/2)


def rotate(x, rope):
    """Rotate the channel pairs (2i, 2i + 1) of x (B, heads, N, d) by the angles of `rope_2d`."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


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
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


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
    """A transformer block, x (B, N, D) -> (B, N, D), modulated by c (adaLN-zero).

    c is (B, 1, D) in the trunk, one vector per image, and (B, N, D) in the DDT head, one per token.
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
    """Patch size 1: a linear map of each token, (B, C, H, W) -> (B, N, D). Published as a 1 x 1 convolution."""

    def __init__(self, latent_dim, width):
        super().__init__()
        self.proj = nn.Conv2d(latent_dim, width, 1)
        nn.init.xavier_uniform_(self.proj.weight.view(width, latent_dim))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        return F.linear(x.flatten(2).mT, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class TimeEmbedder(nn.Module):
    """Times t (B,) -> (B, D): 256 fixed Gaussian frequencies, then an MLP. Never in bf16, which is too coarse for t."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):
            angles = 2 * torch.pi * t.float()[:, None] * self.W  # (B, 256)
            return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


def sincos_2d(grid, width):
    """MAE's fixed 2D positions (1, N, D): the first half from the column, the second from the row, each [sin, cos]."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (column, row)]  # (N, D/4) each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(table).float()[None]


class DiT(nn.Module):
    """The diffusion transformer (LightningDiT's blocks); with head_depth > 0 DiT-DH, with the wide shallow DDT head.

    Plain DiT: embedding, `depth` blocks modulated by time and class, final layer. DiT-DH (section 5): these blocks are
    the trunk. The head, `head_depth` blocks of width `head_width`, maps x_t to v; the trunk's output and the time
    modulate each of its tokens. Theorem 1: the width D of the layers that map x_t to v must be at least C. Otherwise
    the loss of a token, summed over its channels, stays above the sum of the C - D smallest eigenvalues of Cov(eps - x)
    at any depth.

    Args: latent_dim C; grid H = W; num_classes: without the null class, 0 for an unconditional model; qk_norm: RMSNorm
    on queries and keys, advised for bf16 training. Warns if the model is narrower than its tokens.
    Set `checkpointing` to recompute the blocks in backward: less memory, about a third more time.
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
        self.checkpointing = False

        self.register_buffer("pos_embed", sincos_2d(grid, width), persistent=False)
        self.register_buffer("rope", rope_2d(grid, width // heads), persistent=False)
        self.t_embedder = TimeEmbedder(width)
        # The last row of the class table is the null class.
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
        """As in the released code. The latent embedders are Xavier-uniform, with and without head."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not self.has_head:  # a DiT-DH keeps torch's default
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]:
            nn.init.normal_(module.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, the model as v = 0.
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
        """Velocity v (B, C, H, W) at x_t (B, C, H, W), times t (B,) and labels y (B,).

        Raises ValueError if the shape of x differs from this model's.
        """
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are {tuple(x.shape)}, this model needs (B, C, H, W) of {self.latent_shape}")
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        y_emb = self.y_embedder.embedding_table(y)[:, None]  # (B, 1, D)
        if self.has_head:  # section 5: the trunk maps x_t, t and y to s, the head maps x_t, t and s to v
            c = F.silu(t_emb + y_emb)  # (B, 1, D); every adaLN applies another SiLU, as in the released code
            s = self.s_embedder(x) + self.pos_embed  # (B, N, D)
            s = self.run_blocks(self.blocks[: self.depth], s, c, self.rope)  # (B, N, D)
            c = self.s_projector(F.silu(t_emb + s))  # (B, N, D_head), one vector per token
            x = self.x_embedder(x).float()  # (B, N, D_head); the residual stream is float32 under autocast too
            x = self.run_blocks(self.blocks[self.depth :], x, c, self.head_rope)  # (B, N, D_head)
        else:
            c = t_emb + y_emb  # (B, 1, D)
            x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
            x = self.run_blocks(self.blocks, x, c, self.rope)  # (B, N, D)
        x = self.final_layer(x, c)  # (B, N, C)
        return x.mT.unflatten(2, self.latent_shape[1:])  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching and sampling. A training step normalises the latents, samples t = sigmoid(n) with n ~ N(0, 1) for each
# image (`step_randomness` in train_dit.py), shifts t (section 4), and computes the loss.


def normalize(z, stats):
    """Encoder latents z (B, C, H, W) -> mean 0 and variance 1 for each element. stats: {"mean", "var"}, (C, H, W)."""
    return (z - stats["mean"]) / (stats["var"] + 1e-5).sqrt()


def denormalize(x, stats):
    """The inverse of `normalize`, from the diffusion model's latents to the decoder's."""
    return x * (stats["var"] + 1e-5).sqrt() + stats["mean"]


def shift_strength(latent_shape, base=4096):
    """Strength a >= 1 of the time shift: sqrt(C H W / base) (section 4). With C = 768: 6.93 at 256 px, 13.86 at 512."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / base))


def time_shift(t, a):
    """t' = a t / (1 + (a - 1) t): shifts times towards noise; 0 and 1 stay (section 4)."""
    return (a * t / (1 + (a - 1) * t)).clamp(max=1)  # float32 rounding may exceed 1


def flow_matching_loss(model, x, y, t, noise):
    """Mean squared error of the velocity for each image (B,), float32 (section 2).

    x, noise (B, C, H, W): normalised latents and N(0, I). y (B,): labels, after label dropout. t (B,): shifted times.
    """
    t_image = t[:, None, None, None]  # (B, 1, 1, 1)
    x_t = (1 - t_image) * x + t_image * noise  # (B, C, H, W)
    v = model(x_t, t, y).float()  # (B, C, H, W)
    return (v - (noise - x)).square().mean((1, 2, 3))  # (B,)


def guided(model, y, scale=1.0, guide=None, interval=(0.0, 1.0)):
    """The velocity field v(x, t) for `sample`: v_weak + scale (v - v_weak), with labels y (B,).

    v_weak comes from `guide`, a smaller or less trained model (AutoGuidance, arXiv 2406.02507), or without one from the
    same model with the null class (classifier-free guidance). With scale 1, and for t outside the closed `interval`,
    v_weak is not computed. t is shifted, as in training. The published numbers use the interval [0, 1].
    """
    weak_model, weak_y = (guide, y) if guide is not None else (model, torch.full_like(y, model.null_class))

    def velocity(x, t):
        times = x.new_full((len(x),), t.item())  # (B,)
        v = model(x, times, y).float()  # (B, C, H, W)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return v
        v_weak = weak_model(x, times, weak_y).float()  # (B, C, H, W)
        return v_weak + scale * (v - v_weak)

    return velocity


def sample_noise(seed, indices, shape):
    """Initial noise (B, *shape) of the samples `indices`; that of sample i is a function of (seed, i) alone."""
    noise = [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(noise))


@torch.no_grad()
def sample(velocity, noise, steps=50, shift=1.0, estimates=None):
    """Integrate dx/dt = velocity(x, t) from noise (t = 1) to data (t = 0): Euler's method on steps + 1 shifted times.

    noise (B, C, H, W): N(0, I). Returns normalised latents (B, C, H, W). `velocity` gets t as a 0-dimensional tensor on
    the CPU, so no step waits for the GPU. estimates: a list; each step appends its estimate x_t - t v of the clean
    latents (B, C, H, W), of which the last is the sample.
    """
    times = time_shift(torch.linspace(1, 0, steps + 1), shift)  # (steps + 1,)
    x = noise
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)  # (B, C, H, W)
        if estimates is not None:
            estimates.append(x - t.item() * v)
        x = x + (t_next - t).item() * v
    return x


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


def check_stats(stats, shape, path):
    """Raise ValueError if latent statistics {"mean", "var"} are not finite numbers of `shape` with variances >= 0."""
    for key, value in stats.items():
        if value.shape != tuple(shape) or not value.isfinite().all() or (stats["var"] < 0).any():
            raise ValueError(f"{path}: the latent statistics, {key} of shape {tuple(value.shape)}, are not finite, "
                             f"negative, or not of the model's shape {tuple(shape)}: give others with --stats")


def config_from_state(state):
    """The arguments of `DiT` for a published state dict.

    Raises ValueError if a width is none of `SIZES`, which give the numbers of heads.
    """
    heads = {size[f"{part}width"]: size[f"{part}heads"] for size in SIZES.values() for part in ("", "head_")
             if f"{part}width" in size}
    rows, width = state["y_embedder.embedding_table.weight"].shape
    head_width, latent_dim = state["x_embedder.proj.weight"].shape[:2]
    if not {width, head_width} <= heads.keys():
        raise ValueError(f"no known model has widths {width} and {head_width}: known are {', '.join(SIZES)}")
    blocks = [len(value) for key, value in state.items() if key.startswith("blocks.") and key.endswith(".norm1.weight")]
    config = dict(latent_dim=latent_dim, grid=round(state["pos_embed"].shape[1] ** 0.5), num_classes=rows - 1,
                  width=width, depth=blocks.count(width), heads=heads[width],
                  qk_norm="blocks.0.attn.q_norm.weight" in state)
    if head_width != width:
        config |= dict(head_width=head_width, head_depth=blocks.count(head_width), head_heads=heads[head_width])
    return config


def load_dit(path):
    """Read a dit.pt, {"config": arguments of `DiT`, "model": weights, ...}, or a published diffusion model.

    path: a file, or hf:OWNER/REPO/PATH.
    Returns (model on the CPU, in eval mode, without gradients; info). info is the rest of the file: "stats" (the latent
    statistics {"mean", "var"}, (C, H, W)), "encoder" (its name, image size, layers, pixel mean and std), "shift" (a of
    the time shift), "label_dropout", "epoch", "classes" (their names).
    Raises ValueError if the file cannot be read, contains no diffusion model, or has values that cannot be right.
    """
    checkpoint, state = read_checkpoint(path)
    if "pos_embed" in state:
        config = config_from_state(state)
    elif checkpoint.get("kind") == "dit":
        config = checkpoint["config"]
    else:
        raise ValueError(f"{path} is not a diffusion model: give a dit.pt of train_dit.py, or a published one")
    model = DiT(**config)
    load_weights(model, {k: v for k, v in state.items() if k != "pos_embed" and "feat_rope" not in k}, path)
    optional = ("stats", "encoder", "shift", "label_dropout", "epoch", "classes")
    info = {key: checkpoint[key] for key in optional if key in checkpoint}
    check_stats(info.get("stats", {}), model.latent_shape, path)
    if not 0 < info.get("shift", 1) < math.inf:
        raise ValueError(f"{path}: the time shift {info['shift']} is not positive and finite")
    return model.eval().requires_grad_(False), info


def load_stats(path, shape):
    """Read latent statistics of `shape` (C, H, W) -> {"mean", "var"}, (C, H, W) each.

    path: a stat.pt, ours or published (its mean may be None for 0), or a file of diffusers' autoencoder, which has mean
    and sqrt(var + 1e-5); or hf:OWNER/REPO/PATH.
    Raises ValueError if the file cannot be read or has no statistics of this shape.
    """
    stats, _ = read_checkpoint(path)
    if "_latents_std" in stats:
        stats = {"mean": stats["_latents_mean"], "var": (stats["_latents_std"].square() - 1e-5).clamp(min=0)}
    if "var" not in stats:
        raise ValueError(f"{path} contains no latent statistics: give a stat.pt, ours or published")
    var = stats["var"].float()
    stats = {"mean": torch.zeros_like(var) if stats["mean"] is None else stats["mean"].float(), "var": var}
    check_stats(stats, shape, path)
    return stats
