"""What token ids prove about a graph: which positions matter, how long a text must be.

Read `token_ids.py` first, then `token_map.py`. Only the graph counts here, never a model's name.
"""
