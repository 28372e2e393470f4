"""Small random models of many kinds, by name."""

from __future__ import annotations

import tiny
import tiny_experts
import transformers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert(kind):
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=160, **_SIZES))


def _vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **_SIZES))


def _resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config)


def _t5():
    config = transformers.T5Config(vocab_size=160, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _whisper():
    config = transformers.WhisperConfig(
        num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=160, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=1, **_SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _clip():
    vision = {**_SIZES, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**_SIZES, "vocab_size": 160}, vision_config=vision)
    return transformers.CLIPModel(config)


def _mamba():
    config = transformers.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=1, state_size=4, **_SPECIAL)
    return transformers.MambaForCausalLM(config)


def _wav2vec2():
    config = transformers.Wav2Vec2Config(
        vocab_size=160, **_SIZES, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


MAKERS = {
    "llama": lambda: tiny.make("llama"),
    "phi3": lambda: tiny.make("phi3"),
    "gpt2": lambda: tiny.make("gpt2"),
    "modernbert": lambda: tiny.make("modernbert"),
    "qwen2_vl": lambda: tiny.make("qwen2_vl"),
    "mixtral": lambda: tiny_experts.make("mixtral"),
    "mamba": _mamba,
    "bert": lambda: _bert("BertModel"),
    "classifier": lambda: _bert("BertForSequenceClassification"),
    "masked": lambda: _bert("BertForMaskedLM"),
    "t5": _t5,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "vit": _vit,
    "resnet": _resnet,
    "clip": _clip,
}
