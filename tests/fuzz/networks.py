"""Random small networks, drawn by hypothesis as the source of a module: what is printed when one fails can be run.

All values are ``[ROWS, WIDTH]``, so that any layer can follow any other. Layers that want images or sequences view them
as such.
"""

import dataclasses
import itertools
import linecache
import sys
import types
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

ROWS, WIDTH = 3, 8

PRELUDE = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
    def forward(self, x, broken=False):
        x = torch.tanh(self.inner(x))
        if broken:
            torch._dynamo.graph_break()
        return x + self.out(x)
"""

# How to make a layer of each kind; a letter in braces in STATEMENTS asks for one of them.
LAYERS = {
    "L": "nn.Linear(8, 8)",
    "C": "nn.Conv2d(2, 2, 3, padding=1)",
    "G": "nn.Conv1d(2, 2, 1, groups=2, bias=False)",
    "T": "nn.ConvTranspose2d(2, 2, 1)",
    "B": "nn.Bilinear(8, 8, 8)",
    "A": "nn.MultiheadAttention(4, 2, batch_first=True)",
    "R": "nn.GRUCell(8, 8)",
    "N": "nn.LayerNorm(8)",
    "K": "Block()",
    "P": "nn.Parameter(torch.randn(8, 8) * 0.3)",
    "E": "nn.Embedding(8, 8)",
}
# {v} is the new value, {a} and {b} are earlier ones.
STATEMENTS = [
    # layers
    "{v} = self.{L}({a})",
    "{v} = self.{C}({a}.view(3, 2, 2, 2)).flatten(1)",
    "{v} = self.{G}({a}.view(3, 2, 4)).flatten(1)",
    "{v} = self.{T}({a}.view(3, 2, 2, 2)).flatten(1)",
    "{v} = torch.tanh(self.{B}({a}, {b}))",
    "{v} = self.{A}({a}.view(3, 2, 4), {b}.view(3, 2, 4), {b}.view(3, 2, 4), need_weights=False)[0].reshape(3, 8)",
    "{v} = self.{R}({a}, torch.tanh({b}))",
    "{v} = self.{N}({a})",
    "{v} = self.{K}({a})",
    "{v} = {a} + self.{E}(torch.arange(3))",
    # weights that the code itself multiplies by, as they are and as views
    "{v} = F.linear({a}, self.{L}.weight, self.{L}.bias)",
    "{v} = {a} @ self.{L}.weight.t()",
    "{v} = torch.einsum('bi,oi->bo', {a}, self.{L}.weight)",
    "{v} = torch.addmm(self.{L}.bias, {a}, self.{L}.weight.T)",
    "{v} = torch.cat([F.linear({a}, part) for part in self.{L}.weight.chunk(2)], 1)",
    "{v} = torch.bmm({a}.view(3, 2, 4).transpose(0, 1), self.{L}.weight.view(2, 4, 8)).sum(0)",
    "{v} = F.conv2d({a}.view(3, 2, 2, 2), self.{C}.weight, padding=1).reshape(3, 8)",
    "{v} = {a} @ self.{L}.weight",
    "{v} = {a} @ self.{P}",
    "{v} = torch.matmul(self.{P}.T, {a}.T).T",
    # a weight that is used for something else as well
    "{v} = self.{L}({a}) * self.{L}.weight.mean()",
    "{v} = self.{L}({a}) + self.{L}.weight[0]",
    "{v} = {a} * self.{L}.weight.std(1)",
    "{v} = F.linear({a}, self.{L}.weight * 0.5)",
    # weights used more than once
    "{v} = self.{L}(torch.relu(self.{L}({a})))",
    "{v} = {a}\nfor _ in range(3):\n    {v} = torch.tanh(self.{L}({v}))",
    # branches and activations
    "{v} = {a} + {b}",
    "{v} = torch.tanh({a}) * torch.sigmoid({b})",
    "{v} = torch.cat([{a}[:, :4], {b}[:, 4:]], 1)",
    "{v} = torch.where({a} > 0, {a}, {b})",
    "{v} = F.gelu({a})",
    "{v} = {a}.detach() - {b}",
    # views
    "{v} = {a}.view(3, 2, 4).transpose(1, 2).reshape(3, 8)",
    "{v} = torch.stack({a}.chunk(2, 1), 2).flatten(1)",
    "{v} = {a}.flip(1).narrow(1, 0, 8)",
    # in place
    "{v} = self.{L}({a})\n{v} += {b}",
    "{v} = F.relu(self.{L}({a}), inplace=True)",
    "{v} = {a}.clone()\n{v}[:, 0] = {b}[:, 1]",
    "{v} = {a}.clone()\n{v}.view(3, 2, 4)[:, 1].mul_(0.5).add_({b}[:, :4])",
    "{v} = torch.zeros_like({a})\n{v}.copy_(self.{L}({a}))",
    # control flow
    "torch._dynamo.graph_break()\n{v} = {a}",
    "{v} = self.{L}({a})\ntorch._dynamo.graph_break()\n{v} = self.{L}({v})",
    "{v} = self.{K}({a}, broken=True)",
    "if {a}.sum() > 0:\n    {v} = self.{L}({a})\nelse:\n    {v} = -self.{L}({b})",
    "if self.training:\n    {v} = self.{L}({a})\nelse:\n    {v} = {b}",
    "if {a}.mean().item() > 0:\n    {v} = {a} * 0.5\nelse:\n    {v} = {a} * 2",
    # around autograd
    "with torch.no_grad():\n    {v} = self.{L}({a})",
    "{v} = checkpoint(self.{L}, {a}, use_reentrant=False)",
    "{v} = checkpoint(lambda a: torch.tanh(self.{L}(a)) + self.{L}.weight[1], {a}, use_reentrant=False)",
]
_numbers = itertools.count()


@dataclasses.dataclass
class Network:
    """The source of a module ``Net``, with the seed of its weights and the granularity of its thresholds."""

    layers: dict[str, str]
    ties: list[tuple[str, str]]
    body: list[str]
    returned: list[str]
    seed: int
    granularity: str

    def __repr__(self) -> str:
        return f"\n# seed {self.seed}, a threshold per {self.granularity}{PRELUDE}\n{self.source()}"

    def source(self) -> str:
        init = [f"self.{name} = {layer}" for name, layer in self.layers.items()]
        init += [f"self.{name} = self.{other}" for name, other in self.ties]
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in init]
        lines += ["    def forward(self, v0):"]
        lines += [f"        {line}" for statement in self.body for line in statement.splitlines()]
        return "\n".join([*lines, f"        return {', '.join(self.returned)}", ""])

    def build(self) -> nn.Module:
        text = PRELUDE + self.source()
        name = f"<network {next(_numbers)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)  # for tracebacks
        module: Any = types.ModuleType("random_network")
        sys.modules[module.__name__] = module  # Dynamo imports it
        exec(compile(text, name, "exec"), module.__dict__)
        torch.manual_seed(self.seed)
        net: nn.Module = module.Net().double()
        return net

    def inputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]

    def axis(self, name: str) -> int:
        """The dimension of a weight that holds the output channels."""
        layer = self.layers.get(name.split(".")[0], "")
        return 1 if layer in (LAYERS["P"], LAYERS["T"]) else 0


@st.composite
def networks(draw: st.DrawFn, statements: int = 7) -> Network:
    layers: dict[str, str] = {}
    ties: list[tuple[str, str]] = []
    body: list[str] = []
    values = ["v0"]
    for statement in draw(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=statements)):
        names = {"v": f"v{len(values)}", "a": draw(st.sampled_from(values[-3:])), "b": draw(st.sampled_from(values))}
        for kind in LAYERS:
            if f"{{{kind}}}" in statement:
                names[kind] = _layer(draw, kind, layers, ties)
        body.append(statement.format(**names))
        values.append(names["v"])
    returned = [values[-1], *draw(st.lists(st.sampled_from(values), max_size=1))]
    seed, granularity = draw(st.integers(0, 99)), draw(st.sampled_from(["layer", "channel"]))
    return Network(layers, ties, body, returned, seed, granularity)


def _layer(draw: st.DrawFn, kind: str, layers: dict[str, str], ties: list[tuple[str, str]]) -> str:
    """One that is there, or a new one, which may have the weight of another."""
    there = [name for name in layers if name[0] == kind.lower()]
    if there and draw(st.booleans()):
        return draw(st.sampled_from(there))
    name = f"{kind.lower()}{len(layers)}"
    layers[name] = LAYERS[kind]
    alike = [other for other in layers if other != name and layers[other] in (LAYERS["L"], LAYERS["E"])]
    if kind in "LE" and alike and draw(st.booleans()):
        ties.append((f"{name}.weight", f"{draw(st.sampled_from(alike))}.weight"))
    return name
