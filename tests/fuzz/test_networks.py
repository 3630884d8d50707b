"""Random networks are the same in every form: eager, compiled, in one line, and by the definition of a mask."""

from collections.abc import Iterator

import hypothesis
import pytest
from fuzz.compare import check
from fuzz.networks import Network, networks

# All of torch itself: where a compiled graph begins with a computed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

settings = hypothesis.settings(
    deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False
)


@pytest.fixture(scope="module")
def eager_kernels() -> Iterator[None]:
    """Dynamo, our passes and AOTAutograd as ever, without Inductor behind them."""
    from torch._dynamo.backends.debugging import aot_eager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))
        yield


@hypothesis.settings(settings, max_examples=12, derandomize=True)
@hypothesis.given(network=networks())
def test_networks(eager_kernels: None, network: Network) -> None:
    check(network)


@pytest.mark.long
@hypothesis.settings(settings, max_examples=3000)
@hypothesis.given(network=networks(statements=12))
def test_many_networks(eager_kernels: None, network: Network) -> None:
    check(network)


@pytest.mark.long
@hypothesis.settings(settings, max_examples=150)
@hypothesis.given(network=networks(statements=12))
def test_networks_with_inductor(network: Network) -> None:
    check(network)
