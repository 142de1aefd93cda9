"""The mathematics on plain tensors: qparams, histograms, searches, least squares, rounding.

Read `qparams.py` first, then `regression.py`. `torch.fx` may not come in: whatever is here can be
tried on two tensors in a console.
"""
