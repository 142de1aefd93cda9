"""What is done to each layer beside quantizing it, as one declaration that passes read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSettings:
    """What `CalibrateLayers` does beside finding plain ranges; every field can stand alone.

    Attributes:
        output_ranges: ranges minimize the error of the layers' output instead of the tensor's.
        strengths: candidates for how much of the channels' differences moves into the weights; (1.0,)
            is RepQ-ViT's own choice, (0.0,) none.
        fold_values: move the scales of attention's output into the rows of the values.
        input_scales: where neither can take the differences between channels, multiply the input by a
            constant per channel, if that leaves at most 0.7 of the output's error; below 8 bits only.
        refit: refit each weight by ridge regression on its quantized input (ERQ, arXiv 2407.06794).
        fp_target: aim at the floating-point path's output, and at the residual stream where the
            layer adds to one, instead of the layer's own output on the quantized path's input
            (GPTAQ, arXiv 2504.02692).
        rounding: "gptq" (arXiv 2210.17323) or "nearest".
        bias_correction: let the bias take the mean error.
        symmetric_weights: zero point of weights fixed at 2^(bits - 1), as integer kernels want it.
        mask_ranges, mask_sums: leave text positions that provably cannot matter out of the ranges,
            and out of the regressions and roundings.
        token_scales: give the few positions that are far larger than all others, such as the class
            token, a scale of their own beside the common one.
        hold_out: share of the samples that choose each ridge.
        tokens_per_input: at least so many tokens per input channel, and 4,096 of them, are summed for
            layers with more inputs than outputs, whose Gram is most of the cost.
    """

    output_ranges: bool = True
    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    fold_values: bool = True
    input_scales: bool = True
    refit: bool = True
    fp_target: bool = True
    rounding: str = "gptq"
    bias_correction: bool = True
    symmetric_weights: bool = True
    mask_ranges: bool = False
    mask_sums: bool = True
    token_scales: bool = True
    hold_out: float = 0.2
    tokens_per_input: int = 4


STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
