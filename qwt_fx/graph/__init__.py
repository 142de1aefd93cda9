"""A captured graph: its operators, its records, how it is run, copied and rewritten.

Read `graph_info.py` first, then `nodes.py` and `pass_base.py`, the contract of a pass. Nothing
that knows a quantizer may come in.
"""
