"""report with example inputs: costs by layer and in total, of the training, and the forms it can be had in."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import ConvNet, classification_batches, mlp, train
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from autosparse_fx import AutoSparse, GradientAnnealing, finalize, report, sparsify
from autosparse_fx.kernels.layers import layers

X = torch.randn(2, 1, 8, 8)
# Multiply-accumulates for two images, by hand: outputs times the weights that each meets.
MACS = {"conv1.weight": 2 * 64 * 16 * 9, "conv2.weight": 2 * 16 * 32 * 16 * 9, "fc.weight": 2 * 512 * 4}


def trained(steps: int = 20, **config: Any) -> tuple[nn.Module, GradientAnnealing]:
    model = sparsify(ConvNet(), AutoSparse(target_sparsity=0.8, **config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    annealer = GradientAnnealing(model, steps, optimizer=optimizer)
    train(model, optimizer, classification_batches(steps, (1, 8, 8)))
    return model, annealer


def test_costs_by_layer_and_in_total() -> None:
    model, _ = trained()
    made = report(model, X)
    for layer in made.layers:
        assert layer.cost is not None
        assert layer.cost.dense == 2 * MACS[layer.name]
        assert layer.cost.sparse == pytest.approx(layer.cost.dense * (1 - layer.sparsity))
    assert made.cost is not None and made.cost.dense == 2 * sum(MACS.values())
    assert made.cost.sparse == pytest.approx(sum(layer.cost.sparse for layer in made.layers if layer.cost))
    assert not made.other_costs


def test_without_inputs_there_are_no_costs() -> None:
    made = report(ConvNet())
    assert made.cost is None and made.flops is None and made.training is None
    assert all(layer.cost is None for layer in made.layers)
    assert "FLOPs" not in str(made) and "forward" not in made.to_dict()


def test_macs_count_average_pooling_and_flops_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 2))
    by_unit = {unit: report(model, X, unit=unit).cost for unit in ("flops", "macs")}
    products = 2 * (64 * 4 + 64 * 2)
    assert by_unit["flops"].dense == 2 * products  # type: ignore[union-attr]
    assert by_unit["macs"].dense == products + 2 * 64 * 4  # type: ignore[union-attr]
    assert "average pooling" in str(report(model, X, unit="macs"))
    assert "average pooling" not in str(report(model, X))


def test_what_is_in_no_layer_is_told_apart() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).mT

    model = sparsify(Attention(), AutoSparse(rules={"k.weight": None}))
    made = report(model, torch.randn(2, 5, 8))
    assert [layer.name for layer in made.layers] == ["q.weight"]
    dense = {name: cost.dense for name, cost in made.other_costs.items()}
    assert dense == {"weights left dense": 2 * 10 * 64, "products of activations": 2 * 2 * 5 * 5 * 8}
    assert made.cost is not None and made.cost.dense == sum(dense.values()) + 2 * 10 * 64


def test_dynamic_sizes_stay_symbols_and_the_table_shows_the_example() -> None:
    made = report(ConvNet(), X, dynamic_shapes=({0: "batch"},))
    assert made.flops is not None
    assert str(made.flops.dense.forward) == f"{sum(MACS.values()) // 2}*batch"
    assert made.cost is not None and made.cost.dense == 2 * sum(MACS.values())
    assert "at batch = 2" in str(made)


def test_training_cost_comes_from_the_history() -> None:
    model, annealer = trained()
    made = report(model, X)
    assert made.history is annealer.history and made.training is not None
    assert 0 < made.training.others["MEST"] < made.training.sparse < made.training.dense
    assert "training so far" in str(made)
    plain = finalize(model)
    assert report(plain, X).training is None
    again = report(plain, X, history=annealer.history).training
    assert again is not None and again.fraction == pytest.approx(made.training.fraction)
    assert "training so far" not in str(report(plain, X))


def test_a_model_that_breaks_its_graph_says_so() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            torch._dynamo.graph_break()
            return self[1](x)

    text = str(report(Broken(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)))
    assert "breaks into 2 graphs" in text and "graph_break" in text
    assert "graphs" not in str(report(mlp(), torch.randn(2, 16)))


def test_stored_size_is_the_smallest_form() -> None:
    layer = nn.Linear(1000, 100, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
        assert report(layer).stored_bytes == report(layer).dense_bytes == 400_000  # dense
        layer.weight.view(-1)[:60_000] = 0
        assert report(layer).stored_bytes == 100_000 // 8 + 40_000 * 4  # a bitmap
        layer.weight.view(-1)[:99_000] = 0
        assert report(layer).stored_bytes == 1000 * (4 + 2) + 4 * 101  # indices of 16 bits, and where rows begin


def test_json_frame_and_html() -> None:
    model, _ = trained()
    made = report(model, X)
    found = json.loads(made.to_json())
    assert found == json.loads(json.dumps(made.to_dict()))
    assert found["forward"]["dense"] == 2 * sum(MACS.values()) and found["forward"]["unit"] == "flops"
    assert set(found["training"]["other_methods"]) == {"STR", "RigL", "GMP", "MEST"}
    assert found["layers"][0]["dense"] == 2 * MACS["conv1.weight"]
    html = made._repr_html_()
    assert html.count("<tr>") == 1 + 3 + 2 and "conv2.weight" in html
    pandas = pytest.importorskip("pandas")
    frame = made.to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == list(MACS)
    assert frame.loc["fc.weight", "dense"] == 2 * MACS["fc.weight"]


def test_html_escapes_names() -> None:
    model = nn.Module()
    model.add_module("<b>", nn.Linear(2, 2))
    html = report(model)._repr_html_()
    assert "&lt;b&gt;.weight" in html and "<b>" not in html


def speed_line(model: nn.Module) -> str:
    (line,) = [line for line in str(report(model, torch.randn(2, 16))).splitlines() if line.startswith("speed:")]
    return line


OPEN = AutoSparse(target_sparsity=None)


@pytest.mark.parametrize(
    ("make", "words", "follow"),
    [
        (mlp, "in training mode zeros are multiplied", nn.Module.eval),
        (lambda: finalize(sparsify(mlp(), OPEN)), "the report of model.eval() says", nn.Module.eval),
        (lambda: sparsify(mlp(), OPEN), "a model is prepared its zeros", lambda model: finalize(model).eval()),
        (lambda: sparsify(mlp().eval(), OPEN), "finalize(model).eval() says", lambda model: finalize(model).eval()),
    ],
    ids=["dense", "finalized", "prepared", "prepared, eval"],
)
def test_speed_is_claimed_for_inference_only_and_else_how_to_ask(
    make: Callable[[], nn.Module], words: str, follow: Callable[[nn.Module], nn.Module]
) -> None:
    model = make()
    line = speed_line(model)
    assert words in line and not re.search(r"\d", line)
    assert "0 of 3 weights run on sparse kernels" in speed_line(follow(model))


def test_the_total_is_of_masked_weights_where_there_are_masks() -> None:
    model = mlp()
    assert "all these weights" in str(report(model)) and "all masked weights" not in str(report(model))
    sparsify(model, OPEN)
    assert "all masked weights" in str(report(model)) and "all these weights" not in str(report(model))


def test_each_weight_says_which_kernel_it_runs_on_and_why() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    with torch.no_grad():
        model[2].weight[torch.rand(512, 512) < 0.95] = 0
    found = report(model, torch.randn(64, 256))
    assert [layer.kernel for layer in found.layers] == ["dense", "sparse", "dense"]
    assert [layer["kernel"] for layer in found.to_dict()["layers"]] == ["dense", "sparse", "dense"]
    assert "sparse: estimated" in str(found) and "1 of 3 weights run on sparse kernels" in str(found)


def test_weights_of_no_layer_that_has_a_sparse_kernel_are_counted_as_dense() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(256, 256, batch_first=True), nn.Linear(256, 512)
            with torch.no_grad():
                self.linear.weight[torch.rand(512, 256) < 0.95] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.lstm(x)[0])

    found = report(Recurrent().eval(), torch.randn(4, 64, 256))
    assert [layer.kernel for layer in found.layers] == ["dense", "dense", "sparse"]
    assert [layer.kernel_reason for layer in found.layers[:2]] == 2 * ["no layer that has a sparse kernel"]
    assert "1 of 3 weights run on sparse kernels" in str(found)


def test_without_a_compiler_only_the_kernels_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise RuntimeError("No working C++ compiler found\n\nand more")

    for module in [module for name, module in sys.modules.items() if name.startswith("autosparse_fx.")]:
        if callable(getattr(module, "library", None)):
            monkeypatch.setattr(module, "library", no_compiler)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    assert [layer.kernel for layer in report(model, torch.randn(64, 256)).layers] == [
        "dense",
        "dense",
    ]  # and no warning
    with torch.no_grad():
        model[2].weight[torch.rand(512, 512) < 0.95] = 0
    with pytest.warns(
        UserWarning, match=r"kernels .* not known: RuntimeError: No working C\+\+ compiler found$"
    ) as seen:
        found = report(model, torch.randn(64, 256))
    assert [warning.filename for warning in seen] == [__file__]
    assert [layer.kernel for layer in found.layers] == [None, None]
    assert found.cost is not None and found.cost.dense == 2 * 64 * 512 * (256 + 512)
    assert "speed:" not in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "gflops"}, "unit must be one of 'flops', 'macs', got 'gflops'"),
        ({"example_inputs": torch.randn(2, 3)}, "could not be run on the example_inputs"),
        ({"example_inputs": X, "dynamic_shapes": ({2: "height"},)}, "ConvNet fixes 'height'"),
        ({"dynamic_shapes": ({0: "batch"},)}, "example_inputs, which are missing"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(ConvNet(), **arguments)


def test_a_graph_that_writes_to_its_input_says_that_it_runs_dense() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.mul_(2))

    found = report(Scaled().eval(), torch.randn(2, 16))
    assert {layer.kernel for layer in found.layers} == {"dense"}
    assert "its graph writes to an input or a buffer" in str(found)
    assert "while a model is prepared" not in str(found)


def test_a_weight_that_is_pruned_by_torch_says_which_kernel_it_runs_on() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    pruning.l1_unstructured(model[2], "weight", 0.95)
    found = {layer.name: layer for layer in layers(model, torch.randn(64, 256))}
    assert found["2.weight_orig"].choice.is_sparse and not found["0.weight"].choice.is_sparse


def test_weights_that_are_pruned_by_torch_are_reported_as_the_layers_read_them() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.LSTM(512, 8)).eval()
    pruning.l1_unstructured(model[2], "weight", 0.95)
    pruning.l1_unstructured(model[2], "bias", 0.5)
    pruning.l1_unstructured(model[3], "weight_hh_l0", 0.25)
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[2].weight_orig.mul_(2)  # and no forward since, in which torch would compute the weight
    found = report(model, torch.randn(64, 256))
    assert {layer.name: layer.sparsity for layer in found.layers} == {
        "2.weight_orig": pytest.approx(0.95, abs=1e-5),
        "3.weight_ih_l0": 0,
        "3.weight_hh_l0_orig": 0.25,
    }
    linear = found.layers[0]
    assert linear.kernel == "sparse" and linear.stored_bytes < linear.numel and linear.cost is not None
    assert linear.cost.dense == 2 * 64 * 512 * 512 and linear.cost.sparse == pytest.approx(
        0.05 * linear.cost.dense, 1e-3
    )
    sparsify(model, OPEN)
    assert "torch.nn.utils.prune: 2.weight_orig" in str(report(model))
