"""A tokenizer and text for tiny random models: words w0, w1, ... stand for token ids 0, 1, ..."""

from __future__ import annotations

import torch
import transformers
from tiny import make
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def token_ids(tokens=1024, vocabulary=160, seed=0):
    """Token ids that follow one another by rules, so that inputs are correlated."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 5, (tokens,), generator=g)
    return step.cumsum(0) % (vocabulary - 3) + 3


def text(tokens, seed=0):
    return " ".join(f"w{i}" for i in token_ids(tokens, seed=seed).tolist())


def save_tokenizer(path, vocabulary=160, before=None, after=None, **tokens):
    """Write a tokenizer that splits at spaces beside a checkpoint; it may put tokens before and after a text."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if before is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}", special_tokens=[(w, words[w]) for w in (before, after)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **tokens).save_pretrained(path)


def save_calibrated_source(path):
    """Write a sharded float checkpoint with its tokenizer, and text.txt in the directory above."""
    make("llama").save_pretrained(path, max_shard_size="60KB")
    save_tokenizer(path)
    (path.parent / "text.txt").write_text(text(2048))
    return path


def sharp_llama():
    """A model whose next tokens are far from uniform."""
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model
