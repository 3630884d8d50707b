"""Inference graphs of small models, and what is checked of every pass over them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernels.compare import assert_close
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from autosparse_fx._compat.aot_autograd import inference_graph
from autosparse_fx.inference import with_state_as_inputs
from autosparse_fx.kernels.choice import CHOICE, Choice
from autosparse_fx.passes.constants import with_constants
from autosparse_fx.pipeline import run_passes

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
PROGRAM = torch.ops.autosparse.run_program.default
SPARSE_CONV = torch.ops.autosparse.sparse_conv.default
SPARSE_LINEAR = torch.ops.autosparse.sparse_linear.default


def prune(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """Zero so many weights of every convolution and product, at random; normalisations get statistics of some kind."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.mul_(torch.rand_like(parameter.float()) >= sparsity).mul_((1 - sparsity) ** -0.5)
                elif isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight":
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0, 0.3)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def conv(inputs: int = 16, outputs: int = 32, kernel: int = 3, padding: int = 1, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, **arguments)


@contextmanager
def cleanings() -> Iterator[list[Graph]]:
    """Collect the graphs that are gone through for nodes that nothing uses, each as often as it is."""
    found: list[Graph] = []
    clean = Graph.eliminate_dead_code

    def note(graph: Graph, *arguments: Any) -> bool:
        found.append(graph)
        return clean(graph, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "eliminate_dead_code", note)
        yield found


class Function(nn.Module):
    """Some layers by name, and how they are called."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Captured:
    """The ATen graph of a model in evaluation whose weights are constants."""

    def __init__(self, model: nn.Module, *inputs: Tensor, train: bool = False) -> None:
        self.model, self.inputs = model.train(train), inputs
        self.graphs: list[GraphModule | str] = []
        with torch.no_grad():
            torch.compile(model, backend=self._capture, fullgraph=True)(*inputs)

    def _capture(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        lifted, state = with_state_as_inputs(gm)
        graph = inference_graph(lifted)
        self.graphs.append(graph if isinstance(graph, str) else with_constants(graph, state))
        return gm.forward

    @property
    def gm(self) -> GraphModule:
        (graph,) = self.graphs
        assert isinstance(graph, GraphModule)
        return graph

    def apply(self, *passes: Callable[[GraphModule], int]) -> int:
        """Run passes; see that the graph computes the same, and that the last changes nothing when run again.

        Returns:
            The number of changes that the last one made.
        """
        changes = list(run_passes(self.gm, passes, "inference").values())[-1]
        self.check()
        code, buffers = self.gm.code, dict(self.gm.named_buffers())
        assert run_passes(self.gm, passes[-1:], "inference") == {passes[-1].__name__: 0}
        assert self.gm.code == code
        assert {n: id(b) for n, b in self.gm.named_buffers()} == {n: id(b) for n, b in buffers.items()}
        return changes

    def check_left_alone(self, graph_pass: Callable[[GraphModule], int], reason: str) -> None:
        """See that a pass changes nothing, and says of a layer that this is why."""
        code = self.gm.code
        assert self.apply(graph_pass) == 0
        assert self.gm.code == code
        assert any(reason in given for given in self.reasons()), self.reasons()

    def check(self) -> None:
        self.gm.graph.lint()
        used = {str(node.target) for node in self.gm.graph.nodes if node.op == "get_attr"}
        assert {name for name, _ in self.gm.named_buffers()} <= used
        wide = copy.deepcopy(self.model).double()
        inputs = [x.double() if x.is_floating_point() else x for x in self.inputs]
        with torch.no_grad():
            expected = [y for y in tree_leaves(wide(*inputs)) if isinstance(y, Tensor)]
            found = self.gm(*self.inputs)
        assert len(found) == len(expected)
        outputs = self.gm.graph.output_node().args[0]
        for y, wanted, node in zip(found, expected, outputs, strict=True):
            assert_close(y, wanted, 2e-2 if y.dtype.itemsize == 2 else 1e-5)
            assert tuple(node.meta["val"].shape) == tuple(y.shape)
            assert node.meta["val"].dtype == y.dtype

    def nodes(self, target: object) -> list[Node]:
        return list(self.gm.graph.find_nodes(op="call_function", target=target))

    def count(self, target: object) -> int:
        return len(self.nodes(target))

    def choices(self) -> list[Choice]:
        return [node.meta[CHOICE] for node in self.gm.graph.nodes if CHOICE in node.meta]

    def reasons(self) -> list[str]:
        """Why layers stayed dense."""
        return [choice.reason for choice in self.choices() if not choice.is_sparse]
