"""Generators for initial weights: one for each name, so that leaving a part out moves no other."""

import hashlib

import torch


def generator(text: str) -> torch.Generator:
    """A generator on the host, seeded by the text."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    )
