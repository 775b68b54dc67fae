"""Randomness is addressed, not stored.

Every draw of a run is a pure function of (run seed, purpose, where): no generator is carried from
step to step, so that resuming, prefetching and validating cannot change what comes next.
"""

from __future__ import annotations

import hashlib


def seed_at(seed: int, purpose: str, *where: int | str) -> int:
    """A 63-bit seed for one draw: seed_at(42, "noise", step, sample_id).

    Distinct addresses give independent seeds (BLAKE2b of their unambiguous spelling).
    """
    address = "\x1f".join(
        [str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in where)]
    )
    digest = hashlib.blake2b(address.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
