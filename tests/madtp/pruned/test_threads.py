"""Calls in several threads and tasks do not see each other: outputs, records, strength, captures and the process's streams."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from small_vit import images, rewritten
from torch import Tensor

from madtp import PrunedModel

BATCHES = {count: images(count, count) for count in (2, 3, 5)}


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Let threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # reported below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@torch.no_grad()
def outputs(pruned: PrunedModel) -> dict[tuple[int, bool], Tensor]:
    """By batch size, and whether pruning is on."""
    found = {(count, True): pruned(batch) for count, batch in BATCHES.items()}
    with pruned.madtp.dense():
        return found | {(count, False): pruned(batch) for count, batch in BATCHES.items()}


def test_eight_threads_prune_or_not_and_each_has_its_own_record() -> None:
    pruned = rewritten(2)
    expected = outputs(pruned)

    def calls(count: int, pruning: bool) -> Callable[[], None]:
        @torch.no_grad()
        def work() -> None:
            for _ in range(125):
                if pruning:
                    found = pruned(BATCHES[count])
                    counts = pruned.madtp.token_counts()
                    assert all(len(kept) == count and (kept < 65).any() for kept in counts.values())
                else:
                    with pruned.madtp.dense():
                        found = pruned(BATCHES[count])
                        assert all(bool((kept == 65).all()) for kept in pruned.madtp.token_counts().values())
                torch.testing.assert_close(found, expected[count, pruning])

        return work

    together(
        *[calls(count, pruning) for count in BATCHES for pruning in (True, False)], calls(2, True), calls(3, False)
    )


def test_first_calls_of_a_kind_at_once_capture_it_once() -> None:
    pruned = rewritten(1).train()
    before = pruned.madtp.programs
    together(*[lambda count=count: pruned(BATCHES[count]) for count in BATCHES])
    assert pruned.madtp.programs == before + 1


def test_a_capture_leaves_streams_logging_and_warnings_of_others_alone(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pruned, done, said = rewritten(1).train(), threading.Event(), []

    def talk() -> None:
        while not done.is_set():
            number = len(said)
            print("line", number)
            logging.getLogger("other").warning("line %d", number)
            warnings.warn(f"line {number}", stacklevel=1)
            said.append(number)
            done.wait(0.005)

    def capture() -> None:
        pruned(BATCHES[2])
        done.set()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        together(talk, capture)
    assert len(said) > 1
    assert capsys.readouterr().out.count("line") == len(said)
    assert sum(record.name == "other" for record in caplog.records) == len(said)
    # torch itself, while it exports, now and then ignores the warnings of the whole process for a moment.
    assert len(warned) > len(said) / 2
    assert logging.root.manager.disable == 0


@torch.no_grad()
def test_tasks_of_one_loop_have_their_own_strength_and_record() -> None:
    pruned = rewritten(1)

    async def ask(count: int, pruning: bool) -> None:
        if pruning:
            pruned(BATCHES[count])
            await asyncio.sleep(0.01)
            assert all(len(kept) == count for kept in pruned.madtp.token_counts().values())
        else:
            with pruned.madtp.dense():
                await asyncio.sleep(0.005)
                pruned(BATCHES[count])
                assert all(bool((kept == 65).all()) for kept in pruned.madtp.token_counts().values())

    async def all_at_once() -> None:
        pruned(BATCHES[2])
        await asyncio.gather(ask(2, True), ask(3, False), ask(5, True))

    asyncio.run(all_at_once())


def test_whoever_made_no_call_reads_the_last_record() -> None:
    pruned = rewritten(1)
    together(lambda: pruned(BATCHES[3]))
    assert all(len(kept) == 3 for kept in pruned.madtp.token_counts().values())


def test_an_export_in_another_thread_is_not_taken_for_ones_own() -> None:
    pruned, done = rewritten(1), threading.Event()
    with torch.no_grad():
        expected = pruned(BATCHES[2])

    def export() -> None:
        for _ in range(3):
            torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.randn(2, 4),))
        done.set()

    def call() -> None:
        with torch.no_grad():
            while not done.is_set():
                torch.testing.assert_close(pruned(BATCHES[2]), expected)
                assert all(len(kept) == 2 for kept in pruned.madtp.token_counts().values())

    together(export, call)


def test_dense_blocks_may_end_in_any_order() -> None:
    pruned = rewritten(1)
    first, second = pruned.madtp.dense(), pruned.madtp.dense()
    for block in (first, second):
        block.__enter__()
    for block in (first, second):
        assert not pruned.madtp.control.active
        block.__exit__(None, None, None)
    assert pruned.madtp.control.active
