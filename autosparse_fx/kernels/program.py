"""Programs: what the C++ of ``sparse_program.cpp`` runs, laid out here as one tensor of bytes.

The structures mirror those of the C++, field by field, eight bytes each.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from autosparse_fx.kernels.chains import find_chains, ring_columns
from autosparse_fx.kernels.library import library
from autosparse_fx.kernels.memory import images_in_buffers, layout_of, place, place_rings, tiled_buffers
from autosparse_fx.kernels.step_writer import Blob, StepWriter
from autosparse_fx.kernels.steps import BUFFER_KINDS, MOST_IMAGES, Buffer, Machine, Step, Window

__all__ = ["Buffer", "Machine", "Program", "Step", "Window", "assemble"]


@dataclass(frozen=True)
class Program:
    """Steps laid out for a machine.

    Attributes:
        data: uint8 ``[bytes]``, all that a run needs besides its inputs and outputs.
        any_layout: the numbers of the inputs that may be in the channels-last format.
    """

    data: Tensor
    any_layout: list[int]


def assemble(
    steps: Sequence[Step],
    buffers: Sequence[Buffer],
    machine: Machine,
    *,
    is_tokens: bool = False,
    images: int = 1,
    tokens: int = 0,
) -> Program:
    """Lay out a program for ``machine``.

    Args:
        steps: in the order in which they run.
        buffers: what the numbers in the steps mean.
        machine: what the C++ was compiled for.
        images: that one thread will work on, about; the last steps may take them side by side. 0 where threads are
            more than images, and share them.
        tokens: that there always are; 0 where it may be any number.
        is_tokens: inputs and outputs are ``[tokens, channels]``, worked on in chunks of tokens, and every step is 1x1.

    Raises:
        ValueError: for a residual in a program of tokens.
    """
    if is_tokens and any(step.residual >= 0 for step in steps):
        raise ValueError("programs of tokens add no residuals")
    blob = Blob()
    header_size = 8 * 8
    blob.add(np.zeros(header_size, np.uint8))
    are_few = 0 < tokens < machine.vector_length
    chunk = machine.vector_length * (1 if are_few else machine.most_vectors) if is_tokens else 0
    writers = [StepWriter(step, machine, chunk) for step in steps]
    side_by_side = 1 if is_tokens else max(1, min(images, MOST_IMAGES))
    joint_from = _joint_from(writers) if side_by_side > 1 else len(steps)
    writers[joint_from:] = [StepWriter(step, machine, images=side_by_side) for step in steps[joint_from:]]
    # Where threads share the tiles of an image, there should be several.
    narrow = {w.window.out_size for w in writers if images < 1 or not w.is_coded}
    # Steps hand each other tiles in the cache only where those are equally wide.
    writers = [w.narrowed() if w.vectors > machine.most_vectors and w.window.out_size in narrow else w for w in writers]
    # So few columns are read and written quickest where channels are contiguous, as those of inputs and outputs are.
    are_narrow = is_tokens and 0 < 2 * tokens <= machine.vector_length
    tiled = {} if are_narrow else tiled_buffers(writers, buffers)
    for writer in writers:
        if writer.mode == "plain" and writer.step.source in tiled:
            writer.read_tiles()
    chains = find_chains(writers, buffers)
    rings = ring_columns(writers, buffers, chains)
    images_of = images_in_buffers(writers)
    layouts = [
        layout_of(b, tiled.get(n, 0), rings.get(n, 0), machine, chunk, *images_of.get(n, (1, False)))
        for n, b in enumerate(buffers)
    ]
    positions, arena_bytes = place(steps, chains, buffers, layouts, joint_from)
    rings_at, ring_bytes = place_rings(steps, chains, buffers, layouts)
    written = []
    for chain in chains:
        reads = 0 if chain.reads is None else blob.add(chain.reads)
        for number in range(chain.first, chain.first + chain.length):
            fields = writers[number].write(blob)
            fields += [chain.first + chain.length - number, reads if number == chain.window else 0]
            written.append(b"".join(map(_eight_bytes, fields)))
    rows = [
        [BUFFER_KINDS.index(b.kind), position, *astuple(layout)[:5], ring_at]
        for b, position, layout, ring_at in zip(buffers, positions, layouts, rings_at, strict=True)
    ]
    steps_at = blob.add(np.frombuffer(b"".join(written), np.uint8))
    buffers_at = blob.add(np.array(rows, np.int64))
    data = bytearray(b"".join(blob.pieces))
    memory = torch.frombuffer(data, dtype=torch.uint8)
    address = 0  # written where the program finds its place
    header = [steps_at, len(steps), buffers_at, arena_bytes, address, int(is_tokens), chunk or side_by_side, ring_bytes]
    memory[:header_size] = torch.tensor(header).view(torch.uint8)
    if any(writer.is_coded for writer in writers):
        memory = library().executable(memory)
    return Program(memory, _read_in_any_layout(writers, buffers))


def _joint_from(writers: Sequence[StepWriter]) -> int:
    """The first of the last steps that all may take images side by side."""
    number = len(writers)
    while number > 0 and writers[number - 1].may_be_joint:
        number -= 1
    return number


def _eight_bytes(number: int | float) -> bytes:
    return np.array([number], np.float64 if isinstance(number, float) else np.int64).tobytes()


def _read_in_any_layout(writers: Sequence[StepWriter], buffers: Sequence[Buffer]) -> list[int]:
    strict = {w.step.source for w in writers if not w.reads_any_layout} | {w.step.residual for w in writers}
    return [b.index for number, b in enumerate(buffers) if b.kind == "input" and number not in strict]
