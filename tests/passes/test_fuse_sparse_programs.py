"""fuse_sparse_programs: what becomes one program, and that it computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.graphs import CONVOLUTION, PROGRAM, SPARSE_CONV, SPARSE_LINEAR, Captured, Function, prune
from torch import Tensor, nn

from autosparse_fx.passes import fuse_sparse_programs, lower_sparse_conv, lower_sparse_linear

aten = torch.ops.aten
G = torch.Generator().manual_seed(0)
X, X3 = torch.randn(2, 16, 20, 20, generator=G), torch.randn(3, 20, 64, generator=G)


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **arguments)


def fused(forward: Callable[..., Any], *inputs: Tensor, **layers: nn.Module) -> tuple[Captured, int]:
    return fuse(Captured(prune(Function(forward, **layers)), *inputs))


def fuse(graph: Captured) -> tuple[Captured, int]:
    graph.apply(lower_sparse_conv)
    graph.apply(lower_sparse_linear)
    count = graph.apply(fuse_sparse_programs)
    assert count == graph.count(PROGRAM)
    assert not graph.count(SPARSE_CONV) and not graph.count(SPARSE_LINEAR)
    return graph, count


def test_row_of_convolutions_is_one_program() -> None:
    model = prune(
        nn.Sequential(conv(), nn.ReLU(), conv(), nn.SiLU(), conv(16, 32, 1), nn.ReLU(), conv(32, 8, stride=2))
    )
    graph, count = fuse(Captured(model, X))
    assert count == 1
    (call,) = graph.nodes(PROGRAM)
    assert len(call.args[1]) == 1 and call.args[3] == [3, 8, 10, 10]
    assert len(dict(graph.gm.named_buffers())) == 1  # the weights are in the program
    assert graph.count(CONVOLUTION) == 0


def test_row_of_products_is_one_program() -> None:
    model = prune(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)))
    graph, count = fuse(Captured(model, X3))
    assert count == 1
    assert graph.nodes(PROGRAM)[0].args[3] == [1, 32]


def test_branches_and_residuals_are_one_program() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        z = F.relu(m.c(F.relu(m.b(y))) + y)
        return F.relu(m.d(z) + m.e(y)) + 1

    layers = {"a": conv(), "b": conv(kernel=1), "c": conv(), "d": conv(), "e": conv(kernel=1)}
    graph, count = fused(forward, X, **layers)
    assert count == 1 and len(graph.nodes(PROGRAM)[0].args[1]) == 1


def test_every_result_that_is_used_elsewhere_is_an_output() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        z = F.relu(m.b(y))
        return y.sum(), m.c(z), z

    graph, count = fused(forward, X, a=conv(), b=conv(), c=conv())
    assert count == 1
    assert graph.nodes(PROGRAM)[0].args[3] == [3, 16, 20, 20] * 3


def test_layers_around_something_else_are_two_programs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.max_pool2d(F.relu(m.a(x)), 2))

    assert fused(forward, X, a=conv(), b=conv())[1] == 2


def test_something_else_beside_a_row_does_not_make_a_cycle() -> None:
    """``b`` needs a sum that needs ``a``: they are one program only if nothing between them is outside of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        z = F.relu(m.b(torch.tanh(y)))
        return m.c(z + y) + m.d(y)

    _, count = fused(forward, X, a=conv(), b=conv(), c=conv(), d=conv())
    assert count >= 2


def test_dense_layer_between() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    prune(model[0])
    prune(model[4])
    graph, count = fuse(Captured(model, X))
    assert count == 2 and graph.count(CONVOLUTION) == 1


def test_user_that_stands_before_a_later_input_is_moved() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        a = F.relu(m.a(x))
        early = a.sum()
        late = F.softsign(y)
        return early * 2, F.relu(m.b(a) + late), early + late.sum()

    _, count = fused(forward, X, torch.randn(2, 16, 20, 20), a=conv(), b=conv())
    assert count == 1


