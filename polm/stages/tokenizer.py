"""`polm tokenizer`: train a tokenizer on the documents of a data set."""

from __future__ import annotations

from polm.data.readers import read_documents
from polm.recipe import TokenizerSettings
from polm.stages.common import Context, Stage, StageResult, input_file
from polm.text.tokenizer import count_unknown, fingerprint_tokenizer, train_tokenizer


def run(settings: TokenizerSettings, context: Context) -> StageResult:
    """Learn the vocabulary from pretrain.jsonl and write an ordinary tokenizer folder to `model/`."""
    texts = read_documents(input_file(context, "data", "pretrain.jsonl"))
    tokenizer = train_tokenizer(
        texts,
        kind=settings.kind,
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        chat_template=settings.chat_template,
        lowercase=settings.lowercase,
    )
    tokenizer.save_pretrained(context.workdir / "model")
    sample = texts[:200]
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sample)
    num_bytes = sum(len(text.encode()) for text in sample)
    summary = {
        "vocabulary": len(tokenizer),
        "bytes_per_token": num_bytes / max(1, num_tokens),
        "fingerprint": fingerprint_tokenizer(tokenizer),
    }
    return StageResult(
        summary, {"documents": len(texts), "sample_unknown": sum(count_unknown(tokenizer, text) for text in sample)}
    )


STAGE = Stage("tokenizer", "produce", TokenizerSettings, run, inputs=("data",), summary="train a tokenizer")
