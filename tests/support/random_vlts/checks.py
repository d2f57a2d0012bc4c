"""What must hold of every random model once it is rewritten. Start at :data:`CHECKS` and :func:`examine`.

A check raises AssertionError; a model that cannot be rewritten raises :class:`madtp.MadtpError` with its reasons.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from masked_oracle import leaves
from rewritten_models import eager_arithmetic, gap, gradients
from torch import Tensor, nn

import madtp
from madtp import PruningConfig
from random_vlts.design import Design
from random_vlts.marks import END, Tap
from random_vlts.models import build, inputs, lengths
from random_vlts.oracle import Kept, masked_outputs

# Everything runs in float64, so what is larger than this is an error.
TOLERANCE = 1e-7
# Scores, and with them the weights of merged tokens, are float32 whatever the model is.
MERGED = 1e-4
SIZES = ((1, 5), (2, 9), (4, 6))
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A design, its model, and the rewritten one. sites: name by stream and layer. depth: layers by stream."""

    design: Design
    model: nn.Module
    pruned: madtp.PrunedModel
    sites: dict[tuple[str, int], str]
    depth: dict[str, int]

    def lost(self) -> dict[str, str]:
        """Blocks without a site, and why: those with self-attention, for pooling needs none."""
        blocks = {p.rpartition(".")[0] for p, m in self.model.named_modules() if isinstance(m, Tap)}
        reasons = {r.block: r.reason for r in self.pruned.report.refusals}
        found = {}
        for block in sorted(blocks - set(self.sites.values())):
            found[block] = reasons.get(block) or reasons.get(f"{block}.attention") or "no reason given"
        return found

    @contextmanager
    def set(
        self, temperature: float, gain: float = 1.0, forced: Tensors | None = None, **config: Any
    ) -> Iterator[madtp.PrunedModel]:
        """Inside the block: this strength, these survivors [B, N] by site, these fields of the configuration."""
        control = self.pruned.madtp.control
        before = control.temperature, control.gain, control.config, control.forced
        control.temperature, control.gain, control.forced = temperature, gain, forced
        control.config = replace(control.config, **config)
        try:
            yield self.pruned
        finally:
            control.temperature, control.gain, control.config, control.forced = before


def rewritten(design: Design) -> Subject:
    """The subject of a design; raises MadtpError if it is refused."""
    model = build(design)
    with eager_arithmetic():
        pruned = madtp.rewrite(model, inputs(design, 3, 7, 0), config=PruningConfig(alignment_tokens=4))
    places: dict[str, tuple[str, int]] = {}
    depth: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, Tap):
            places[path.rpartition(".")[0]] = module.stream, module.layer
            depth[module.stream] = max(depth.get(module.stream, 0), module.layer + 1)
    sites = {}
    for site in pruned.report.sites:
        assert site.name in places, f"the site {site.name} is no block of the model"
        assert places[site.name] not in sites, f"two sites in the block {site.name}"
        sites[places[site.name]] = site.name
    return Subject(design, model, pruned, sites, depth)


def reproduction(design: Design) -> str:
    """Lines of Python that check one design again, in the folder of the tests."""
    return "\n".join(
        (
            "from random_vlts import Design",
            "from random_vlts.checks import examine",
            f"examine(Design.from_json({design.to_json()!r}))",
        )
    )


def examine(design: Design) -> Subject:
    """Rewrite a design and run all checks that are due."""
    subject = rewritten(design)
    for refusal in subject.pruned.report.refusals:
        assert all((refusal.block, refusal.node, refusal.reason, refusal.help)), f"a refusal without words: {refusal}"
    assert "no reason given" not in subject.lost().values(), f"blocks left alone in silence: {subject.lost()}"
    due = zlib.crc32(design.to_json().encode())
    with eager_arithmetic():
        for check, every in CHECKS:
            if due % every == 0:
                check(subject)
    return subject


