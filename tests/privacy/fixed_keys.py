"""Keys of engines are fixed in tests: none of noise or sampling fails, or passes, by chance."""

import itertools

import mlx_bulwark as bw
from mlx_bulwark.privacy import engine, key_file, sampling, state

MODULES = (engine, key_file, sampling, state)


def fix_keys(seed):
    """Let engines of this process take their keys from a seed, each another."""
    numbers = itertools.count(seed << 32)

    def next_key():
        return bw.key_from_seed(next(numbers))

    for module in MODULES:
        module.random_key = next_key
