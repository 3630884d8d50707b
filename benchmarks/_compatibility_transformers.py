"""Small models of Hugging Face transformers, from configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from _compatibility_case import Case, Family

TOKENS, WIDTH, LENGTH, CLASSES, SIDE = 64, 32, 12, 10, 32

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH, "max_position_embeddings": 2 * LENGTH, **_SPECIAL,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
# Which the first forward would find out and write down, after which the model has to be compiled a second time.
_LABELS = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
_IMAGES = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH, **_LABELS,
}  # fmt: skip
_TWO_SIDED = {
    "vocab_size": TOKENS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 2 * LENGTH, "decoder_start_token_id": 1, "forced_eos_token_id": None, **_SPECIAL,
}  # fmt: skip
_WAVES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH,
    "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
    "apply_spec_augment": False, "vocab_size": TOKENS, **_LABELS,
}  # fmt: skip
_STATE = {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, **_SPECIAL}


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, TOKENS, (2, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, SIDE, SIDE), "labels": torch.randint(CLASSES, (2,))}


def _waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800), "labels": torch.randint(CLASSES, (2,))}


def _spectra() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 4 * LENGTH), "labels": torch.randint(3, TOKENS, (2, LENGTH))}


def _pairs() -> dict[str, Any]:
    images = _images()["pixel_values"]
    return {"input_ids": _tokens()["input_ids"], "pixel_values": images, "return_loss": True}


def _model(
    kind: str, config: str, model: str, inputs: Callable[[], dict[str, Any]], **arguments: Any
) -> Callable[[], Case]:
    """How to build a model of the class ``model`` from the configuration ``config``."""

    def build() -> Case:
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**arguments)
        settle(made)
        return Case(kind, getattr(transformers, model)(made).train(), inputs(), lambda out: out.loss, _reload)

    return build


def settle(config: Any) -> None:
    """Set every rate of dropout to 0, here and in the configurations inside this one, and let weights begin so large
    that the loss says something about them."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            settle(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name in ("initializer_range", "init_std"):
            setattr(config, name, WIDTH**-0.5)
    if hasattr(config, "use_cache"):
        config.use_cache = False


def _reload(model: nn.Module, folder: Path) -> nn.Module:
    saved: Any = model
    saved.save_pretrained(folder)
    loaded: nn.Module = type(saved).from_pretrained(folder)
    return loaded


def _encoder(config: str, suffix: str = "ForMaskedLM", **arguments: Any) -> Callable[[], Case]:
    return _model("encoder", config, f"{config}{suffix}", _tokens, **{**_TEXT, **arguments})


def _decoder(config: str, model: str, kind: str = "decoder", **arguments: Any) -> Callable[[], Case]:
    return _model(kind, config, model, _tokens, **arguments)


def _vision(config: str, **arguments: Any) -> Callable[[], Case]:
    name = f"{config}ForImageClassification"
    return _model("vision", config, name, _images, **{**_IMAGES, **arguments})