def protected(design: Design, given: Tensors) -> tuple[Tensors, Tensors]:
    """Positions [B, N] that must survive at every site, and further ones that may: learned tokens. By stream."""
    batch, sizes = len(given["pixels"]), lengths(design, given)
    must = {s: torch.zeros(batch, n, dtype=torch.bool) for s, n in sizes.items()}
    may = {s: m.clone() for s, m in must.items()}
    may["image"][:, : design.prefix] = True
    # Scattered features are the patches, whatever the tower's readout is.
    if design.image_readout in ("first", "first_and_mean") and design.arrangement != "scattered":
        must["image"][:, 0] = True
    if "ids" in given:
        if design.text_readout == "first":
            must["text"][:, 0] = True
        elif design.text_readout == "last":
            must["text"][:, -1] = True
        elif design.text_readout.startswith("end"):
            must["text"] |= given["ids"] == END
        order = ["text", "image"] if design.order == "text_first" else ["image", "text"]
        must["joint"], may["joint"] = (torch.cat([m[s] for s in order], 1) for m in (must, may))
    # What a joint stream protects in the space of its own positions is policy; the streams before it must protect it too.
    may["joint"] |= must["joint"]
    must["joint"] = torch.zeros_like(must["joint"])
    return must, may


def survivors(subject: Subject, given: Tensors) -> Kept:
    """Which tokens the last forward left, by its own record."""
    design, record = subject.design, subject.pruned.kept_tokens()
    batch, sizes = len(given["pixels"]), lengths(design, given)
    after: dict[str, list[Tensor]] = {}
    for stream, depth in subject.depth.items():
        names = [subject.sites.get((stream, layer)) for layer in range(depth)]
        if not any(names):
            continue
        now = torch.ones(batch, sizes[stream], dtype=torch.bool)
        after[stream] = []
        for name in names:
            now = now if name is None else record[name]
            after[stream].append(now)
    text, image = sizes["text"], sizes["image"]
    first = design.order == "text_first"
    parts = {
        "joint_text": ("joint", slice(0, text) if first else slice(image, image + text)),
        "joint_image": ("joint", slice(text, text + image) if first else slice(0, image)),
    }
    return Kept(after, parts, _starts(design, after, batch, sizes))


def _starts(design: Design, after: dict[str, list[Tensor]], batch: int, sizes: dict[str, int]) -> Tensors:
    """What a stream made of pruned ones starts with, if tokens dropped before do not come back."""
    if design.arrangement != "joint_after_towers" or "joint" not in after:
        return {}
    order = ["text", "image"] if design.order == "text_first" else ["image", "text"]
    ends = [after[s][-1] if s in after else torch.ones(batch, sizes[s], dtype=torch.bool) for s in order]
    start = torch.cat(ends, 1)
    return {} if bool((after["joint"][0] & ~start).any()) else {"joint": start}


def dense_equals_original(subject: Subject) -> None:
    """Temperature 0 reproduces the original, at other sizes too, and so do its gradients."""
    with subject.set(0.0) as pruned:
        for batch, length in SIZES:
            given = inputs(subject.design, batch, length, 1)
            with torch.no_grad():
                same(leaves(subject.model(**given)), leaves(pruned(**given)), f"temperature 0, {batch} x {length}")
        if _blind(subject.design):
            return
        given = inputs(subject.design, 2, 6, 2)
        wanted = gradients(subject.model, lambda: leaves(subject.model(**given)))
        found = gradients(pruned, lambda: leaves(pruned(**given)))
    assert wanted.keys() == found.keys(), f"gradients of {sorted(wanted.keys() ^ found.keys())}"
    worst = max(float(g.abs().amax()) for g in wanted.values())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).abs().amax())
        assert error < TOLERANCE * worst, f"the gradient of {name} is off by {error:.1e}"


def _blind(design: Design) -> bool:
    """Whether some queries see no key: torch's fused attention has its own idea of the gradient of their even softmax."""
    pairs = "additive_pairs" in (design.text.mask, design.fusion.mask) and design.padding != "none"
    return pairs or (design.padding == "left" and design.causal)


