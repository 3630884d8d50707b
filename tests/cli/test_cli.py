"""The command line, run as a user runs it but in this process: what it prints, writes, refuses, and its exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension  # on machines with CUDA and without a GPU it warns, once, on import
from torch import nn

from autosparse_fx import AutoSparse, finalize, save_sparse, sparsify, sparsity
from autosparse_fx.cli.main import main
from autosparse_fx.cli.models import make_model

# A small model of torchvision, and what it takes at the size that it is made for.
SMALL = "squeezenet1_1"
INPUT = ["--input", "1x3x64x64"]
pytestmark = pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; with a code, what it says on standard error."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(code)
    return captured.err if code else captured.out


def made_by_user() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def tied_by_user() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def make():\n    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "def make_tied():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))\n"
        "    model[2].weight = model[0].weight\n"
        "    return model\n"
        "class Extra(torch.nn.Sequential):\n"
        "    def get_extra_state(self):\n        return {'calls': 0}\n"
        "    def set_extra_state(self, state):\n        assert state == {'calls': 3}\n"
        "def make_extra():\n    return Extra(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "def tokens():\n    return torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))\n"
        "number = int\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_models"
    sys.modules.pop("my_models", None)


def test_report_of_a_torchvision_model(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "report", SMALL, *INPUT)
    assert "features.0.weight" in out and "forward pass" in out and "speed:" in out
    found = json.loads(run(capsys, "report", SMALL, *INPUT, "--json", "--macs"))
    assert found["forward"]["unit"] == "macs" and found["sparsity"] == 0


def test_a_torchvision_model_needs_no_input(capsys: pytest.CaptureFixture[str]) -> None:
    """The published count of ResNet-18 at 224x224."""
    found = json.loads(run(capsys, "flops", "resnet18", "--macs", "--json"))
    assert found["dense, sparse"]["forward"] == [1_814_073_344 + 512 * 49] * 2


@pytest.mark.parametrize(("name", "size"), [("vit_h_14", 224), ("efficientnet_b1", 240)])
def test_the_input_has_the_size_that_the_model_takes(name: str, size: int) -> None:
    """The first weights of vit_h_14 are of another model, for 518x518; efficientnet_b1 takes any size, and has one."""
    with torch.device("meta"):
        model, (images,), _ = make_model(name, None, None)
        assert images.shape == (1, 3, size, size)
        assert model(images).shape == (1, 1000)


def test_callable_of_the_user(capsys: pytest.CaptureFixture[str], user_module: str) -> None:
    out = run(capsys, "report", f"{user_module}:make", "--input", "3x4")
    assert "0.weight" in out and "288 FLOPs of 288 FLOPs" in out
    assert "1.weight" in run(capsys, "report", f"{user_module}:tokens", "--input", "1x6:int64")


def test_weights_of_a_sparse_and_a_finalized_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from torchvision.models import get_model

    model = sparsify(get_model(SMALL), AutoSparse(threshold_init=-4.0, granularity="channel"))
    expected = sparsity(model)
    assert 0.1 < expected < 0.9
    torch.save(model.state_dict(), tmp_path / "sparse.pt")
    with pytest.warns(UserWarning, match="no GradientAnnealing"):
        torch.save(finalize(model).state_dict(), tmp_path / "final.pt")
    for name in ("sparse.pt", "final.pt"):
        found = json.loads(run(capsys, "report", SMALL, *INPUT, "--json", "--weights", str(tmp_path / name)))
        assert found["sparsity"] == expected, name


def test_weights_of_a_sparse_model_that_cannot_train_on_one_image(
    capsys: pytest.CaptureFixture[str], user_module: str, tmp_path: Path
) -> None:
    with (tmp_path / "my_models.py").open("a") as file:
        file.write("def norm():\n    return torch.nn.Sequential(make(), torch.nn.BatchNorm1d(2))\n")
    model = sparsify(nn.Sequential(made_by_user(), nn.BatchNorm1d(2)), AutoSparse(threshold_init=-1.0))
    torch.save(model.state_dict(), "norm.pt")
    out = run(capsys, "report", f"{user_module}:norm", "--input", "1x4", "--weights", "norm.pt", "--json")
    assert json.loads(out)["sparsity"] == sparsity(model) > 0


def test_rules_and_scale_of_a_saved_model(capsys: pytest.CaptureFixture[str], user_module: str, tmp_path: Path) -> None:
    model = sparsify(made_by_user(), AutoSparse(threshold_init=-1.0, threshold_scale=1.0, rules={"2.*": None}))
    with torch.no_grad():
        model[0]._parameters["weight_threshold"].fill_(-0.5)
    torch.save({"model": model.state_dict(), "config": {"threshold_scale": 1.0}}, "saved.pt")
    out = run(capsys, "report", f"{user_module}:make", "--input", "3x4", "--weights", "saved.pt", "--json")
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == ["0.weight"]
    assert found["layers"][0]["threshold"] == pytest.approx(torch.sigmoid(torch.tensor(-1.5)).item())


def test_checkpoint_that_names_its_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from torchvision.models import get_model

    path = tmp_path / "run.pt"
    model = get_model("squeezenet1_1", num_classes=7)
    torch.save({"architecture": {"name": "squeezenet1_1", "num_classes": 7}, "model": model.state_dict()}, path)
    found = json.loads(run(capsys, "report", str(path), *INPUT, "--json"))
    assert found["layers"][-1]["shape"] == [7, 512, 1, 1]


def test_flops_with_sparsities(capsys: pytest.CaptureFixture[str], user_module: str, tmp_path: Path) -> None:
    call = ("flops", f"{user_module}:make", "--input", "3x4", "--json")
    everywhere = json.loads(run(capsys, *call, "--sparsity", "0.5"))["dense, sparse"]
    assert everywhere["forward"] == [288, 144]
    assert everywhere["gradient of activations"] == [96, 48]
    assert everywhere["gradient of weights, alpha > 0"] == [288, 288]
    assert everywhere["gradient of weights, alpha = 0"] == [288, 144]
    (tmp_path / "s.json").write_text(json.dumps({"2.weight": 1.0}))
    assert json.loads(run(capsys, *call, "--sparsity", "s.json"))["dense, sparse"]["forward"] == [288, 192]


def test_flops_as_a_formula(capsys: pytest.CaptureFixture[str], user_module: str) -> None:
    out = run(capsys, "flops", f"{user_module}:make", "--input", "1x4", "--dynamic", "batch=0")
    assert "forward, dense FLOPs:\n    96*batch\n" in out


@pytest.mark.parametrize("suffix", ["html", "dot", "graphml"])
def test_graph(capsys: pytest.CaptureFixture[str], user_module: str, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"graph.{suffix}"
    assert f"wrote {path}" in run(capsys, "graph", f"{user_module}:make", "--input", "3x4", "-o", str(path))
    assert "linear" in path.read_text()


def test_gradient_annealing_is_in_the_backward_graph_of_sparse_weights(
    capsys: pytest.CaptureFixture[str], user_module: str
) -> None:
    call = ("graph", f"{user_module}:make", "--input", "3x4", "--kind", "backward", "-o", "x.dot")
    run(capsys, *call)
    assert "anneal_gradient" not in Path("x.dot").read_text()
    torch.save(sparsify(made_by_user()).state_dict(), "training.pt")
    run(capsys, *call, "--weights", "training.pt")
    assert "anneal_gradient" in Path("x.dot").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "resnet_50"), "no model of torchvision.models"),
        (("report", "nosuch.pt"), "there is no file 'nosuch.pt'"),
        (("report", "nosuch.safetensors"), "there is no file 'nosuch.safetensors'"),
        (("report", "nosuch:make", "--input", "1"), "cannot import 'nosuch'"),
        (("report", "my_models:nosuch", "--input", "1"), "module 'my_models' has no 'nosuch'"),
        (("report", "my_models:make"), "say with --input what my_models:make takes"),
        (("report", "my_models:number", "--input", "1"), "gives a int, not a torch.nn.Module"),
        (("report", "my_models:make", "--input", "3,4"), "is no shape such as 1x3x224x224"),
        (("report", "my_models:make", "--input", "3x4:float99"), "is no shape such as"),
        (("report", "my_models:make", "--input", "3x5"), "could not be run on the example_inputs"),
        (("report", "my_models:make", "--input", "3x4", "--weights", "nosuch.pt"), "there is no file"),
        (("flops", "my_models:make", "--input", "3x4", "--sparsity", "1.5"), "'0.weight' must be a fraction"),
        (("flops", "my_models:make", "--input", "3x4", "--sparsity", "no.json"), "No such file"),
        (("flops", "my_models:make", "--input", "3x4", "--dynamic", "batch"), "is no name of a dimension"),
        (("flops", "my_models:make", "--input", "3x4", "--dynamic", "width=1"), "Sequential fixes 'width'"),
        (("graph", "my_models:make", "--input", "3x4", "-o", "x.jpg"), ".jpg"),
        (("graph", "my_models:make", "--input", "3x4", "-o", "nosuch/x.html"), "nosuch"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_errors_name_the_culprit(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    error = run(capsys, *arguments, code=1)
    assert message in error and error.startswith(f"autosparse-fx {arguments[0]}: error: ") and "Traceback" not in error


class Evil:
    """What runs a command where a file is unpickled."""

    def __reduce__(self) -> object:
        return Path.touch, (Path("pwned"),)


@pytest.mark.usefixtures("user_module")
def test_no_code_of_a_file_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(8, 4), "x": Evil()}, "evil.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    torch.save({"architecture": {"name": "os:getcwd"}, "model": {}}, "import.pt")
    for name in ("evil.pt", "module.pt"):
        error = run(capsys, "report", "my_models:make", "--input", "3x4", "--weights", name, code=1)
        assert "nothing in it was run" in error
    assert "no model of torchvision" in run(capsys, "report", "import.pt", code=1)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.usefixtures("user_module")
def test_damaged_and_foreign_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(made_by_user().state_dict(), "whole.pt")
    whole = Path("whole.pt").read_bytes()
    for keep in (0, 1, len(whole) // 2, len(whole) - 1):
        Path("part.pt").write_bytes(whole[:keep])
        error = run(capsys, "report", "my_models:make", "--input", "3x4", "--weights", "part.pt", code=1)
        assert "'part.pt'" in error and "damaged" in error, keep
    torch.save([1, 2], "list.pt")
    assert "holds a list" in run(capsys, "report", "my_models:make", "--input", "3x4", "--weights", "list.pt", code=1)
    torch.save({"0.weight": torch.zeros(3, 3)}, "other.pt")
    error = run(capsys, "report", "my_models:make", "--input", "3x4", "--weights", "other.pt", code=1)
    assert "do not fit Sequential" in error and "0.bias is missing" in error
    assert "does not say of which model" in run(capsys, "report", "whole.pt", code=1)


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["draw", "resnet18"], ["graph", "resnet18"], ["report"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["report", "--help"], ["flops", "--help"], ["graph", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "package.module:callable" in out and "weights_only=True" in out and ".safetensors" in out


def test_as_a_program() -> None:
    """The module form; an error is one line on standard error, and exit code 1."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "autosparse_fx", "report", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout


