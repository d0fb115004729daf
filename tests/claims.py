"""The paper's findings in miniature: are they reproduced with this code? (Paper: arXiv 2510.11690, section 4)

    python tests/claims.py            # about 20 minutes on two CPU cores: prints the tables, plots .github/claims.png
    python tests/claims.py --quick    # seconds, for a test; its numbers mean nothing

1. Theorem 1: a diffusion model narrower than its tokens cannot even overfit one image; its loss stays above
   1 - width / C, at any depth. Section 5: a wide DDT head on the same narrow trunk removes this limit.
2. The time shift: without it, models of high-dimensional latents are worse.
3. Noise-augmented decoding: a decoder trained on noisy latents reconstructs a little worse, and decodes the samples of
   a diffusion model better.

The set-up is the demo's: shapes, a frozen encoder with random weights (the std of its latents over images is 0.57, so
tau is in units of about that), the real classes and the real training scripts. Samples, without guidance, and
reconstructions are judged by the CNN of demo_check.py: by the Frechet distance of its features, and for samples by the
share in the requested class.

Every number is the mean over seeds, with the least and the largest. THE RULE: two settings differ only if their ranges
do not overlap, so that each seed of one is better than all seeds of the other; otherwise the finding is "not shown".
The lengths of training were chosen in pilot runs of seed 0 (after two epochs the diffusion model had learned nothing);
the seeds in the tables are others.

Each run uses one thread, so results do not depend on --jobs. Tables are printed in Markdown, claims.png goes to --out.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo_check import draw_shapes, frechet, sample_images, train_cnn

import train_decoder
import train_dit
from decoder import load_decoder, to_uint8
from dit import DiT, flow_matching_loss, load_dit, normalize, time_shift
from encoder import Encoder, Shapes
from fid import psnr as psnr_of

SIZE, TOKEN = 32, 96  # pixels; C of finding 1, for which the paper's ratios of width to C are whole widths
FULL = dict(
    seeds=(1, 2, 3), widths=(32, 48, 64, 80, 96, 112), depths=(4, 8), overfit=(400, 32), strengths=(1, 2, 8),
    dit_epochs=4, taus=(0, 0.1, 0.8), decoder_epochs=1.5, images=1000, samples=500, judge_images=4000, judge_steps=600,
)
QUICK = dict(
    seeds=(1,), widths=(48,), depths=(), overfit=(120, 8), strengths=(1, 2), dit_epochs=0.02, taus=(0, 0.1),
    decoder_epochs=0.02, images=100, samples=20, judge_images=200, judge_steps=10,
)
DEPTH, HEAD = 2, 112  # of finding 1: the depth for all widths; the width of the DDT head
DEMO_SHIFT, DEMO_TAU = 2, 0.1
# The paper's numbers. Loss of one image by width / C (C = 768, depth 12), and at width C / 2 for depths 4 to 24.
PAPER_LOSS = {1 / 2: 0.52, 2 / 3: 0.35, 5 / 6: 0.19, 1: 0.02, 7 / 6: 0.00}
PAPER_SHIFT = {1: "23.08", DEMO_SHIFT: "4.81 (shift 6.93)"}  # gFID of DiT-XL, 80 epochs
PAPER_TAU = {0: ("0.49", "4.81"), 0.8: ("0.57", "4.28")}  # rFID of the ViT-XL decoder, gFID of DiT-XL with it


def overfit(width, depth, head, seed, steps, batch):
    """Finding 1: train a DiT on one image's latent, `batch` times per step with other t and noise -> its final loss.

    For one image Cov(eps - x) is the identity, so by Theorem 1 the loss is at least 1 - width / C.
    head: width of a DDT head of one block, 0 for none.
    """
    torch.manual_seed(seed)
    encoder = Encoder("random-tiny", SIZE, embed_dim=TOKEN)
    z = encoder(draw_shapes(seed, 256, SIZE)[0])
    x = normalize(z, {"mean": z.mean(0), "var": z.var(0)})[:1]  # (1, C, 4, 4)
    size = dict(head_width=head, head_depth=1, head_heads=4) if head else {}
    model = DiT(TOKEN, encoder.grid, 0, width, depth, heads=4, **size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = argparse.Namespace(lr=3e-3, lr_end=0.0, warmup=0.1 * steps, decay_start=steps / 2, decay_end=steps,
                                  epochs=steps)  # an epoch has one step

    def loss(n):
        t = time_shift(torch.randn(n).sigmoid(), DEMO_SHIFT)
        noise, y = torch.randn(n, *x.shape[1:]), torch.full((n,), model.null_class)
        return flow_matching_loss(model, x.expand(n, -1, -1, -1), y, t, noise).mean()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = train_dit.lr_at(step, schedule, 1)
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return torch.stack([loss(16 * batch) for _ in range(2)]).mean().item()


def train(stage, out, *flags):
    """Findings 2 and 3: train a stage of the demo with its real script, without output."""
    script = {"decoder": train_decoder, "dit": train_dit}[stage]
    argv = ["--preset", "demo", "--out", out, "--device", "cpu", "--preview-every", 0, *flags]
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        script.main([str(word) for word in argv])


def generate(folder, decoder_folders, count, seed):
    """Unguided samples of a diffusion model, decoded by each decoder -> [float (n, 3, S, S), ...]."""
    model, info = load_dit(folder / "dit.pt")
    several = [load_decoder(path / "decoder.pt")[0] for path in decoder_folders]

    def together(z):
        return torch.cat([decoder(z) for decoder in several], 1)  # (n, 3 for each decoder, S, S)

    labels = torch.arange(count) % model.num_classes
    return [part.numpy() for part in sample_images(model, together, info, labels, 1.0, 25, seed).split(3, 1)]


def run(what, tasks, jobs):
    """Results of [(function, argument, ...), ...] in order; each runs in one thread."""
    bar = tqdm(total=len(tasks), desc=what, unit="run", dynamic_ncols=True)
    if jobs == 1:
        results = [(function(*arguments), bar.update())[0] for function, *arguments in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(*task) for task in tasks]
            for future in as_completed(futures):
                future.result()  # raises the error of a run
                bar.update()
        results = [future.result() for future in futures]
    bar.close()
    return results


def spread(values, digits=2):
    """Mean (least to largest) over the seeds."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(values, baseline):
    """The rule, for numbers that are better if they are lower."""
    if max(values) < min(baseline):
        return "better"
    return "worse" if min(values) > max(baseline) else "not shown"


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n### {title}\n", *("| " + " | ".join(map(str, line)) + " |" for line in lines), sep="\n", flush=True)