MODELS: dict[str, Callable[[], Case]] = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "distilbert": _model(
        "encoder", "DistilBert", "DistilBertForMaskedLM", _tokens, vocab_size=TOKENS, dim=WIDTH, n_layers=2, n_heads=2,
        hidden_dim=2 * WIDTH, max_position_embeddings=2 * LENGTH,
    ),
    "albert": _encoder("Albert", embedding_size=16),
    "electra": _encoder("Electra", embedding_size=16),
    "deberta_v2": _encoder(
        "DebertaV2", relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False,
    ),
    "modernbert": _encoder("ModernBert", local_attention=4, global_attn_every_n_layers=2, cls_token_id=1),
    "gpt2": _decoder("GPT2", "GPT2LMHeadModel", vocab_size=TOKENS, n_embd=WIDTH, n_layer=2, n_head=2, **_SPECIAL),
    "gpt_neo": _decoder(
        "GPTNeo", "GPTNeoForCausalLM", vocab_size=TOKENS, hidden_size=WIDTH, num_layers=2, num_heads=2,
        attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=2 * LENGTH, **_SPECIAL,
    ),
    "gpt_neox": _decoder("GPTNeoX", "GPTNeoXForCausalLM", **_TEXT),
    "opt": _decoder(
        "OPT", "OPTForCausalLM", vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=2 * WIDTH, word_embed_proj_dim=16, max_position_embeddings=2 * LENGTH, **_SPECIAL,
    ),
    "bloom": _decoder("Bloom", "BloomForCausalLM", vocab_size=TOKENS, hidden_size=WIDTH, n_layer=2, n_head=2),
    "falcon": _decoder(
        "Falcon", "FalconForCausalLM", vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, **_SPECIAL,
    ),
    "llama": _decoder("Llama", "LlamaForCausalLM", **_GROUPED),
    "mistral": _decoder("Mistral", "MistralForCausalLM", sliding_window=4, **_GROUPED),
    "qwen2": _decoder("Qwen2", "Qwen2ForCausalLM", **_GROUPED, tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3", "Qwen3ForCausalLM", **_GROUPED),
    "gemma2": _decoder("Gemma2", "Gemma2ForCausalLM", sliding_window=4, **_GROUPED),
    "gemma3": _decoder("Gemma3Text", "Gemma3ForCausalLM", sliding_window=4, **_GROUPED),
    "phi": _decoder("Phi", "PhiForCausalLM", **_TEXT),
    "phi3": _decoder("Phi3", "Phi3ForCausalLM", **_TEXT),
    "olmo2": _decoder("Olmo2", "Olmo2ForCausalLM", **_TEXT),
    "t5": _model(
        "encoder-decoder", "T5", "T5ForConditionalGeneration", _tokens, vocab_size=TOKENS, d_model=WIDTH, d_kv=16,
        d_ff=2 * WIDTH, num_layers=2, num_heads=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    ),
    "bart": _model("encoder-decoder", "Bart", "BartForConditionalGeneration", _tokens, **_TWO_SIDED),
    "marian": _model("encoder-decoder", "Marian", "MarianMTModel", _tokens, **_TWO_SIDED),
    "mbart": _model("encoder-decoder", "MBart", "MBartForConditionalGeneration", _tokens, **_TWO_SIDED),
    "vit": _vision("ViT"),
    "deit": _vision("DeiT"),
    "beit": _vision("Beit", use_relative_position_bias=True),
    "dinov2": _vision("Dinov2", mlp_ratio=2),
    "swin": _model(
        "vision", "Swin", "SwinForImageClassification", _images, image_size=SIDE, patch_size=4, embed_dim=16,
        depths=[1, 2], num_heads=[2, 4], window_size=4, **_LABELS,
    ),
    "convnext": _model(
        "vision", "ConvNext", "ConvNextForImageClassification", _images, num_stages=2, hidden_sizes=[16, 32],
        depths=[1, 1], **_LABELS,
    ),
    "segformer": _model(
        "vision", "Segformer", "SegformerForImageClassification", _images, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], **_LABELS,
    ),
    "clip": _model(
        "vision and text", "CLIP", "CLIPModel", _pairs, projection_dim=16, text_config=_TEXT, vision_config=_IMAGES
    ),
    "whisper": _model(
        "speech", "Whisper", "WhisperForConditionalGeneration", _spectra, num_mel_bins=8,
        max_source_positions=2 * LENGTH, max_target_positions=2 * LENGTH, suppress_tokens=None,
        begin_suppress_tokens=None, **_TWO_SIDED,
    ),
    "wav2vec2": _model("speech", "Wav2Vec2", "Wav2Vec2ForSequenceClassification", _waves, **_WAVES),
    "hubert": _model("speech", "Hubert", "HubertForSequenceClassification", _waves, **_WAVES),
    "mixtral": _decoder("Mixtral", "MixtralForCausalLM", "mixture of experts", num_local_experts=4, **_GROUPED),
    "qwen2_moe": _decoder(
        "Qwen2Moe", "Qwen2MoeForCausalLM", "mixture of experts", num_key_value_heads=2,
        shared_expert_intermediate_size=WIDTH, **_EXPERTS, **_TEXT,
    ),
    "qwen3_moe": _decoder("Qwen3Moe", "Qwen3MoeForCausalLM", "mixture of experts", **_EXPERTS, **_GROUPED),
    "gpt_oss": _decoder(
        "GptOss", "GptOssForCausalLM", "mixture of experts", num_local_experts=4, num_experts_per_tok=2,
        sliding_window=4, **_GROUPED,
    ),
    "mamba": _decoder("Mamba", "MambaForCausalLM", "state space", **_STATE),
    "mamba2": _decoder(
        "Mamba2", "Mamba2ForCausalLM", "state space", num_heads=4, head_dim=16, n_groups=2, chunk_size=4, **_STATE
    ),
    "falcon_mamba": _decoder("FalconMamba", "FalconMambaForCausalLM", "state space", **_STATE),
    "jamba": _decoder(
        "Jamba", "JambaForCausalLM", "state space", num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=8, **_TEXT,
    ),
}  # fmt: skip

FAMILY = Family("transformers", "https://github.com/huggingface/transformers", MODELS, reasons={})
