"""What to call the nodes of a graph: what they call, what their inputs are to the caller, which line they come from."""

import re
import sys
from pathlib import Path

import torch
from torch.fx import Node

_PACKAGE = str(Path(__file__).resolve().parents[1])


def input_name(name: str) -> str:
    """What the caller knows an input of Dynamo's as: its position, or its keyword."""
    position = re.fullmatch(r"l_args_(\d+)_", name)
    keyword = re.fullmatch(r"l_(?:kwargs_)?(\w+?)_?", name)
    return f"input {position[1]}" if position else keyword[1] if keyword else name


def target_name(node: Node) -> str:
    """The full name of what a node calls."""
    target = node.target
    if isinstance(target, str) or not callable(target):
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
    return name if module in ("", "builtins", "_operator") else f"{module}.{name}"


def short_name(node: Node) -> str:
    """What a node calls, in a word."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    name = target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)
    return str(name).removeprefix("_").rpartition(".")[2] if node.op.startswith("call") else str(name)


def source_line(stack_trace: str) -> str:
    """The innermost line of the model's own code in a stack trace, with its file as it would be imported."""
    frames = re.findall(r'^ *File "(.+?)", line (\d+), in .*\n +(.*)$', stack_trace, re.MULTILINE)
    for file, line, code in reversed(frames):
        if not str(file).startswith(_PACKAGE):
            roots = sorted((entry for entry in sys.path if entry and file.startswith(entry)), key=len)
            short = file[len(roots[-1]) :].lstrip("/\\") if roots else Path(file).name
            return f"{short}:{line}  {code.strip()}"
    return ""
