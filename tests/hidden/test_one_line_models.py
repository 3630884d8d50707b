"""The one-line form in whole models: own products, ties, rules, and what it leaves dense."""

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from hidden.compare import (
    INIT,
    OLD,
    assert_same,
    check,
    eager,
    error,
    one_line,
    outputs_and_gradients,
    without_inductor,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from autosparse_fx import AutoSparse, report, sparsify, thresholds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)


# Parameters that a user's own module multiplies by.


class Own(nn.Module):
    """One weight, used by a function; every other parameter is to stay dense."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape) / 5)
        self.token = nn.Parameter(torch.randn(1, 8))
        self.positions = nn.Parameter(torch.randn(4, 8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.positions + self.token.expand(4, -1), self.kernel)


USES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], int]] = {
    "linear": ((6, 8), F.linear, 0),
    "einsum": ((8, 6), lambda x, w: torch.einsum("bi,io->bo", x, w), 1),
    "einsum implicit": ((8, 6), lambda x, w: torch.einsum("bi,io", x, w), 1),
    "matmul": ((8, 6), lambda x, w: x @ w, 1),
    "left": ((6, 4), lambda x, w: w @ x, 0),
    "torch.matmul": ((8, 6), lambda x, w: torch.matmul(x, w), 1),
    "mm": ((8, 6), lambda x, w: x.mm(w), 1),
    "bmm": ((4, 8, 6), lambda x, w: torch.bmm(x.unsqueeze(1), w), 2),
    "baddbmm": ((4, 8, 6), lambda x, w: torch.baddbmm(torch.zeros(4, 1, 6), x.unsqueeze(1), w), 2),
    "addmm": ((8, 6), lambda x, w: torch.addmm(torch.zeros(6), x, w), 1),
    "tensordot": ((8, 6), lambda x, w: torch.tensordot(x, w, dims=([1], [0])), 1),
    "keyword": ((6, 8), lambda x, w: F.linear(input=x, weight=w), 0),
    "transposed": ((6, 8), lambda x, w: x @ w.t(), 0),
    "property T": ((6, 8), lambda x, w: x @ w.T, 0),
    "transpose": ((6, 8), lambda x, w: torch.matmul(x, w.transpose(0, 1)), 0),
    "viewed": ((48,), lambda x, w: F.linear(x, w.view(6, 8)), 0),
    "permuted": ((8, 2, 3), lambda x, w: F.linear(x, w.permute(1, 2, 0).reshape(6, 8)), 2),
    "sliced": ((12, 8), lambda x, w: F.linear(x, w[:6]) + F.linear(x, w[6:]), 0),
    "chunked": ((12, 8), lambda x, w: F.linear(x, w.chunk(2)[0]), 0),
    "cast": ((6, 8), lambda x, w: F.linear(x.double(), w.to(torch.float64)).float(), 0),
    "double": ((6, 8), lambda x, w: F.linear(x.double(), w.double()).float(), 0),
    "contiguous": ((8, 6), lambda x, w: F.linear(x, w.t().contiguous()), 1),
    "conv": ((8, 4, 1), lambda x, w: F.conv1d(x.unsqueeze(0), w), 0),
    "movedim": ((6, 8), lambda x, w: x @ w.movedim(0, 1), 0),
    "transposed experts": ((8, 4, 6), lambda x, w: torch.bmm(x.unsqueeze(1), w.transpose(0, 1)), 2),
    "selected": ((3, 8, 6), lambda x, w: x @ w[1], 2),
    "repeated": ((1, 8, 6), lambda x, w: torch.bmm(x.unsqueeze(1), w.repeat(4, 1, 1)), 2),
    "concatenated": ((8, 3), lambda x, w: x @ torch.cat([w, -w], 1), 1),
    "scaled": ((6, 8), lambda x, w: F.linear(x, w * 0.5), 0),
    "standardized": ((6, 8), lambda x, w: F.linear(x, (w - w.mean(1, True)) / (w.std(1, keepdim=True) + 1e-5)), 0),
    "padded": ((8, 4, 1), lambda x, w: F.conv1d(x.unsqueeze(0), F.pad(w, (1, 1)), padding=1), 0),
    "aten": ((8, 6), lambda x, w: torch.ops.aten.mm(x, w), 1),
    "memory": ((1, 5, 8), lambda x, w: F.scaled_dot_product_attention(x.unsqueeze(0), w, w), 1),
    "vmap": ((3, 8, 6), lambda x, w: torch.vmap(lambda one: x @ one)(w), 2),
}


@pytest.mark.parametrize("use", USES)
def test_functional_weight_equals_the_prepared_one(use: str) -> None:
    shape, function, axis = USES[use]
    x = torch.randn(4, 8)
    model = Own(shape, function)
    masked = check(model, x, example_inputs=x, axes={"kernel": axis}, config={"granularity": "channel"})
    assert masked == {"kernel"}


def test_weight_of_a_layer_keeps_the_channels_of_its_layer() -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert check(Transposed(8, 5), torch.randn(4, 5), config={"granularity": "channel"}) == {"weight"}


# All of torch itself: where a compiled graph begins with a computed tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("first", [True, False])
def test_weight_reads_masked_in_a_graph_that_does_not_multiply_by_it(first: bool) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = x * self.weight.std(1) if first else super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x) if first else F.linear(x, self.weight * 0.5)

    assert check(Scaled(8, 8), torch.randn(4, 8)) == {"weight"}


class Mixed(nn.Module):
    """What is not multiplied by stays dense: norms, biases, embeddings, tokens, tables, scales."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.prelu = nn.PReLU(8)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(ids), -1, -1), self.embed(ids)], 1) + self.positions
        x = self.norm(x) * self.scale
        x = self.prelu(self.bn(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x[:, 0])


IDS = torch.arange(8).reshape(2, 4)


def test_everything_else_stays_dense() -> None:
    model = Mixed()
    assert check(model, IDS) == {"conv.weight", "head.weight"}
    found = report(model)
    assert [layer.name for layer in found.layers] == ["conv.weight", "head.weight"]
    reasons = {name: why for name, (_, why) in found.skipped.items()}
    assert reasons["embed.weight"] == "an embedding" and reasons["norm.weight"] == "a normalization"
    assert reasons["head.bias"] == "a bias" and {"token", "positions", "scale", "prelu.weight"} <= set(reasons)


def test_terms_of_a_low_rank_update_equal_the_prepared_ones() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 6)
            self.a, self.b = nn.Parameter(torch.randn(2, 8) / 3), nn.Parameter(torch.randn(6, 2) / 3)
            self.gain = nn.Parameter(torch.ones(6, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.gain * (self.weight + self.b @ self.a), self.bias)

    x = torch.randn(4, 8)
    assert check(LowRank(), x, example_inputs=x) == {"weight", "a", "b"}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo, between graphs
def test_experts_of_a_mixture_equal_the_prepared_ones() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=4, **sizes)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = transformers.MixtralForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.lm(input_ids=ids, use_cache=False).logits

    ids = torch.randint(0, 50, (2, 8))
    model = Logits()
    check(model, ids, example_inputs=ids, config={"granularity": "channel"}, by_definition=False)
    layer = "lm.model.layers.0"
    attention = {f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"}
    experts = {f"{layer}.mlp.experts.{name}": size for name, size in (("gate_up_proj", 64), ("down_proj", 32))}
    assert set(thresholds(model)) == {*attention, *experts, f"{layer}.mlp.gate.weight", "lm.lm_head.weight"}
    assert {name: len(thresholds(model)[name]) for name in experts} == experts


# Weights that something else owns.


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(8))

    def forward(self, weight: Tensor) -> Tensor:
        return weight @ self.mix


