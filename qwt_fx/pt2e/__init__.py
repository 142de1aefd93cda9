"""torchao's PT2E flow with RepQ-ViT's quantizers: `QwTQuantizer` (extra `torchao`).

Read `quantizer.py` first. This room is a door for users; no other room imports it.
"""

from qwt_fx.pt2e.quantizer import QwTQuantizer

__all__ = ["QwTQuantizer"]
