"""open_clip models and artifacts as two towers, a transform and a tokenizer.

Read `clip.py` first. This room is a door for users: `qwt_fx.clip.load`. Whatever reads a checkpoint's
bytes stays in `weights.py` and `torchscript.py`.
"""

from qwt_fx.clip.clip import ClipModel, load, load_clip_benchmark

__all__ = ["ClipModel", "load", "load_clip_benchmark"]
