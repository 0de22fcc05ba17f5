"""Teach what reads spectra before the rest: in minutes, and over and over the same patches.

The spectra of a patch (`models.nets.physics.CrossSpectra`) hold no weights. Once computed,
they are a thousand numbers instead of 50,000 pixels, and the perceptron behind them sees some
thousands a second where the whole net sees some tens. So what it must learn of many slides
and lenses, it learns first, beside what the convolutions find as they are (of a net that
begins with other weights, much); the loop then trains everything together.

Before them come, if asked for, spectra by theory (`spectra_theory`), of many more lenses than
anyone has stacks of. What differs between theory and images, those of images then mend; theory
stays beside them, so that what it taught of lenses that no stack has is not forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mm_autofocus.refocusing.running import cores
from mm_autofocus.training.batches import batches_of
from mm_autofocus.training.muon import BlockMuon
from mm_autofocus.training.spectra_theory import SpectraByTheory

if TYPE_CHECKING:
    from mm_autofocus.models.nets.sparsefocus import SparseFocus
    from mm_autofocus.training.options import TrainOptions
    from mm_autofocus.training.samples import Source

    Taught: TypeAlias = tuple[Tensor, Tensor]

__all__ = ["gather", "gather_by_theory", "learn", "spectra_first"]

_USUAL = 100_000  # patches that say what spectra usually are
_READ = 64  # patches whose spectra are computed at a time
_BATCH, _MANY = 256, 512  # of patches of images, and of theory, of which there are more
_LR, _FURTHER_LR = 1.5e-3, 7e-4  # of the first lesson, and of one that mends
_MUON_LR, _MUON_DECAY = 0.02, 0.01
_DECAY = 0.05
_WARMUP = 0.15
_BESIDE = 3  # images to one patch by theory, where both are learned together


def spectra_first(
    net: SparseFocus,
    source: Source,
    options: TrainOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Draw patches, compute their spectra, teach the perceptron and the head.

    Every process of a training does the same with the same result.

    Parameters
    ----------
    net : SparseFocus
        With spectra; changed in place.
    source : Source
        Of patches; the first ones it numbers are taken.
    options : TrainOptions
        ``spectra_patches``, ``spectra_passes``, ``theory``, ``near_share``, ``near_um``,
        ``seed``, ``workers``.
    device : torch.device
    say : callable
        Takes lines of progress.
    """
    net.to(device)
    theory = images = None
    if options.spectra_patches:
        images = gather(net, source, options, device, say)
    if options.theory.patches:
        theory = gather_by_theory(net, options, device, say)
    first = images or theory
    if first is None:
        return
    if not net.knows_usual:  # else its weights were learned on what was usual then
        net.learn_usual(first[0][:_USUAL])
    lr, seed = _LR, options.seed
    if theory is not None:
        learn(net, theory, passes=options.theory.passes, seed=seed, say=say, lr=lr, muon=True)
        lr = _FURTHER_LR
    if images is not None:
        passes = options.spectra_passes
        learn(net, images, passes=passes, seed=seed, say=say, lr=lr, beside=theory)


