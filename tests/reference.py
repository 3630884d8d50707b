"""An independent form of what the package computes, and the small models that the tests train.

Nothing here uses the package's own arithmetic: masks and gradients come from ordinary autograd over the definition.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked(w: Tensor, s: Tensor, alpha: Tensor | float) -> Tensor:
    """Survivors shrink by ``g = sigmoid(s)``; the others are 0, and pass ``alpha`` of their gradient."""
    g = torch.sigmoid(s)
    x = w - torch.sign(w) * g
    return torch.where(w.abs() > g, x, alpha * (x - x.detach()))


def gradients(w: Tensor, s: Tensor, alpha: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(value, dw, ds)`` in float64, for weights and thresholds of any dtype."""
    w64 = w.detach().double().requires_grad_()
    s64 = s.detach().double().requires_grad_()
    value = masked(w64, s64, alpha)
    dw, ds = torch.autograd.grad(value, (w64, s64), grad.double())
    return value.detach(), dw, ds


def masked_parameters(model: nn.Module, scale: float = 0.1) -> Iterator[tuple[str, nn.Module, nn.Parameter, Tensor]]:
    """``(name, module, stored weight, logit that broadcasts to it)`` for every masked weight, each tensor once.

    Reads nothing but parameters and buffers by their documented names.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, threshold in list(module._parameters.items()):
            name = key.removesuffix("_threshold")
            if name == key or threshold is None:
                continue
            weight = module._parameters[name]
            assert weight is not None
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            offset = module._buffers[f"{name}_offset"]
            assert offset is not None
            s = (offset + scale * threshold).detach()
            if s.numel() > 1:
                shape = [1] * weight.dim()
                shape[channel_axis(module)] = -1
                s = s.view(shape)
            yield (f"{prefix}.{name}" if prefix else name), module, weight, s


def channel_axis(module: nn.Module) -> int:
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return 1 if isinstance(module, transposed) or type(module).__name__ == "Conv1D" else 0


def zero_counts(model: nn.Module, scale: float = 0.1) -> dict[str, tuple[int, int]]:
    """``{name: (zeros, elements)}`` of every masked weight, counted from the definition: ``|w| <= sigmoid(s)``."""
    return {
        name: (int((weight.detach().float().abs() <= torch.sigmoid(s)).sum()), weight.numel())
        for name, _, weight, s in masked_parameters(model, scale)
    }


def total_sparsity(model: nn.Module, scale: float = 0.1) -> float:
    counts = zero_counts(model, scale).values()
    return sum(zeros for zeros, _ in counts) / sum(numel for _, numel in counts)


def layer_sparsities(model: nn.Module, scale: float = 0.1) -> dict[str, float]:
    return {name: zeros / numel for name, (zeros, numel) in zero_counts(model, scale).items()}


def mlp(inputs: int = 16, hidden: int = 64, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class ConvNet(nn.Module):
    """Convolutions with batch norm and a linear head, over ``[N, 1, 8, 8]``."""

    def __init__(self, width: int = 16, outputs: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width * 16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.flatten(1))


class Residual(nn.Module):
    """``x + branch(x)`` between two linear layers, over ``[N, inputs]``."""

    def __init__(self, inputs: int = 16, width: int = 64, outputs: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.branch(x)))


class Tied(nn.Module):
    """An embedding and an output projection of one tensor, with a linear layer between; over token ids ``[N, T]``."""

    def __init__(self, tokens: int = 50, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.mid = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(self.embed(ids))))


def classification_batches(
    steps: int, shape: tuple[int, ...] = (16,), classes: int = 4, batch: int = 32, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Learnable batches: one noisy prototype per class, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(classes, *shape, generator=generator)
    for _ in range(steps):
        y = torch.randint(classes, (batch,), generator=generator)
        yield prototypes[y] + torch.randn(batch, *shape, generator=generator), y


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    after_step: Callable[[], object] | None = None,
) -> list[float]:
    """The ordinary training loop; returns the losses."""
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if after_step is not None:
            after_step()
    return losses
