"""Phi-3.5 with the rational codec: 15 greedy tokens of the float model and of the converted one."""

import argparse

import torch
from qins_weight_codec import QINSWeightLinear, convert_linear_to_qins, verify_qins_layer
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="microsoft/Phi-3.5-mini-instruct")
parser.add_argument("--tokens", type=int, default=15)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
inputs = tokenizer("The capital of France is", return_tensors="pt")


def generate():
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    return out[0, inputs.input_ids.shape[1] :].tolist()


def megabytes():
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values()) / 2**20


reference, before = generate(), megabytes()
first = model.model.layers[0].self_attn.o_proj
model = convert_linear_to_qins(model, target_names=["o_proj", "gate_up_proj", "down_proj"], alpha=1.0, verbose=False)
layers = [m for m in model.modules() if isinstance(m, QINSWeightLinear)]
assert all(m.w_encoded.dtype == torch.uint8 for m in layers), "quantised"
print(verify_qins_layer(first, model.model.layers[0].self_attn.o_proj))
result = generate()
match = sum(a == b for a, b in zip(reference, result))
print(f"layers {len(layers)}, tokens {match}/{args.tokens}, {before:.1f} -> {megabytes():.1f} MB")
print(tokenizer.decode(result))
