"""The picture of the demo for the documentation: two of its scenes, with few colours, so that the file is small."""

from __future__ import annotations

from pathlib import Path

SCENES, SEED, SHOWN = 64, 0, 2
COLOURS, DPI = 128, 100


def write_demo(path: Path) -> Path:
    """Draw what the shipped models keep of two held-out scenes, and return the path."""
    from PIL import Image

    from madtp.demo.models import load_models
    from madtp.demo.run import choose_examples, explain
    from madtp.pictures import draw_figure
    from zoo.scenes import SceneDataset, collate

    dataset = SceneDataset("test", SCENES, seed=SEED)
    items = choose_examples([dataset[number] for number in range(SCENES)], SHOWN, SEED)
    draw_figure(explain(load_models(), items, collate(items)), path, dpi=DPI)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path
