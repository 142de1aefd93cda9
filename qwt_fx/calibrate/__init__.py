"""The data-dependent steps on a prepared graph: ranges, the paired walk, fits, compensations.

Read `paired_walk.py` first, then `layer_range.py`. What is pure arithmetic belongs in numerics; what is
a pass of its own, in passes.
"""
