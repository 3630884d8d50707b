"""A model with layers of all kinds, and what of it two models must have in common."""

import torch
from torch import Tensor, nn

from autosparse_fx import AutoSparse, sparsify

CONFIG = AutoSparse(alpha=0.5, threshold_init=-2.5)


class Everything(nn.Module):
    """One of each kind of masked module, with batch norm's buffers, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.mix = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.encoder(x)
        y, _ = self.lstm(x)
        return self.head(self.mix(y[..., :8].contiguous(), y[..., 8:].contiguous()))


IDS = torch.arange(12).reshape(2, 6) % 11


def sparse_model(config: AutoSparse = CONFIG) -> Everything:
    """A model whose every piece of state differs from its initial value."""
    model = sparsify(Everything(), config)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("_threshold"):
                t.normal_()
            elif name.endswith("_offset"):
                t.add_(torch.randn(t.shape) / 4)
            elif name.endswith("running_var"):
                t.uniform_(0.5, 1.5)
    return model.eval()


def alphas(model: nn.Module) -> list[Tensor]:
    found = {id(b): b for name, b in model.named_buffers(remove_duplicate=False) if "alpha" in name}
    return list(found.values())


def own_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, t) for name, t in named if name.endswith(("_threshold", "_offset"))]


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    with torch.no_grad():
        assert torch.equal(found(IDS), expected(IDS))
