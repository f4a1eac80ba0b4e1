"""Every knob of polm, typed. One class a section; a recipe is a `Recipe`, a stage's own file is its section.

Learning rates are per update, token counts are in tokens, shares are in [0, 1]. A field marked not semantic changes
no result, so it is no part of an artifact's key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polm.config import Settings, fill_defaults, require_readers
from polm.recipe_adapter import AdapterSettings
from polm.recipe_data import DataSettings, DemoData
from polm.recipe_rewards import RewardSettings
from polm.recipe_types import (
    NOT_SEMANTIC,
    BelowOne,
    Count,
    NotNegative,
    Number,
    Positive,
    Seed,
    Several,
    Share,
    Smoothing,
    UpToOne,
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
    threads: Number = Field(
        1, description="CPU threads, on which the bits depend; 0 = all cores (the default of a stage run by itself)"
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute each layer's activations again in the backward pass: less memory, a quarter more time",
        json_schema_extra=NOT_SEMANTIC,
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    adapter: AdapterSettings | None = Field(
        None,
        description="train this on the frozen base, in place of its weights",
        json_schema_extra={"semantic": "if given"},
    )
    checkpoint_every: Number | None = Field(
        None,
        description="updates between checkpoints; 0 = none; without it, one whenever the last is ten minutes old",
        json_schema_extra=NOT_SEMANTIC,
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
    keep: UpToOne = Field(0.6, description="rho1: share of the tokens kept")
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


class RecordSettings(PackedSettings):
    """What the stages have that read conversations, pairs or judged answers."""

    bad_records: Literal["error", "drop"] = Field(
        "error",
        description="a record that refers to media, a pair whose prompts differ, an answer of which the template "
        "leaves nothing, a conversation that it does not let be marked, an empty step",
        json_schema_extra={"semantic": "if given"},
    )


class SFTSettings(RecordSettings):
    loss: Literal["nll", "dft"] = Field("nll", description="dft: each token's loss is weighted by its own probability")
    neftune_alpha: NotNegative = Field(
        0.0, description="NEFTune: scale of the noise on the input embeddings while training; 0 = none, papers use 5"
    )
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


class DPOSettings(RecordSettings):
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
        return fill_defaults(values, "loss", "sigmoid", PREFERENCE_KNOBS)

    @model_validator(mode="after")
    def _check_knobs(self) -> DPOSettings:
        require_readers(self, "loss", PREFERENCE_KNOBS)
        read = PREFERENCE_KNOBS[self.loss]
        if self.loss in ("robust", "exo") and not self.label_smoothing:
            raise ValueError(f"loss: {self.loss} needs label_smoothing above 0, for example {read['label_smoothing']}")
        if self.per_token and self.ld_alpha is not None:
            raise ValueError("give per_token or ld_alpha, not both: each is a way to take the length out of a score")
        return self


class RewardModelSettings(RecordSettings):
    """A reward model from comparisons. `bin_tokens` is also the longest prompt with one answer."""

    center_coefficient: NotNegative = Field(0.0, description="weight of (c + r)^2, which keeps rewards around 0")
    holdout_share: BelowOne = Field(
        0.1, description="share of prompts that is not trained on but reported on; 0 = none"
    )
    head_spread: NotNegative | None = Field(
        None, description="deviation of a fresh head's weights; default 1 / sqrt(width + 1), 0 = rewards begin at 0"
    )


class ProcessRewardModelSettings(RecordSettings):
    """A process reward model from answers whose steps are labelled."""

    separator: Annotated[str, Field(min_length=1)] = Field(
        "\n", description="text behind each step; its last token is where the step is scored"
    )
    last_step_only: bool = Field(False, description="learn from the label of the last step alone (an outcome model)")
    holdout_share: BelowOne = Field(
        0.1, description="share of prompts that is not trained on but reported on; 0 = none"
    )
    head_spread: NotNegative | None = Field(
        None, description="deviation of a fresh head's weights; default 1 / sqrt(width + 1), 0 = all steps begin at 1/2"
    )


class SamplingSettings(TrainSettings, RewardSettings):
    """What every stage has that learns from its own samples."""

    prompts_per_rollout: Count = 32
    samples: Count = Field(8, description="answers to each prompt of a rollout")
    temperature: Positive = 1.0
    top_p: UpToOne = 1.0
    top_k: Number = 0
    max_new_tokens: Count = 64


class RolloutSettings(SamplingSettings):
    """What the policy-gradient stages have besides."""

    kl_beta: NotNegative = Field(0.0, description="weight of the KL penalty to the starting model; 0 = none")
    importance_cap: Positive | None = Field(
        None, description="weight what the generator drew by min(p_trainer / p_generator, this); none = as it is"
    )
    kl_groups: Number = Field(
        4,
        description="groups of each rollout in which KL to the starting model is measured where kl_beta is 0; 0 = none",
        json_schema_extra=NOT_SEMANTIC,
    )


class GRPOSettings(RolloutSettings):
    """`updates` counts optimizer updates; a rollout serves `updates_per_rollout` of them, one minibatch each."""

    samples: Several = 8
    updates_per_rollout: Count = 1
    clip_low: Share = 0.2
    clip_high: Positive = 0.2
    normalize: Literal["tokens", "sequences", "constant"] = "tokens"
    advantage_scale: Literal["std", "none"] = "std"

    @model_validator(mode="after")
    def _check_parts(self) -> GRPOSettings:
        if self.prompts_per_rollout < self.updates_per_rollout:
            raise ValueError("prompts_per_rollout must be at least updates_per_rollout: each update takes whole groups")
        return self


class AnswerSettings(RewardSettings):
    """What every stage has that makes data of a model's judged answers."""

    seed: Seed = 0
    num_prompts: Number = Field(500, description="0 = all")
    samples: Count = Field(4, description="answers to each prompt")
    temperature: Positive = 1.0
    top_p: UpToOne = 1.0
    top_k: Number = 0
    max_new_tokens: Count = 64
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1


