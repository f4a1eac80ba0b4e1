"""Every knob of polm, typed. One class a section; a recipe is a `Recipe`, a stage's own file is its section.

Learning rates are per update, token counts are in tokens, shares are in [0, 1]. A field marked not semantic changes
no result, so it is no part of an artifact's key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polm.config import Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
NOT_SEMANTIC: dict[str, Any] = {"semantic": False}


# ---- data ----------------------------------------------------------------------------------------------------------


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
    ngram: Annotated[int, Field(ge=2)] = Field(13, description="words in a row that make a record contaminated")
    deduplicate: bool = Field(True, description="drop records of the same text as an earlier one of the role")
    media: Literal["error", "drop"] = Field("error", description="records that refer to images, video or sound")
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


class TokenizerSettings(Settings):
    kind: Literal["bpe", "word", "byte"] = "bpe"
    vocab_size: Count = 8192
    min_frequency: Count = 1
    lowercase: bool = False
    chat_template: str = "polm"


# ---- training ------------------------------------------------------------------------------------------------------


class ModelShape(Settings):
    """Layout of a model that starts from random weights, in the architecture of a `transformers` model type."""

    architecture: str = "qwen3"
    hidden_size: Count = 128
    num_layers: Count = 2
    num_heads: Count = 4
    num_key_value_heads: Count = 4
    intermediate_size: Count = 384
    max_positions: Count = 512
    tie_embeddings: bool = True
    rope_theta: Positive = 10_000.0

    @model_validator(mode="after")
    def _check_heads(self) -> ModelShape:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_key_value_heads:
            raise ValueError("hidden_size must be a multiple of num_heads, and num_heads of num_key_value_heads")
        return self


class OptimizerSettings(Settings):
    """`muon` trains the matrices of the layers with Muon and everything else (embeddings, norms) with AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 3e-4
    embedding_learning_rate: Positive | None = Field(
        None, description="AdamW's rate beside Muon; default: a quarter of learning_rate"
    )
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    epsilon: Positive = 1e-8
    momentum: Share = 0.95
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = Field(1.0, description="largest gradient norm; 0 = no clipping")


class ScheduleSettings(Settings):
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_updates: Number = 0
    decay_share: Share = Field(0.2, description="wsd: the last part of the updates, over which the rate falls")
    final_share: Share = Field(0.0, description="where the rate ends, as a share of its peak")


class TrainSettings(Settings):
    """What every training stage has. Exactly one of `updates` and `epochs` is given."""

    seed: Seed = 0
    updates: Count | None = None
    epochs: Positive | None = None
    bin_tokens: Count = Field(1024, description="length of a packed bin")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = Field(1, description="CPU threads of the stage; 0 = all cores. Fixed, so that bits repeat")
    activation_checkpointing: bool = Field(
        False,
        description="compute each layer's activations again in the backward pass: less memory, a quarter more time",
        json_schema_extra=NOT_SEMANTIC,
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint_every: Number = Field(
        0, description="updates between checkpoints; 0 = off", json_schema_extra=NOT_SEMANTIC
    )
    log_every: Count = Field(1, json_schema_extra=NOT_SEMANTIC)

    @model_validator(mode="after")
    def _check_length(self) -> TrainSettings:
        if self.updates is not None and self.epochs is not None:
            raise ValueError("give updates or epochs, not both")
        return self


class PackedSettings(TrainSettings):
    """What every stage has that packs a data set once and walks over the bins."""

    bins_per_update: Count = 1
    micro_bins: Number = Field(0, description="bins in one forward pass; 0 = all of the update's")
    too_long: Literal["error", "truncate", "drop", "split"] = Field(
        "error", description="an example longer than the context; split is for plain documents only"
    )


class PretrainSettings(PackedSettings):
    model: ModelShape = ModelShape()
    too_long: Literal["error", "truncate", "drop", "split"] = "split"


def is_plausible(weighting: str, shuffles: str) -> bool:
    """Whether the weights are those of `plausible`, on their own tokens or shuffled."""
    return weighting == "plausible" or (weighting == "shuffled" and shuffles == "plausible")


class MidtrainSettings(PackedSettings):
    """Annealing; docs/flywheel.md explains each knob."""

    too_long: Literal["error", "truncate", "drop", "split"] = "split"
    weighting: Literal["ntp", "remit", "rho1", "distill", "plausible", "shuffled"] = "ntp"
    eps: Share = Field(0.2, description="remit, shuffled: weights are clipped to [1 - eps, 1 + eps]")
    temperature: Positive = Field(1.0, description="remit, shuffled: divides the centred difference")
    centring: Literal["sequence", "batch", "none"] = "sequence"
    base: Literal["live", "frozen"] = Field(
        "live", description="remit, shuffled, rho1: whose log-probabilities to compare"
    )
    denominator: Literal["tokens", "weights"] = Field("tokens", description="remit, plausible, shuffled")
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.6, description="rho1: share of the tokens kept")
    scope: Literal["batch", "sequence"] = Field("batch", description="rho1: where tokens are ranked")
    alpha: Share = Field(0.5, description="distill: share of the divergence in the loss")
    top_k: Count = Field(16, description="distill: tokens of the reference's distribution that are kept")
    gamma: NotNegative = Field(1.0, description="plausible: power of p_reference(token) / p_reference(its best token)")
    floor: BelowOne = Field(0.0, description="plausible: tokens whose ratio is below this are dropped")
    shuffles: Literal["remit", "plausible"] = Field("remit", description="shuffled: whose weights")

    @property
    def reference_top_k(self) -> int:
        """How many of the reference's likeliest tokens the weighting reads."""
        return self.top_k if self.weighting == "distill" else int(is_plausible(self.weighting, self.shuffles))


