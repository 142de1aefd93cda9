"""The graph as ONNX, and the runtimes that take it. Read `onnx.py` first."""
