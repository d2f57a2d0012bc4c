"""The evaluation loop: stages, parts that are kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_workers
from torch import Tensor, nn

from madtp.errors import CheckpointError, ConfigError
from madtp.evaluation import PartialResults, Result, evaluate
from madtp.processes import current


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@dataclass
class Doubled:
    """First stage: twice the place of each sample. Fails at a batch, as often as told."""

    name: str = "doubled"
    fail_at: int = -1
    ran: list[range] = field(default_factory=list)

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        assert not earlier
        if samples.start == self.fail_at:
            raise KeyboardInterrupt
        self.ran.append(samples)
        return [{"value": value} for value in model(torch.tensor(list(samples))).tolist()]


@dataclass
class Shares:
    """Second stage: the share of each value in all values of the first."""

    name: str = "shares"

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        del model
        total = sum(result["value"] for result in earlier["doubled"])
        return [{"share": earlier["doubled"][place]["value"] / total} for place in samples]


@dataclass
class FakeTask:
    stages: tuple[Any, ...]
    name: str = "fake"
    ids: tuple[str, ...] = ("a", "b", "c", "d", "e")

    def inputs(self, samples: range) -> dict[str, Any]:
        return {"x": torch.tensor(list(samples))}

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        return {"total": sum(result["share"] for result in results["shares"])}


def test_a_later_stage_sees_all_results_of_the_earlier_one() -> None:
    done: list[int] = []
    found = evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2, advance=done.append)
    assert found.metrics == {"total": 1.0}
    assert found.samples[3] == {"id": "d", "doubled": {"value": 6}, "shares": {"share": 0.3}}
    assert done == [2, 2, 1, 2, 2, 1]
    assert found.macs is None
    assert found.reduction is None


@pytest.mark.parametrize("fail_at", [0, 2, 4])
def test_an_interrupted_evaluation_goes_on_with_the_same_result(tmp_path: Path, fail_at: int) -> None:
    whole = evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            Doubling(),
            FakeTask((Doubled(fail_at=fail_at), Shares())),
            batch_size=2,
            partial_results=PartialResults(folder, {"a": 1}),
        )
    again = Doubled()
    found = evaluate(
        Doubling(), FakeTask((again, Shares())), batch_size=2, partial_results=PartialResults(folder, {"a": 1})
    )
    assert [samples.start for samples in again.ran] == list(range(fail_at, 5, 2))
    assert (found.metrics, found.samples) == (whole.metrics, whole.samples)


def shared(folder: Path) -> dict[str, Any]:
    """In workers: without parts, and going on from those that lie in the folder."""
    stages, own, done = (Doubled(), Shares()), current(), []
    plain = evaluate(Doubling(), FakeTask(stages), batch_size=2, processes=own, advance=done.append)
    again = Doubled()
    parts = PartialResults(folder / "parts", {"a": 1})
    found = evaluate(Doubling(), FakeTask((again, Shares())), batch_size=2, processes=own, partial_results=parts)
    alike = (found.metrics, found.samples) == (plain.metrics, plain.samples)
    ran = [[places.start for places in first.ran] for first in (stages[0], again)]
    return {"metrics": plain.metrics, "samples": list(plain.samples), "alike": alike, "ran": ran, "done": done}


@pytest.mark.slow
def test_processes_share_batches_out_and_find_what_one_finds(tmp_path: Path) -> None:
    whole = evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2)
    parts = PartialResults(tmp_path / "parts", {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        evaluate(Doubling(), FakeTask((Doubled(fail_at=2), Shares())), batch_size=2, partial_results=parts)
    first, second = run_workers(shared, tmp_path)
    for found in (first, second):
        assert (found["metrics"], tuple(found["samples"])) == (whole.metrics, whole.samples)
        assert found["alike"]
    assert first["ran"] == [[0, 4], [4]]  # of the batches at 0, 2 and 4; that at 0 was done before
    assert second["ran"] == [[2], [2]]
    assert (first["done"], second["done"]) == ([2, 1, 2, 1], [2, 2])


def test_parts_of_another_evaluation_are_not_mixed_in(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path / "p", {"model": "a", "sizes": (1, 2)})
    parts.put("x", {"results": []})
    assert PartialResults(tmp_path / "p", {"model": "a", "sizes": [1, 2]}).get("x") == {"results": []}
    with pytest.raises(CheckpointError, match="another evaluation: model is 'a' there and 'b' here; remove it"):
        PartialResults(tmp_path / "p", {"model": "b", "sizes": (1, 2)})
    parts.remove()
    assert not (tmp_path / "p").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a folder of an evaluation"):
        PartialResults(tmp_path, {})


@pytest.mark.parametrize("draft", [".setup.json.4711", ".setup.0123456789ab.json", ".setup.json"])
def test_a_kill_in_the_first_write_leaves_a_folder_to_go_on_with(tmp_path: Path, draft: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / draft).write_text('{"half')
    found = evaluate(
        Doubling(),
        FakeTask((Doubled(), Shares())),
        batch_size=2,
        partial_results=PartialResults(tmp_path / "p", {"a": 1}),
    )
    assert found.metrics == {"total": 1.0}


def test_a_kill_while_the_folder_is_removed_leaves_one_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, left = Path.unlink, [0]

    def killed(self: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        own(self, missing_ok)

    for count in range(4):
        parts = PartialResults(tmp_path / "p", {"a": 1})
        for name in ("x", "y", "z"):
            parts.put(name, {})
        left[0] = count
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.remove()
        PartialResults(tmp_path / "p", {"a": 1}).remove()
        assert not (tmp_path / "p").exists()


def interrupted(folder: Path, task: FakeTask) -> list[Path]:
    """Stop after two batches; return their files."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(Doubling(), task, batch_size=2, partial_results=PartialResults(folder, {"a": 1}))
    return sorted(folder.glob("doubled-*.json"))


