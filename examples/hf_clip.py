"""Quantize a Hugging Face CLIP image tower: fifteen lines, random weights, nothing downloaded."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

import qwt_fx
from qwt_fx import QuantConfig

sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=64, intermediate_size=256)).eval()
batches = [torch.randn(8, 3, 64, 64) for _ in range(2)]
config = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit", compensation="qwt")
quantized = qwt_fx.quantize(model, (batches[0],), batches, config)
print(type(quantized(batches[0])).__name__, len(qwt_fx.qparams(quantized)), "layers quantized")
qwt_fx.save(quantized, "hf_clip_w6a6", force=True)
