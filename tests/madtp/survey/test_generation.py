"""The survey of what models write: a host that generates, faults that are found, and what the page and the command say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cached_decoders import IMAGE, Body, Reader, reader
from region_hosts import Memory
from small_vit import images, vit
from survey_models import Made
from torch import Tensor
from typer.testing import CliRunner

import madtp
from madtp.cli.app import app
from madtp.errors import DataError
from madtp.survey import generation
from madtp.survey.generation import CHECKS, GenerationRecord, examine_generation
from madtp.survey.generation_table import COLUMNS, markdown, summary, table_row
from madtp.survey.prompts import Prompts
from madtp.survey.runner import load, save
from madtp.survey.surveys import REWRITES, generation_survey

TOKENS = 10
GENERATION = generation_survey(TOKENS)


class Writer(Reader):
    """Generates in the words that libraries agree on."""

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        pixels: Tensor | None = None,
        past_key_values: Memory | None = None,
        *,
        use_cache: bool = True,
        num_beams: int = 1,
        return_dict_in_generate: bool = False,
        output_logits: bool = False,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        suppress_tokens: Sequence[int] = (),
    ) -> object:
        assert num_beams == 1
        memory = past_key_values or (Memory() if use_cache else None)
        known = memory.seen[0][0].shape[2] if memory is not None and memory.seen else 0
        words, logits = input_ids, []
        for _ in range(max_new_tokens):
            image = pixels if known == 0 else None
            logits.append(self.told(self(image, words[:, known:], attention_mask, memory)[:, -1]))
            known = words.shape[1] if memory is not None else 0
            allowed = logits[-1].index_fill(1, torch.tensor(list(suppress_tokens), dtype=torch.long), -torch.inf)
            words = torch.cat([words, allowed.argmax(-1, keepdim=True)], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(words[:, :1])], 1)
        return SimpleNamespace(sequences=words, logits=tuple(logits), past_key_values=memory)

    def told(self, logits: Tensor) -> Tensor:
        return logits


def source(kind: type[Writer] = Writer) -> Made:
    """A writer, with prompts of one image and of two."""
    model, inputs = reader()
    torch.manual_seed(0)
    writer = kind(Body).eval()
    writer.load_state_dict(model.state_dict())
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixels"]
    two = {
        "pixels": torch.stack([pixels, pixels.roll(1, 0)], 1).flatten(0, 1),
        "input_ids": torch.cat([ids, ids], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(mask)], 1),
    }
    return Made(writer, inputs, {"two images": two})


def test_a_model_that_writes_as_it_should() -> None:
    record = examine_generation("writer", source(), TOKENS)
    assert record.outcome == "as it should", record.failure
    assert record.kind == "Writer"
    assert record.tokens == TOKENS
    assert record.sites > 2
    assert record.cache is not None
    assert record.cache < 0.9
    not_taken = ("off, static", "static", "off, beams", "off, clip", "alone, clip")
    assert record.checks == dict.fromkeys(CHECKS, "same") | dict.fromkeys(not_taken, "not taken")


class Shifting(Writer):
    """Prefers another word once it is pruned."""

    def told(self, logits: Tensor) -> Tensor:
        return logits.roll(1, 1) if isinstance(self, madtp.PrunedModel) else logits


class Lonely(Writer):
    """Prefers another word once it is pruned and alone."""

    def told(self, logits: Tensor) -> Tensor:
        return logits.roll(1, 1) if isinstance(self, madtp.PrunedModel) and len(logits) == 1 else logits


class Raising(Writer):
    """Fails once it is pruned."""

    def told(self, logits: Tensor) -> Tensor:
        if isinstance(self, madtp.PrunedModel):
            raise IndexError("out of words")
        return logits


class Coupling(Writer):
    """Writes something else alone, dense or pruned."""

    def told(self, logits: Tensor) -> Tensor:
        return logits.roll(1, 1) if len(logits) == 1 else logits


@pytest.mark.parametrize(
    ("kind", "outcome", "check", "result"),
    [
        (Shifting, "wrong", "off", "differs"),
        (Lonely, "wrong", "alone", "differs"),
        (Raising, "error", "off", "fails"),
        (Coupling, "as it should", "alone", "dense differs"),
    ],
)
def test_faults_are_found(
    kind: type[Writer], outcome: str, check: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "CHECKS", {check: CHECKS[check]})
    record = examine_generation("writer", source(kind), TOKENS)
    assert record.outcome == outcome, record.failure
    assert record.checks[check] == result
    assert (check in record.failure) == (outcome != "as it should")


def test_only_words_of_the_prompts_are_written() -> None:
    """An image token among the new ones would need an image."""
    made = source()
    prompts = Prompts.of(made.inputs, TOKENS).that_it_takes(made.model)
    allowed = set(made.inputs["input_ids"].flatten().tolist()) - {IMAGE}
    assert set(prompts.written(made.model).words.flatten().tolist()) <= allowed


def test_models_that_do_not_write_say_why() -> None:
    record = examine_generation("vit", Made(vit(depth=2), {"images": images(2, seed=0)}), TOKENS)
    assert record.outcome == "cannot generate"
    assert "generate" in record.failure


def test_prompts_are_padded_on_the_left_and_alone_without_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    example = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "patches": torch.arange(6.0)[:, None],
        "labels": ids,
    }
    prompts = Prompts.of(example, TOKENS)
    assert prompts.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 4]]
    assert prompts.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert set(prompts.inputs) == {"input_ids", "attention_mask", "patches"}
    alone = prompts.alone(1).inputs
    assert alone["input_ids"].tolist() == [[9, 4]]
    assert alone["patches"].flatten().tolist() == [3, 4, 5]
    longer = prompts.longer(torch.cat([prompts.inputs["input_ids"], torch.ones(2, 3, dtype=torch.long)], 1)).inputs
    assert longer["attention_mask"].tolist() == [[1] * 7, [0, 0, *[1] * 5]]


def test_records_survive_the_file_and_surveys_are_not_mixed(tmp_path: Path) -> None:
    record = GenerationRecord("a", "wrong", checks={"off": "differs"}, cache=0.5, notes=("unpruned",))
    save(tmp_path / "s.json", [record], GENERATION)
    assert load(tmp_path / "s.json", GENERATION) == [record]
    with pytest.raises(DataError, match="survey of generation, not of rewrites"):
        load(tmp_path / "s.json", REWRITES)


def test_the_page_holds_every_row_check_and_reason() -> None:
    records = [
        GenerationRecord(
            "b", "wrong", tokens=64, sites=3, checks={"off": "differs"}, cache=0.25, failure="off differs"
        ),
        GenerationRecord("a", "as it should", tokens=64, checks={"off": "same", "turns": "not taken"}),
    ]
    assert summary(records) == "2 architectures, 64 new tokens: 1 as it should, 1 wrong."
    page = markdown(records, "versions")
    assert page.index("| a | as it should |") < page.index("| b | wrong | 3 | **no** |")
    assert all(f"| {name} | {check.meaning} |" in page for name, check in CHECKS.items())
    assert "versions" in page
    assert "| b | off differs |" in page
    assert len(table_row(records[0])) == len(COLUMNS)


@pytest.mark.slow
def test_the_command_surveys_what_models_write(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    runner = CliRunner()
    listed = runner.invoke(app, ["survey", "--generate", "--list", "hf:Llava*"]).output.split()
    assert "hf:LlavaForConditionalGeneration" in listed
    assert "hf:LlavaModel" not in listed
    files = ["--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    command = ["survey", "--generate", "--new-tokens", "10", "hf:LlavaForConditionalGeneration", *files]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "s.json", GENERATION)[0].outcome == "as it should"
    assert "| hf:LlavaForConditionalGeneration | as it should |" in (tmp_path / "s.md").read_text()
