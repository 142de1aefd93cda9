"""The files of a quantized graph: JSON from an allow-list of operators, tensors as safetensors.

Read `artifact.py` first, then `graph_document.py`. Nothing here unpickles, evaluates or imports what a
file says, and nothing that would may come in.
"""
