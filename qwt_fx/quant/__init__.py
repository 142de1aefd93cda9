"""Quantizers in a graph: the fake_quant module, q/dq operators, which layers share one, what may move.

Read `fake_quant.py` first, then `quantizers.py`. `torch_ao.py` alone may name torch.ao. Nothing that
needs calibration data may come in.
"""
