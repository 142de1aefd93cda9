"""Quantize a timm DeiT: fifteen lines. Random weights and images here; nothing is downloaded."""

import timm
import torch

import qwt_fx
from qwt_fx import QuantConfig

model = timm.create_model("deit_tiny_patch16_224", pretrained=False, img_size=96).eval()
batches = [torch.randn(8, 3, 96, 96) for _ in range(2)]
config = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="qwt")
quantized = qwt_fx.quantize(model, (batches[0],), batches, config)
print(quantized(batches[0]).shape, len(qwt_fx.qparams(quantized)), "layers quantized")
qwt_fx.save(quantized, "deit_tiny_w6a6", force=True)
assert torch.equal(qwt_fx.load("deit_tiny_w6a6")(batches[0]), quantized(batches[0]))
