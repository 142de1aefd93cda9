"""Quantize a timm ViT from Python: ten lines. Here with random weights and random images."""

import timm
import torch

import qwt_fx
from qwt_fx import QuantConfig

model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
batches = [torch.randn(8, 3, 224, 224) for _ in range(2)]
config = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="qwt")
quantized = qwt_fx.quantize(model, (batches[0],), batches, config)
print(quantized(batches[0]).shape, len(qwt_fx.qparams(quantized)), "layers quantized")
qwt_fx.save(quantized, "vit_tiny_w6a6", force=True)
assert torch.equal(qwt_fx.load("vit_tiny_w6a6")(batches[0]), quantized(batches[0]))
