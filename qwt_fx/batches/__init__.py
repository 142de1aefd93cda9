"""Calibration batches and what a process may hold of them: memory, files, other ranks' parts.

Read `value_store.py` first. Nothing that knows a graph or a quantizer may come in.
"""
