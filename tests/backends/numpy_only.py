"""Run by tests in a process of its own: exported towers with onnxruntime and numpy, nothing else.

usage: python numpy_only.py IMAGE.onnx TEXT.onnx IMAGES.npy TEXTS.npy FEATURES.npz
"""

import importlib.abc
import sys


class Refuse(importlib.abc.MetaPathFinder):
    """Refuses everything that only quantizing needs."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (
            "torch",
            "open_clip",
            "torchvision",
            "qwt_fx",
            "onnx",
            "timm",
        ):
            raise ImportError(f"{name} must not be needed")


sys.meta_path.insert(0, Refuse())

import numpy  # noqa: E402
import onnxruntime  # noqa: E402

files, arrays, target = sys.argv[1:3], sys.argv[3:5], sys.argv[5]
features = {}
for name, file, array in zip(("image", "text"), files, arrays, strict=True):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = numpy.load(array)
    parts = [
        session.run([f"{name}_features"], {name: inputs[i : i + 64]})[0]
        for i in range(0, len(inputs), 64)
    ]
    features[name] = numpy.concatenate(parts)
assert "torch" not in sys.modules
numpy.savez(target, **features)
