"""Integer products on NVIDIA cards: lowering, the operator, its Triton kernel. Read `cuda.py` first."""