# What each way to choose pairs reads, with its default.
PAIR_KNOBS: dict[str, dict[str, Any]] = {
    "best_worst": {"pairs_per_prompt": 1},
    "rso": {"rso_beta": 0.5, "rso_accepted": 8, "rso_rounds": "first"},
}


class PairsSettings(AnswerSettings):
    """Preference pairs from a model's own samples: a better answer over a worse one to the same prompt."""

    samples: Several = 4
    choose: Literal["best_worst", "rso"] = Field(
        "best_worst", description="rso: statistical rejection sampling, then pairs at random; wants many samples (64)"
    )
    pairs_per_prompt: Count | None = Field(None, description="best_worst: at most so many pairs a prompt")
    rso_beta: Positive | None = Field(None, description="rso: temperature of the reward in the acceptance")
    rso_accepted: Several | None = Field(None, description="rso: answers accepted of a prompt's")
    rso_rounds: Literal["first", "all"] | None = Field(
        None, description="rso: pairs of the first round only, or of the whole tournament"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_knobs(cls, values: Any) -> Any:
        return fill_defaults(values, "choose", "best_worst", PAIR_KNOBS)

    @model_validator(mode="after")
    def _check_knobs(self) -> PairsSettings:
        require_readers(self, "choose", PAIR_KNOBS)
        return self


class AnnotateSettings(Settings):
    """Log-probabilities of a frozen model over a data set, computed once."""

    data: Literal["midtrain", "preferences", "sft"] = "midtrain"
    top_k: Number = Field(0, description="also keep the k likeliest tokens at each place; 0 = none")
    bin_tokens: Count = 4096
    max_tokens: Number = Field(0, description="the longest document of the stage that will read this; 0 = its context")
    too_long: Literal["error", "truncate", "drop", "split"] = "split"
    train_on: Literal["all", "last"] = "all"
    bad_records: Literal["error", "drop"] = Field(
        "error", description="as in the stage that will read this", json_schema_extra={"semantic": "if given"}
    )
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
    keep: UpToOne = 0.6
    scope: Literal["batch", "sequence"] = "batch"
    gamma: NotNegative = 1.0
    floor: BelowOne = 0.0
    shuffles: Literal["remit", "plausible"] = "remit"
    bin_tokens: Count = Field(1024, description="length at which a document is cut, as in midtrain")
    too_long: Literal["error", "truncate", "drop", "split"] = "split"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Number = 1


class MergeAdapterSettings(Settings):
    threads: Number = 1


class EvalSettings(Settings):
    benchmarks: tuple[str, ...] = Field((), description="names; empty = all in the data set folder")
    format: Literal["plain", "chat"] = "chat"
    num_items: Number = Field(0, description="at most so many items a benchmark; 0 = all")
    samples: Number = Field(4, description="sampled answers an item; 0 = greedy only")
    temperature: Positive = 1.0
    top_p: UpToOne = 1.0
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
        if "model" in self.grpo.reward:
            raise ValueError(
                "grpo.reward: model needs a reward model, and a flywheel makes none; run `polm grpo` itself"
            )
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
