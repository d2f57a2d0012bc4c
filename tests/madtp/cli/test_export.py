"""``madtp export``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from madtp.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.mark.slow
def test_a_shipped_model_becomes_a_file_and_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "caption.pt2"
    code, out, _ = run(
        capsys, "blip_caption_mini", "-k", "pruned-80", "-o", str(output), "--batch", "2", "--rounds", "1"
    )
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line and line.split()[0] in ("dense", "pt2")}
    assert rows.keys() == {"dense", "pt2"}
    assert "outputs equal those of the frozen model" in out
    args, inputs = torch.export.load(output).example_inputs
    assert args == ()
    assert len(inputs["images"]) == 2


def test_wrong_usage_is_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "clip_mini", "-o", str(tmp_path / "x.onnx"), "--format", "aoti")
    assert code == 1
    assert "ends in .pt2" in err.replace("\n", " ")
    code, _, err = run(capsys, "clip_mini", "-o", str(tmp_path / "x.pt2"), "--any-batch", "--batch", "1")
    assert code == 1
    assert "batch is 1" in err
    code, _, err = run(capsys, "no_such_model", "-o", str(tmp_path / "x.pt2"))
    assert code == 1
    assert "no_such_model" in err
    assert list(tmp_path.iterdir()) == []
