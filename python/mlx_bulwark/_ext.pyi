from collections.abc import Callable
from typing import Any

import mlx.core as mx

def set_reference(name: str, reference: Callable[..., list[mx.array]]) -> None: ...
def set_num_threads(n: int) -> None: ...
def isa() -> str: ...
def load_blas(library: str, prefix: str) -> bool: ...
def has_blas() -> bool: ...
def on_metal(stream: Any = None) -> bool: ...
def sources() -> list[tuple[str, str, str]]: ...
def sim_enable(on: bool) -> None: ...
def sim_option(name: str, value: int) -> None: ...
def sim_load(hash: str, library: str) -> None: ...
def sim_take() -> list[tuple[str, str]]: ...
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
def ghost_sq_norms(
    x: list[mx.array],
    dy: list[mx.array],
    mask: list[mx.array],
    segments: list[mx.array],
    units: int,
    bias: bool,
    groups: int,
    window: list[int],
    method: str,
    stream: Any = None,
) -> mx.array: ...
def ghost_grads(
    x: list[mx.array],
    dy: list[mx.array],
    mask: list[mx.array],
    segments: list[mx.array],
    units: int,
    bias: bool,
    groups: int,
    window: list[int],
    stream: Any = None,
) -> list[mx.array]: ...
def ghost_clipped_sum(
    x: list[mx.array],
    dy: list[mx.array],
    mask: list[mx.array],
    factors: mx.array,
    bias: bool,
    groups: int,
    window: list[int],
    stream: Any = None,
) -> list[mx.array]: ...
def convolved(
    x: mx.array, weight: mx.array, bias: list[mx.array], groups: int, window: list[int], stream: Any = None
) -> mx.array: ...
def max_pool(x: mx.array, kernel: list[int], stream: Any = None) -> mx.array: ...
def max_pool_gradient(x: mx.array, dy: mx.array, kernel: list[int], stream: Any = None) -> mx.array: ...
def embedding_sq_norms(
    tokens: list[mx.array], dy: list[mx.array], segments: list[mx.array], units: int, stream: Any = None
) -> mx.array: ...
def embedding_clipped_sum(
    tokens: list[mx.array], dy: list[mx.array], factors: mx.array, vocabulary: int, stream: Any = None
) -> mx.array: ...
def embedding_linear_products(
    tokens: list[mx.array],
    dy: list[mx.array],
    x: list[mx.array],
    dy_linear: list[mx.array],
    segments: list[mx.array],
    units: int,
    stream: Any = None,
) -> mx.array: ...
def knn(
    arrays: list[mx.array], prepared: list[mx.array], k: int, metric: str, stream: Any = None
) -> list[mx.array]: ...
def mmd(
    rows: mx.array, words: mx.array, n: int, permutations: int, rates: list[float], stream: Any = None
) -> mx.array: ...
def noisy_copies(
    x: mx.array,
    n: int,
    sigma: mx.array,
    key: mx.array,
    counter: mx.array,
    uniform: bool,
    bounds: list[float],
    levels: int,
    stream: Any = None,
) -> mx.array: ...
def count_votes(logits: mx.array, counts: mx.array, stream: Any = None) -> mx.array: ...
def projected_step(
    x: mx.array,
    grad: mx.array,
    origin: mx.array,
    eps: mx.array,
    alpha: mx.array,
    norm: int,
    low: float,
    high: float,
    stream: Any = None,
) -> mx.array: ...
def column_stats(x: mx.array, stream: Any = None) -> list[mx.array]: ...
def quantile_table(x: mx.array, stream: Any = None) -> list[mx.array]: ...
def tail_scores(
    x: mx.array,
    values: mx.array,
    counts: mx.array,
    skewness: mx.array,
    ranks: list[mx.array],
    kind: int,
    stream: Any = None,
) -> list[mx.array]: ...
def histogram_counts(x: mx.array, edges: mx.array, stream: Any = None) -> mx.array: ...
def histogram_scores(
    x: mx.array, edges: mx.array, scores: mx.array, reach: mx.array, per_column: bool, stream: Any = None
) -> mx.array: ...
def robust_zscore(x: mx.array, center: mx.array, scale: mx.array, stream: Any = None) -> mx.array: ...
def mahalanobis(x: mx.array, mean: mx.array, cholesky: mx.array, stream: Any = None) -> mx.array: ...
