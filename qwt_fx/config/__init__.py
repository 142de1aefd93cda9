"""What a user asks for, as frozen declarations: no tensors, no graphs, no files.

Read `config.py` first (`QuantConfig`), then `settings.py`, which makes every choice that a configuration
leaves open. Nothing that touches data or a model may come in: every other room reads this one.
"""
