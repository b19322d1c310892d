"""Fixtures of the unit tests."""

import gc
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from tests.unit.helpers import LIMIT_S, descriptors, slab_maps
from vllm_dwdp.transport.shm import ShmTransport


@pytest.fixture(scope="session")
def quick_collections() -> None:
    """Set aside all that torch and pytest made, so that each later collection takes no 100 ms."""
    resource_tracker.ensure_running()  # multiprocessing's: it keeps a descriptor from the first spawn on
    gc.collect()
    gc.freeze()


@pytest.fixture
def transport(quick_collections: None) -> Iterator[ShmTransport]:
    """A transport; the test fails if it leaves a descriptor or a mapping behind."""
    gc.collect()
    before = descriptors(), slab_maps()
    made = ShmTransport(timeout_s=LIMIT_S)
    yield made
    made.close()
    made.close()
    gc.collect()
    assert (descriptors(), slab_maps()) == before