def gather_by_theory(
    net: SparseFocus,
    options: TrainOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> Taught:
    """Spectra of patches by theory, ``(N, F)`` float16; their defocus ``(N,)`` in µm.

    Behind the spectra the code of the lens, if the net is told of it. Rounded, so that
    millions of them fit into memory.
    """
    near = (options.near_share, options.near_um)
    theory = SpectraByTheory(net.context, options.theory, options.seed, near, net.lens)
    found, defocus = torch.empty(0), torch.empty(0)
    # nobody computes beside them
    workers = cores() if options.workers is None else options.workers
    for k, (seen, at) in enumerate(DataLoader(theory, batch_size=None, num_workers=workers)):
        if not k:  # all at once: to join parts takes twice the memory
            rows = len(theory) * len(at)
            found = torch.empty(rows, seen.shape[1], dtype=torch.float16, device=device)
            defocus = torch.empty(rows, device=device)
        here = slice(k * len(at), (k + 1) * len(at))
        found[here], defocus[here] = seen, at
        if k % max(1, len(theory) // 10) == 0:
            say(f"spectra by theory, {k * len(at)} of {len(theory) * len(at)}")
    return found, defocus


def gather(
    net: SparseFocus,
    source: Source,
    options: TrainOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> Taught:
    """What the net sees in patches, ``(N, S)`` float32; their defocus ``(N,)`` in µm."""
    steps = max(2, options.spectra_patches // _READ)
    found, defocus = [], []
    net.eval()
    cuda = device.type == "cuda"
    with torch.inference_mode():
        for k, batch in enumerate(
            batches_of(source, _READ, range(steps), workers=options.workers, cuda=cuda)
        ):
            lens = batch["lens"].to(device) if "lens" in batch else None
            found.append(net.seen(batch["patches"].to(device), lens))
            defocus.append(batch["defocus_um"].to(device))
            if k % max(1, steps // 10) == 0:
                say(f"spectra of {k * _READ} of {steps * _READ} patches")
    return torch.cat(found), torch.cat(defocus)


def learn(
    net: SparseFocus,
    taught: Taught,
    *,
    passes: int,
    seed: int,
    say: Callable[[str], None],
    lr: float = _LR,
    beside: Taught | None = None,
    muon: bool = False,
) -> None:
    """Teach the perceptron and the head of `net`, in place.

    Parameters
    ----------
    net : SparseFocus
        It knows what spectra usually are.
    taught : tuple of Tensor
        ``(N, S)`` of `SparseFocus.seen`, or ``(N, F)``: the spectra of it alone; and the
        defocus ``(N,)`` in µm.
    passes : int
        Over all of them.
    seed : int
        Of the order, and of what is dropped.
    say : callable
        Takes lines of progress.
    lr : float
        Largest learning rate.
    beside : tuple of Tensor | None
        Spectra ``(M, F)`` and their defocus, of which each batch holds a third as many.
    muon : bool
        Teach the matrices of the perceptron by `BlockMuon` (Jordan et al., 2024): all
        directions of a step are of one length, so that what tells lens from defocus, a few
        per cent of inputs that vary together, is not learned last. For many patches: of a few
        it learns soon what is peculiar to them. Nothing is dropped then: what is never learned
        by heart only gets vaguer by it.
    """
    seen, defocus_um = taught
    learned = [p for p in net.reading_parameters() if p.requires_grad]
    matrices = [p for p in net.reading_matrices() if p.requires_grad] if muon else []
    others = [p for p in learned if all(p is not other for other in matrices)]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, lr, weight_decay=_DECAY), lr)
    ]
    if matrices:
        muons = BlockMuon(matrices, _MUON_LR, weight_decay=_MUON_DECAY)
        optimisers.append((muons, _MUON_LR))
    n = len(seen)
    batch = min(_MANY if muon else _BATCH, n)
    steps = n // batch
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            most,
            total_steps=passes * steps,
            pct_start=_WARMUP,
            cycle_momentum=False,
        )
        for optimiser, most in optimisers
    ]
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net.train()
    for module in net.modules() if muon else ():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for number in range(passes):
        total = 0.0
        shuffled = torch.randperm(n, generator=order).to(seen.device)
        for k in range(steps):
            which = shuffled[k * batch : (k + 1) * batch]
            x, d = seen[which].float(), defocus_um[which]
            if beside is not None:
                other = torch.randint(len(beside[0]), (batch // _BESIDE,), generator=order)
                other = other.to(seen.device)
                spectra = beside[0][other].float()
                if x.shape[1] != spectra.shape[1]:
                    spectra = net.seen_of(spectra)
                x, d = torch.cat((x, spectra)), torch.cat((d, beside[1][other]))
            losses = net.losses(net.by_seen(x), d)
            loss = cast("Tensor", sum(losses.values()))
            for optimiser, _ in optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, 5.0)
            for optimiser, _ in optimisers:
                optimiser.step()
            for schedule in schedules:
                schedule.step()
            total += float(loss.detach())
        say(f"spectra, pass {number + 1}/{passes}  loss {total / steps:.3f}")