OWNERS: dict[str, Callable[[nn.Module], object]] = {
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["one line", "prepared"])
@pytest.mark.parametrize("own", OWNERS)
def test_weights_that_something_else_owns_stay_dense(own: str, prepared: bool) -> None:
    """Also where a graph multiplies by them, as the power iteration of spectral_norm does."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    OWNERS[own](model[0])
    if prepared:
        sparsify(model, AutoSparse(threshold_init=INIT), example_inputs=x)
    else:
        one_line(model)(x).sum().backward()
    assert set(thresholds(model)) == {"2.weight"}
    owned = {name: why for name, (_, why) in report(model).skipped.items() if "bias" not in name}
    assert owned and all(why.startswith("owned by torch.nn.utils.") for why in owned.values())


@pytest.mark.parametrize("prepared", [False, True], ids=["one line", "prepared"])
def test_report_lists_parameters_whose_use_was_looked_for_in_vain(prepared: bool) -> None:
    x = torch.randn(4, 8)
    model = Own((8, 8), lambda x, w: F.linear(x, w.softmax(1)))
    model.head = nn.Linear(8, 4)
    function = model.function
    model.function = lambda x, w: model.head(function(x, w))
    if prepared:
        sparsify(model, AutoSparse(threshold_init=INIT), example_inputs=x)
    else:
        one_line(model)(x)
    assert set(thresholds(model)) == {"head.weight"}
    assert report(model).skipped["kernel"] == (
        64,
        "no known layer multiplies by it, nor does any product that was seen",
    )


# Tied weights.


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.mid(F.relu(self.a(x)))))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(F.relu(self.fc(x))))


@pytest.mark.parametrize(
    ("model", "x", "masked"),
    [
        (reference.Tied(), torch.arange(12).reshape(3, 4), {"embed.weight", "mid.weight"}),
        (SharedLayers(), torch.randn(4, 8), {"a.weight", "mid.weight"}),
        (CalledTwice(), torch.randn(4, 8), {"fc.weight", "head.weight"}),
    ],
    ids=["embedding", "layers", "twice"],
)
def test_tied_weight_has_one_threshold(model: nn.Module, x: Tensor, masked: set[str]) -> None:
    assert check(model, x) == masked


def test_tied_embedding_is_reported_as_masked() -> None:
    model = reference.Tied()
    one_line(model)(IDS)
    found = report(model)
    assert found.masked_embeddings == ("embed.weight",) and found.layers[0].tied == ("head.weight",)


@pytest.mark.parametrize("pattern", ["embed.weight", "head.weight", "h*"])
def test_rule_meets_a_tied_weight_by_any_alias(pattern: str) -> None:
    assert check(reference.Tied(), IDS, config={"rules": {pattern: None}}) == {"mid.weight"}


# Frozen weights.


GUARDED = pytest.mark.skipif(OLD, reason="torch 2.11 runs the old graph after requires_grad_() on a dense model, too")


@GUARDED
def test_frozen_weights_stay_dense_until_they_are_unfrozen() -> None:
    model = reference.mlp()
    model[0].requires_grad_(False)
    x = torch.randn(4, 16)
    step = one_line(model)
    step(x)
    assert set(thresholds(model)) == {"2.weight", "4.weight"}
    torch.testing.assert_close(step(x), eager(model)(x))
    model[0].requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    found = outputs_and_gradients(step, model, names, x)
    assert set(thresholds(model)) == {"0.weight", "2.weight", "4.weight"}
    assert_same(found, outputs_and_gradients(eager(model), model, names, x))


@GUARDED
def test_graph_of_frozen_weights_is_not_used_for_masked_ones() -> None:
    """As that of a critic whose generator takes the first step."""
    model, x = reference.mlp(), torch.randn(4, 16)
    step = one_line(model)
    model.requires_grad_(False)
    dense = step(x)
    torch.testing.assert_close(step(x), dense)  # nothing has changed
    one_line(reference.mlp())(x)  # nor have masks of other weights
    torch.testing.assert_close(step(x), dense)
    model.requires_grad_(True)
    masked = step(x)
    assert set(thresholds(model)) == {"0.weight", "2.weight", "4.weight"} and not torch.equal(masked, dense)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"(?s)weight '0\.weight' .* had no mask when.*torch\._dynamo\.reset"):
        step(x)
    torch._dynamo.reset()
    torch.testing.assert_close(step(x), masked)


def test_graph_of_frozen_weights_is_not_used_for_those_of_another_instance() -> None:
    teacher, student, x = reference.mlp(), reference.mlp(), torch.randn(4, 16)
    step = one_line(lambda model, x: model(x))
    step(student, x)  # which gets its masks
    teacher.requires_grad_(False)
    torch._dynamo.reset()
    torch.testing.assert_close(step(teacher, x), teacher(x))  # a graph without masks
    student.requires_grad_(False)
    with pytest.raises(RuntimeError, match="had no mask when this graph was compiled"):
        step(student, x)


def test_graph_that_was_compiled_without_options_before_the_masks_says_so() -> None:
    """As that of an evaluation before the training."""
    model, x = reference.mlp(), torch.randn(4, 16)
    evaluate, step = torch.compile(lambda x: model(x), backend="autosparse"), one_line(model)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(x), model(x))
        one_line(reference.mlp())(x)  # masks of other weights
        torch.testing.assert_close(evaluate(x), model(x))
        masked = step(x)
        with pytest.raises(RuntimeError, match=r"(?s)weight '0\.weight' .* had no mask when.*torch\._dynamo\.reset"):
            evaluate(x)
        torch._dynamo.reset()
        torch.testing.assert_close(evaluate(x), masked)


# All of torch itself: where a compiled graph begins with a computed tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_that_looks_up_what_a_later_one_multiplies_by_says_so() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.table(x)
            torch._dynamo.graph_break()
            return F.linear(self.layer(x), self.table.weight)

    model, x = Broken(), torch.arange(6).view(2, 3)
    step = one_line(model)
    step(x)
    assert set(thresholds(model)) == {"layer.weight", "table.weight"}
    with pytest.raises(RuntimeError, match=r"(?s)weight 'table\.weight' .* had no mask when.*torch\._dynamo\.reset"):
        step(x)
    torch._dynamo.reset()
    torch.testing.assert_close(step(x), eager(model)(x))


def test_rules_need_not_match_in_every_model_of_a_function() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model, other, criterion, x = reference.mlp(), reference.mlp(), Scaled(), torch.randn(4, 16)
    one_line(lambda x: criterion(model(x)), rules={"0.weight": None})(x)
    assert set(thresholds(model)) == {"2.weight", "4.weight"}
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"rules: 'no.weight' .*matches no parameter"):
        one_line(lambda x: criterion(other(x)), rules={"no.weight": None})(x)


def test_weight_of_a_tensor_subclass_may_stay_dense() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    both = (torch.randn(4, 4), torch.randn(4, 4))
    model[0].weight = nn.Parameter(TwoTensor(*both))
    one_line(lambda x: model(x), rules={"0.weight": None})(x)
    assert set(thresholds(model)) == {"1.weight"}


@GUARDED
def test_masked_weights_that_are_frozen_keep_their_masks() -> None:
    model = reference.mlp()
    x = torch.randn(4, 16)
    step = one_line(model)
    before = step(x)
    model.requires_grad_(False)
    torch.testing.assert_close(step(x), before)


# Rules.


@pytest.mark.parametrize(
    ("rules", "masked"),
    [
        ({"0.weight": None}, {"2.weight", "4.weight"}),
        ({"[02].*": None}, {"4.weight"}),
        ({"re:[24]\\..*": None}, {"0.weight"}),
        ({"2.weight": {}, "*": None}, {"2.weight"}),
        ({"*": None}, set()),
    ],
)
def test_rules_leave_weights_dense(rules: dict[str, None], masked: set[str]) -> None:
    model, x = reference.mlp(), torch.randn(4, 16)
    if masked:
        assert check(model, x, config={"rules": rules}) == masked
    else:
        assert torch.equal(one_line(model, rules=rules)(x), model(x)) and not thresholds(model)


def test_report_names_the_rule() -> None:
    model = reference.mlp()
    one_line(model, rules={"0.*": None})(torch.randn(4, 16))
    assert report(model).skipped["0.weight"] == (1024, "left dense by the rule '0.*'")


def test_rules_set_granularity_target_and_start() -> None:
    rules = {"0.weight": {"granularity": "channel"}, "2.*": {"target_sparsity": 0.5, "threshold_init": -3.0}}
    model = reference.mlp()
    check(model, torch.randn(4, 16), config={"target_sparsity": 0.9, "rules": rules})
    assert [len(s) for s in thresholds(model).values()] == [64, 1, 1]
    assert thresholds(model)["2.weight"].item() == -3 and thresholds(model)["4.weight"].item() == INIT
    assert [layer.target for layer in report(model).layers] == [0.9, 0.5, 0.9]


@pytest.mark.parametrize("rules", [{"nope.weight": None}, {"0.*": None, "x*": {"granularity": "channel"}}])
def test_rule_that_matches_nothing_is_refused(rules: dict[str, None]) -> None:
    model = reference.mlp()
    text = error(one_line(model, rules=rules), torch.randn(4, 16))
    assert repr(list(rules)[-1]) in text and "its weights are 0.weight, 2.weight, 4.weight" in text
    assert not thresholds(model)
