"""The data-dependent steps on a prepared graph: ranges, the paired walk, fits, compensations.

Read `paired_walk.py` first, then `layer_range.py`, which looks, and `channel_moves.py`, which edits.
What is pure arithmetic belongs in numerics; what is a pass of its own, in passes.
"""
