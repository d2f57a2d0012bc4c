"""Diagrams of the documentation that need no measurement: the pipeline, guidance, a decision, packed batches."""

from __future__ import annotations

from svg import NOTE, Drawing

STAGES = (
    ("capture", "torch.export turns forward into a graph"),
    ("canonicalise", "one spelling of attention, norms and masks"),
    ("detect", "streams, blocks, modalities, readouts"),
    ("plan", "what is pruned, what is refused and why"),
    ("insert", "guidance and pruning; masks and positions follow"),
    ("lower", "MACs priced, operations run on packed rows"),
    ("verify", "pruning off: equal; pruning on: no trace"),
)


def pipeline() -> Drawing:
    """The stages of a rewrite below each other, between the model and the pruned model."""
    row, left, width = 46, 14, 150
    top = 66
    drawing = Drawing(530, top + row * len(STAGES) + 70, "The stages of a rewrite")
    drawing.box(left, 10, width, 36, "your model", fill="image", bold=True)
    drawing.text(left + width + 16, 33, "any nn.Module, not changed", anchor="start")
    for number, (name, words) in enumerate(STAGES):
        y = top + number * row
        drawing.arrow((left + width / 2, y - (20 if number == 0 else 12)), (left + width / 2, y))
        drawing.box(left, y, width, 34, name, fill="plain")
        drawing.text(left + width + 16, y + 22, words, anchor="start")
    y = top + row * len(STAGES)
    drawing.arrow((left + width / 2, y - 12), (left + width / 2, y))
    drawing.box(left, y, width, 36, "pruned model", fill="madtp", bold=True)
    drawing.text(left + width + 16, y + 16, "the same class, signature and outputs,", anchor="start")
    drawing.text(left + width + 16, y + 34, "with a child madtp and a report", anchor="start")
    return drawing


def guidance() -> Drawing:
    """Tokens of both towers are compared with one set of alignment tokens."""
    drawing = Drawing(560, 330, "Image and text tokens are scored with the same alignment tokens")
    for x, fill, name in ((20, "image", "image tokens"), (420, "text", "text tokens")):
        drawing.text(x + 60, 24, name, size=14)
        for number in range(5):
            drawing.box(x, 38 + 36 * number, 120, 28, f"x{number + 1}", fill=fill)
    drawing.text(280, 24, "alignment tokens E", size=14)
    for number in range(3):
        drawing.box(220, 74 + 36 * number, 120, 28, f"e{number + 1}", fill="madtp")
    for y in (52, 124, 196):
        drawing.arrow((140, y), (220, 88 + (y - 52) / 2))
        drawing.arrow((420, y), (340, 88 + (y - 52) / 2))
    drawing.text(180, 50, "G = q Eᵀ", size=12)
    drawing.text(380, 50, "G = q Eᵀ", size=12)
    drawing.arrow((80, 220), (80, 262))
    drawing.arrow((480, 220), (480, 262))
    drawing.box(20, 262, 150, 30, "pooled by G", fill="image")
    drawing.box(390, 262, 150, 30, "pooled by G", fill="text")
    drawing.arrow((210, 277), (170, 277))
    drawing.arrow((350, 277), (390, 277))
    drawing.box(210, 256, 140, 42, "alignment loss\n1 − cos", fill="madtp", size=13)
    drawing.text(280, 320, "the loss draws the two together, so E learns from both modalities", size=12)
    return drawing


def packed() -> Drawing:
    """A batch of three samples in front of a site, padded behind it, and packed behind it."""
    drawing = Drawing(560, 330, "A batch before a site, padded and packed behind it")
    counts, tokens, side = (5, 2, 3), 6, 26
    fills = ("image", "text", "merged")
    drawing.text(100, 22, "before a site: [3, 6, C]", size=14)
    drawing.text(410, 22, "padded: [3, 5, C]", size=14)
    for sample, (count, fill) in enumerate(zip(counts, fills, strict=True)):
        y = 36 + sample * (side + 8)
        for token in range(tokens):
            drawing.box(14 + token * (side + 4), y, side, side, fill=fill)
        for token in range(max(counts)):
            if token < count:
                drawing.box(336 + token * (side + 4), y, side, side, fill=fill)
            else:
                drawing.frame(336 + token * (side + 4), y, side, side)
    drawing.arrow((206, 85), (322, 85))
    drawing.text(264, 76, "prune", size=13)
    drawing.text(410, 156, "5 of 15 places are wasted", size=12)
    drawing.arrow((100, 146), (100, 196))
    drawing.text(280, 202, "packed: [1, 10, C]", size=14)
    x = 100.0
    for count, fill in zip(counts, fills, strict=True):
        start = x
        for _ in range(count):
            drawing.box(x, 214, side, side, fill=fill)
            x += side + 4
        drawing.line((start, 250), (x - 4, 250), colour=NOTE)
        drawing.text((start + x - 4) / 2, 268, "attention", size=12)
        x += 14
    drawing.line((100, 288), (x - 18, 288), colour=NOTE)
    drawing.text((100 + x - 18) / 2, 308, "linear layers, norms and activations: all rows at once", size=12)
    return drawing
