"""Randomness as a pure function of a key.

Every random decision of a run is drawn from a generator made on the spot from a key such as
(seed, "augment", epoch, sample). Nothing is ever drawn from a stream that a rank, a worker or an earlier step has
advanced, so the number of ranks, workers and restarts cannot change a draw.
"""

import hashlib

import numpy as np

Part = int | str


def digest(*parts: Part) -> bytes:
    """16 bytes that depend on every part, its type and its position."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in map(_plain, parts))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def integer(*parts: Part) -> int:
    """A 63-bit integer from a key: fit for torch.manual_seed."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1


def generator(*parts: Part) -> np.random.Generator:
    """A NumPy generator of its own for a key."""
    return np.random.Generator(_philox(parts))


def permutation(count: int, *parts: Part) -> np.ndarray:
    """A permutation of range(count), (count,) int64.

    From the raw Philox stream, which NumPy guarantees to stay the same over releases (Generator.permutation it does
    not, NEP 19), so a data plan written down today is the data plan of the next NumPy.
    """
    return np.argsort(_philox(parts).random_raw(count), kind="stable")


def _philox(parts: tuple[Part, ...]) -> np.random.Philox:
    return np.random.Philox(key=np.frombuffer(digest(*parts), dtype=np.uint64))


def _plain(part: Part) -> Part:
    return int(part) if isinstance(part, np.integer) else part
