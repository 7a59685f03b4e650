"""Counter-based random numbers: the same for a particle whatever else is drawn, and wherever."""

import hashlib

import numpy as np


def generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    """Generator of one particle's (or iteration's) random numbers.

    seed: the run's. stream: what the numbers are for, such as "noise". counter: the particle's id, from 0 up
    to 2^64 - 1. Generators of different arguments never overlap: (seed, stream) makes the key of a Philox
    cipher (Salmon et al., SC 2011) and `counter` the top word of its 256-bit counter.
    """
    digest = hashlib.blake2b(f"{int(seed)}/{stream}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"), counter=int(counter) << 192))
