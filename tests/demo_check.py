"""Are the demo's samples of the requested classes? A check of about two minutes, to run by hand after the demo:

    python tests/demo_check.py [--runs runs/demo]

Trains a small CNN on `shapes` of another seed than the demo's, samples from the checkpoints, and prints the share of
samples that the CNN classifies as requested, and the Frechet distance of its features to those of real images: the
share alone would be high for a model with only one image per class. Exit code 1 if a share is below its bar.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from decoder import load_decoder, to_uint8
from dit import denormalize, guided, load_dit, sample, sample_noise
from encoder import Shapes, center_crop_flip
from fid import frechet_distance

BARS = {"CNN": 0.98, "guided": 0.98, "unguided": 0.95}


def draw_shapes(seed, count, size):
    """Images for stage 2, half of them mirrored -> (count, 3, S, S) in [0, 1], labels (count,)."""
    source = Shapes(count, size, seed)
    items = [source.open(i) for i in range(count)]
    rng = np.random.default_rng(seed)
    images = np.stack([np.asarray(center_crop_flip(image, size, rng)) for image, _ in items])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.tensor([label for _, label in items])


class CNN(nn.Module):
    """Images (B, 3, S, S) in [0, 1], resized to 32 x 32 -> logits (B, classes), features (B, 64)."""

    def __init__(self, classes):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((16, 1), (32, 2), (64, 2), (64, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images):
        features = self.features(F.interpolate(images, (32, 32), mode="area") - 0.5)
        return self.head(features), features


def train_cnn(images, labels, classes, steps=600, batch=64):
    torch.manual_seed(0)
    cnn = CNN(classes)
    optimizer = torch.optim.AdamW(cnn.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(cnn(images[chosen])[0], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return cnn.eval().requires_grad_(False)


def sample_images(model, decoder, info, labels, scale, steps, seed, batch=100):
    """Samples of the labels (n,), in 8 bits as from sample.py -> (n, 3, S, S) in [0, 1]."""
    shape, images = info["stats"]["mean"].shape, []
    for index in torch.arange(len(labels)).split(batch):
        velocity = guided(model, labels[index], scale)
        latents = sample(velocity, sample_noise(seed, index.tolist(), shape), steps, info["shift"])
        with torch.no_grad():
            images.append(to_uint8(decoder(denormalize(latents, info["stats"]))))
    return torch.cat(images).permute(0, 3, 1, 2) / 255


def frechet(a, b):
    """Frechet distance of two sets of features (n, D)."""
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="output folder of the demo")
    parser.add_argument("--num", type=int, default=1000, help="samples with, and as many without guidance")
    parser.add_argument("--scale", type=float, default=1.5, help="guidance scale of the guided samples")
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler")
    parser.add_argument("--seed", type=int, default=1, help="of the samples' noise")
    args = parser.parse_args(argv)
    paths = [args.runs / "decoder" / "decoder.pt", args.runs / "dit" / "dit.pt"]
    if missing := [str(path) for path in paths if not path.is_file()]:
        sys.exit(f"{' and '.join(missing)} missing: run the demo first, as the README says")
    decoder, _ = load_decoder(paths[0])
    model, info = load_dit(paths[1])
    size, classes = info["encoder"]["image_size"], Shapes.classes

    held_out, held_out_labels = draw_shapes(seed=101, count=2000, size=size)
    cnn = train_cnn(*draw_shapes(seed=100, count=4000, size=size), len(classes))
    logits, real = cnn(held_out)
    shares = {"CNN": (logits.argmax(1) == held_out_labels).float().mean().item()}
    print(f"CNN on held-out images: {shares['CNN']:.1%} right (bar {BARS['CNN']:.0%})")
    print(f"real against other real images: Frechet distance {frechet(real[:1000], real[1000:]):.2f}", flush=True)
    labels = torch.arange(args.num) % len(classes)
    for name, scale in (("unguided", 1.0), ("guided", args.scale)):
        logits, features = cnn(sample_images(model, decoder, info, labels, scale, args.steps, args.seed))
        right = (logits.argmax(1) == labels).float()
        shares[name] = right.mean().item()
        worst = min(range(len(classes)), key=lambda label: right[labels == label].mean())
        print(f"samples, {name} (scale {scale:g}): {shares[name]:.1%} in their class (bar {BARS[name]:.0%}; least "
              f"{classes[worst]} {right[labels == worst].mean():.0%}), Frechet distance {frechet(features, real):.2f}",
              flush=True)
    failed = [name for name, bar in BARS.items() if shares[name] < bar]
    print(f"below the bar: {', '.join(failed)}" if failed else "all above their bars")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
