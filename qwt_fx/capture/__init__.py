"""A model becomes a graph of ATen ops with named layers and blocks.

Read `capture.py` first. Nothing that quantizes may come in.
"""
