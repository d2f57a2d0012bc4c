"""Examine one model that generates: does the pruned model write what it should? Start at :func:`examine_generation`.

:data:`CHECKS` is the list of what is compared. Decoding is greedy, so words are equal or they are not.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import madtp
from madtp.errors import LeftAloneError, MadtpError, NoSiteError
from madtp.pruned import PrunedModel
from madtp.survey.examination import CONFIG, strongly, text_of
from madtp.survey.outputs import in_double_precision
from madtp.survey.prompts import Prompts, Writing
from madtp.survey.record import INDEPENDENCE, known_fields
from madtp.survey.source import Source

OUTCOMES = {
    "as it should": "the model is pruned, and every check that the dense model can take holds",
    "left alone": "nothing is pruned, by policy or because there is no attention to prune",
    "refused": "nothing can be pruned; the reason is given",
    "cannot generate": "the dense model is not built, or does not continue its example inputs",
    "error": "an exception of the pruned model that the dense one does not raise",
    "wrong": "the pruned model writes something else than it should",
}
"""Outcomes of an examination, from best to worst."""

Result = Literal["same", "differs", "not taken", "dense differs", "fails"]

EXAMPLE = "example"
"""Name of the form of the example inputs."""
TURN = 8
"""New tokens of a turn."""
A_TURN = {"max_new_tokens": TURN, "min_new_tokens": TURN}
ASKED = 3
"""Words of a further question."""

# It judges by the image tokens alone, so what it keeps does not depend on the words that follow.
BY_IMAGES = madtp.PruningConfig(selection="diversity", keep_ratio=0.7, alignment=False, towers=("image",))


@dataclass(frozen=True)
class GenerationRecord:
    """What came out for one model.

    Attributes:
        name: name in the survey.
        outcome: one of :data:`OUTCOMES`.
        kind: class of the model.
        tokens: new tokens of a prompt.
        sites: number of pruning sites.
        checks: result of each check by its name in :data:`CHECKS`. ``"not taken"``: the dense model does not take such a
            call, or no image token is pruned where a check judges by images. ``"dense differs"``: the dense model does not
            give itself what is compared.
        cache: bytes that the cache of the strongly pruned prompts takes, relative to an unpruned one; None if no program
            fills a cache.
        failure: what went wrong.
        notes: of the report, after all checks.
        seconds: duration of everything.
    """

    name: str
    outcome: str
    kind: str = ""
    tokens: int = 0
    sites: int = 0
    checks: Mapping[str, Result] = dataclasses.field(default_factory=dict)
    cache: float | None = None
    failure: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationRecord:
        """Return the record of JSON values; fields of other versions are ignored."""
        fields = known_fields(cls, values)
        return cls(**{**fields, "notes": tuple(fields.get("notes", ()))})


@dataclass(frozen=True)
class Case:
    """A model before and after the rewrite, with prompts for it.

    Attributes:
        model: the dense model.
        pruned: rewritten with the method.
        by_images: rewritten with :data:`BY_IMAGES`; None if that is refused.
        prompts: a batch in each form that the dense model takes, by name; :data:`EXAMPLE` is there.
    """

    model: nn.Module
    pruned: PrunedModel
    by_images: PrunedModel | None
    prompts: Mapping[str, Prompts]


Way = Callable[[nn.Module, Prompts], Writing]


@dataclass(frozen=True)
class Check:
    """Two ways to the same words.

    Attributes:
        meaning: what the check says if it holds.
        one: a way to them; see :attr:`strength`.
        other: the other way.
        strength: ``"off"``: the pruned model goes one way with pruning off, the dense model the other. ``"strong"``: the
            strongly pruned model goes both. ``"images"``: the model that judges by images goes both.
        form: of the prompts.
    """

    meaning: str
    one: Way
    other: Way
    strength: Literal["off", "strong", "images"]
    form: str = EXAMPLE


def _with(**settings: object) -> Way:
    return lambda model, prompts: prompts.written(model, **settings)


def _each_alone(**settings: object) -> Way:
    return lambda model, prompts: Writing.joined(
        [prompts.alone(row).written(model, **settings) for row in range(prompts.size)]
    )


def _in_turns(model: nn.Module, prompts: Prompts) -> Writing:
    """An answer, and an answer to more words on the cache of the first."""
    first = prompts.generated(model, **A_TURN)
    asked = prompts.longer(_asked(first.sequences))
    words = {name: x for name, x in asked.inputs.items() if name in ("input_ids", "attention_mask")}
    second = replace(asked, inputs=words).generated(model, past_key_values=first.past_key_values, **A_TURN)
    return Writing.of(second, TURN)


def _in_one(model: nn.Module, prompts: Prompts) -> Writing:
    """The same without the cache of the first."""
    asked = prompts.longer(_asked(prompts.generated(model, **A_TURN).sequences))
    return Writing.of(asked.generated(model, **A_TURN), TURN)


def _asked(sequences: Tensor) -> Tensor:
    """The words so far, and a question that repeats the last of them."""
    return torch.cat([sequences, sequences[:, -1:].expand(-1, ASKED)], dim=1)


def _off(meaning: str, **settings: object) -> Check:
    return Check(meaning, _with(**settings), _with(**settings), "off")


DENSE = _with()

CHECKS: Mapping[str, Check] = {
    "off": _off("with pruning off, the dense model's words"),
    "off, static": _off("the same with a cache of fixed size", cache_implementation="static"),
    "off, no cache": _off("the same without a cache", use_cache=False),
    "off, beams": _off("the same with two beams", num_beams=2),
    "alone": Check("strongly pruned, a sample alone writes what it writes in a batch", DENSE, _each_alone(), "strong"),
    "static": Check(
        "the same with a cache of fixed size",
        _with(cache_implementation="static"),
        _each_alone(cache_implementation="static"),
        "strong",
    ),
    **{
        f"{name}, {form}": replace(check, meaning=f"the same with {words}", form=form)
        for form, words in (("two images", "two images in each prompt"), ("clip", "a clip of two frames for the image"))
        for name, check in (("off", _off("")), ("alone", Check("", DENSE, _each_alone(), "strong")))
    },
    "uncached": Check(
        "judged by images, without a cache what it writes with one", DENSE, _with(use_cache=False), "images"
    ),
    "turns": Check("judged by images, in several turns what one long prompt gives", _in_turns, _in_one, "images"),
}
"""What is checked, by name."""


def examine_generation(name: str, source: Source, tokens: int = 64) -> GenerationRecord:
    """Build a model and its inputs, rewrite it, and compare what it writes. Exceptions become part of the record.

    Args:
        name: of the model.
        source: makes it, and inputs.
        tokens: new tokens of each prompt.
    """
    started = time.perf_counter()
    record = _examine(GenerationRecord(name, "cannot generate", tokens=tokens), source)
    return replace(record, seconds=time.perf_counter() - started)


def _examine(record: GenerationRecord, source: Source) -> GenerationRecord:
    torch.manual_seed(0)
    try:
        model, example = source.build(record.name)
        model.eval()
        record = replace(record, kind=type(model).__name__)
        prompts = Prompts.of(example, record.tokens).that_it_takes(model)
        further = {form: prompts.of_form(inputs) for form, inputs in source.further_inputs(model, example).items()}
    except Exception as error:
        return replace(record, failure=text_of(error))
    try:
        pruned = madtp.rewrite(model, dict(example), config=CONFIG)
    except (LeftAloneError, NoSiteError) as error:
        return replace(record, outcome="left alone", failure=text_of(error))
    except MadtpError as error:
        return replace(record, outcome="refused", failure=text_of(error))
    except Exception as error:
        return replace(record, outcome="error", failure=text_of(error))
    try:
        by_images = madtp.rewrite(model, dict(example), config=BY_IMAGES)
    except MadtpError:
        by_images = None
    record = replace(record, sites=len(pruned.madtp.report.sites))
    return _checked(record, Case(model, pruned, by_images, {EXAMPLE: prompts, **further}))


def _checked(record: GenerationRecord, case: Case) -> GenerationRecord:
    results: dict[str, Result] = {}
    failures = []
    for name, check in CHECKS.items():
        try:
            results[name] = _result(check, case)
        except Exception as error:  # whatever the pruned model raises where the dense one does not
            results[name] = "fails"
            failures.append(f"{name}: {text_of(error)}")
    wrong = [name for name, result in results.items() if result == "differs"]
    outcome = "wrong" if wrong else "error" if failures else "as it should"
    return replace(
        record,
        outcome=outcome,
        checks=results,
        cache=None if failures else _cache_of(case),
        failure="; ".join([*failures, *(f"{name} differs" for name in wrong)]),
        notes=tuple(map(str, case.pruned.madtp.report.notes)),
    )


def _result(check: Check, case: Case) -> Result:
    prompts = case.prompts.get(check.form)
    if prompts is None:
        return "not taken"
    try:
        wanted = check.other(case.model, prompts)
        alike = check.strength == "off" or check.one(case.model, prompts).agrees(wanted, INDEPENDENCE)
    except Exception:  # the model's own
        return "not taken"
    if not alike:
        return "dense differs"
    if check.strength == "off":
        with case.pruned.madtp.dense():
            return "same" if check.one(case.pruned, prompts).equals(wanted) else "differs"
    pruned = case.pruned if check.strength == "strong" else case.by_images
    if pruned is None:
        return "not taken"
    if _agrees(check, pruned, prompts):
        return "same"
    # Words that are equally likely but for rounding are told apart in double precision.
    exact = replace(prompts, inputs=in_double_precision(prompts.inputs))
    return "same" if _agrees(check, copy.deepcopy(pruned).double(), exact) else "differs"


def _agrees(check: Check, pruned: PrunedModel, prompts: Prompts) -> bool:
    with strongly(pruned):
        return check.one(pruned, prompts).agrees(check.other(pruned, prompts), INDEPENDENCE)


def _cache_of(case: Case) -> float | None:
    """What the cache of the strongly pruned prompts takes, relative to a dense one."""
    with strongly(case.pruned):
        case.prompts[EXAMPLE].written(case.pruned)
    held = case.pruned.madtp.cache_bytes()
    return held.held / held.dense if held is not None and held.dense else None
