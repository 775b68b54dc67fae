"""Randomness is addressed, not stored.

Every random number of a run is a pure function of (run seed, purpose, address). No generator is
carried from step to step, so resuming, prefetching and validating cannot change what comes next.
"""

from __future__ import annotations

import hashlib


def seed_at(seed: int, purpose: str, *address: int | str) -> int:
    """Return the 63-bit seed of one random draw, addressed by purpose and numbers or names.

    Distinct addresses give independent seeds: BLAKE2b of a text that is unambiguous, because each
    part carries its type and the parts are joined with a separator.
    """
    text = "\x1f".join([str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in address)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
