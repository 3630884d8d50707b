"""What each command prints or writes."""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

import autosparse_fx
from autosparse_fx.cli.models import make_model
from autosparse_fx.flops import ModelFlops, count_flops
from autosparse_fx.history import History
from autosparse_fx.sparsity_report import UNITS
from autosparse_fx.tables import short, text_table


def report(args: argparse.Namespace) -> None:
    """Print the report of a model."""
    model, inputs, state = make_model(args.model, args.weights, args.input)
    annealer = state.get("annealer")
    try:
        history = History.from_state(annealer["history"]) if annealer and "history" in annealer else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the history of the annealer in {str(args.weights)!r} is damaged ({error!r})") from error
    made = autosparse_fx.report(model.train(args.train), inputs, unit="macs" if args.macs else "flops", history=history)
    print(made.to_json(indent=1) if args.json else made)


def flops(args: argparse.Namespace) -> None:
    """Print what a model multiplies, in numbers or as a formula."""
    model, inputs, _ = make_model(args.model, args.weights, args.input)
    dynamic, inputs = _dynamic_shapes(args.dynamic, inputs)
    counted = count_flops(model.train(args.train), inputs, dynamic)
    sparsities = _sparsities(args.sparsity, counted) if args.sparsity else _zeros(model, counted)
    unit, factor = UNITS["macs" if args.macs else "flops"]
    pooling = counted.pooling if args.macs else 0
    parts = {
        "forward": (counted.dense.forward + pooling, counted.sparse.forward + pooling),
        "gradient of activations": (counted.dense.input_gradient, counted.sparse.input_gradient),
        "gradient of weights, alpha > 0": (counted.dense.weight_gradient, counted.sparse.weight_gradient),
        "gradient of weights, alpha = 0": (counted.dense.weight_gradient, counted.settled.weight_gradient),
        "training step, alpha > 0": (counted.dense.step + pooling, counted.sparse.step + pooling),
        "training step, alpha = 0": (counted.dense.step + pooling, counted.settled.step + pooling),
    }
    values = {
        name: tuple(counted.evaluate(factor * count, sparsities) for count in pair) for name, pair in parts.items()
    }
    if args.json:
        plain = {name: [v if isinstance(v, (int, float)) else str(v) for v in pair] for name, pair in values.items()}
        print(json.dumps({"unit": unit, "sizes": dict(counted.example_sizes), "dense, sparse": plain}, indent=1))
        return
    if counted.sizes:
        for name, (dense, sparse) in values.items():
            print(f"{name}, dense {unit}:\n    {dense}" + (f"\n  sparse:\n    {sparse}" if sparse != dense else ""))
        return
    rows = [
        [name, short(dense), short(sparse), f"{sparse / dense:.4f}" if dense else ""]
        for name, (dense, sparse) in values.items()
    ]
    print(text_table(["", f"dense {unit}", f"sparse {unit}", "ratio"], rows, left=1))
    if counted.graphs > 1:
        print(f"the model breaks into {counted.graphs} graphs, and all are counted: {'; '.join(counted.breaks)}")


def graph(args: argparse.Namespace) -> None:
    """Draw the graph of a model."""
    model, inputs, _ = make_model(args.model, args.weights, args.input)
    autosparse_fx.visualize(model.train(args.train), inputs, args.output, graph=args.kind)
    print(f"wrote {args.output}")


def _zeros(model: Any, counted: ModelFlops) -> dict[str, float]:
    layers = autosparse_fx.report(model).layers
    return {layer.name: layer.sparsity for layer in layers if layer.name in counted.weights}


def _sparsities(text: str, counted: ModelFlops) -> dict[str, float]:
    """A fraction for all weights, or a JSON file of fractions by name."""
    try:
        everywhere = float(text)
    except ValueError:
        found: Any = json.loads(Path(text).read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{text!r} must hold a JSON object of fractions by the names of weights") from None
        return found
    return dict.fromkeys(counted.weights, everywhere)


def _dynamic_shapes(given: list[str] | None, inputs: tuple[Any, ...]) -> tuple[list[dict[int, str]] | None, Any]:
    """The names of dimensions, and inputs of which these dimensions are at least 2, as the compiler wants them."""
    if not given:
        return None, inputs
    if not inputs or not isinstance(inputs[0], Tensor):
        raise ValueError("--dynamic needs a model whose first input is a tensor")
    names: dict[int, str] = {}
    first = inputs[0]
    for text in given:
        name, _, dimension = text.partition("=")
        if not name.isidentifier() or not dimension.isdigit() or int(dimension) >= first.dim():
            raise ValueError(f"--dynamic {text!r} is no name of a dimension of {list(first.shape)}, such as batch=0")
        names[int(dimension)] = name
        if first.shape[int(dimension)] == 1:
            first = first.repeat_interleave(2, int(dimension))
    return [names], (first, *inputs[1:])