def test_weights_in_a_sparse_file(capsys: pytest.CaptureFixture[str], user_module: str) -> None:
    model = made_by_user()
    with torch.no_grad():
        model[0].weight.zero_()
    save_sparse(model, "final.safetensors")
    out = run(capsys, "report", f"{user_module}:make", "--input", "3x4", "--weights", "final.safetensors", "--json")
    assert json.loads(out)["sparsity"] > 0
    sparse = sparsify(made_by_user(), AutoSparse(threshold_init=-3.0, threshold_scale=1.0))
    with torch.no_grad():
        sparse[0].weight_threshold.fill_(2.0)
    save_sparse(sparse, "sparse.safetensors")
    out = run(capsys, "report", f"{user_module}:make", "--input", "3x4", "--weights", "sparse.safetensors", "--json")
    assert json.loads(out)["sparsity"] == sparsity(sparse) > 0


def test_safetensors_file_that_does_not_tell_the_scale_is_told_of(
    capsys: pytest.CaptureFixture[str], user_module: str
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    given = ("report", f"{user_module}:make", "--input", "3x4", "--weights")
    sparse = sparsify(made_by_user(), AutoSparse(threshold_init=-3.0))
    safetensors.save_model(sparse, "untrained.safetensors")
    assert main([*given, "untrained.safetensors"]) == 0
    assert "threshold_scale" not in capsys.readouterr().err
    with torch.no_grad():
        sparse[0].weight_threshold.fill_(2.0)
    safetensors.save_model(sparse, "trained.safetensors")
    torch.save(sparse.state_dict(), "trained.pt")
    assert main([*given, "trained.safetensors"]) == 0
    assert "'trained.safetensors' does not tell the threshold_scale" in capsys.readouterr().err
    assert main([*given, "trained.pt"]) == 0
    assert "threshold_scale" not in capsys.readouterr().err


@pytest.mark.parametrize("is_sparse", [True, False])
def test_safetensors_file_of_tied_weights(
    capsys: pytest.CaptureFixture[str], user_module: str, is_sparse: bool
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = tied_by_user()
    if is_sparse:
        sparsify(model, AutoSparse(threshold_init=-3.0))
    else:
        with torch.no_grad():
            model[0].weight[0] = 0
    safetensors.save_model(model, "tied.safetensors")
    out = run(capsys, "report", f"{user_module}:make_tied", "--input", "3x4", "--weights", "tied.safetensors", "--json")
    assert json.loads(out)["sparsity"] == sparsity(model) > 0


def test_weights_of_a_model_with_other_state(capsys: pytest.CaptureFixture[str], user_module: str) -> None:
    state = {**made_by_user().state_dict(), "_extra_state": {"calls": 3}}
    torch.save(state, "extra.pt")
    run(capsys, "report", f"{user_module}:make_extra", "--input", "3x4", "--weights", "extra.pt")


def test_weights_in_an_ordinary_safetensors_file(capsys: pytest.CaptureFixture[str], user_module: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = made_by_user()
    with torch.no_grad():
        model[0].weight.zero_()
    safetensors.save_file(model.state_dict(), "plain.safetensors")
    given = ("report", f"{user_module}:make", "--input", "3x4", "--weights", "plain.safetensors")
    assert "0.weight" in run(capsys, *given)
    Path("plain.safetensors").write_bytes(Path("plain.safetensors").read_bytes()[:20])
    assert "'plain.safetensors' is damaged" in run(capsys, *given, code=1)
