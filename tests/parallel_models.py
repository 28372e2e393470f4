"""What the ranks of a tensor-parallel model do in tests; importable by their processes."""

from __future__ import annotations

import traceback

import torch
import transformers
from tiny import COMMON, make, outputs
from torch import nn

import qins

# Half of 320 is a border inside groups of 64, 128 and 192; a quarter of it, inside groups of 32, too.
WIDE = COMMON | {"intermediate_size": 320, "num_key_value_heads": 2}
SMOLLM2 = COMMON | {
    "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 2, "tie_word_embeddings": True,
}  # fmt: skip
# Phi-3.5's heads of 96 and its ratios of sizes, in an eighth of its width
PHI35 = COMMON | {
    "vocab_size": 512, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 4,
    "num_key_value_heads": 4, "original_max_position_embeddings": 128,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_FOUR = {"num_key_value_heads": 4}
SIZES = {
    "llama": ("Llama", WIDE),
    "llama, four heads": ("Llama", WIDE | _FOUR),
    "llama, tied": ("Llama", WIDE | {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", WIDE | _BIASES),
    "smollm2": ("Llama", SMOLLM2),
    "phi3": ("Phi3", WIDE | {"original_max_position_embeddings": 128}),
    "phi3.5": ("Phi3", PHI35),
    "qwen2": ("Qwen2", WIDE),
    "qwen3": ("Qwen3", WIDE | {"head_dim": 16}),
    "gemma2": ("Gemma2", WIDE | {"head_dim": 16}),
    "mixtral": ("Mixtral", WIDE | _LOCAL | {"intermediate_size": 160}),
    "mixtral, four heads": ("Mixtral", WIDE | _LOCAL | _FOUR | {"intermediate_size": 160}),
    "qwen3_moe": ("Qwen3Moe", WIDE | _MOE | {"head_dim": 16, "moe_intermediate_size": 160}),
    "gpt_oss": (
        "GptOss", WIDE | _LOCAL | {"head_dim": 16, "layer_types": ["full_attention"] * 2, "rope_scaling": None},
    ),
}  # fmt: skip


def save(name, path):
    """Save a random model; its experts and biases are large enough to matter."""
    prefix, sizes = SIZES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**sizes)).eval()
    for key, p in model.named_parameters():
        if p.ndim == 3 or key.endswith("bias"):
            nn.init.normal_(p, std=0.05)
    model.save_pretrained(path)
    return type(model).__name__


def distributed(**told):
    from transformers.distributed import DistributedConfig

    return DistributedConfig(**(told or {"tp_plan": "auto"}))


def load(name, path, told, **kwargs):
    return getattr(transformers, name).from_pretrained(path, distributed_config=distributed(**told), **kwargs)


def tokens(model):
    ids = torch.arange(3, 12)[None]
    return model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))


def held(model):
    """Return the bytes of codes in this process."""
    return sum(m.get_buffer(n).nbytes for m in model.modules() if isinstance(m, qins.nn.Coded) for n in m._names)


def report(model):
    return [(c.name, c.shape, c.codec, c.group_size, c.bytes_after) for c in model.hf_quantizer.report.converted]


def same_parts(a, b):
    """Return whether the state of two models on this rank is equal."""
    a, b = ({k: t.to_local() if hasattr(t, "to_local") else t for k, t in m.state_dict().items()} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def on_rank(cases):
    """Quantize models while loading, save them, load the codes, save again; return what each case found."""
    found = []
    for name, path, settings, told, kwargs in cases:
        try:
            model = load(name, f"{path}/float", told, quantization_config=qins.QinsConfig(**settings), **kwargs)
            result = {"logits": outputs(model), "tokens": tokens(model), "held": held(model), "report": report(model)}
            ranks = torch.distributed.get_world_size()
            model.save_pretrained(f"{path}/{ranks}")
            again = load(name, f"{path}/{ranks}", told, **kwargs)
            result |= {"same": same_parts(model, again), "logits of codes": outputs(again)}
            again.save_pretrained(f"{path}/{ranks} again", max_shard_size="20KB")
            found.append(result)
        except Exception:
            found.append({"error": traceback.format_exc()})
        torch.distributed.barrier()
    return found


def input_gradient(name, path, told=None):
    """Return the gradient of a model's input, with codes in every layer."""
    settings = {"quantization_config": qins.QinsConfig(lm_head=True)}
    model = (
        load(name, path, told, **settings) if told else getattr(transformers, name).from_pretrained(path, **settings)
    )
    embedded = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    return embedded.grad


def refusals(paths):
    """Return the message of each error that loading or using a model should raise."""
    import peft

    def message(function, *arguments, **kwargs):
        try:
            function(*arguments, **kwargs)
        except ValueError as e:
            return str(e)
        return "no error"

    config = {"quantization_config": qins.QinsConfig()}
    auto = {"tp_plan": "auto"}
    rows = {"tp_plan": {"transformer.h.*.mlp.c_fc": "rowwise"}, "tp_size": 2}
    calibrated = {"quantization_config": qins.QinsConfig(calibration=f"{paths}/text")}
    model = load("LlamaForCausalLM", f"{paths}/llama", auto, **config)
    floats = load("LlamaForCausalLM", f"{paths}/llama", auto)
    return {
        "convert": message(qins.convert, floats),
        "heads": message(load, "LlamaForCausalLM", f"{paths}/smollm2", auto, **config),
        "heads of codes": message(load, "LlamaForCausalLM", f"{paths}/smollm2 codes", auto),
        "conv1d": message(load, "GPT2LMHeadModel", f"{paths}/gpt2", rows, **config),
        "calibration": message(load, "LlamaForCausalLM", f"{paths}/llama", auto, **calibrated),
        "fsdp": message(load, "LlamaForCausalLM", f"{paths}/llama", {"fsdp_size": 2}, **config),
        "dequantize": message(model.dequantize),
        "distributed checkpoint": message(model.save_pretrained, f"{paths}/dcp", distributed_checkpoint=True),
        # last, since transformers believes that the model has the adapter
        "lora": message(model.add_adapter, peft.LoraConfig(target_modules="all-linear")),
    }


def save_gpt2(path):
    make("gpt2").save_pretrained(path)


def peak_while_loading(path, codes):
    """Return this rank's peak memory while loading, what it then holds, and its largest tensor, in bytes."""
    from qins.system import peak_resident_bytes, reset_peak_resident_bytes

    auto, config = {"tp_plan": "auto"}, {} if codes else {"quantization_config": qins.QinsConfig()}
    load("LlamaForCausalLM", f"{path}/small", auto, quantization_config=qins.QinsConfig())  # warms up
    reset_peak_resident_bytes()
    before = peak_resident_bytes()
    model = load("LlamaForCausalLM", f"{path}/{'codes' if codes else 'float'}", auto, **config)
    peak = peak_resident_bytes() - before
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in (*model.parameters(), *model.buffers())]
    return peak, sum(t.nbytes for t in tensors)
