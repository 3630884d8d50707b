"""The one-line form over models of transformers and torchvision, small and random."""

from collections.abc import Callable

import pytest
import torch
from hidden.compare import check, error, one_line, without_inductor
from torch import Tensor, nn

from autosparse_fx import report, thresholds

pytestmark = [
    # The libraries and their dependencies warn about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(10)  # of std 0.02, which one cut of 0.076 would mask altogether

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip

    class Bert(Logits):
        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits  # type: ignore[no-any-return]

    return Bert(transformers.BertForMaskedLM(config))


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_transformers_model_equals_the_prepared_one(make: Callable[[], nn.Module]) -> None:
    """Also Hugging Face's own Conv1D, stored ``[in, out]``, and the embedding that is the head's weight."""
    model = make()
    axes = {name: 1 for name, _ in model.named_parameters() if ".c_" in name}
    masked = check(model, IDS, config={"granularity": "channel"}, axes=axes, rtol=1e-3, atol=1e-3)
    (embedding,) = report(model).masked_embeddings
    assert embedding in masked and not any("position" in n or "wpe" in n or "norm" in n for n in masked)
    if make is gpt2:
        assert thresholds(model)["model.transformer.h.1.attn.c_attn.weight"].shape == (48,)


def test_resnet18_equals_the_prepared_one() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    masked = check(model, torch.randn(2, 3, 32, 32), rtol=1e-2, atol=1e-3)
    assert masked == {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight, std=0.2)  # which starts at zero
    return model  # type: ignore[no-any-return]


def test_vision_transformer_equals_the_prepared_one() -> None:
    model = vit()
    masked = check(model, torch.randn(2, 3, 16, 16), rtol=1e-3, atol=1e-3)
    assert "class_token" not in masked and "encoder.pos_embedding" not in masked
    assert len(masked) == 1 + 2 * 4 + 1


def test_vision_transformer_is_never_half_dense_in_silence() -> None:
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_line(model)(torch.randn(2, 3, 16, 16)).sum().backward()
    if len(thresholds(model)) < 10:
        assert "self_attention" in error(optimizer.step)
