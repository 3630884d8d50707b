"""Hugging Face models from small random configurations: what ``transformers`` does to their weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from autosparse_fx import AutoSparse, GradientAnnealing, dense_weights, finalize, report, sparsify

transformers = pytest.importorskip("transformers")

# transformers and its dependencies warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = 40


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def llama(tied: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "bert": bert, "llama": llama}
IDS = torch.arange(12).reshape(2, 6)
CONFIG = AutoSparse(alpha=0.5, target_sparsity=None, threshold_init=-4.5)  # a cut of 0.011, of weights with std 0.02


def masked_names(model: nn.Module) -> set[str]:
    return {name for name, *_ in reference.masked_parameters(model)}


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def masked_dense(model: nn.Module, dense: nn.Module) -> nn.Module:
    """``dense`` with the masked values of ``model`` written into it."""
    held = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, _, weight, s in reference.masked_parameters(model):
            held[name].copy_(reference.masked(weight, s, 0.0))
    return dense


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_output_equals_the_reference_eager_and_compiled(name: str, granularity: str) -> None:
    dense = MODELS[name]().eval()
    model = sparsify(copy.deepcopy(dense), AutoSparse(alpha=0.5, threshold_init=-4.5, granularity=granularity))
    expected = logits(masked_dense(model, dense))
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected)
    assert 0.2 < reference.total_sparsity(model) < 0.8


@pytest.mark.parametrize("name", MODELS)
def test_projections_are_masked_and_norms_and_position_tables_are_not(name: str) -> None:
    model = sparsify(MODELS[name](), CONFIG)
    masked = masked_names(model)
    dense = {n for n, p in model.named_parameters() if n not in masked and not n.endswith("_threshold") and p.dim() > 1}
    expected = {
        "gpt2": {"transformer.wpe.weight"},
        "bert": {"bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"},
        "llama": set(),
    }
    assert dense == expected[name]
    assert not any("norm" in n.lower() or "ln_" in n or "bias" in n for n in masked)


def test_hf_conv1d_has_its_channels_on_axis_1() -> None:
    model = sparsify(gpt2(), AutoSparse(granularity="channel", threshold_init=-4.5))
    c_attn = model.transformer.h[0].attn.c_attn
    assert tuple(c_attn._parameters["weight"].shape) == (16, 48)
    assert tuple(c_attn.weight_threshold.shape) == (48,)
    with torch.no_grad():
        c_attn.weight_offset[5] = 30.0
    zero = (c_attn.weight == 0).all(0)
    assert zero.nonzero().flatten().tolist() == [5]
    assert type(finalize_quietly(model).transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D


def finalize_quietly(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return finalize(model)


@pytest.mark.parametrize("name", MODELS)
def test_tied_embedding_is_masked_with_its_head_and_reported(name: str) -> None:
    model = sparsify(MODELS[name](), CONFIG)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding._parameters["weight"] is head._parameters["weight"]
    assert embedding.weight_threshold is head.weight_threshold
    assert torch.equal(embedding.weight, head.weight) and (head.weight == 0).any()
    (layer,) = (x for x in report(model).layers if x.numel == TOKENS * 16)
    assert len({layer.name, *layer.tied}) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_init_weights_inside_is_that_of_the_dense_model(name: str) -> None:
    dense = MODELS[name]()
    model = sparsify(copy.deepcopy(dense), CONFIG)
    for m in (dense, model):
        torch.manual_seed(5)
        with dense_weights(m), torch.no_grad():
            for module in m.modules():
                for flag in ("_is_hf_initialized",):
                    module.__dict__.pop(flag, None)
            for p in m.parameters():
                if hasattr(p, "_is_hf_initialized"):
                    del p._is_hf_initialized
            m.apply(m._init_weights)
    state = model.state_dict()
    for n, t in dense.state_dict().items():
        assert torch.equal(state[n], t), n
    for n, t in state.items():
        if n.endswith("_threshold"):
            assert not t.any(), n


@pytest.mark.parametrize("name", MODELS)
def test_tie_weights_inside_keeps_one_threshold(name: str) -> None:
    model = sparsify(MODELS[name](), CONFIG)
    expected = logits(model.eval())
    with dense_weights(model):
        model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding._parameters["weight"] is head._parameters["weight"]
    assert embedding.weight_threshold is head.weight_threshold
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_tie_weights_outside_names_the_weight_and_the_cure(name: str) -> None:
    model = sparsify(MODELS[name](), CONFIG)
    expected = logits(model.eval())
    with pytest.raises((RuntimeError, TypeError), match=r"weight '.*' \[40, 16\] of .* is masked.*dense_weights"):
        model.tie_weights()
    assert torch.equal(logits(model), expected)


def test_tie_weights_inside_ties_what_was_not() -> None:
    model = sparsify(llama(tied=False), CONFIG)
    assert "model.embed_tokens.weight" not in masked_names(model)
    with dense_weights(model):
        model.lm_head.weight = model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight_threshold is model.lm_head.weight_threshold
    assert torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("tokens", [TOKENS + 7, TOKENS - 7, TOKENS])
@pytest.mark.parametrize("name", MODELS)
def test_resized_embeddings_are_masked_tied_and_of_the_dense_values(name: str, tokens: int, granularity: str) -> None:
    dense = MODELS[name]().eval()
    model = sparsify(copy.deepcopy(dense), AutoSparse(alpha=0.5, threshold_init=-4.5, granularity=granularity))
    dense.resize_token_embeddings(tokens, mean_resizing=False)
    torch.manual_seed(2)
    with dense_weights(model):
        model.resize_token_embeddings(tokens, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding._parameters["weight"].shape[0] == head._parameters["weight"].shape[0] == tokens
    assert embedding._parameters["weight"] is head._parameters["weight"]
    assert embedding.weight_threshold is head.weight_threshold
    assert head.weight_threshold.shape == ((tokens,) if granularity == "channel" else (1,))
    kept = min(tokens, TOKENS)
    old = dense.get_input_embeddings().weight[:kept]
    assert torch.equal(embedding._parameters["weight"][:kept], old)
    assert (embedding.weight == 0).any() and torch.equal(embedding.weight, head.weight)
    assert logits(model).shape[-1] == tokens
    with torch.no_grad():
        held = dict(dense.named_parameters(remove_duplicate=False))
        for n, _, weight, s in reference.masked_parameters(model):
            held[n].copy_(reference.masked(weight, s, 0.0))
    torch.testing.assert_close(logits(model), logits(dense))


def test_resized_untied_head_is_masked_and_its_embedding_is_not() -> None:
    model = sparsify(llama(tied=False), CONFIG)
    with dense_weights(model):
        model.resize_token_embeddings(TOKENS + 5, mean_resizing=False)
    assert "lm_head.weight" in masked_names(model)
    assert "model.embed_tokens.weight" not in masked_names(model)
    assert logits(model).shape[-1] == TOKENS + 5


@pytest.mark.parametrize("name", MODELS)
def test_finalized_model_is_the_dense_class_with_the_same_output(name: str) -> None:
    dense = MODELS[name]().eval()
    model = sparsify(copy.deepcopy(dense), CONFIG)
    expected = logits(model)
    finalize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_every_weight_and_the_target(name: str) -> None:
    model = sparsify(MODELS[name](), AutoSparse(0.8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    GradientAnnealing(model, 12, optimizer)
    for _ in range(12):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("_threshold"))
        optimizer.step()
        optimizer.zero_grad()
    assert abs(reference.total_sparsity(model) - 0.8) < 0.005


def test_generate_uses_the_masked_weights() -> None:
    model = sparsify(llama().eval(), CONFIG)
    expected = finalize(copy.deepcopy(model)).generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), expected)


def test_save_pretrained_of_the_finalized_model_loads_as_the_dense_class(tmp_path: Path) -> None:
    model = sparsify(gpt2().eval(), CONFIG)
    expected = logits(model)
    finalize(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)
    assert any((p == 0).any() for p in loaded.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = sparsify(llama(), AutoSparse(alpha=0.5, threshold_init=-4.5))
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain.train(), checkpointed.train()):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (n, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=n)
