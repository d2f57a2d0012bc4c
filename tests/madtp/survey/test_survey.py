"""The survey: outcomes of models of every kind, processes within limits, resumable files, and what the tables say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import survey_models
import torch
from detection_hosts import Detector, detector
from torch import Tensor, nn
from typer.testing import CliRunner

from madtp.cli.app import app
from madtp.errors import CaptureError, DataError
from madtp.survey import OUTCOMES, Record, RefusalRecord, examination, examine
from madtp.survey.attention_calls import AttentionCalls, traits
from madtp.survey.outputs import batch_size, output_tensors, relative_error, repeat_samples, take_sample
from madtp.survey.record import with_outcome
from madtp.survey.runner import Limits, load, run, save
from madtp.survey.surveys import REWRITES
from madtp.survey.tables import denominator, generalised, markdown, reasons, summary, table_row


def record_of(name: str) -> Record:
    """The record of one of the test's models, made in this process."""
    return examine(name, survey_models)


def test_a_transformer_is_rewritten_and_every_invariant_is_measured() -> None:
    record = record_of("vit")
    assert record.outcome == "rewritten", record.failure
    assert record.blocks == {"pre-norm self": 2}
    assert (record.streams, record.pruned, record.sites) == (1, 1, 2)
    assert record.identity is not None
    assert record.identity < 1e-5
    assert record.independence is not None
    assert record.independence < 1e-3
    assert record.reduction is not None
    assert record.reduction > 0.2
    assert record.trains is True
    assert record.seconds >= record.rewrite_seconds > 0


def test_what_a_model_draws_at_random_is_drawn_alike() -> None:
    record = record_of("shuffled")
    assert record.outcome == "rewritten", record.failure
    assert record.identity is not None
    assert record.independence is not None


def test_a_tower_that_is_refused_as_a_whole_is_a_stream_that_is_not_pruned() -> None:
    record = record_of("half")
    assert (record.outcome, record.capture) == ("partly", "regions"), record.failure
    assert (record.streams, record.pruned, record.left, record.sites) == (2, 1, 0, 2)


def test_what_a_refused_model_holds_is_counted_by_its_regions() -> None:
    record = record_of("coupled")
    assert (record.outcome, record.capture) == ("rewritten", "regions"), record.failure
    assert (record.streams, record.pruned) == (1, 1)
    assert [refusal.block for refusal in record.refusals] == ["Coupled"]


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("conv", "no transformer", "no attention"),
        ("uncapturable", "refused", "Error"),
        ("missing", "unbuildable", "no such"),
    ],
)
def test_models_that_are_not_rewritten_say_why(name: str, outcome: str, reason: str) -> None:
    record = record_of(name)
    assert record.outcome == outcome
    assert reason in record.failure + "".join(refusal.reason for refusal in record.refusals)


def test_an_error_with_pruning_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from madtp.survey import examination

    probe = replace(examination.PROBES[0], measure=lambda model, pruned, inputs: 0.5)
    monkeypatch.setattr(examination, "PROBES", (probe,))
    record = record_of("vit")
    assert record.outcome == "wrong"
    assert "identity: 5.0e-01" in record.failure


def test_an_exception_in_a_probe_is_an_error_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from madtp.survey import examination

    def fails(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(examination, "PROBES", (examination.Probe("identity", fails, bool),))
    record = record_of("vit")
    assert record.outcome == "error"
    assert "IndexError: out of range (test_survey.py:" in record.failure


def test_a_probe_that_is_refused_leaves_a_part_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from madtp.survey import examination

    def refuses(*_: object) -> None:
        raise CaptureError("not in training mode")

    monkeypatch.setattr(examination, "PROBES", (*examination.PROBES[:2], examination.Probe("trains", refuses, bool)))
    record = record_of("vit")
    assert record.outcome == "partly"
    assert record.refusals[-1] == RefusalRecord("trains", "CaptureError: not in training mode")


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "rewritten"),
        ({"refusals": (RefusalRecord("head", "no residual add"),)}, "rewritten"),
        ({"refusals": (RefusalRecord("blocks.0", "a"), RefusalRecord("blocks.1", "b"))}, "partly"),
        ({"refusals": (RefusalRecord("head", "no residual add"),) * 4}, "rewritten"),
        ({"refusals": (RefusalRecord("", "no residual add"),) * 2}, "partly"),
        ({"refusals": (RefusalRecord("trains", "cannot be captured"),)}, "partly"),
        ({"pruned": 1}, "partly"),
        ({"reduction": -0.1}, "partly"),
        ({"reduction": None}, "partly"),
    ],
)
def test_what_is_only_half_done_is_not_called_rewritten(changes: dict[str, Any], outcome: str) -> None:
    done = Record("a", "rewritten", streams=2, pruned=2, sites=2, reduction=0.4)
    assert with_outcome(replace(done, **changes)).outcome == outcome