def judge(cnn, real, images, labels):
    """Frechet distance to the features `real`, and the share in its class, of images (n, 3, S, S) with labels (n,)."""
    logits, features = cnn(torch.as_tensor(images))
    return frechet(features, real), (logits.argmax(1) == labels).float().mean().item()


def measure(plan, work, jobs):
    """All runs -> losses {(width, depth, head): [seeds]}; {shift: array} and {tau: array}, one column per seed, with
    the rows (Frechet distance of samples, their share in class) and (PSNR of reconstructions, their Frechet distance,
    that of samples, their share in class); the Frechet distance of as many real images."""
    seeds, epochs = plan["seeds"], plan["dit_epochs"]
    narrow = TOKEN // 2
    models = [(width, DEPTH, 0) for width in plan["widths"]]
    models += [(narrow, depth, 0) for depth in plan["depths"]] + [(narrow, DEPTH, HEAD)]
    dits = {(a, seed): work / f"dit-{a}-{seed}" for a in plan["strengths"] for seed in seeds}
    several = {(tau, seed): work / f"decoder-{tau}-{seed}" for tau in plan["taus"] for seed in seeds}
    schedule = ["--epochs", epochs, "--warmup", epochs / 10]
    tasks = [  # the latents have 128 x 4 x 4 elements, and a = sqrt(elements / base)
        (train, "dit", out, "--seed", seed, "--shift-base", 2048 / a**2, *schedule, "--ema", 0.99, "--stats-images",
         plan["images"]) for (a, seed), out in dits.items()]
    tasks += [(train, "decoder", out, "--seed", seed, "--tau", tau, "--epochs", plan["decoder_epochs"])
              for (tau, seed), out in several.items()]
    tasks += [(overfit, *model, seed, *plan["overfit"]) for model in models for seed in seeds]
    results = run("training", tasks, jobs)[len(dits) + len(several) :]
    losses = {model: results[i * len(seeds) : (i + 1) * len(seeds)] for i, model in enumerate(models)}

    # Samples: of each shift with the demo's decoder, of the demo's shift with each decoder, of the same seed.
    wanted = {(a, seed): plan["taus"] if a == DEMO_SHIFT else [DEMO_TAU] for a, seed in dits}
    tasks = [(generate, dits[a, seed], [several[tau, seed] for tau in taus], plan["samples"], seed)
             for (a, seed), taus in wanted.items()]
    samples = {}
    for ((a, seed), taus), images in zip(wanted.items(), run("sampling", tasks, jobs), strict=True):
        samples |= {(a, tau, seed): part for tau, part in zip(taus, images, strict=True)}

    cnn = train_cnn(*draw_shapes(100, plan["judge_images"], SIZE), len(Shapes.classes), plan["judge_steps"])
    held_out, held_out_labels = draw_shapes(101, 2 * plan["images"], SIZE)
    real, labels = cnn(held_out)[1], torch.arange(plan["samples"]) % len(Shapes.classes)
    judged = {key: judge(cnn, real, images, labels) for key, images in samples.items()}
    shifts = {a: np.array([judged[a, DEMO_TAU, seed] for seed in seeds]).T for a in plan["strengths"]}
    z, taus = Encoder("random-tiny", SIZE)(held_out), {}
    for tau in plan["taus"]:
        rows = []
        for seed in seeds:
            decoder, _ = load_decoder(several[tau, seed] / "decoder.pt")
            recon = to_uint8(decoder(z)).permute(0, 3, 1, 2) / 255
            psnr = psnr_of(recon, held_out).mean().item()
            rows.append((psnr, judge(cnn, real, recon, held_out_labels)[0], *judged[DEMO_SHIFT, tau, seed]))
        taus[tau] = np.array(rows).T
    return losses, shifts, taus, judge(cnn, real[len(labels) :], held_out[: len(labels)], labels)[0]


