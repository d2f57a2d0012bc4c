"""A pruned model as an ONNX file, run by ONNX Runtime without madtp and without torch.

Shows   fixing the token counts, exporting, and reading the file.
Needs   pip install 'madtp[onnx]'
Prints  how far the file is off, how often it finds the caption that the dense model finds, and its time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.utils.benchmark import Timer

import madtp
import zoo
from zoo.clip.config import MINI
from zoo.tasks.encode_text import clip_texts
from zoo.transforms.images import for_model

BATCH = 16


def pairs(split: str) -> dict[str, torch.Tensor]:
    """Return pictures and captions; all captions have the same length, as a file takes inputs of fixed sizes."""
    data = zoo.data("scenes_captions", split=split, limit=BATCH, transform=for_model("clip_mini"))
    ids = clip_texts(MINI, None)([data[index].record.captions[0] for index in range(BATCH)])
    ids = torch.nn.functional.pad(ids, (0, MINI.positions - ids.shape[1]))
    return {"images": torch.cat([data[index].images for index in range(BATCH)]), "input_ids": ids}


def milliseconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call, which other work on the machine does not change much."""
    return 1000 * Timer("call()", globals={"call": call}, timer=time.process_time).timeit(3).mean


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    test, calibration = pairs("test"), pairs("val")
    dense = zoo.create("clip_mini", checkpoint="dense")
    # For a model of your own: pruned = madtp.rewrite(model, batch), madtp.calibrate(pruned, batches, reduction=0.5), training.
    pruned = zoo.create("clip_mini", checkpoint="pruned-80")
    madtp.freeze(pruned, [calibration])  # every sample keeps as many tokens; which ones still depends on the sample

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.onnx")
        written = madtp.export(pruned, path, test)  # compares the file with the model
        print(f"wrote {path.name}, {written.megabytes:.1f} MB, off by {written.difference:.1e} at most")

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {name: value.numpy() for name, value in test.items()}
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        found = (outputs["image_features"] @ outputs["text_features"].T).argmax(1)
        file_time = milliseconds(lambda: session.run(None, inputs))

    output = dense(**test)
    wanted = (output.image_features @ output.text_features.T).argmax(1).numpy()
    print(f"the same caption as the dense model for {np.mean(found == wanted):.0%} of {BATCH} pictures")
    times = {"dense, torch": milliseconds(lambda: dense(**test)), "pruned, torch": milliseconds(lambda: pruned(**test))}
    times["pruned, ONNX Runtime"] = file_time
    for name, time_taken in times.items():
        print(f"  {name:<22}{time_taken:7.1f} ms a batch, x{time_taken / times['dense, torch']:.2f}")


if __name__ == "__main__":
    main()
