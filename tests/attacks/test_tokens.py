"""Token substitution against all substitutions, one by one."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.attacks import TokenSubstitution

V, E, T, B = 11, 6, 5, 12
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, T))


class Linear(nn.Module):
    """Linear in the embeddings, with weights of their own for each place."""

    def __init__(self, classes=2):
        super().__init__()
        rng = np.random.default_rng(1)
        self.embedding = nn.Embedding(V, E)
        self.embedding.weight = mx.array(rng.standard_normal((V, E)).astype(np.float32))
        self.head = nn.Linear(T * E, classes)
        self.head.weight = mx.array(rng.standard_normal((classes, T * E)).astype(np.float32))

    def __call__(self, tokens):
        return self.head(self.embedding(tokens).reshape(len(tokens), -1))


class Deep(Linear):
    def __call__(self, tokens):
        return self.head(nn.gelu(self.embedding(tokens).reshape(len(tokens), -1) * 2) - 0.2)


def lead(model, tokens, y):
    z = np.array(model(mx.array(tokens)))
    own = z[np.arange(len(y)), y]
    z[np.arange(len(y)), y] = -np.inf
    return z.max(1) - own


def brute_force(model, text, y, allowed=None, protected=None):
    """The best margin that one substitution gives."""
    places = [t for t in range(T) if protected is None or not protected[t]]
    words = [v for v in range(V) if allowed is None or allowed[v]]
    tried = []
    for t, v in itertools.product(places, words):
        if v != text[t]:
            tried.append([*text[:t], v, *text[t + 1 :]])
    return lead(model, np.array(tried), np.full(len(tried), y)).max()


@pytest.fixture
def case():
    model = Linear()
    return model, mx.array(TOKENS), model(mx.array(TOKENS)).argmax(axis=1)


def test_one_candidate_is_the_best_substitution_of_a_linear_model(case):
    model, tokens, y = case
    found = TokenSubstitution(1, candidates=1)(model, model.embedding, tokens, y)
    best = np.array([brute_force(model, text, c) for text, c in zip(TOKENS, np.array(y), strict=True)])
    assert (np.array(found.success) == (best > 0)).all()
    assert 0 < found.success.sum().item() < B
    reached = lead(model, np.array(found.tokens), np.array(y))
    fooled = np.array(found.success)
    assert np.allclose(reached[fooled], best[fooled], atol=1e-4)
    assert (found.edits == found.success).all().item()
    assert (found.queries == 3).all().item()


def test_all_candidates_are_brute_force_on_any_model():
    model = Deep(3)
    y = model(mx.array(TOKENS)).argmax(axis=1)
    allowed = np.arange(V) == 3
    attack = TokenSubstitution(1, candidates=T * V, allowed=mx.array(allowed))
    found = attack(model, model.embedding, mx.array(TOKENS), y)
    best = np.array([brute_force(model, text, c, allowed) for text, c in zip(TOKENS, np.array(y), strict=True)])
    assert (np.array(found.success) == (best > 0)).all()
    assert 0 < found.success.sum().item() < B


@pytest.mark.parametrize("k", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("kind", [Linear, Deep])
def test_edits_are_few_and_where_they_may_be(k, kind):
    model = kind(3)
    allowed = np.zeros(V, bool)
    allowed[[1, 4, 7, 9]] = True
    protected = RNG.random((B, T)) < 0.3
    y = model(mx.array(TOKENS)).argmax(axis=1)
    attack = TokenSubstitution(k, allowed=mx.array(allowed), candidates=5, batch_size=7)
    found = attack(model, model.embedding, mx.array(TOKENS), y, protected=mx.array(protected))
    new = np.array(found.tokens)
    changed = new != TOKENS
    assert (changed.sum(1) <= k).all()
    assert (changed.sum(1) == np.array(found.edits)).all()
    assert not changed[protected].any()
    assert allowed[new[changed]].all()
    assert (np.array(model(found.tokens).argmax(axis=1) != y) == np.array(found.success)).all()
    assert (changed.any(1) == np.array(found.success)).all()
    if k > 2:
        assert found.success.sum().item() > 3


def test_no_place_is_changed_twice(case):
    """One open place: a round of four candidates, then a gradient that finds no place."""
    model, tokens, y = case
    protected = mx.broadcast_to(mx.arange(T) > 0, (B, T))
    found = TokenSubstitution(3, candidates=4)(model, model.embedding, tokens, y, protected=protected)
    assert not found.success.all().item()
    assert (found.queries <= 1 + 1 + 4 + 1).all().item()


def test_targets(case):
    model = Linear(3)
    y = model(mx.array(TOKENS)).argmax(axis=1)
    targets = (y + 1) % 3
    found = TokenSubstitution(3, targeted=True)(model, model.embedding, mx.array(TOKENS), y, targets=targets)
    hit = np.array(model(found.tokens).argmax(axis=1) == targets)
    assert (hit == np.array(found.success)).all()
    assert hit.sum() > B // 2


def test_wrong_texts_are_left_alone(case):
    model, tokens, y = case
    found = TokenSubstitution(3)(model, model.embedding, tokens, 1 - y)
    assert not found.correct.any().item()
    assert not found.success.any().item()
    assert (found.tokens == tokens).all().item()


def test_batches_change_nothing(case):
    model, tokens, y = case
    whole, parts = (TokenSubstitution(2, batch_size=b)(model, model.embedding, tokens, y) for b in (64, 5))
    for a, b in zip(whole, parts, strict=True):
        assert (a == b).all().item()


def test_the_embedding_is_as_before(case):
    model, tokens, y = case
    weight = mx.array(model.embedding.weight)
    TokenSubstitution(2)(model, model.embedding, tokens, y)
    assert type(model.embedding) is nn.Embedding
    assert (model.embedding.weight == weight).all().item()
    assert TokenSubstitution(2)(model, model.embedding, tokens[:0], y[:0]).tokens.shape == (0, T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: TokenSubstitution(-1), "max_edits must be"),
        (lambda m, x, y: TokenSubstitution(1, candidates=0), "candidates must be"),
        (lambda m, x, y: TokenSubstitution(1, allowed=mx.array([1])), "allowed must be bool"),
        (lambda m, x, y: TokenSubstitution(1, allowed=mx.array([True]))(m, m.embedding, x, y), "11 entries"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding.weight, x, y), "embedding must be a mlx.nn.Module"),
        (lambda m, x, y: TokenSubstitution(1)(m, nn.ReLU(), x, y), "embedding must have a weight"),
        (lambda m, x, y: TokenSubstitution(1)(m, nn.Embedding(V, E), x, y), "embedding must be called by the model"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x + V, y), r"tokens must be in \[0, 11\)"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x[0], y), r"tokens must be integers \[B, T\]"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x, y[:2]), "y must be integers"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x, y + 2), r"in \[0, 2\)"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x, y, targets=1 - y), "targets must be given"),
        (lambda m, x, y: TokenSubstitution(1, targeted=True)(m, m.embedding, x, y, targets=y), "differ from y"),
        (lambda m, x, y: TokenSubstitution(1)(m, m.embedding, x, y, protected=x), "protected must be bool"),
        (lambda m, x, y: TokenSubstitution(1)(lambda x: m(x)[0], m.embedding, x, y), "model must return logits"),
    ],
)
def test_refused(case, call, message):
    with pytest.raises(ValueError, match=message):
        call(*case)
