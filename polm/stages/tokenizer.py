"""`polm tokenizer`: train a tokenizer on the documents of a data set."""

from __future__ import annotations

from itertools import islice

from polm.data.readers import iterate_documents
from polm.recipe import TokenizerSettings
from polm.stages.common import Context, Stage, StageResult, input_file
from polm.text.tokenizer import count_unknown, fingerprint_tokenizer, train_tokenizer


def run(settings: TokenizerSettings, context: Context) -> StageResult:
    """Learn the vocabulary from pretrain.jsonl and write an ordinary tokenizer folder to `model/`."""
    path = input_file(context, "data", "pretrain.jsonl")
    tokenizer = train_tokenizer(
        (document.text for document in iterate_documents(path)),
        kind=settings.kind,
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        chat_template=settings.chat_template,
        lowercase=settings.lowercase,
    )
    tokenizer.save_pretrained(context.workdir / "model")
    sample = [document.text for document in islice(iterate_documents(path), 200)]
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sample)
    num_bytes = sum(len(text.encode()) for text in sample)
    num_documents = num_unknown = 0
    for document in iterate_documents(path):  # read again rather than kept
        num_documents += 1
        num_unknown += count_unknown(tokenizer, document.text)
    summary = {
        "vocabulary": len(tokenizer),
        "bytes_per_token": num_bytes / max(1, num_tokens),
        "fingerprint": fingerprint_tokenizer(tokenizer),
    }
    return StageResult(summary, {"documents": num_documents, "sample_unknown": num_unknown})


STAGE = Stage("tokenizer", "produce", TokenizerSettings, run, inputs=("data",), summary="train a tokenizer")
