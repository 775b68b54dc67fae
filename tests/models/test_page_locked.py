"""Page-locked memory of an exact size, by a driver that is made up."""

from __future__ import annotations

import mmap

import pytest
import torch

from simpletuner.errors import ConfigError
from simpletuner.models.block_swap import CudaTransferEngine
from simpletuner.models.page_locked import PageLockRefused, copy_to_page_locked
from simpletuner.training.optimizer_offload import copy_to_pinned_host


class Driver:
    """Page-locks what it is asked to, until it has had enough."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: list[tuple[int, int]] = []

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:
        self.locked.append((at, size))
        return 0 if sum(size for _, size in self.locked) <= self.limit else 2

    def cudaHostUnregister(self, at: int) -> int:
        self.locked.remove(next(entry for entry in self.locked if entry[0] == at))
        return 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_memory_is_locked_to_the_byte(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = (torch.randn(37, 41) * 50).to(dtype)
    driver = Driver(2 * tensor.nbytes)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    first, second = copy_to_page_locked(tensor), copy_to_page_locked(tensor + 1)
    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor + 1)
    assert driver.locked == [(each.data_ptr(), tensor.nbytes) for each in (first, second)]
    assert all(at % mmap.PAGESIZE == 0 for at, _ in driver.locked), "a page is nobody else's"
    assert len(copy_to_page_locked(tensor[:0])) == 0
    with pytest.raises(PageLockRefused, match="error 2"):
        copy_to_page_locked(tensor)
    (refused,) = driver.locked[2:]
    del first, second
    assert driver.locked == [refused], "the driver keeps no address of memory that is gone"


def test_an_offloaded_optimizer_state_needs_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(0))
    with pytest.raises(ConfigError, match=r"\(error 2\).*adamw_8bit"):
        copy_to_pinned_host(torch.ones(3))


@pytest.mark.parametrize("limit", [1000, 0])
def test_swapped_blocks_are_only_slower_without(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(limit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    packed = torch.arange(700).to(torch.uint8)
    engine = object.__new__(CudaTransferEngine)  # its streams need a GPU
    kept = engine.pin_memory(packed)
    assert torch.equal(kept, packed)
    assert (kept is packed) == (limit == 0)
    assert [size for _, size in driver.locked] == [700]
