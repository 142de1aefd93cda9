"""Text encoders with a mask: every family is captured, quantized, stored and loaded again.

`tests/test_zoo.py` does the same for models of one input.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.clip.towers import TextTower
from qwt_fx.errors import CaptureError

LENGTH, PAD, START, END = 12, 0, 62, 63
# Each library calls the same sizes by other names; a configuration takes what it knows.
SIZES = {
    "hidden_size": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "projection_dim": 16,
    "intermediate_size": 64, "d_ff": 64, "hidden_dim": 64, "d_kv": 16, "head_dim": 16,
    "num_hidden_layers": 1, "num_layers": 1, "n_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "n_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 24,
    "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
}  # fmt: skip
FAST = ("CLIPTextModelWithProjection", "XLMRobertaModel")
FAMILIES = (
    *FAST, "CLIPTextModel", "SiglipTextModel", "Siglip2TextModel", "BertModel", "RobertaModel",
    "DistilBertModel", "AlbertModel", "ElectraModel", "MPNetModel", "DebertaV2Model",
    "T5EncoderModel", "MT5EncoderModel", "ModernBertModel", "BlipTextModel", "AltCLIPTextModel",
    "ChineseCLIPTextModel", "CLIPSegTextModel", "XCLIPTextModel", "Owlv2TextModel",
)  # fmt: skip


def _ids(samples: int) -> tuple[Tensor, Tensor]:
    """Texts that end at different places, and what is not padding."""
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(2, START, (samples, LENGTH), generator=generator)
    ends = torch.randint(LENGTH // 2, LENGTH, (samples, 1), generator=generator)
    place = torch.arange(LENGTH)
    ids = torch.where(place > ends, PAD, torch.where(place == ends, END, ids))
    return ids, (place <= ends).long()


def _assert_stored(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> None:
    gm = qwt_fx.capture(model, inputs)
    q = qwt_fx.quantize(gm, inputs, [inputs], QuantConfig(8, 8, recipe="repq-vit"))
    qwt_fx.save(q, folder)
    loaded = qwt_fx.load(folder)
    with torch.no_grad():
        wanted, exact, kept, again = (tree_leaves(g(*inputs)) for g in (model, gm, q, loaded))
    for a, b in zip(wanted, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    with pytest.raises(qwt_fx.QwtError, match=rf"wanted \(n, {LENGTH}\)"):
        loaded(*(torch.cat([x, x], 1) for x in inputs))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES],
)
def test_ids_and_mask(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES)).eval()
    _assert_stored(model, _ids(3), tmp_path / "artifact")


@pytest.mark.parametrize(
    "pooler", ["mean_pooler", pytest.param("cls_pooler", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["Roberta", pytest.param("Bert", marks=pytest.mark.slow)])
def test_text_towers_that_open_clip_takes_from_hugging_face(
    kind: str, pooler: str, tmp_path: Path
) -> None:
    """They make the mask of the ids themselves, which are no longer than the context."""
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    torch.manual_seed(0)
    encoder = HFTextEncoder(
        "local", output_dim=16, config=config, pooler_type=pooler, proj_type="mlp", pretrained=False
    )
    model = nn.Module()
    model.visual, model.text = nn.Identity(), encoder
    _assert_stored(TextTower(model.eval()), _ids(3)[:1], tmp_path / "artifact")


class Drawn(nn.Module):
    """Reads a table by an operator that no stored graph may call: it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand_like(x)


def test_a_graph_that_cannot_be_stored_says_so_at_capture(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    said = r"not saved: node rand_like: the operator aten.rand_like.default is not on the list"
    with pytest.warns(UserWarning, match=said):
        gm = qwt_fx.capture(Drawn(), (x,))
    q = qwt_fx.quantize(gm, (x,), [x], QuantConfig(recipe="repq-vit"))  # for use in Python alone
    assert q(x).shape == x.shape
    with pytest.raises(qwt_fx.QwtError, match="rand_like"):
        qwt_fx.save(q, tmp_path / "artifact")


def test_the_program_refuses_a_tower_that_cannot_be_stored_before_it_calibrates() -> None:
    from qwt_fx.capture.capture import capture
    from qwt_fx.commands.quantize.pipeline import require_storable

    with pytest.raises(CaptureError, match=r"text tower: the graph can be quantized.*rand_like"):
        require_storable({"text": capture(Drawn(), (torch.randn(3, 4),))})