def report(losses, shifts, taus, floor):
    """Print the three tables, with the verdicts by the rule."""
    rows, least = [], min(1 - width / TOKEN for width, _, _ in losses if width < TOKEN)
    for (width, depth, head), values in losses.items():
        bound, trunk_bound = max(0, 1 - (head or width) / TOKEN), 1 - width / TOKEN
        if head:
            verdict = "below its trunk's bound" if max(values) < trunk_bound else "not shown"
        elif bound:
            verdict = "above the bound" if min(values) >= bound else "BELOW the bound"
        else:
            verdict = "below them all" if max(values) < least else "not shown"
        paper = "" if head else f"{PAPER_LOSS[width / TOKEN]:.2f}" if width / TOKEN in PAPER_LOSS else ""
        rows.append((f"{width}" + (f", head {head}" if head else ""), depth, f"{(head or width) / TOKEN:.3f}",
                     f"{bound:.3f}", paper, spread(values, 3), verdict))
    table("1. Theorem 1: the loss of one image", ["width", "depth", "width / C", "bound 1 - width / C", "paper", "here",
          "verdict"], rows)

    rows = []
    for a, (distance, share) in shifts.items():
        verdict = compare(distance, shifts[1][0]) if a != 1 else ""
        rows.append((a, PAPER_SHIFT.get(a, ""), spread(distance, 1), spread(100 * share, 1), verdict))
    table("2. The time shift", ["shift", "paper: gFID", "here: Frechet distance", "% in class", "against shift 1"],
          rows)

    rows = []
    for tau, (psnr, recon, distance, share) in taus.items():
        verdicts = [compare(a, b) for a, b in ((recon, taus[0][1]), (distance, taus[0][2]))] if tau else ["", ""]
        rfid, gfid = PAPER_TAU.get(tau, ("", ""))
        rows.append((tau, rfid, spread(recon), spread(psnr, 1), verdicts[0], gfid, spread(distance, 1),
                     spread(100 * share, 1), verdicts[1]))
    table("3. Noise-augmented decoding", ["tau", "paper: rFID", "here: reconstructions", "PSNR", "against tau 0",
          "paper: gFID", "here: samples", "% in class", "against tau 0"], rows)
    print(f"\nFrechet distance of as many real images: {floor:.2f}", flush=True)


