"""Small models that hold 90 % zeros, and how their compiled form is compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.compare import assert_close
from kernels.graphs import prune
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from autosparse_fx.kernels import choice


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two bottlenecks, the second with a convolution beside it, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.a1, self.a2, self.a3 = conv(16, 16, 1), conv(16, 16), conv(16, 16, 1)
        self.b1, self.b2, self.b3, self.side = conv(16, 16, 1), conv(16, 16, 3, 2), conv(16, 64, 1), conv(16, 64, 1, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a3(F.relu(self.a2(F.relu(self.a1(x))))) + x)
        x = F.relu(self.b3(F.relu(self.b2(F.relu(self.b1(x))))) + self.side(x))
        return self.head(x.mean((2, 3)))


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3)
        self.wide, self.deep, self.thin = conv(16, 64, 1), conv(64, 64, 3, 1, 64), conv(64, 16, 1)
        self.last = conv(16, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = x + self.thin(F.relu6(self.deep(F.relu6(self.wide(x)))))
        return F.relu6(self.last(x)).mean((2, 3))


class Mlp(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.mlp(x + self.attention(y, y, y, need_weights=False)[0])


class Speech(nn.Module):
    """Convolutions over time, of features that are side by side at each time: the first shortens, another one looks
    further, one is depthwise, and a residual is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(24, 32, 5, stride=2, padding=2), nn.BatchNorm1d(32), nn.ELU())
        self.wide = nn.Sequential(
            nn.Conv1d(32, 64, 3, padding=4, dilation=4, bias=False), nn.BatchNorm1d(64), nn.GELU()
        )
        self.deep = nn.Sequential(nn.Conv1d(64, 64, 3, padding=1, groups=64), nn.SiLU())
        self.thin, self.head = nn.Conv1d(64, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2))
        x = F.leaky_relu(self.thin(self.deep(self.wide(x))) + x)
        return self.head(x.transpose(1, 2))


class Stack(nn.Module):
    """Two convolutions and their activations; the smallest model that is one program."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.silu(self.first(x))))


MODELS: dict[str, tuple[type[nn.Module], Callable[[int], Tensor]]] = {
    "stack": (Stack, lambda batch: torch.randn(batch, 16, 12, 14)),
    "residual": (Residual, lambda batch: torch.randn(batch, 3, 21, 20)),
    "mobile": (Mobile, lambda batch: torch.randn(batch, 3, 20, 18)),
    "speech": (Speech, lambda batch: torch.randn(batch, 45, 24)),
    "mlp": (Mlp, lambda batch: torch.randn(batch, 21, 64)),
    "attention": (Block, lambda batch: torch.randn(batch, 21, 64)),
}


@dataclass
class Seen:
    """What the backend did: how many programs ran, and the graphs that were handed to Inductor."""

    programs: int
    graphs: list[GraphModule]

    @property
    def compilations(self) -> int:
        return len(self.graphs)


def small_layers_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers as small as these run sparse, which by the estimates they would not."""
    monkeypatch.setattr(choice, "WORTHWHILE", 0)


def compiled(model: nn.Module, **arguments: Any) -> Any:
    return torch.compile(model, backend="autosparse", **arguments)


def made(name: str = "stack", sparsity: float = 0.9) -> nn.Module:
    model = prune(MODELS[name][0](), sparsity).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1:
            nn.init.normal_(module.weight, 0, 0.3)  # as they stay in a pruned MobileNet
    return model


def inputs_of(name: str = "stack", batch: int = 2) -> Tensor:
    return MODELS[name][1](batch)


def dense(model: nn.Module, *inputs: Any) -> Any:
    """What the model computes, eagerly, in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        return copy.deepcopy(model).double()(*wide)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for y, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, Tensor):
            assert_close(y, wanted, tolerance)
        else:
            assert y == wanted


def check(compiled: Any, model: nn.Module, *inputs: Any, tolerance: float = 1e-5) -> Any:
    """Compare a call under no_grad with the dense computation."""
    with torch.no_grad():
        found = compiled(*inputs)
    assert_same(found, dense(model, *inputs), tolerance)
    return found
