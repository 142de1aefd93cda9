"""oneDNN's integer products on the CPU: lowering, fusion, one layer. Read `x86.py` first."""
