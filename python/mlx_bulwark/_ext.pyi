from collections.abc import Callable
from typing import Any

import mlx.core as mx

def set_reference(name: str, reference: Callable[[list[mx.array], Any], list[mx.array]]) -> None: ...
def set_num_threads(n: int) -> None: ...
def isa() -> str: ...
def gaussian(
    shape: list[int],
    sigma: mx.array,
    key: mx.array,
    counter: mx.array,
    dtype: mx.Dtype,
    domain: tuple[int, int],
    stream: Any = None,
) -> mx.array: ...
def add_gaussian(
    leaves: list[mx.array],
    sigma: mx.array,
    key: mx.array,
    counter: mx.array,
    domain: tuple[int, int],
    stream: Any = None,
) -> list[mx.array]: ...
def random_bits(
    shape: list[int], key: mx.array, counter: mx.array, domain: tuple[int, int], stream: Any = None
) -> mx.array: ...
def normals_from_words(words: mx.array) -> mx.array: ...
def sample_sq_norms(grads: list[mx.array], stream: Any = None) -> mx.array: ...
def clipped_sum(
    grads: list[mx.array], factors: mx.array, noise: list[mx.array], stream: Any = None
) -> list[mx.array]: ...
def clip_and_sum(
    grads: list[mx.array],
    max_grad_norm: mx.array,
    mode: str,
    mask: list[mx.array],
    noise: list[mx.array],
    stream: Any = None,
) -> list[mx.array]: ...
