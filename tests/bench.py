"""How fast is it here? So far the parts of fid.py, in seconds for 1,000 images, as a Markdown table.

    python tests/bench.py [--quick]     # --quick: fewer images and smaller sets, about two minutes on two CPU cores

The networks have random weights, which are as fast as trained ones.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid


def seconds(run, device):
    """Wall time of the second call: the first one warms up."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class RandomLPIPS(fid.LPIPS):
    """LPIPS as it is, but for the pretrained weights."""

    def __init__(self):
        original, fid.load_weights = fid.load_weights, lambda *_, **__: None
        try:
            super().__init__()
        finally:
            fid.load_weights = original
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and smaller sets")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    n, rows = (8, 2000) if args.quick else (64, 10000)

    images = torch.randint(256, (n, 3, 256, 256), dtype=torch.uint8, device=device)
    a, b = images / 255, images.flip(0) / 255
    features = torch.randn(rows, 2048, device=device)
    inception = fid.InceptionV3().to(device).eval().requires_grad_(False)
    lpips = RandomLPIPS().to(device)
    statistics = fid.FeatureStatistics(2048, device)
    parts = [
        ("Inception features, 256 px", n, lambda: inception(images)),
        ("mean and covariance, 2048 dimensions", rows, lambda: statistics.update(features)),
        (f"precision and recall, {rows} against {rows}", rows, lambda: fid.precision_recall(features, features)),
        ("Inception score", rows, lambda: fid.inception_score(features[:, :1008])),
        ("PSNR, 256 px", n, lambda: fid.psnr(a, b)),
        ("SSIM, 256 px", n, lambda: fid.ssim(a, b)),
        ("LPIPS, 256 px", n, lambda: lpips(2 * a - 1, 2 * b - 1)),
    ]
    print(f"{name}, {platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, {time.strftime('%F')}\n")
    print("| part of fid.py | seconds for 1,000 images |\n|---|---|")
    for part, count, run in parts:
        print(f"| {part} | {1000 * seconds(run, device) / count:.3g} |", flush=True)
    moments = statistics.mean, statistics.cov
    print(
        f"\nFrechet distance, 2048 dimensions: {seconds(lambda: fid.frechet_distance(*moments, *moments), 'cpu'):.3g} s"
    )


if __name__ == "__main__":
    main()
