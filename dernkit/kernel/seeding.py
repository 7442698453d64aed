"""Generators that depend on nothing but a seed and a place, so that no order of work changes a result."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded from all numbers of ``key``, say (seed, layer, expert)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