@pytest.mark.parametrize("flipped", [False, True])
def test_input_of_something_else(flipped: bool) -> None:
    """The inputs of the graph stay in front, whatever the order of those that the program reads."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = (y, x) if flipped else (x, y)
        return m.b(F.relu(m.a(x))) * y

    graph, _ = fused(forward, X, torch.randn(2, 16, 20, 20), a=conv(), b=conv())
    operators = [node.op for node in graph.gm.graph.nodes]
    assert operators.index("call_function") > max(i for i, op in enumerate(operators) if op == "placeholder")


def test_programs_of_two_batch_sizes() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        return m.a(x), m.b(y)

    _, count = fused(forward, X, torch.randn(3, 16, 20, 20), a=conv(), b=conv())
    assert count == 2


def test_layers_side_by_side_with_one_batch_size() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        return m.a(x), m.b(y)

    _, count = fused(forward, X, torch.randn(2, 16, 9, 20), a=conv(), b=conv())
    assert count in (1, 2)


def test_batch_that_is_folded_into_channels_between_layers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y.view(4, 8, 20, 20).contiguous()).view(2, 32, 20, 20)

    assert fused(forward, X, a=conv(), b=conv(8, 16))[1] == 2


def test_products_of_the_same_tokens() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.q(x), m.k(x).transpose(1, 2), F.gelu(m.v(x))

    layers = {name: nn.Linear(64, rows, bias=name != "k") for name, rows in (("q", 64), ("k", 64), ("v", 96))}
    _, count = fused(forward, X3, **layers)
    assert count >= 1


def test_attention_block() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.n1(x)
        x = x + m.attention(y, y, y, need_weights=False)[0]
        return x + m.b(F.gelu(m.a(m.n2(x))))

    layers = {
        "attention": nn.MultiheadAttention(64, 4, batch_first=True), "n1": nn.LayerNorm(64), "n2": nn.LayerNorm(64),
        "a": nn.Linear(64, 256), "b": nn.Linear(256, 64),
    }  # fmt: skip
    assert fused(forward, X3, **layers)[1] == 3


def test_convolutions_and_products_are_programs_of_their_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x)).flatten(2).transpose(1, 2))

    assert fused(forward, X, a=conv(), b=nn.Linear(16, 64))[1] == 2


def test_mobile_block() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for number in range(2):
            y = F.relu6(m.get_submodule(f"wide{number}")(x))
            y = F.relu6(m.get_submodule(f"deep{number}")(y))
            x = m.get_submodule(f"thin{number}")(y) + x
        return x

    layers: dict[str, nn.Module] = {}
    for number in range(2):
        layers |= {f"wide{number}": conv(16, 48, 1), f"deep{number}": conv(48, 48, groups=48),
                   f"thin{number}": conv(48, 16, 1)}  # fmt: skip
    model = prune(Function(forward, **layers))
    for name, layer in layers.items():
        if name.startswith("deep"):
            nn.init.normal_(layer.weight, 0, 0.3)
    assert fuse(Captured(model, X))[1] == 1


def test_channels_last_input_is_read_as_it_is_where_that_is_possible() -> None:
    x = X.to(memory_format=torch.channels_last)
    for kernel, layouts in ((1, [0]), (3, [])):
        torch._dynamo.reset()
        graph, _ = fused(lambda m, x: m.b(F.relu(m.a(x))), x, a=conv(16, 48, kernel), b=conv(48, 48))
        assert graph.nodes(PROGRAM)[0].args[2] == layouts


def test_weight_of_two_layers_and_two_programs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(F.softsign(m.a(x)))

    assert fused(forward, X, a=conv())[1] == 2


def test_graph_without_sparse_layers_is_left_alone() -> None:
    graph = Captured(nn.Sequential(conv(), nn.ReLU()), X)
    code = graph.gm.code
    assert graph.apply(fuse_sparse_programs) == 0
    assert graph.gm.code == code