@torch.no_grad()
def pruned_equals_masked_original(subject: Subject) -> None:
    """With forced survivors and no merging, the result is the original's in which dropped tokens are hidden."""
    design = subject.design
    for seed, batch, length, share in ((3, 3, 7, 0.6), (4, 2, 9, 0.3), (5, 1, 6, 0.8)):
        given = inputs(design, batch, length, seed)
        chance = torch.Generator().manual_seed(seed)
        sizes = lengths(subject.design, given)
        forced = {}
        for (stream, _), name in subject.sites.items():
            forced[name] = torch.rand(batch, sizes[stream], generator=chance) < share
            # A mean over no tokens, or no patches, is nothing that a model could do.
            second = sizes["text" if subject.design.order == "text_first" else "image"]
            forced[name][:, [1, 4, *((second + 1, second + 4) if stream == "joint" else ())]] = True
        with subject.set(1.0, forced=forced, merge=False) as pruned:
            found = leaves(pruned(**given))
            kept = survivors(subject, given)
        _as_wanted(subject, given, kept, forced)
        wanted = masked_outputs(subject.model, given, kept)
        if subject.pruned.madtp.report.capture == "regions" and not _agree(wanted, found):
            wanted = masked_outputs(subject.model, given, replace(kept, given_back=True))
        if design.arrangement in ("joint", "joint_after_towers") and not _agree(wanted, found):
            # A part cut out of a joint stream may have been given its dropped tokens back before it is pooled.
            wanted = masked_outputs(subject.model, given, replace(kept, pooled=False))
        same(wanted, found, f"forced survivors, {batch} x {length}")


def _agree(wanted: Tensors, found: Tensors) -> bool:
    return all(gap(value, found[name]) < TOLERANCE for name, value in wanted.items())


def _as_wanted(subject: Subject, given: Tensors, kept: Kept, forced: Tensors) -> None:
    must, may = protected(subject.design, given)
    for stream, layers in kept.after.items():
        if stream == "joint" or (stream == "text" and subject.design.arrangement == "scattered"):
            continue  # which segments are pruned, and what is protected in them, is policy
        before = torch.ones_like(layers[0])
        for layer, now in enumerate(layers):
            name = subject.sites.get((stream, layer))
            if name is not None:
                wanted = before & ((forced[name] & valid(stream, given)) | must[stream])
                allowed = before & (forced[name] | must[stream] | may[stream])
                assert not bool((wanted & ~now).any()), f"{name} dropped a token that it had to keep"
                assert not bool((now & ~allowed).any()), f"{name} kept a token that it had to drop"
            before = now


def valid(stream: str, given: Tensors) -> Tensor:
    """Which tokens [B, N] of a stream are not padding; all where that is not known."""
    if stream == "text" and "attention_mask" in given:
        return given["attention_mask"].bool()
    if stream == "joint" and "attention_mask" in given:
        seen = given["attention_mask"].bool()
        # Padding may lie on either side; a joint stream is checked for tokens that stand for sure.
        return torch.zeros(len(seen), 1, dtype=torch.bool)
    return torch.ones(1, 1, dtype=torch.bool)


@torch.no_grad()
def batch_mates_do_not_matter(subject: Subject) -> None:
    """A sample's tokens and outputs depend neither on the others nor on their order."""
    for temperature, merge, contrasts in ((1.0, True, (1, 1, 1)), (6.0, False, (1, 1, 1)), (1.0, True, (0.03, 1, 10))):
        # Images of different contrast: some samples lose tokens at sites where others lose none.
        given = _with_contrasts(inputs(subject.design, 3, 7, 6), contrasts)
        with subject.set(temperature, merge=merge) as pruned:
            together, kept = leaves(pruned(**given)), pruned.kept_tokens()
            order = torch.tensor([2, 0, 1])
            permuted = leaves(pruned(**{n: v[order] for n, v in given.items()}))
            same({n: v[order] for n, v in together.items()}, permuted, "a permuted batch", MERGED)
            for row in range(3):
                alone = leaves(pruned(**{n: v[row : row + 1] for n, v in given.items()}))
                for name, mask in pruned.kept_tokens().items():
                    assert torch.equal(mask, kept[name][row : row + 1]), f"{name} keeps other tokens of a sample alone"
                same({n: v[row : row + 1] for n, v in together.items()}, alone, f"sample {row} alone", MERGED)


def _with_contrasts(given: Tensors, contrasts: Sequence[float]) -> Tensors:
    return given | {"pixels": given["pixels"] * torch.tensor(contrasts, dtype=torch.float64)[:, None, None, None]}


