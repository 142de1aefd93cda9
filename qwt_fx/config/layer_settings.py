"""What is done to each layer beside quantizing it, as one declaration that passes read."""

from __future__ import annotations

from dataclasses import dataclass

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The candidates that a search for the strength of a reparameterization tries."""


@dataclass(frozen=True)
class LayerSettings:
    """What `CalibrateLayers` does beside finding plain ranges; every field can stand alone.

    The fields are those of `QuantConfig` of the same name, without "auto".

    Attributes:
        ranges: minimize the error of the layers' "output", or of the "tensor" itself.
        reparameterization: how much of the channels' differences moves into the weights, in [0, 1]: 1
            is RepQ-ViT's own choice, 0 none; "search" tries `STRENGTHS`.
        fold_values: move the scales of attention's output into the rows of the values.
        input_scales: where neither can take the differences between channels, multiply the input by a
            constant per channel, if that leaves at most 0.7 of the output's error; below 8 bits only.
        refit: refit each weight by ridge regression on its quantized input (ERQ, arXiv 2407.06794).
        target: aim at the floating-point path's output, "fp", and at the residual stream where the
            layer adds to one (GPTAQ, arXiv 2504.02692), or at the layer's own output on the quantized
            path's input, "local".
        rounding: "gptq" (arXiv 2210.17323) or "nearest".
        bias_correction: let the bias take the mean error.
        symmetric_weights: zero point of weights fixed at 2^(bits - 1), as integer kernels want it.
        token_masks: leave text positions that provably cannot matter out of nothing, "none"; out of the
            regressions and roundings, "regression"; out of the ranges too, "all".
        token_scales: give the few positions that are far larger than all others, such as the class
            token, a scale of their own beside the common one.
        hold_out: share of the samples that choose each ridge.
        tokens_per_input: at least so many tokens per input channel, and 4,096 of them, are summed for
            layers with more inputs than outputs, whose Gram is most of the cost.
    """

    ranges: str = "output"
    reparameterization: str | float = "search"
    fold_values: bool = True
    input_scales: bool = True
    refit: bool = True
    target: str = "fp"
    rounding: str = "gptq"
    bias_correction: bool = True
    symmetric_weights: bool = True
    token_masks: str = "regression"
    token_scales: bool = True
    hold_out: float = 0.2
    tokens_per_input: int = 4

    @property
    def strengths(self) -> tuple[float, ...]:
        """The candidates for the strength of a reparameterization."""
        if self.reparameterization == "search":
            return STRENGTHS
        return (float(self.reparameterization),)