class SFTSettings(PackedSettings):
    train_on: Literal["all", "last"] = Field("all", description="every assistant turn, or only the last")
    chat_template: str | None = Field(None, description="set this template of ours; needed where the base has none")


# What each preference loss reads beside the scores, with its default; docs/methods.md has the formulas and papers.
_PAIRS: dict[str, Any] = {"nll_weight": 0.0, "wpo": False}
_REFERENCE: dict[str, Any] = {**_PAIRS, "beta": 0.1, "per_token": False, "ld_alpha": None}
PREFERENCE_KNOBS: dict[str, dict[str, Any]] = {
    "sigmoid": {**_REFERENCE, "label_smoothing": 0.0},
    "robust": {**_REFERENCE, "label_smoothing": 0.1},
    "ipo": _REFERENCE,
    "hinge": _REFERENCE,
    "exo": {**_REFERENCE, "label_smoothing": 0.001},
    "nca": {**_REFERENCE, "beta": 0.01},
    "apo_zero": _REFERENCE,
    "apo_down": _REFERENCE,
    "sppo": {**_REFERENCE, "beta": 0.001},
    "discopop": {**_REFERENCE, "beta": 0.05, "discopop_temperature": 0.05},
    "slic": {**_PAIRS, "beta": 1.0, "nll_weight": 1.0},
    "cpo": {**_PAIRS, "beta": 0.1, "label_smoothing": 0.0, "nll_weight": 1.0},
    "simpo": {**_PAIRS, "beta": 2.0, "label_smoothing": 0.0, "gamma": 1.0},
    "orpo": {"orpo_lambda": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"beta": 0.1},
}


