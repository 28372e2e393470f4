"""GGUF files of tiny Llama models, as llama.cpp's converter writes them."""

from __future__ import annotations

import pytest


def write_gguf(path, model, kind, tokenizer=False):
    """Write a Llama model with llama.cpp's names, and the halves of query and key interleaved.

    kind: a GGMLQuantizationType for matrices. tokenizer: whether to add one, of 160 tokens.
    """
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        words = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"w{i}" for i in range(6, 160))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, w in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in key:
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        stem = names.get_name(key.removesuffix(".weight"))
        quantized = kind if w.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(w.numpy(), quantized)
        writer.add_tensor(f"{stem}.weight", data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
