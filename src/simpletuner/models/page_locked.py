"""Page-locked host memory, which a GPU reads and writes without waiting for the processor.

torch's own page-locked memory is rounded up to a power of two: a double block in bf16, of 453 MB,
would take 537 MB.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class PageLockRefused(Exception):
    """The driver does not lock that much memory. The text is its error code."""


class LockedPages(mmap.mmap):
    """Memory that is unlocked before it is given back.

    The driver remembers addresses: a later mapping at the same one would be refused as locked
    already.
    """

    locked_at = 0

    def __del__(self) -> None:
        if self.locked_at:
            torch.cuda.cudart().cudaHostUnregister(self.locked_at)


def copy_to_page_locked(tensor: Tensor) -> Tensor:
    """Copy a tensor to page-locked memory of its exact size. Raises PageLockRefused."""
    if not tensor.numel():
        return tensor.cpu()
    owner = LockedPages(-1, tensor.nbytes)
    # The tensor holds the buffer, which unlocks its pages when the last view is gone.
    pages = torch.frombuffer(owner, dtype=torch.uint8)
    error = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), tensor.nbytes, 0))
    if error:
        raise PageLockRefused(f"error {error}")
    owner.locked_at = pages.data_ptr()
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)