@torch.no_grad()
def protected_tokens_survive(subject: Subject) -> None:
    """Under any pressure readouts survive, counts never rise, and the minimum stays."""
    given = inputs(subject.design, 4, 8, 7)
    must, _ = protected(subject.design, given)
    for temperature, least in ((2.0, 1), (1e4, 2)):
        with subject.set(temperature, gain=temperature, min_tokens=least) as pruned:
            for name, value in leaves(pruned(**given)).items():
                assert bool(torch.isfinite(value).all()), f"the output {name} is not finite"
            kept, counts = survivors(subject, given), pruned.token_counts()
        for stream, layers in kept.after.items():
            before = torch.ones_like(layers[0])
            fewest: Tensor | None = None
            for layer, now in enumerate(layers):
                assert bool(now[must[stream] & before].all()), f"{stream} lost a protected token"
                assert not bool((now & ~before).any()), f"{stream} got tokens back"
                count = counts.get(subject.sites.get((stream, layer), ""))
                if count is not None:
                    assert fewest is None or bool((count <= fewest).all()), f"counts of {stream} rise"
                    assert bool((count >= 1).all()), f"{stream} has no token left"
                    fewest = count
                before = now


def gradients_reach_everything(subject: Subject) -> None:
    """While pruning, parameters that had a gradient still have one, and alignment tokens get one."""
    given = inputs(subject.design, 3, 7, 8)
    model, pruned = subject.model, subject.pruned
    wanted = {n for n, g in gradients(model, lambda: leaves(model(**given))).items() if bool(g.any())}
    with subject.set(1.0):
        found = gradients(pruned, lambda: leaves(pruned(**given)))
        modalities = {site.modality for site in pruned.report.sites}
        lost = {n for n in wanted if n not in found}
        assert not lost, f"no gradient for {sorted(lost)}"
        assert any(n.startswith("madtp.alignment") for n in found), "no gradient for the alignment tokens"
        if {"image", "text"} <= modalities:
            pruned(**given)
            assert torch.isfinite(pruned.alignment_loss())


def train_and_eval_behave(subject: Subject) -> None:
    """Training mode runs and trains; back in eval mode the result is as before."""
    given = inputs(subject.design, 3, 7, 9)
    with subject.set(0.0) as pruned:
        with torch.no_grad():
            calm = leaves(pruned(**given))
        pruned.train()
        try:
            assert gradients(pruned, lambda: leaves(pruned(**given))), "training gives no gradient"
        finally:
            pruned.eval()
        with torch.no_grad():
            same(calm, leaves(pruned(**given)), "eval mode after training")


def state_dict_keeps_keys(subject: Subject) -> None:
    """Every key of the original, and further ones under one prefix."""
    before, after = subject.model.state_dict().keys(), subject.pruned.state_dict().keys()
    assert before <= after, f"lost keys {sorted(before - after)}"
    assert all(n.startswith("madtp.") for n in after - before)


@torch.no_grad()
def save_and_load_round_trip(subject: Subject) -> None:
    """A saved model, loaded onto a fresh one, computes the same."""
    given = inputs(subject.design, 2, 6, 10)
    with tempfile.TemporaryDirectory() as folder:
        madtp.save(subject.pruned, folder)
        loaded = madtp.load(folder, build(subject.design))
    for name, value in leaves(subject.pruned(**given)).items():
        assert torch.equal(value, leaves(loaded(**given))[name]), f"{name} differs after save and load"


def same(wanted: Tensors, found: Tensors, where: str, tolerance: float = TOLERANCE) -> None:
    """Raise unless two sets of outputs agree."""
    assert wanted.keys() == found.keys(), f"{where}: outputs {sorted(found)} instead of {sorted(wanted)}"
    for name, value in wanted.items():
        error = gap(value, found[name])
        assert error < tolerance, f"{where}: the output {name!r} is off by {error:.1e} of its scale"


CHECKS: tuple[tuple[Callable[[Subject], None], int], ...] = (
    (dense_equals_original, 1),
    (pruned_equals_masked_original, 1),
    (batch_mates_do_not_matter, 1),
    (protected_tokens_survive, 1),
    (gradients_reach_everything, 1),
    (state_dict_keeps_keys, 1),
    (train_and_eval_behave, 12),
    (save_and_load_round_trip, 13),
)