def plot(path, losses, shifts, taus):
    """A figure of three panels, on white for light and dark pages. Dots are means, bars the ranges of the seeds."""
    figure = Figure(figsize=(13, 4.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(wspace=0.06)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))

    def points(axis, x, values, color, marker="o", **style):
        mean = np.mean(values)
        reach = [[mean - min(values)], [max(values) - mean]]
        axis.errorbar(x, mean, reach, fmt=marker, color=color, capsize=4, **style)
        return mean

    ratio = np.linspace(0.3, 1.25, 100)
    left.fill_between(ratio, (1 - ratio).clip(0), color="0.88")
    left.text(0.33, 0.22, "out of reach:\nloss < 1 − width / C\n(Theorem 1)", color="0.35", fontsize=10)
    for (width, depth, head), values in losses.items():
        if head:
            mean = points(left, width / TOKEN, values, "tab:green", "*", markersize=13)
            left.annotate(f"with a wide head, {HEAD / TOKEN:.2f} C", (width / TOKEN, mean), (10, 5),
                          textcoords="offset points", color="tab:green", fontsize=10)
        else:
            deep = depth != DEPTH
            points(left, width / TOKEN, values, "tab:orange" if deep else "tab:blue", "D" if deep else "o",
                   mfc="none" if deep else None, markersize=6 + depth * deep)
    if any(depth != DEPTH for _, depth, _ in losses):
        left.text(0.55, 0.6, "two and four times as deep", color="tab:orange")
    left.text(0.72, 0.39, f"depth {DEPTH}", color="tab:blue")
    left.set(xlabel="width of the model / token width C", ylabel="loss of one image", ylim=0, xlim=(0.3, 1.25),
             title="One image: width against depth")

    verdict = compare(shifts[DEMO_SHIFT][0], shifts[1][0])
    for i, (distance, _) in enumerate(shifts.values()):
        mean = points(middle, i, distance, "tab:blue", markersize=8)
        middle.annotate(f"{mean:.0f}", (i, mean), (9, -4), textcoords="offset points", color="tab:blue")
    names = {1: "none", DEMO_SHIFT: f"{DEMO_SHIFT} (demo)"}
    middle.set_xticks(range(len(shifts)), [names.get(a, str(a)) for a in shifts])
    middle.set(xlabel="time shift in training", ylabel="Fréchet distance of samples (lower is better)", ylim=0,
               xlim=(-0.5, len(shifts) - 0.5), title=f"Time shift {DEMO_SHIFT} against none: {verdict}")

    for row, color, name in ((2, "tab:blue", "samples"), (1, "tab:orange", "reconstructions")):
        for i, values in enumerate(taus.values()):
            mean = points(right, i, values[row], color, markersize=8)
            right.annotate(f"{mean:.0f}", (i, mean), (9, -4), textcoords="offset points", color=color)
        right.annotate(name, (0, max(taus[0][row])), (-14, 6), textcoords="offset points", color=color)
    right.set_xticks(range(len(taus)), [f"{tau} (demo)" if tau == DEMO_TAU else str(tau) for tau in taus])
    right.set(xlabel="noise tau in the decoder's training", ylabel="Fréchet distance (lower is better)", ylim=0,
              xlim=(-0.5, len(taus) - 0.5), title="Noise-augmented decoding")
    figure.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(".github"), help="folder for claims.png")
    parser.add_argument("--runs", type=Path, help="folder to keep the trained models in, and to load those that it has")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: the cores; 1 with --quick)")
    args = parser.parse_args(argv)
    jobs, start = args.jobs or (1 if args.quick else os.cpu_count()), time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(QUICK if args.quick else FULL, args.runs or Path(temporary), jobs)
    report(*results)
    args.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        plot(args.out / "claims.png", *results[:3])
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{args.out / 'claims.png'}; {minutes:.1f} minutes, {jobs} runs at a time, torch {torch.__version__}")


if __name__ == "__main__":
    main()
