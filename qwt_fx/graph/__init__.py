"""A captured graph: its operators, its records, how it is run, copied and rewritten.

Read `graph.py` first, then `pass_base.py`, the contract of a pass. Nothing that knows a quantizer may
come in.
"""
