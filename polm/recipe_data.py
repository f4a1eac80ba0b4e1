"""The knobs of data: embedded, published, or files of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from polm.config import Settings
from polm.recipe_types import Count, Positive, Seed, Several, Share


class DemoData(Settings):
    """The embedded default: ten generated tasks, generated prose, corrupted solutions."""

    source: Literal["demo"] = "demo"
    seed: Seed = 0
    num_pretrain_docs: Count = 30_000
    num_midtrain_docs: Count = 8_000
    num_sft: Count = 1_400
    num_prompts: Count = 2_000
    num_items: Count = 200
    prose_share: Share = 0.25
    direct_share: Share = 0.3
    corrupted_share: Share = 0.12
    chat_share: Share = 0.1
    midtrain_prose_share: Share = 0.5
    midtrain_corrupted_share: Share = 0.3


class WordProblemsData(Settings):
    """GSM8K, MAWPS, ASDiv and SVAMP from a folder of the published files; the split is by a hash of the question."""

    source: Literal["word_problems"]
    path: Path = Field(description="folder that holds gsm8k/ and word_problems/")
    seed: Seed = 0
    holdout_share: Share = 0.2


class FolderData(Settings):
    """A data set folder as it is: (pretrain|midtrain|sft|preferences|feedback|stepwise|prompts).jsonl, benchmarks/*."""

    source: Literal["folder"]
    path: Path


class FileSource(Settings):
    """A file of your own in any format that polm knows (`polm data inspect FILE` shows which; docs/data.md)."""

    path: str = Field(description="a file, a folder of files, or hub:OWNER/NAME[:CONFIG][:SPLIT]")
    format: str | None = Field(None, description="default: told from the first rows")
    columns: dict[str, str] = Field(default_factory=dict, description="ours: theirs")


class MixedSource(FileSource):
    weight: Positive | None = Field(None, description="share in a mixture; none for all = each record once")


class FilesData(Settings):
    """Files of your own, converted, cleaned and mixed into a data set folder."""

    source: Literal["files"]
    pretrain: tuple[MixedSource, ...] = ()
    midtrain: tuple[MixedSource, ...] = ()
    sft: tuple[MixedSource, ...] = ()
    preferences: tuple[MixedSource, ...] = ()
    feedback: tuple[MixedSource, ...] = ()
    stepwise: tuple[MixedSource, ...] = ()
    prompts: tuple[MixedSource, ...] = ()
    benchmarks: Path | None = Field(None, description="folder of NAME.jsonl, copied; no record may hold its questions")
    decontaminate: dict[str, FileSource] = Field(
        default_factory=dict,
        description="name: file of further questions; format: published = a benchmark's own layout",
    )
    ngram: Several = Field(13, description="words in a row that make a record contaminated")
    deduplicate: bool = Field(True, description="drop records of the same text as an earlier one of the role")
    media: Literal["error", "drop"] = Field("error", description="records that refer to images, video or sound")
    bad_records: Literal["error", "drop"] = Field("error", description="pairs whose prompts differ")
    seed: Seed = Field(0, description="of the order of a mixture")
    stop: Literal["first", "all"] = Field(
        "first", description="end of a mixture: at the first exhausted source, or when all are (others repeat)"
    )


DataSettings = Annotated[DemoData | WordProblemsData | FolderData | FilesData, Field(discriminator="source")]


class DataStage(Settings):
    """Settings of the `data` stage when it is run on its own."""

    data: DataSettings = DemoData()
    needs: tuple[str, ...] = Field(
        (), description="files or folders that must be in the result; a flywheel fills it in"
    )
