"""LoRA on a real quantized model."""

from __future__ import annotations

import pytest
import torch

import qins

peft = pytest.importorskip("peft")
from tiny import same_state  # noqa: E402

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already "),
]


@pytest.mark.long
def test_smollm2_end_to_end(tmp_path):
    """Quantized while loading, saved, loaded, trained with LoRA in transformers' Trainer, saved, loaded, merged."""
    transformers = pytest.importorskip("transformers")
    from qins.fidelity import metrics
    from qins.hf import find_model

    source = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    model.save_pretrained(tmp_path / "codes")
    loaded = qins.load(tmp_path / "codes")
    assert same_state(loaded, model)
    del model
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = loaded.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert "Paris" in tokenizer.decode(out[0])
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(loaded, config).train()
    ids = tokenizer(metrics.sample_text(), return_tensors="pt").input_ids[:, :64]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=5, learning_rate=2e-3, per_device_train_batch_size=1,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", lr_scheduler_type="constant",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    example = {"input_ids": ids[0], "labels": ids[0]}
    trainer = transformers.Trainer(model=tuned, args=arguments, train_dataset=[example] * 5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", losses)
    assert losses[-1] < losses[0] - 0.1
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(qins.load(tmp_path / "codes"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
        again.merge_adapter()
        kl = expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - again(input_ids=ids).logits.log_softmax(-1))
    assert kl.sum(-1).mean() < 0.02