@pytest.mark.slow
def test_processes_end_within_their_limits_and_say_how() -> None:
    seen: list[str] = []
    records = run(["conv", "dies"], "survey_models", REWRITES, jobs=2, each=lambda record: seen.append(record.name))
    records += run(["endless"], "survey_models", REWRITES, limits=Limits(seconds=2))
    by_name = {record.name: record for record in records}
    assert sorted(seen) == ["conv", "dies"]
    assert by_name["conv"].outcome == "no transformer"
    assert by_name["dies"].failure == "the process ended with code 3"
    assert by_name["endless"].failure == "took more than 2 s"


def test_records_survive_the_file(tmp_path: Path) -> None:
    record = Record(
        "a", "partly", blocks={"self": 2}, refusals=(RefusalRecord("block", "reason", "help"),), identity=1e-7
    )
    save(tmp_path / "new" / "s.json", [record, Record("b", "error", trains=False)], REWRITES)
    assert load(tmp_path / "new" / "s.json", REWRITES)[0] == record
    assert load(tmp_path / "none.json", REWRITES) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "records": []}', '{"format": 1}'])
def test_a_file_that_is_no_survey_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DataError, match=r"s\.json"):
        load(tmp_path / "s.json", REWRITES)


RECORDS = [
    Record(
        "lib:A", "rewritten", blocks={"pre-norm self": 4}, streams=2, pruned=2, sites=4, identity=0.0, reduction=0.5
    ),
    Record(
        "lib:B", "refused", refusals=(RefusalRecord("", "CaptureError: BModel runs on the example inputs but fails"),)
    ),
    Record(
        "lib:C", "refused", refusals=(RefusalRecord("", "CaptureError: CModel runs on the example inputs but fails"),)
    ),
    Record("lib:D", "no transformer"),
    Record("lib:E", "unbuildable", failure="ImportError: needs | this"),
]


def test_the_denominator_is_what_could_be_built_and_holds_attention() -> None:
    assert [record.name for record in denominator(RECORDS)] == ["lib:A", "lib:B", "lib:C"]
    assert "1 of the 3 (33%) that could be built and hold attention." in summary(RECORDS)
    assert "0 of the 0 (0%)" in summary([])


def test_kinds_that_are_told_apart_have_denominators_of_their_own() -> None:
    kinds = [("windows", "hierarchy"), ("language",), ("windows",)]
    further = [Record(str(n), "refused", traits=found) for n, found in enumerate(kinds)]
    text = summary([*RECORDS, *further])
    assert (
        "1 of the 6 (17%) that could be built and hold attention, and 1 of the 5 (20%) that are more than a lang"
        in text
    )
    assert "and 1 of the 3 (33%) whose attention runs over all tokens at one resolution." in text
    page = markdown([*RECORDS, *further])
    assert "| windows | 2 | " in page
    assert "| language | 1 | " in page


