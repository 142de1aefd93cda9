"""The commands of the `qwt-fx` program, one module or folder each, and what they share.

Read `quantize/quantize.py` first, then `results.py`. Nothing is computed here that a Python user could
not ask of `qwt_fx.api`.
"""
