"""Every check of the fuzzer can fail, attempts can be repeated, and the two sources of mutations share one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .bytes_mutations import BYTES
from .changes import FORMATS, Attempt, drawn_attempt
from .faulty_readers import READERS
from .json_mutations import JSON, InHeader, InJson, parse, slots, written
from .judging import Bench
from .kinds import drawn, strategy
from .runner import Runner
from .verdicts import CRASH, EXCEPTION, LARGE, LOADED, REFUSED, SLOW, WRONG, Limits, Verdict

LIMITS = Limits(seconds=0.25, bytes=20 << 20)
UNCHANGED = Attempt((), sealed=False)


def verdict(reader: str, folder: Path) -> Verdict:
    return Bench(READERS[reader], folder, LIMITS).judge(UNCHANGED)


@pytest.mark.parametrize(
    ("reader", "kind", "message"),
    [
        ("loading", LOADED, ""),
        ("refusing", REFUSED, "it is refused."),
        ("key_error", EXCEPTION, "KeyError: 'missing'"),
        ("slow", SLOW, "it took 0.3 s"),
        ("large", LARGE, "it took "),
        ("changing", WRONG, "the model is changed, although it was refused"),
        ("wrong", WRONG, "there is something"),
    ],
)
def test_every_fault_is_told(tmp_path: Path, reader: str, kind: str, message: str) -> None:
    found = verdict(reader, tmp_path)
    assert found.kind == kind
    assert found.message.startswith(message)
    assert found.allowed == (kind in (LOADED, REFUSED))


def test_the_model_is_put_back_after_each_attempt(tmp_path: Path) -> None:
    bench = Bench(READERS["changing"], tmp_path, LIMITS)
    assert [bench.judge(UNCHANGED).kind for _ in range(2)] == [WRONG, WRONG]
    assert not bench.case.state()["weight"].any()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("faults"), Limits(seconds=2.0), "tests.fuzz.faulty_readers")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "kind"), [("ending", CRASH), ("crashing", CRASH), ("sleeping", SLOW)])
def test_attempts_that_end_the_process_are_told_and_others_go_on(runner: Runner, reader: str, kind: str) -> None:
    tally = runner.run(reader, range(7, 9))
    assert [(seed, found.kind) for seed, found in tally.faults] == [(7, kind), (8, kind)]
    assert (runner.failures / f"{reader}-7" / "x.txt").is_file()
    assert json.loads(json.dumps(tally.to_json()))["counts"] == {kind: 2}
    assert runner.run("loading", range(3)).counts == {LOADED: 3}


@pytest.mark.parametrize("formats", FORMATS)
def test_a_seed_repeats_its_attempt(formats: str) -> None:
    found = [drawn_attempt([formats], "seed 3") for _ in range(2)]
    assert found[0] == found[1]
    assert len({repr(drawn_attempt([formats], f"seed {seed}")) for seed in range(20)}) > 15


@given(mutation=strategy(BYTES), content=st.binary(max_size=40), other=st.binary(max_size=9))
def test_bytes_may_be_any(mutation: object, content: bytes, other: bytes) -> None:
    assert isinstance(mutation.of(content, other), bytes)  # type: ignore[attr-defined]


@given(mutation=strategy(JSON), seed=st.integers(0, 99))
def test_json_keeps_its_form_until_it_is_mutated(mutation: object, seed: int) -> None:
    content = json.dumps({"a": [1, 2.5, None, {"b": "c"}], "d": {}, "e": True}).encode()
    assert json.loads(written(parse(content.decode()))) == json.loads(content)
    assert len(slots(parse(content.decode()))) == 9
    assert isinstance(InJson(mutation).of(content, b""), bytes)  # type: ignore[arg-type]
    assert InJson(drawn(JSON, Random(seed))).of(b"{", b"") == b"{"


def test_the_length_of_a_header_stays_right() -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    for seed in range(50):
        changed = InHeader(drawn(JSON, Random(seed))).of(content, b"")
        assert changed.endswith(b"\0" * 4)
        assert int.from_bytes(changed[:8], "little") == len(changed) - 12
