"""The demo: a small CLIP with its data, shipped in the package, and how it is made hard.

Read `assets.py` first. It quantizes nothing: the command of the same name does.
"""