@pytest.mark.parametrize(
    ("shapes", "inputs", "found"),
    [
        ([(2, 4, 16, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ()),
        ([(8, 4, 16, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ("windows",)),
        ([(8, 4, 16, 8)], {"pixels": torch.zeros(2, 4, 3, 8, 8)}, ()),
        ([(8, 4, 16, 8)], {"ids": torch.zeros(2, 4, 16, dtype=torch.long)}, ()),
        ([(8, 16, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ()),
        ([(2, 4, 64, 8), (2, 4, 16, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ("hierarchy",)),
        ([(2, 4, 65, 8), (2, 4, 17, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ("hierarchy",)),
        ([(2, 4, 64, 8), (2, 4, 16, 8)], {"pixels": torch.zeros(2, 3, 8, 8), "ids": torch.zeros(2, 16).long()}, ()),
        ([(2, 4, 64, 8), (2, 4, 1, 8)], {"pixels": torch.zeros(2, 3, 8, 8)}, ()),
    ],
)
def test_windows_and_hierarchies_are_told_by_what_attention_runs_over(
    shapes: list[tuple[int, ...]], inputs: dict[str, Tensor], found: tuple[str, ...]
) -> None:
    with AttentionCalls() as seen:
        for shape in shapes:
            x = torch.zeros(shape)
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert seen.count == len(shapes)
    assert traits(seen, inputs) == found


def test_a_language_model_is_told_and_one_beside_an_image_is_left_alone() -> None:
    assert record_of("language").traits == ("language",)
    record = record_of("beside")
    assert (record.outcome, record.traits) == ("left alone", ())
    assert record.refusals[0].by_policy


def test_records_of_older_surveys_are_read() -> None:
    old = Record("a", "refused").to_dict()
    del old["traits"]
    assert Record.from_dict(old).traits is None
    assert Record.from_dict(Record("a", "refused", traits=("windows",)).to_dict()).traits == ("windows",)


def test_reasons_that_differ_by_names_alone_count_as_one() -> None:
    texts = reasons(RECORDS)
    assert texts[0] == ("CaptureError: the model runs on the example inputs but fails", ["lib:B", "lib:C"])
    assert generalised("size 16 of 'x' at node_3") == "size n of '...' at node_n"
    assert len(generalised("a " * 500)) <= 160


def test_the_page_holds_every_row_and_outcome() -> None:
    page = markdown(RECORDS)
    for record in RECORDS:
        assert f"| {record.name} | {record.outcome} |" in page
    for outcome in OUTCOMES:
        assert f"| {outcome} | " in page
    assert "needs \\| this" in page
    assert "measured today" in markdown(RECORDS, "measured today")
    assert table_row(RECORDS[0])[3:6] == ("4 pre-norm self", "4", "2/2")


def test_outputs_are_compared_by_the_scale_of_the_expected_one() -> None:
    one = {"a": torch.tensor([1.0, -10.0])}
    assert relative_error(one, {"a": torch.tensor([1.0, -9.0])}) == pytest.approx(0.1)
    assert relative_error(one, {}) == float("inf")
    assert relative_error(one, {"a": torch.tensor([1.0, float("nan")])}) == float("inf")
    assert relative_error({"a": torch.tensor([1])}, {"a": torch.tensor([2])}) == float("inf")
    masked = {"a": torch.tensor([1.0, float("-inf")])}
    assert relative_error(masked, masked) == 0.0


def test_batches_are_cut_and_repeated_by_rows() -> None:
    inputs = {"x": torch.arange(4).view(2, 2), "flag": True, "scale": torch.tensor(2.0)}
    assert batch_size(inputs) == 2
    assert take_sample(inputs, 1, 2)["x"].tolist() == [[2, 3]]
    more = repeat_samples(inputs, 3)
    assert more is not None
    assert more["x"][:, 0].tolist() == [0, 2, 0]
    assert more["flag"] is True
    assert repeat_samples({"x": torch.ones(2), "y": torch.ones(3)}, 3) is None


def test_output_tensors_have_paths() -> None:
    assert list(output_tensors({"a": [torch.ones(1), {"b": torch.ones(1)}], "c": None})) == ["a.0", "a.1.b"]


def test_the_command_lists_names_and_refuses_unknown_ones() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["survey", "--list", "hf:CLIP*"])
    assert "hf:CLIPModel\n" in listed.stdout
    assert "timm" not in listed.stdout
    unknown = runner.invoke(app, ["survey", "hf:Nothing"])
    assert unknown.exit_code == 1
    assert "matches" in unknown.output


@pytest.mark.slow
def test_the_command_writes_both_files_and_resumes(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    command = ["survey", "timm:test_vit", *files]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "1 of the 1 (100%)" in " ".join(first.output.split())
    record = load(tmp_path / "s.json", REWRITES)[0]
    save(tmp_path / "s.json", [replace(record, outcome="refused")], REWRITES)
    again = CliRunner().invoke(app, command)
    assert "0 of the 1 (0%)" in " ".join(again.output.split())
    assert "timm:test_vit | refused" in (tmp_path / "s.md").read_text()


def test_what_differs_in_single_precision_is_measured_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def differing(model: nn.Module, pruned: nn.Module, inputs: Mapping[str, Tensor]) -> float:
        (weight, _), (given,) = model.parameters(), inputs.values()
        seen.append(weight.dtype)
        assert given.dtype == weight.dtype == next(pruned.parameters()).dtype
        return 0.5 if weight.dtype == torch.float32 else 1e-15

    monkeypatch.setattr(examination, "_single_sample_error", differing)
    model = nn.Linear(2, 2)
    assert examination.independence(model, model, {"x": torch.zeros(2, 2)}) == 1e-15  # type: ignore[arg-type]
    assert seen == [torch.float32, torch.float64]
    assert model.weight.dtype == torch.float32


@pytest.mark.slow
def test_what_a_ranking_exchanges_is_no_error() -> None:
    found = examine("detector", survey_models.Made(*detector(Detector)))
    assert found.outcome == "rewritten"
    assert found.identity is not None
    assert found.identity < 1e-10


def test_training_at_a_smaller_rate_counts_where_larger_steps_overshoot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_falls", lambda pruned, inputs, rate: rate < 1e-3)
    model = nn.Linear(2, 2)
    assert examination.trains(model, model, {"input": torch.ones(1, 2)}) is True  # type: ignore[arg-type]
