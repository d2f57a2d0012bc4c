"""Shared set-up of the tests: hypothesis profiles, one torch thread, a fixed seed for each test."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}

settings.register_profile("dev", max_examples=15, **_SHARED)
settings.register_profile("ci", max_examples=15, derandomize=True, print_blob=True, **_SHARED)
settings.register_profile("brief", max_examples=5, derandomize=True, print_blob=True, **_SHARED)
settings.register_profile("thorough", max_examples=200, print_blob=True, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Results must not depend on how many cores the machine has, and parallel test workers must not fight for them.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, then long ones, so that workers that share files end at the same time."""
    sizes = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -sizes[item.path]))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what imports left, and most of its rounds: captures make millions of objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _modes_of_torch_stay() -> Iterator[None]:
    """What madtp does leaves the modes of the thread as they were, also where it fails."""
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    torch.set_grad_enabled(before[0])
    assert after == before, "gradients, inference mode or autocast are not as they were before the test"


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """Run ``nn.TransformerEncoderLayer`` by single operations: its fused kernel rounds differently for other batches."""
    from rewritten_models import eager_arithmetic

    with eager_arithmetic():
        yield