class DPOSettings(PackedSettings):
    """Preference optimisation. A knob that is left out has the default of the loss (PREFERENCE_KNOBS); one that the
    loss does not read is refused."""

    loss: Literal[
        "sigmoid",
        "robust",
        "ipo",
        "hinge",
        "exo",
        "nca",
        "apo_zero",
        "apo_down",
        "sppo",
        "discopop",
        "slic",
        "cpo",
        "simpo",
        "orpo",
        "kto",
        "bco",
    ] = Field("sigmoid", description="slic, cpo, simpo, orpo read no reference; kto, bco take single judged answers")
    beta: Positive | None = Field(None, description="scale of the scores; with a reference, the pull towards it")
    label_smoothing: Smoothing | None = Field(
        None, description="share of pairs held to be labelled the wrong way round"
    )
    per_token: bool | None = Field(None, description="scores are means over the answer's tokens, not sums")
    ld_alpha: Share | None = Field(
        None, description="weight of the tokens past the length of the shorter answer (LD-DPO); default: 1, plain sums"
    )
    wpo: bool | None = Field(None, description="weight each pair by how likely the policy is to write it (WPO)")
    nll_weight: NotNegative | None = Field(None, description="weight of the chosen answer's negative log-likelihood")
    gamma: NotNegative | None = Field(None, description="simpo: margin that the scaled difference must exceed")
    discopop_temperature: Positive | None = Field(None, description="discopop: temperature of the blend of two losses")
    orpo_lambda: Positive | None = Field(None, description="orpo: weight of the odds ratio beside the likelihood")
    desirable_weight: Positive | None = Field(None, description="kto: weight of the answers labelled true")
    undesirable_weight: Positive | None = Field(None, description="kto: weight of the answers labelled false")

    @model_validator(mode="before")
    @classmethod
    def _fill_knobs(cls, values: Any) -> Any:
        """The defaults of the chosen loss, so that a resolved recipe says what was used."""
        if not isinstance(values, dict):
            return values
        loss = values.get("loss", "sigmoid")
        defaults = PREFERENCE_KNOBS.get(loss, {}) if isinstance(loss, str) else {}
        return {**values, **{name: value for name, value in defaults.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _check_knobs(self) -> DPOSettings:
        read = PREFERENCE_KNOBS[self.loss]
        for name in sorted({name for knobs in PREFERENCE_KNOBS.values() for name in knobs} - set(read)):
            if getattr(self, name) is not None:
                others = ", ".join(loss for loss, knobs in PREFERENCE_KNOBS.items() if name in knobs)
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and loss: {self.loss} does not read it; leave it out "
                    f"({self.loss} reads {', '.join(sorted(read))}; {name} is read by {others})"
                )
        if self.loss in ("robust", "exo") and not self.label_smoothing:
            raise ValueError(f"loss: {self.loss} needs label_smoothing above 0, for example {read['label_smoothing']}")
        if self.per_token and self.ld_alpha is not None:
            raise ValueError("give per_token or ld_alpha, not both: each is a way to take the length out of a score")
        return self


class GRPOSettings(TrainSettings):
    """`updates` counts optimizer updates; a rollout serves `updates_per_rollout` of them, one minibatch each."""

    prompts_per_rollout: Count = 32
    samples: Annotated[int, Field(ge=2)] = 8
    updates_per_rollout: Count = 1
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Number = 0
    max_new_tokens: Count = 64
    clip_low: Share = 0.2
    clip_high: Positive = 0.2
    kl_beta: NotNegative = Field(0.0, description="weight of the KL penalty to the starting model; 0 = none")
    kl_groups: Number = Field(
        4,
        description="groups of each rollout in which KL to the starting model is measured where kl_beta is 0; 0 = none",
        json_schema_extra=NOT_SEMANTIC,
    )
    normalize: Literal["tokens", "sequences", "constant"] = "tokens"
    advantage_scale: Literal["std", "none"] = "std"
    time_limit: Positive = Field(3.0, description="seconds that the verifier may take for one answer")

    @model_validator(mode="after")
    def _check_parts(self) -> GRPOSettings:
        if self.prompts_per_rollout < self.updates_per_rollout:
            raise ValueError("prompts_per_rollout must be at least updates_per_rollout: each update takes whole groups")
        return self


class PairsSettings(Settings):
    """Preference pairs from a model's own samples: a right answer over a wrong one to the same prompt."""

    seed: Seed = 0
    num_prompts: Count = 500
    samples: Annotated[int, Field(ge=2)] = 4
    pairs_per_prompt: Count = 1
    temperature: Positive = 1.0
    max_new_tokens: Count = 64
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1
    time_limit: Positive = 3.0


class AnnotateSettings(Settings):
    """Log-probabilities of a frozen model over a data set, computed once."""

    data: Literal["midtrain", "preferences", "sft"] = "midtrain"
    top_k: Number = Field(0, description="also keep the k likeliest tokens at each place; 0 = none")
    bin_tokens: Count = 4096
    max_tokens: Number = Field(0, description="the longest document of the stage that will read this; 0 = its context")
    too_long: Literal["error", "truncate", "drop", "split"] = "split"
    train_on: Literal["all", "last"] = "all"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1


class MicroscopeSettings(Settings):
    """The weights that an arm of mid-training gives at its first update, token by token, to be looked at.

    The weighting fields are those of `midtrain`. `centring: batch`, `scope: batch` and the shuffling take the whole
    sample for the batch.
    """

    seed: Seed = 0
    max_tokens: Count = Field(60_000, description="tokens of mid-training documents that the tables are made of")
    num_documents: Count = Field(40, description="documents shown whole, spread evenly over their sources")
    num_solutions: Number = Field(2, description="solutions shown of each benchmark; 0 = none")
    max_shown: Count = Field(400, description="tokens shown of one text; its weights rest on all of them")
    top: Count = Field(20, description="entries in each table of tokens: the most lifted, the most damped")
    min_count: Count = Field(20, description="a token must occur so often to stand in a table")
    weighting: Literal["remit", "rho1", "distill", "plausible", "shuffled"] = "remit"
    eps: Share = 0.2
    temperature: Positive = 1.0
    centring: Literal["sequence", "batch", "none"] = "sequence"
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    scope: Literal["batch", "sequence"] = "batch"
    gamma: NotNegative = 1.0
    floor: BelowOne = 0.0
    shuffles: Literal["remit", "plausible"] = "remit"
    bin_tokens: Count = Field(1024, description="length at which a document is cut, as in midtrain")
    too_long: Literal["error", "truncate", "drop", "split"] = "split"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1


class EvalSettings(Settings):
    benchmarks: tuple[str, ...] = Field((), description="names; empty = all in the data set folder")
    format: Literal["plain", "chat"] = "chat"
    num_items: Number = Field(0, description="at most so many items a benchmark; 0 = all")
    samples: Number = Field(4, description="sampled answers an item; 0 = greedy only")
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    pass_k: tuple[Count, ...] = (4,)
    not_first: tuple[str, ...] = Field(
        (),
        description="also sample answers that begin with none of these texts (steps@1); a flywheel does so for bases",
    )
    max_new_tokens: Count = 64
    seed: Seed = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1
    time_limit: Positive = 3.0

    @model_validator(mode="after")
    def _check_k(self) -> EvalSettings:
        if self.not_first and not self.samples:
            raise ValueError("not_first is for sampled answers, and samples is 0: set samples, or leave not_first out")
        if self.samples and any(k > self.samples for k in self.pass_k):
            raise ValueError(f"pass_k {self.pass_k} needs at least as many samples, found {self.samples}")
        return self


# ---- the flywheel --------------------------------------------------------------------------------------------------


# What arms may differ in: everything else (data order, seed, optimizer) is shared, or they could not be compared.
WEIGHTING_FIELDS = frozenset(
    (
        *("weighting", "eps", "temperature", "centring", "base", "denominator", "keep", "scope", "alpha", "top_k"),
        *("gamma", "floor", "shuffles"),
    )
)

# What a microscope takes from the arm that it looks at.
MICROSCOPE_FIELDS = (
    *("weighting", "eps", "temperature", "centring", "keep", "scope", "gamma", "floor", "shuffles"),
    *("bin_tokens", "too_long", "precision", "threads"),
)


class Arm(Settings):
    """One way of mid-training, run through every cycle. `changes` go over the recipe's midtrain section."""

    guide: Literal["grpo", "dpo", "sft"] = Field("grpo", description="which model of the cycle before is the reference")
    changes: dict[str, Any] = Field(default_factory=dict)
    cycles: Count | None = Field(None, description="cycles of this arm, at most the recipe's; default: all of them")


class Recipe(Settings):
    """A whole flywheel: what `polm run` takes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seeds: tuple[Seed, ...] = (0,)
    cycles: Count = Field(2, description="cycles after the first pass, which is plain NTP and gives the first RL model")
    arms: dict[str, Arm] = Field(default_factory=lambda: {"remit": Arm(changes={"weighting": "remit"})})
    base: str | None = Field(None, description="a checkpoint before annealing (path or hub id) in place of pretrain")
    data: DataSettings = DemoData()
    tokenizer: TokenizerSettings = TokenizerSettings()
    pretrain: PretrainSettings = PretrainSettings()
    midtrain: MidtrainSettings = MidtrainSettings()
    sft: SFTSettings = SFTSettings()
    pairs: PairsSettings | None = PairsSettings()
    dpo: DPOSettings | None = DPOSettings()
    grpo: GRPOSettings = GRPOSettings()
    microscope: MicroscopeSettings | None = Field(
        MicroscopeSettings(), description="token weights for the report; null = none"
    )
    eval: EvalSettings = EvalSettings()
    workers: Number = Field(0, description="stages run at once; 0 = one a core", json_schema_extra=NOT_SEMANTIC)

    @model_validator(mode="after")
    def _check_passes(self) -> Recipe:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give at least one, each once")
        if self.midtrain.weighting != "ntp":
            raise ValueError("midtrain.weighting must be ntp here: it is the control; weightings go into arms")
        if self.eval.format != "chat":
            raise ValueError("eval.format is set by the flywheel (plain for the base, chat afterwards); leave it out")
        if self.microscope is not None:
            given = self.microscope.model_dump(include=set(MICROSCOPE_FIELDS))
            mine = [name for name, value in given.items() if value != MicroscopeSettings.model_fields[name].default]
            if mine:
                raise ValueError(f"microscope.{mine[0]} is set by the flywheel from each arm; leave it out")
        if self.dpo is None and any(arm.guide == "dpo" for arm in self.arms.values()):
            raise ValueError("an arm has guide: dpo, and dpo is null")
        return self

    @model_validator(mode="after")
    def _check_arms(self) -> Recipe:
        for name, arm in self.arms.items():
            if name == "ntp":
                raise ValueError("the arm ntp is always there (it is the control); leave it out of arms")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"arm name {name!r}: use letters, digits, - and _")
            if "weighting" not in arm.changes:
                raise ValueError(
                    f"arms.{name}.changes names no weighting (remit, rho1, distill, plausible or shuffled)"
                )
            unknown = sorted(set(arm.changes) - WEIGHTING_FIELDS)
            if unknown:
                allowed = ", ".join(sorted(WEIGHTING_FIELDS))
                raise ValueError(f"arms.{name}.changes: {unknown} may not differ between arms; allowed: {allowed}")
        if (self.pairs is None) != (self.dpo is None):
            raise ValueError("pairs and dpo go together: give both, or set both to null")
        return self
