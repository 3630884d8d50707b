"""Programs that hypothesis thinks up, against dense PyTorch in float64."""

import random

import pytest
import torch
from kernels.compare import poison, random_net, threads

from autosparse_fx.kernels import chains

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(rng=st.randoms(use_true_random=False), seed=st.integers(0, 2**31), batch=st.integers(1, 5),
                  count=st.integers(1, 3), channels_last=st.booleans(), stays=st.booleans())  # fmt: skip
def test_program_computes_what_its_layers_do(
    rng: random.Random, seed: int, batch: int, count: int, channels_last: bool, stays: bool
) -> None:
    torch.manual_seed(seed)
    net, outputs = random_net(rng)
    with threads(count), pytest.MonkeyPatch.context() as patch:
        if not stays:
            patch.setattr(chains, "STAYS", 0)  # chains of small images too
        poison()
        net.check(outputs, batch, channels_last=channels_last)