def swap(files: list[Path]) -> None:
    first, second = (file.read_text() for file in files)
    files[0].write_text(second)
    files[1].write_text(first)


def copy_from_another_evaluation(files: list[Path]) -> None:
    other = PartialResults(files[0].parent.parent / "other", {"a": 2})
    other.put("doubled-00000000", json.loads(files[0].read_text())["content"])
    files[0].write_text(other.path("doubled-00000000").read_text())


def change_a_digit(files: list[Path]) -> None:
    text = files[1].read_text()
    assert text.count('"value": 4') == 1
    files[1].write_text(text.replace('"value": 4', '"value": 5'))


def leave_the_content_alone(files: list[Path]) -> None:
    files[0].write_text(json.dumps(json.loads(files[0].read_text())["content"]))


def nest(files: list[Path]) -> None:
    files[0].write_text("[" * 100_000)


HARMS = (swap, copy_from_another_evaluation, change_a_digit, leave_the_content_alone, nest)


@pytest.mark.parametrize("harm", HARMS)
def test_parts_that_were_swapped_or_changed_are_told(tmp_path: Path, harm: Any) -> None:
    harm(interrupted(tmp_path / "p", FakeTask((Doubled(fail_at=4), Shares()))))
    parts = PartialResults(tmp_path / "p", {"a": 1})
    with pytest.raises(
        CheckpointError, match=r"doubled-0000000[02]\.json .*; remove it, and its batch is evaluated again"
    ):
        evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2, partial_results=parts)


def test_parts_of_other_samples_are_told(tmp_path: Path) -> None:
    interrupted(tmp_path / "p", FakeTask((Doubled(fail_at=4), Shares())))
    parts = PartialResults(tmp_path / "p", {"a": 1})
    for ids in (("a", "x", "c", "d", "e"), ("b", "a", "c", "d", "e"), ("a",)):
        with pytest.raises(CheckpointError, match=r"doubled-00000000\.json holds results of other samples"):
            evaluate(Doubling(), FakeTask((Doubled(), Shares()), ids=ids), batch_size=2, partial_results=parts)


CALL = {"samples": 2, "macs": 1.0, "dense_macs": 2.0, "tokens": {"site": [3, 4]}}
GOOD = {"ids": ["a", "b"], "results": [{"value": 0}, {"value": 2}], "calls": [CALL], "seconds": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"results": [{"value": 0}]},
        {"results": {"value": 0}},
        {"results": [1, 2]},
        {"seconds": "long"},
        {"seconds": -1},
        {"seconds": 10**400},
        {"calls": None},
        {"calls": [{}]},
        {"calls": [{**CALL, "macs": "many"}]},
        {"calls": [{**CALL, "tokens": {"site": [3]}}]},
        {"calls": [{**CALL, "tokens": [3]}]},
        {"calls": [{**CALL, "more": 1}]},
    ],
)
def test_malformed_parts_are_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = PartialResults(tmp_path / "p", {})
    parts.put("doubled-00000000", GOOD)
    whole = evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2, partial_results=parts)
    assert whole.samples[1]["tokens"] == {"doubled": {"site": 4}}
    parts.put("doubled-00000000", {**GOOD, **changes})
    with pytest.raises(CheckpointError, match=r"doubled-00000000\.json does not hold the results of a batch"):
        evaluate(Doubling(), FakeTask((Doubled(), Shares())), batch_size=2, partial_results=parts)


def test_a_damaged_setup_says_to_remove_the_folder(tmp_path: Path) -> None:
    PartialResults(tmp_path / "p", {}).put("x", {})
    (tmp_path / "p" / "setup.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"setup\.json is damaged .*; remove {tmp_path / 'p'} to evaluate all"):
        PartialResults(tmp_path / "p", {})


@pytest.mark.parametrize("content", ["{", "[]", '{"a":' * 200 + "1" + "}" * 200])
def test_a_damaged_part_is_named(tmp_path: Path, content: str) -> None:
    parts = PartialResults(tmp_path / "p", {})
    parts.put("x", {})
    (tmp_path / "p" / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"x\.json is damaged"):
        parts.get("x")


def test_a_folder_in_the_parts_stays_and_stops_nothing(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path / "p", {})
    parts.put("x", {})
    (tmp_path / "p" / "own").mkdir()
    parts.remove()
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["own"]


def test_nan_is_no_result_and_leaves_no_file(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path / "p", {})
    with pytest.raises(CheckpointError, match="would hold NaN or an infinite number"):
        parts.put("x", {"value": float("nan")})
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["setup.json"]
    assert json.loads((tmp_path / "p" / "setup.json").read_text()) == {}


def test_a_batch_holds_at_least_one_sample() -> None:
    with pytest.raises(ConfigError, match="batch size is 0"):
        evaluate(Doubling(), FakeTask((Doubled(),)), batch_size=0)
