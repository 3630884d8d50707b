"""Ways out of PyTorch: torch.export, ONNX, safetensors and AOTInductor, of sparse models and of finalized ones."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from autosparse_fx import AutoSparse, finalize, sparsify

# All of torch itself, about dense models as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*(is deprecated|will be removed|deprecation):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
MASK = torch.ops.autosparse.threshold_mask.default


class Attention(nn.Module):
    """Attention behind a projection, over ``[N, 5, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


# With attention through its slow path: torch.export keeps the fused one as an operator that nothing else knows.
MODELS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "mlp": (reference.mlp, (4, 16), "layer"),
    "convolutions": (reference.ConvNet, (4, 1, 8, 8), "channel"),
    "residual": (reference.Residual, (4, 16), "channel"),
    "attention": (Attention, (4, 5, 8), "layer"),
}
FORMS = ["sparse", "finalized"]


def trained(name: str, form: str) -> tuple[nn.Module, Tensor]:
    """An eval model whose thresholds are no longer where they began, and an input."""
    make, shape, granularity = MODELS[name]
    model = sparsify(make(), AutoSparse(target_sparsity=None, threshold_init=-2.5, granularity=granularity))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_threshold"):
                parameter.normal_(std=2.0)
    model.eval().requires_grad_(name != "attention")
    zeros = reference.total_sparsity(model)
    assert 0.1 < zeros < 0.95
    return finalize(model) if form == "finalized" else model, torch.randn(shape)


# torch.export.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_exported_program_is_saved_loaded_and_called_with_other_batch_sizes(
    name: str, form: str, tmp_path: Path
) -> None:
    model, x = trained(name, form)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert bool(program.graph.find_nodes(op="call_function", target=MASK)) == (form == "sparse")
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (x, x[:2]):
        torch.testing.assert_close(again(batch), model(batch))


def test_exported_program_trains_as_the_model_does() -> None:
    model, x = trained("mlp", "sparse")
    model.train()
    exported = torch.export.export(model, (x,)).module()
    for called in (model, exported):
        called(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in exported.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


def test_finalized_program_is_loaded_where_this_package_is_not(tmp_path: Path) -> None:
    model, x = trained("convolutions", "finalized")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    alone(
        "import torch; x, y = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.export.load('model.pt2').module()(x), y)",
        tmp_path,
    )


# ONNX.


def check_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """ONNX Runtime computes from the file what the model does, for any batch size."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    for batch in (x, x[:2]):
        found = torch.from_numpy(session.run(None, {key: batch.numpy()})[0])
        torch.testing.assert_close(found, model(batch).detach(), rtol=1e-4, atol=1e-5)


def to_onnx(model: nn.Module, x: Tensor, path: Path, **arguments: Any) -> Any:
    pytest.importorskip("onnxscript")
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False, dynamic_shapes=shapes, **arguments)
    return pytest.importorskip("onnx").load(str(path))


@pytest.mark.parametrize("name", MODELS)
def test_masks_in_onnx_are_ordinary_operators(name: str, tmp_path: Path) -> None:
    """By the decomposition that the package registers."""
    model, x = trained(name, "sparse")
    file = to_onnx(model, x, tmp_path / "model.onnx", optimize=False)
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx", "pkg.onnxscript.torch_lib.common"}
    check_onnx(model, x, tmp_path / "model.onnx")


def test_optimized_onnx_of_a_sparse_model(tmp_path: Path) -> None:
    model, x = trained("residual", "sparse")
    to_onnx(model, x, tmp_path / "model.onnx")
    check_onnx(model, x, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_onnx_of_a_finalized_model_holds_its_zeros_and_no_thresholds(name: str, tmp_path: Path) -> None:
    model, x = trained(name, "finalized")
    file = to_onnx(model, x, tmp_path / "model.onnx")
    helper = pytest.importorskip("onnx.numpy_helper")
    stored = [torch.from_numpy(helper.to_array(t).copy()) for t in file.graph.initializer]
    kept = sum(int((t == 0).sum()) for t in stored if t.dim() > 1 and t.is_floating_point())
    assert kept == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert not any("threshold" in t.name or "offset" in t.name for t in file.graph.initializer)
    assert "Clip" not in {node.op_type for node in file.graph.node}
    check_onnx(model, x, tmp_path / "model.onnx")


# safetensors.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_through_safetensors(name: str, form: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = trained(name, form)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    make, _, granularity = MODELS[name]
    other = make().eval()
    if form == "sparse":
        sparsify(other, AutoSparse(granularity=granularity))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_tied_model_through_safetensors(form: str, tmp_path: Path) -> None:
    """``save_model`` writes weights that are shared once, and thresholds as well."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = sparsify(reference.Tied(), AutoSparse(target_sparsity=None, threshold_init=-2.5))
    with torch.no_grad():
        model.head.weight_threshold.fill_(3.0)
    other = sparsify(reference.Tied()) if form == "sparse" else reference.Tied()
    if form == "finalized":
        finalize(model)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(other(ids), model(ids))


# AOTInductor.


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_package_of_aot_inductor_runs_where_this_package_is_not(form: str, tmp_path: Path) -> None:
    model, x = trained("convolutions", form)
    with torch.no_grad():
        expected = [model(x), model(x[:2])]
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save((x, expected), tmp_path / "expected.pt")
    alone(
        "import torch; x, expected = torch.load('expected.pt')\n"
        "run = torch._inductor.aoti_load_package('model.pt2')\n"
        "torch.testing.assert_close([run(x), run(x[:2])], expected)",
        tmp_path,
    )


def alone(code: str, directory: Path) -> None:
    """Run ``code`` in a process that imports torch and nothing of this package."""
    check = "\nimport sys; assert not any(name.startswith('autosparse') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=300, cwd=directory)
