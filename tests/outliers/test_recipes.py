"""The recipes of docs/outliers.md, run as they stand."""

import re
from pathlib import Path

import numpy as np
import packaged_data
import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "outliers.md"


@pytest.fixture(scope="module")
def blocks():
    if not DOCUMENT.exists():
        pytest.skip("the documents are not beside the tests")
    return re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def run(block, **names):
    exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


@pytest.fixture(scope="module")
def texts(blocks):
    pytest.importorskip("tokenizers")
    return run(blocks[0], folder=packaged_data.minilm_folder())


@pytest.mark.slow
def test_the_encoder_is_the_published_one(texts):
    """Similarities that the documentation of Sentence Transformers gives for this model."""
    found = np.array(
        texts["encode"](["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    )
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-4)
    np.testing.assert_allclose(np.array(texts["encode"](["He drove to the stadium."]))[0], found[2], atol=1e-5)


@pytest.mark.slow
def test_odd_texts_are_found(texts):
    assert set(texts["worst"]) == {17, 22}
    assert {17, 22} <= set(texts["odd"])
    assert len(texts["odd"]) <= 5


@pytest.mark.slow
def test_a_text_under_the_wrong_label_is_found(texts):
    assert texts["mislabelled"] == 3


def test_poisoned_images_are_found(blocks):
    found = run(blocks[1])
    assert found["recall"] >= 0.8
    sevens, worst = found["sevens"], np.argsort(found["scores"][found["sevens"]])[:20]
    assert np.isin(sevens[worst], found["poisoned"]).mean() >= 0.5
