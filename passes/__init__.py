"""Graph passes, each usable alone on a captured graph; `PassManager` runs an ordered tuple of them.

Read `decompose_attention.py` first, the shortest, then `insert_observers.py`. No pass imports another, a
backend or `api`.
"""

from __future__ import annotations

from qwt_fx.graph.pass_base import Change, Pass, PassManager, PassResult, Skip
from qwt_fx.passes.calibrate_layers import CalibrateLayers
from qwt_fx.passes.choose_softmax_quantizer import ChooseSoftmaxQuantizer
from qwt_fx.passes.convert_to_integers import ConvertToIntegers
from qwt_fx.passes.decompose_attention import DecomposeAttention
from qwt_fx.passes.fix_constant_tokens import FixConstantTokens
from qwt_fx.passes.fold_channel_wise import FoldChannelWise
from qwt_fx.passes.insert_compensation import InsertCompensation
from qwt_fx.passes.insert_log_sqrt2_softmax import InsertLogSqrt2Softmax
from qwt_fx.passes.insert_observers import InsertObservers
from qwt_fx.passes.quantize_embeddings import QuantizeEmbeddings
from qwt_fx.passes.raise_sensitive_layers import RaiseSensitiveLayers
from qwt_fx.passes.remove_observers import RemoveObservers
from qwt_fx.passes.reparameterize_layer_norm import ReparameterizeLayerNorm

__all__ = [
    "CalibrateLayers",
    "Change",
    "ChooseSoftmaxQuantizer",
    "ConvertToIntegers",
    "DecomposeAttention",
    "FixConstantTokens",
    "FoldChannelWise",
    "InsertCompensation",
    "InsertLogSqrt2Softmax",
    "InsertObservers",
    "Pass",
    "PassManager",
    "PassResult",
    "QuantizeEmbeddings",
    "RaiseSensitiveLayers",
    "RemoveObservers",
    "ReparameterizeLayerNorm",
    "Skip",
]
