"""The zero-shot classifier: class embeddings as a linear, quantized where the towers' setting says.

In the image-only setting the class embeddings come from the floating-point text tower and the
linear itself is quantized, its input per tensor and its weight per class; with both towers
quantized it stays in floating point (the published evaluation; see the towers' settings in the
documentation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ArtifactError
from qwt_fx.evaluate.metrics import normalized
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.quant.fake_quant import FakeQuant


def class_weights(prompt_features: Tensor, templates: int) -> Tensor:
    """Mean of each class's normalized prompt embeddings, normalized again.

    prompt_features (classes * templates, e), class by class -> (classes, e), as open_clip does.
    """
    width = prompt_features.shape[-1]
    grouped = normalized(prompt_features).reshape(-1, templates, width)
    return normalized(grouped.mean(dim=1))


@dataclass(frozen=True)
class ClassifierQuantizer:
    """Quantizers of the classifier's input (range known) and weight (range found per class).

    Attributes:
        input: calibrated quantizer of the normalized image features; `None` in floating point.
        weight: quantizer description for the class embeddings; `None` in floating point.
    """

    input: FakeQuant | None
    weight: QuantSpec | None

    @classmethod
    def observe(cls, features: Tensor, config: QuantConfig) -> ClassifierQuantizer:
        """Find the input range from un-normalized image features of one batch, (n, e)."""
        deployable = config.compat == "none"
        bits = config.bits_for("classifier")

        def spec(width: int, ch_axis: int | None) -> QuantSpec:
            return QuantSpec(
                width, ch_axis=ch_axis, integer_zero_point=deployable, include_zero=deployable
            )

        module = None
        if bits.activation is not None:
            dynamic = QuantSpec(bits.activation, dynamic=True)
            static = spec(bits.activation, None)
            module = FakeQuant(dynamic if bits.dynamic else static, "classifier.input")
            module.observe(normalized(features))
        return cls(module, None if bits.weight is None else spec(bits.weight, 0))

    def logits(self, features: Tensor, weights: Tensor) -> Tensor:
        """Cosine logits, without the logit scale. features (n, e), weights (c, e) -> (n, c)."""
        x = normalized(features)
        if self.input is not None:
            x = self.input.fake_quantize(x)
        if self.weight is not None:
            module = FakeQuant(self.weight, "classifier.weight")
            module.observe(weights)
            weights = module.fake_quantize(weights)
        return x @ weights.T

    def to_dict(self) -> JsonObject:
        """Plain values for the artifact. Raises `ArtifactError` for a non-integer zero point."""
        if self.input is not None and not self.input.spec.storable:
            raise ArtifactError("the classifier's zero point is not an integer (compat='original')")
        entry: JsonObject = {"input": None, "weight_bits": self.weight and self.weight.bits}
        if self.input is not None:
            scale, zero_point = self.input.scale, self.input.zero_point
            entry["input"] = {  # no scale: a dynamic one
                "scale": None if scale is None else float(scale),
                "zero_point": None if zero_point is None else int(zero_point),
                "bits": self.input.spec.bits,
            }
        return entry

    @classmethod
    def from_dict(cls, values: JsonObject) -> ClassifierQuantizer:
        """Rebuild from `to_dict`'s values. Raises `ArtifactError` when they are malformed."""
        try:
            module = None
            if values["input"] is not None:
                entry = values["input"]
                dynamic = entry["scale"] is None
                spec = QuantSpec(int(entry["bits"]), dynamic=dynamic)
                module = FakeQuant(spec, "classifier.input")
                if not dynamic:
                    qparams = (float(entry["scale"]), float(entry["zero_point"]))
                    module.set_qparams(*map(torch.tensor, qparams))
            bits = values["weight_bits"]
            weight = None if bits is None else QuantSpec(int(bits), ch_axis=0)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"artifact.json: the classifier entry is malformed: {error}"
            ) from None
        return cls(module, weight)


FLOATING_CLASSIFIER = ClassifierQuantizer(None, None)
