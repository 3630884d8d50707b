"""An FX graph as a networkx graph of plain values: what each node is, its module, line and sparsity."""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, Node

from autosparse_fx._compat import dynamo_graphs
from autosparse_fx.passes.insert_masks import FIELDS, MASK, STATE
from autosparse_fx.report import LayerReport
from autosparse_fx.view.names import input_name, short_name, source_line, target_name

GRADIENT = torch.ops.autosparse.anneal_gradient.default
# What a drawing leaves out at first, since it says little and is much: it is in the details of what reads it.
FOLDED = frozenset({"parameter", "state", "saved"})


@dataclass(frozen=True)
class Module:
    """One call of a module: what a drawing can collapse."""

    path: str  # full name, such as "layer1.0.relu"; that of the model is ""
    type: str
    parent: str | None  # id of the module that called it
    call: int = 0  # 1 for the second call of it in one graph
    backward: bool = False

    @property
    def label(self) -> str:
        """The name to show: the path, and which call of the module it is where there are several."""
        return self.path + (f" (call {self.call + 1})" if self.call else "") + (" backward" if self.backward else "")


def to_networkx(
    graph: Graph,
    *,
    names: Sequence[Mapping[str, str]] = (),
    layers: Iterable[LayerReport] = (),
    flops: Mapping[str, tuple[int, int | None]] | None = None,
    saved_from: Graph | None = None,
    inputs: Mapping[str, str] | None = None,
    backward: bool = False,
) -> nx.DiGraph:
    """Describe ``graph``, one networkx node for each node of it and an edge from each input to each use.

    Node attributes are strings, numbers and booleans, and those that are unknown are left out: ``op``, ``target``,
    ``label``, ``kind`` (input, parameter, state, saved, op, mask, gradient or output), ``module``, ``shape``,
    ``dtype``, ``is_mask``, ``is_gradient``, ``backward``, ``recompute``, ``tensor`` (full names), ``weight``,
    ``weight_shape``, ``numel``, ``sparsity``, ``threshold`` (the mean cut), ``flops``, ``sparse_flops``, ``source``.
    ``graph["modules"]`` maps the ids in ``module`` to :class:`Module`.

    Args:
        graph: of any stage.
        names: for each call of the graph, the full names of tensors by the names of their nodes.
        layers: the sparsity of the weights, as in ``report(model).layers``.
        flops: by the name of the node, of dense weights and, where that is known, without their zeros.
        saved_from: the joint graph that a backward graph was cut from; it knows where saved tensors come from.
        inputs: what to call the inputs, by the names of their nodes.
        backward: that all of the graph belongs to the backward pass, also what it computes again.
    """
    by_name = {name: layer for layer in layers for name in (layer.name, *layer.tied)}
    held = _names_of_nodes(graph, names)
    prefix = _prefix(graph, names[0] if names else {})
    origins = {node.name: node for node in saved_from.nodes} if saved_from is not None else {}
    made = nx.DiGraph()
    modules: dict[str, Module] = {}
    reads: dict[Node, list[str]] = {}  # the weights that a node is, masks, or uses
    state = _state(graph, held)
    for node in graph.nodes:
        own = held.get(node.name, [])
        kind = _kind(node, bool(own), node in state)
        phase = backward or _is_backward(node)
        chain = _modules_of(origins.get(node.name, node) if node.op == "placeholder" else node, prefix, phase)
        if kind in ("input", "output") or any(name.endswith(".autosparse_alpha") for name in own):
            chain = {}
        modules.update({key: module for key, module in chain.items() if key not in modules})
        weights = [name for name in own if name in by_name]
        if not own and kind in ("op", "mask", "gradient"):
            operands = [node.args[1]] if kind == "gradient" else node.all_input_nodes
            weights = [w for i in operands if isinstance(i, Node) and _holds_weight(i) for w in reads.get(i, [])]
        reads[node] = weights = list(dict.fromkeys(weights))
        attributes: dict[str, Any] = {
            "op": node.op,
            "target": target_name(node),
            "label": own[0] if own else _label(node, kind, inputs or {}),
            "kind": kind,
            "module": next(reversed(chain), ""),
            "is_mask": kind == "mask",
            "is_gradient": kind == "gradient",
            "backward": phase,
            "recompute": "recompute" in node.meta,
            **_value(node),
            **_sparsity([by_name[name] for name in weights]),
            **_own_names(own),
            "source": source_line(origins.get(node.name, node).meta.get("stack_trace") or ""),
        }
        if flops and node.name in flops:
            attributes["flops"], attributes["sparse_flops"] = flops[node.name]
        made.add_node(node.name, **{key: value for key, value in attributes.items() if value not in (None, "")})
        made.nodes[node.name].setdefault("module", "")
        made.add_edges_from((used.name, node.name) for used in node.all_input_nodes)
    _place_gradients(graph, made, modules)
    _place_parameters(made, modules, held)
    made.graph["modules"] = modules
    return made


def _label(node: Node, kind: str, inputs: Mapping[str, str]) -> str:
    if kind == "input":
        return inputs.get(node.name) or input_name(node.name)
    return node.name if kind == "saved" else short_name(node)


def _kind(node: Node, is_tensor_of_model: bool, is_state: bool) -> str:
    if node.op == "output":
        return "output"
    if node.target is MASK:
        return "mask"
    if node.target is GRADIENT:
        return "gradient"
    if is_state:
        return "state"
    if node.op in ("placeholder", "get_attr"):
        if is_tensor_of_model or node.op == "get_attr":
            return "parameter"
        is_saved = any(n.name.startswith("tangents") for n in node.graph.nodes) and not node.name.startswith("tangents")
        return "saved" if is_saved and not node.name.startswith("primals") else "input"
    return "op"


