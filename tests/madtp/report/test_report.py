"""What ``print(pruned.madtp.report)`` says before and after a calibration, and that data and HTML say the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import small_vit

import madtp
from madtp.errors import DataError
from madtp.report import RefusalReport, RewriteReport, Savings, SiteReport, SiteTokens
from madtp.report.outline import amount
from madtp.report.text import WIDTH, bar

DEPTH = 2


@pytest.fixture(scope="module")
def fresh() -> RewriteReport:
    return small_vit.rewritten(DEPTH).madtp.report


@pytest.fixture(scope="module")
def calibrated() -> tuple[madtp.PrunedModel, RewriteReport]:
    pruned = small_vit.rewritten(DEPTH)
    batches = [(small_vit.images(8, 1),), (small_vit.images(8, 2),)]
    madtp.calibrate(pruned, batches, reduction=0.3, tolerance=0.05)
    return pruned, pruned.madtp.report


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_before_a_calibration_the_report_says_that_nothing_was_measured(fresh: RewriteReport) -> None:
    text = str(fresh)
    assert text.startswith("VisionTransformer (whole capture, ")
    assert "2 sites in 1 tower, 2 attention blocks in 1 stream, 0 refusals" in " ".join(text.split())
    assert "not measured yet; madtp.calibrate" in text
    assert "image: blocks.*" in text
    assert "2 of 2 blocks pruned" in text
    assert "65 tokens in the example" in text
    assert "tokens kept" not in text
    assert "█" not in text


def test_after_a_calibration_it_has_macs_tokens_and_parameters(
    calibrated: tuple[madtp.PrunedModel, RewriteReport],
) -> None:
    pruned, report = calibrated
    assert report.savings is not None
    text, saved = str(report), report.savings
    assert saved.reduction == pytest.approx(0.3, abs=0.05)
    assert f"{amount(saved.dense_macs)} dense, {amount(saved.macs)} pruned: {saved.reduction:.1%} fewer" in text
    assert "mean of 16 samples" in " ".join(text.split())
    assert f"gain {pruned.gain:.4g}" in text
    added = sum(p.numel() for p in pruned.madtp.parameters())
    total = sum(p.numel() for p in pruned.parameters())
    assert (report.parameters, report.added_parameters) == (total - added, added)
    assert f"pruning adds {amount(added)}" in text
    for tokens in saved.tokens:
        assert tokens.before == 65
        assert f"{tokens.kept:.1f}" in line_with(text, tokens.site)
        assert "█" in line_with(text, tokens.site)


def test_the_tokens_are_those_of_the_batches(calibrated: tuple[madtp.PrunedModel, RewriteReport]) -> None:
    pruned, report = calibrated
    assert report.savings is not None
    counts: dict[str, list[int]] = {}
    for seed in (1, 2):
        pruned(small_vit.images(8, seed))
        for site, kept in pruned.madtp.token_counts().items():
            counts.setdefault(site, []).extend(kept.tolist())
    assert {one.site: one.kept for one in report.savings.tokens} == {s: sum(c) / 16 for s, c in counts.items()}


def test_time_is_told_where_it_was_measured(calibrated: tuple[madtp.PrunedModel, RewriteReport]) -> None:
    report = copy.deepcopy(calibrated[1])
    assert " ms dense, " not in str(report)
    assert report.savings is not None
    report.savings = dataclasses.replace(report.savings, dense_seconds=0.2, seconds=0.15)
    assert "200 ms dense, 150 ms pruned: 25.0% less, for all 2 batches" in str(report)
    report.savings = dataclasses.replace(report.savings, seconds=0.25, batches=1)
    assert "25.0% more, for the batch" in str(report)


def long_report() -> RewriteReport:
    """Long names, notes and refusals, many tokens, and text that is markup."""
    path = "model.vision_tower.vision_model.encoder.very_long_name_of_layers.{}.self_attention_with_<b>name</b>"
    sites = [SiteReport(path.format(n), "image", "pre-norm self", n, 4096, 1_000_000, (0, 5)) for n in range(12)]
    return RewriteReport(
        model="Model<script>",
        capture="regions",
        sites=sites,
        refusals=[RefusalReport(f"{'text.' * 30}{n}", "softmax", "a & b " * 60, "more " * 40) for n in range(3)],
        blocks=[],
        streams=[],
        regions=("tower" * 40,),
        notes=["a note of many words " * 20, "<img src='https://example.org/x.png'>"],
        savings=Savings(
            setting="gain",
            value=1e-9,
            samples=10**6,
            batches=9,
            dense_macs=9.9e14,
            macs=1.2e15,
            deviation=0.5,
            tokens=tuple(SiteTokens(site.name, 1e6, 123456.7) for site in sites[1:]),
        ),
    )


def test_no_line_is_wider_than_a_hundred_columns(calibrated: tuple[madtp.PrunedModel, RewriteReport]) -> None:
    assert WIDTH == 100
    for report in (long_report(), calibrated[1]):
        assert max(map(len, str(report).splitlines())) <= 100


def test_refusals_with_one_reason_are_told_once_and_a_site_that_did_not_run_is_told() -> None:
    text = str(long_report())
    assert text.count("why: ") == 1
    assert "did not run" in text
    assert "21.2% more" in text


def test_data_goes_through_json_and_prints_the_same(
    fresh: RewriteReport, calibrated: tuple[madtp.PrunedModel, RewriteReport]
) -> None:
    for report in (fresh, calibrated[1], long_report()):
        again = RewriteReport.from_dict(json.loads(json.dumps(report.to_dict())))
        assert str(again) == str(report)
        assert again._repr_html_() == report._repr_html_()
        assert again.to_dict() == report.to_dict()


def test_other_data_is_no_report(fresh: RewriteReport) -> None:
    for values in ({}, {**fresh.to_dict(), "sites": [{"name": 1}]}, {**fresh.to_dict(), "more": 1}):
        with pytest.raises(DataError, match="not a report"):
            RewriteReport.from_dict(values)


class Tags(HTMLParser):
    """Collects the tags and attributes of a page, and what is still open at its end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_escaped_and_loads_nothing(calibrated: tuple[madtp.PrunedModel, RewriteReport]) -> None:
    for report in (long_report(), calibrated[1]):
        page = report._repr_html_()
        tags = Tags(page)
        assert not tags.open
        assert tags.names <= {"div", "p", "b", "br", "table", "thead", "tbody", "tr", "th", "td", "span"}
        assert tags.attributes == {"style"}
        assert "url(" not in page
        shown = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
        assert report.sites[-1].name.replace("<", "&lt;").replace(">", "&gt;") in shown
    assert "Model&lt;script&gt;" in long_report()._repr_html_()


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 4) == "██  "
    assert bar(0.0, 4) == "    "
    assert bar(0.6, 4) == "██▍ "
    assert bar(7.0, 4) == "████"
    assert len(bar(1 / 3, 7)) == 7
