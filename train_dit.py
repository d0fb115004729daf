"""Stage 2: train a diffusion transformer to draw the latents of a frozen encoder.

    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/                      # DiT-DH-XL, the paper's recipe
    torchrun --nproc_per_node=gpu train_dit.py --data imagenet/ --preset imagenet512
    python train_dit.py --data photos/ --init runs/imagenet256/dit/dit.pt --epochs 20 --out runs/photos/dit
    python train_dit.py --preset demo                                                # no data, no GPU, minutes

The same command again resumes. Paper: arXiv 2510.11690, sections 4 and 5. It writes to --out:
    dit.pt          EMA weights, configuration, class names and latent statistics: what sample.py reads
    last.pt         everything that is needed to go on exactly where training stopped
    stat.pt         the latent statistics
    log.csv         one row for each logged interval, with the loss by bins of t, and one for each online FID
    preview-*.png   samples of the EMA weights from fixed noise, when there is a decoder
    dit-*.pt        dit.pt at the epochs of --keep-every: guides for AutoGuidance, points of a FID curve
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from decoder import image_grid, load_decoder, to_uint8
from dit import (SIZES, DiT, denormalize, flow_matching_loss, guided, load_dit, normalize, sample, sample_noise,
                 shift_for, time_shift)
from encoder import (ENCODER_HELP, GIVE_UP_AFTER, RUN_FLAGS, Encoder, Images, Log, Plan, agree, amount,
                     center_crop_flip, check_init, compile_blocks, count, distribute, finish, image_source,
                     latent_statistics, load_stats, make_ema, make_loader, make_parser, one_line_refusals,
                     pixel_statistics, positive, random_key, resume, save_checkpoint, set_up, share, stop_by_signal,
                     training_loader)
from fid import FeatureStatistics, frechet_distance, load_inception, load_statistics


RECIPE = [
    # flag             type      256 px  512 px  demo    meaning, and what the paper has
    ("--data",          str,      None,   None,   "shapes", "folder with a folder for each class; or `shapes`"),
    ("--size",          count,    256,    512,    32,     "image side in pixels"),
    ("--encoder",       str,      "dinov2-b", "dinov2-b", "random-tiny", ENCODER_HELP),
    ("--encoder-weights", str,    None,   None,   None,   "local file, instead of the download"),
    ("--model",         tuple(SIZES), "DiT-DH-XL", "DiT-DH-XL", "DiT-DH-tiny", "size; DH: with the wide DDT head"),
    ("--qk-norm",       bool,     False,  False,  False,  "RMSNorm on q and k, for bf16 training; the paper: without"),
    ("--allow-narrow",  bool,     False,  False,  False,  "allow a model narrower than its tokens, against Theorem 1"),
    ("--unconditional", bool,     False,  False,  False,  "train without labels"),
    ("--shift-base",    positive, 4096.0, 4096.0, 512.0,  "base of the shift sqrt(C H W / base); --init keeps its own"),
    ("--epochs",        positive, 80.0,   400.0,  9.0,    "length of training; the paper: also 800 at 256 px"),
    ("--batch",         count,    1024,   1024,   32,     "images in a step, over all processes"),
    ("--micro-batch",   count,    32,     8,      32,     "most images in one forward; for DiT-DH-XL and 80 GB"),
    ("--lr",            positive, 2e-4,   2e-4,   3e-3,   "learning rate of AdamW, betas (0.9, 0.95), no weight decay"),
    ("--lr-end",        amount,   2e-5,   2e-5,   1e-4,   "learning rate from --decay-end on"),
    ("--warmup",        amount,   0.0,    0.0,    0.4,    "epochs of linear warm-up"),
    ("--decay-start",   amount,   40.0,   40.0,   None,   "epoch where --lr begins to fall; plain DiT: never"),
    ("--decay-end",     amount,   800.0,  800.0,  None,   "epoch where the fall ends; demo: both by --epochs"),
    ("--clip",          amount,   1.0,    1.0,    1.0,    "largest gradient norm; 0: no clipping; plain DiT: 0"),
    ("--ema",           share,    0.9995, 0.9995, 0.995,  "decay of the weights' average; plain DiT: 0.9999"),
    ("--label-dropout", share,    0.1,    0.1,    0.1,    "share of labels replaced by the null class"),
    ("--init",          str,      None,   None,   None,   "weights to start from; published ones need their --stats"),
    ("--stats",         str,      None,   None,   None,   "latent statistics (default: of --init, or measured)"),
    ("--stats-images",  count,    50000,  50000,  4000,   "images on which the statistics are measured"),
    ("--decoder",       str,      None,   None,   None,   "for previews and FID (default: of runs/<preset>, if there)"),
    ("--preview-every", amount,   None,   None,   None,   "epochs between previews, or 0 (default: 5, >= 500 steps)"),
    ("--keep-every",    amount,   0.0,    0.0,    0.0,    "epochs between copies dit-<epoch>.pt that stay; 0: none"),
    ("--fid-every",     amount,   0.0,    0.0,    0.0,    "epochs between online FIDs, unguided; 0: none"),
    ("--fid-reference", str,      None,   None,   None,   "its reference: VIRTUAL_*.npz, or of fid.py --save-stats"),
    ("--fid-num",       count,    10000,  10000,  10000,  "images of an online FID; published ones are of 50,000"),
    ("--inception-weights", str,  None,   None,   None,   "local file, instead of the download"),
]
PLAIN_DIT = dict(decay_start=math.inf, decay_end=math.inf, clip=0.0, ema=0.9999)  # the paper's, without the DDT head


def parse_args(argv):
    parser = make_parser(__doc__, RECIPE + RUN_FLAGS, argv)
    args = parser.parse_args(argv)
    if "DH" not in args.model and args.preset != "demo":
        parser.set_defaults(**PLAIN_DIT)
        args = parser.parse_args(argv)
    args.out = args.out or Path("runs", args.preset, "dit")
    start, end = decay_epochs(args)
    if start > end:
        parser.error(f"--decay-start {start:g} comes after --decay-end {end:g}")
    if bool(args.fid_every) != bool(args.fid_reference):
        parser.error("--fid-every EPOCHS and --fid-reference NPZ need each other")
    found = Path("runs", args.preset, "decoder", "decoder.pt")
    if args.fid_every and not args.decoder and not found.exists():
        parser.error(f"--fid-every needs a --decoder: there is no {found}")
    if args.fid_num < 2:
        parser.error(f"--fid-num {args.fid_num}: a covariance needs at least 2 images")
    return parser, args


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and draws


def decay_epochs(args):
    """The first and the last epoch of the learning rate's fall. None, the demo's: the last two thirds of training."""
    start, end = args.decay_start, args.decay_end
    return args.epochs / 3 if start is None else start, args.epochs if end is None else end


def lr_at(step, args, steps_per_epoch):
    """Learning rate of a step, counted from 0: linear warm-up, constant, then linear from lr to lr_end."""
    warm = min(1.0, (step + 1) / max(1, args.warmup * steps_per_epoch))
    epoch, (start, end) = step / steps_per_epoch, decay_epochs(args)
    decayed = min(1.0, (epoch - start) / max(end - start, 1e-9)) if epoch > start else 0.0
    return warm * (args.lr + decayed * (args.lr_end - args.lr))


def draw(keys, labels, shape, null_class, label_dropout, generator):
    """Everything random of a training step: times, noise, dropped labels; each image's from its own key.

    So last.pt holds no state of a generator: step and seed say what is drawn.
    Returns t (B,) in (0, 1), logit-normal (section 4) and not yet shifted; noise (B, C, H, W); and the labels (B,), of
    which the share `label_dropout` is the null class, for classifier-free guidance.
    """
    B, device = len(keys), generator.device
    normal, uniform = torch.empty(B, 1, device=device), torch.empty(B, 1, device=device)
    noise = torch.empty(B, *shape, device=device)
    for i, key in enumerate(keys.tolist()):
        generator.manual_seed(key)
        noise[i].normal_(generator=generator)
        normal[i].normal_(generator=generator)
        uniform[i].uniform_(generator=generator)
    t = normal[:, 0].sigmoid()  # logit-normal(0, 1)
    return t, noise, labels.where(uniform[:, 0] >= label_dropout, null_class)


LOSS_BY_TIME = [f"loss_t{i / 5:.1f}" for i in range(5)]


def by_time(losses, t):
    """The losses (B,) once for each fifth of [0, 1], NaN where t (B,) lies elsewhere: the log leaves NaN out."""
    fifth = (5 * t).long().clamp(max=4)
    return {name: losses.where(fifth == i, math.nan) for i, name in enumerate(LOSS_BY_TIME)}


# ---------------------------------------------------------------------------------------------------------------------
# What a run starts from: weights, statistics, the decoder for previews; its online FID


def start_from(path, model, encoder):
    """Copy the weights of --init into the model -> what their file says besides: {"stats", "shift", ...}.

    Where the counts of classes differ, the class table stays new, but for the null class, its last row.
    """
    trained, info = load_dit(path)
    check_init(path, info, encoder, trained.config, model.config, but=("num_classes",))
    state, table = trained.state_dict(), "y_embedder.embedding_table.weight"
    if trained.num_classes != model.num_classes:
        state[table] = torch.cat([model.state_dict()[table][:-1], state[table][-1:]])
    model.load_state_dict(state)
    return info


def load_preview_decoder(args, encoder):
    """The decoder for previews and online FID: --decoder, else that of runs/<preset>/; None without either of them.

    Raises ValueError for a --decoder of other latents.
    """
    path = args.decoder or Path("runs", args.preset, "decoder", "decoder.pt")
    if not args.fid_every and (args.preview_every == 0 or not args.decoder and not path.exists()):
        return None
    decoder, info = load_decoder(path, pixel_statistics(args.encoder))
    name = info.get("encoder", dict(name=args.encoder))["name"]
    if (name, decoder.latent_shape) == (args.encoder, encoder.latent_shape):
        return decoder
    if args.decoder or args.fid_every:
        raise ValueError(f"{path} decodes other latents than those of {args.encoder} at {args.size} px: give another "
                         "--decoder, or leave out previews by --preview-every 0 and --fid-every")


def measure_statistics(args, encoder, images, micro_batch, device):
    """Latent statistics over --stats-images images, chosen by the seed; each rank takes its share."""
    order = np.random.default_rng(args.seed).permutation(len(images))[: args.stats_images]
    chosen = [(int(i), random_key(args.seed, int(i))) for i in order[args.rank :: args.world_size]]
    chosen = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
    bar = tqdm(chosen, "latent statistics", disable=args.rank > 0)
    return latent_statistics(encoder, make_loader(images, bar, args.workers, device), device)


def online_fid(args, pictures, inception, reference, num_classes, batch, device):
    """FID of pictures(indices, labels) with labels in turn; every rank draws and measures its share."""
    statistics = FeatureStatistics(2048, device)
    indices = range(args.rank, args.fid_num, args.world_size)
    for i in tqdm(range(0, len(indices), batch), "FID", leave=False, disable=args.rank > 0):
        part = indices[i : i + batch]
        drawn = pictures(part, [index % max(num_classes, 1) for index in part])  # (B, H, W, 3)
        statistics.update(inception(drawn.permute(0, 3, 1, 2))[0])
    statistics.all_reduce()
    return frechet_distance(statistics.mean, statistics.cov, reference["mu"], reference["sigma"])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(args):
    device, autocast = set_up(args)
    say = functools.partial(print, flush=True) if args.rank == 0 else (lambda _: None)
    source = image_source(args.data, args.size)
    plan = Plan(args, len(source))
    last, recorded, start = resume(args, "train_dit", "dit.pt", images=len(source), classes=source.classes)
    if start >= plan.total:
        say(f"finished: {args.out}/dit.pt has its {start / plan.steps_per_epoch:g} epochs; a larger --epochs goes on")
        return

    # The frozen encoder, and the model that learns to draw its latents.
    encoder = Encoder(args.encoder, args.size, args.encoder_weights).to(device)
    shape = encoder.latent_shape
    num_classes = 0 if args.unconditional else len(source.classes)
    label_dropout = 1.0 if args.unconditional else args.label_dropout
    torch.manual_seed(args.seed)
    model = DiT(*shape[:2], num_classes, **SIZES[args.model], qk_norm=args.qk_norm, allow_narrow=args.allow_narrow)
    # Shift and statistics are those of the run that goes on, else of --init, else computed (below).
    origin = last or (start_from(args.init, model, args.encoder) if args.init else {})
    shift = origin.get("shift") or shift_for(shape, args.shift_base)
    stats = origin.get("stats")  # the weights of --init were trained on latents normalised with these
    if args.stats and not last:
        stats = load_stats(args.stats, shape)
    if args.init and not stats:
        raise ValueError(f"--init {args.init} has no latent statistics with it: give them with --stats")
    decoder = load_preview_decoder(args, encoder)
    if args.fid_every:
        reference, inception = load_statistics(args.fid_reference), load_inception(args.inception_weights, device)
    say(f"{source.root}: {len(source)} images, classes: {len(source.classes)} ({', '.join(source.classes[:5])})")
    if decoder is None:
        say("no previews: there is no decoder for these latents, or --preview-every is 0")

    # Compiled block by block, before DDP; the average stays eager.
    images = Images(source, functools.partial(center_crop_flip, size=args.size))
    if args.compile:
        compile_blocks(encoder.vit, model)
    if stats is None:
        with autocast:
            stats = measure_statistics(args, encoder, images, plan.micro_batch, device)
    stats = {key: value.to(device) for key, value in stats.items()}
    model = model.to(device).train()
    model.checkpointing = args.checkpointing
    ema = make_ema(model, args.ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    skipped = bad_in_a_row = 0
    if last:
        model.load_state_dict(last["model"])
        ema.module.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        skipped = last["skipped"]
        last = origin = None  # last.pt is memory-mapped: release it
    ddp = distribute(model, device)
    if decoder and (args.rank == 0 or args.fid_every):
        decoder = decoder.to(device)
    say(f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; time shift {shift:.2f}; "
        f"{plan.words}; from step {start}")

    def checkpoint(done):
        result = dict(kind="dit", config=model.config, model=ema.module.state_dict(), stats=stats, shift=shift,
                      encoder=encoder.record, label_dropout=label_dropout, epoch=done / plan.steps_per_epoch,
                      classes=source.classes if num_classes else [])
        files = {args.out / "stat.pt": stats, args.out / "dit.pt": result}
        if plan.due(done, args.keep_every):
            epoch = args.keep_every * round(done / plan.steps_per_epoch / args.keep_every)
            files[args.out / f"dit-{epoch:g}.pt"] = result
        last = dict(kind="train_dit", args=recorded, step=done, model=model.state_dict(), ema=ema.module.state_dict(),
                    optimizer=optimizer.state_dict(), stats=stats, shift=shift, skipped=skipped)
        save_checkpoint(files | {args.out / "last.pt": last})

    def pictures(indices, labels):
        """Unguided samples of the average, uint8 (n, S, S, 3); sample i starts from the noise of (seed, i)."""
        velocity = guided(ema.module, torch.tensor(labels, device=device))
        x = sample(velocity, sample_noise(args.seed, indices, shape).to(device), shift=shift)
        return to_uint8(decoder(denormalize(x, stats)))

    batches, steps = training_loader(images, args, plan, start, device)
    generator = torch.Generator(device)
    preview_every = plan.interval(args.preview_every, 5)
    log = Log(args, plan, ["loss", *LOSS_BY_TIME, "grad_norm", "lr", "fid"], start, device)
    stopping = stop_by_signal(args.rank)
    for step in steps:
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, args, plan.steps_per_epoch)
        for micro in range(plan.accumulate):
            ddp.require_backward_grad_sync = micro == plan.accumulate - 1  # ranks exchange gradients in the last
            pixels, labels, keys = next(batches)  # (B, 3, S, S) uint8, (B,), (B,)
            pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            t, noise, labels = draw(keys, labels, shape, model.null_class, label_dropout, generator)
            t = time_shift(t, shift)  # section 4: t' = a t / (1 + (a - 1) t)
            with autocast:
                x = normalize(encoder(pixels.float() / 255), stats)  # (B, C, H, W)
                # x_t = (1 - t) x + t noise; the loss is |v(x_t, t, labels) - (noise - x)|^2, averaged over each image
                losses = flow_matching_loss(ddp, x, labels, t, noise)  # (B,)
            (losses.sum() / plan.local_batch).backward()  # DDP averages over ranks: the gradient of the batch's mean
            log.add(loss=losses, **by_time(losses.detach(), t))
        norm = clip_grad_norm_(model.parameters(), args.clip or math.inf)  # inf only measures
        log.add(grad_norm=norm)
        norm, loss, stop = agree(stopping, norm, losses.detach().mean())
        finite = math.isfinite(norm)
        if finite:  # else weights, moments and average stay as they are
            optimizer.step()
            ema.update(model, step + 1)
        optimizer.zero_grad(set_to_none=args.world_size == 1)  # DDP's are views of its buckets: zero in place

        done = step + 1
        skipped, bad_in_a_row = skipped + (not finite), 0 if finite else bad_in_a_row + 1
        end = done == plan.total or stop or bad_in_a_row == GIVE_UP_AFTER
        log.step(loss)
        if done % plan.log_every == 0 or end:
            log.row(done, lr=lr, skipped=skipped)
        if decoder and args.rank == 0 and preview_every and (plan.due(done, preview_every) or done == plan.total):
            grid = image_grid(pictures(range(16), [i * num_classes // 16 for i in range(16)]).cpu(), 8)
            grid.save(args.out / f"preview-{done / plan.steps_per_epoch:.2f}.png")
        if args.rank == 0 and (plan.due(done, plan.save_every) or plan.due(done, args.keep_every) or end):
            checkpoint(done)  # after the preview: a run that goes on from here would not draw it
        if args.fid_every and (plan.due(done, args.fid_every) or done == plan.total):  # minutes: the step is saved
            score = online_fid(args, pictures, inception, reference, num_classes, plan.micro_batch, device)
            log.write(done, fid=score)
        if end:
            break
    finish(args, done, stop, bad_in_a_row)


def main(argv=None):
    parser, args = parse_args(argv)
    with one_line_refusals(parser):
        train(args)


if __name__ == "__main__":
    main()
