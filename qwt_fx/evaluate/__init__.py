"""Zero-shot accuracy, retrieval recall and their intervals, from embeddings of two towers.

Read `evaluate.py` first. Nothing that quantizes may come in.
"""