def _state(graph: Graph, held: Mapping[str, list[str]]) -> set[Node]:
    """The thresholds, offsets and alphas, and what turns them into the logits that the masks read."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.target in (MASK, GRADIENT):
            pending = list(node.args[-2:])
            while pending:
                used = pending.pop()
                if isinstance(used, Node) and used not in found and not _holds_gradient(used):
                    found.add(used)
                    pending += used.all_input_nodes
        suffixes = ("_threshold", "_offset", ".autosparse_alpha")
        if STATE in node.meta or any(name.endswith(suffixes) for name in held.get(node.name, [])):
            found.add(node)
    return found


def _holds_gradient(node: Node) -> bool:
    return _is_backward(node) and node.op != "placeholder"


def _is_backward(node: Node) -> bool:
    return "fwd_nn_module_stack" in node.meta or node.meta.get("partitioner_tag") == "is_backward"


def _holds_weight(node: Node) -> bool:
    """Whether a node stands for a weight: it itself, its mask, or a cast or view of one."""
    while node.op != "placeholder" and node.op != "get_attr" and node.target is not MASK:
        if len(node.all_input_nodes) != 1 or node.op == "output":
            return False
        node = node.all_input_nodes[0]
    return True


def _names_of_nodes(graph: Graph, names: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The full names of the tensor that a node holds, of every call."""
    found: dict[str, list[str]] = {}
    for call in names:
        for node, name in call.items():
            if name not in found.setdefault(node, []):
                found[node].append(name)
    for node in graph.nodes:
        weight, field = node.meta.get(STATE, (None, None))
        if field in FIELDS and weight in found:
            found[node.name] = [f"{name}_{field}" for name in found[weight]]
    return found


def _prefix(graph: Graph, names: Mapping[str, str]) -> str:
    """What the model calls the module that the paths in this graph start from: after a graph break, a part of it."""
    prefixes: Counter[str] = Counter()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.name in names and stack:
            inside = dynamo_graphs.module_name(next(reversed(stack.values()))[0])
            owner = names[node.name].rpartition(".")[0]
            if owner == inside or owner.endswith(f".{inside}") or not inside:
                prefixes[owner.removesuffix(inside).rstrip(".")] += 1
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _modules_of(node: Node, prefix: str, backward: bool) -> dict[str, Module]:
    """The calls of modules that a node stands in, outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    found: dict[str, Module] = {}
    entries = [("", prefix, "")] if prefix and stack else []
    for key, (path, module_type) in stack.items():
        inside = dynamo_graphs.module_name(str(path))
        full = ".".join(part for part in (prefix, inside) if part)
        type_name = module_type.__name__ if inspect.isclass(module_type) else str(module_type).rpartition(".")[2]
        if full == prefix and entries:
            entries[0] = (key, full, type_name)
        elif full:
            entries.append((key, full, type_name))
    parent = None
    for key, path, type_name in entries:
        call = int(key.rpartition("@")[2]) if "@" in str(key) else 0
        identity = path + (f"@{call}" if call else "") + ("~backward" if backward else "")
        found[identity] = Module(path, type_name, parent, call, backward)
        parent = identity
    return found


def _value(node: Node) -> dict[str, str]:
    value = node.meta.get("example_value", node.meta.get("val"))
    values = value if isinstance(value, (tuple, list)) else [value]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return {
        "shape": ", ".join("x".join(map(str, t.shape)) if t.dim() else "scalar" for t in tensors),
        "dtype": ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors)),
    }


def _sparsity(layers: Sequence[LayerReport]) -> dict[str, Any]:
    layers = list({layer.name: layer for layer in layers}.values())
    numel = sum(layer.numel for layer in layers)
    if not numel:
        return {}
    cuts = [layer.threshold for layer in layers if layer.threshold is not None]
    return {
        "weight": ", ".join(" = ".join((layer.name, *layer.tied)) for layer in layers),
        "weight_shape": ", ".join(dict.fromkeys("x".join(map(str, layer.shape)) for layer in layers)),
        "numel": numel,
        "sparsity": sum(layer.zeros for layer in layers) / numel,
        "threshold": sum(cuts) / len(cuts) if cuts and math.isfinite(sum(cuts)) else None,
    }


def _own_names(names: Sequence[str]) -> dict[str, str]:
    return {"tensor": ", ".join(names)} if names else {}


def _place_gradients(graph: Graph, made: nx.DiGraph, modules: Mapping[str, Module]) -> None:
    """Put what autograd adds on its own into the module of its latest input; sums of gradients, into the one around it.

    A sum joins the gradient that came along a residual connection with the one that a layer has just computed: it
    belongs where that layer was called.
    """
    callers = {module.parent for module in modules.values()}
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        data = made.nodes[node.name]
        inputs = [used for used in node.all_input_nodes if made.nodes[used.name]["backward"]]
        if node.op == "call_function" and not data["module"] and data["backward"] and inputs:
            module = made.nodes[max(inputs, key=order.__getitem__).name]["module"]
            is_between = any(made.nodes[used.name]["module"] != module for used in inputs)
            if module and module not in callers and is_between:
                module = modules[module].parent or ""
            data["module"] = module


def _place_parameters(made: nx.DiGraph, modules: Mapping[str, Module], held: Mapping[str, list[str]]) -> None:
    """Put parameters into the module that owns them, not the one that used them first."""
    by_path: dict[str, str] = {}
    for key, module in modules.items():
        by_path.setdefault(module.path, key)
    for name, owned in held.items():
        if name in made and not owned[0].endswith(".autosparse_alpha"):
            made.nodes[name]["module"] = by_path.get(owned[0].rpartition(".")[0], made.nodes[name]["module"])
