"""The knobs of adapters: which kind, how large, and on which layers. docs/adapters.md explains each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polm.config import Settings
from polm.recipe_types import BelowOne, Count, Positive

Name = Annotated[str, Field(min_length=1)]

# What each kind reads, with its default. The IA3 paper (arXiv 2205.05638) scales keys, values and the inner
# activations of the feed-forward layers; the names are those of Llama and its relatives.
ADAPTER_KNOBS: dict[str, dict[str, Any]] = {
    "lora": {
        **{"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"},
        **{"rslora": False, "dora": False, "quantize": None},
    },
    "ia3": {"targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)},
    "prefix": {"virtual_tokens": 16, "encoder_width": None},
    "prompt": {"virtual_tokens": 16, "init_text": None},
    "p_tuning": {"virtual_tokens": 16, "encoder_width": 128},
    "continue": {},
}
MERGING_KINDS = ("lora", "ia3")  # layer changes, which go into the weights


class AdapterSettings(Settings):
    """A few new weights on a frozen base. A knob that is left out has the default of the kind (ADAPTER_KNOBS); one
    that the kind does not read is refused."""

    kind: Literal["lora", "ia3", "prefix", "prompt", "p_tuning", "continue"] = Field(
        description="continue = go on training the adapter that the base comes with"
    )
    rank: Count | None = Field(None, description="lora: width of the low-rank product")
    alpha: Positive | None = Field(
        None, description="lora: the product is scaled by alpha / rank, with rslora by alpha / sqrt(rank)"
    )
    dropout: BelowOne | None = Field(None, description="lora: on the product's input")
    targets: Literal["all-linear"] | tuple[Name, ...] | None = Field(
        None, description="lora, ia3: names of layers; all-linear = every linear layer but the output head"
    )
    feedforward: tuple[Name, ...] | None = Field(
        None, description="ia3: those of the targets whose input is scaled, not their output"
    )
    rslora: bool | None = Field(None, description="lora: rank-stabilised scaling")
    dora: bool | None = Field(None, description="lora: learn the length of each weight column apart from its direction")
    quantize: Literal["nf4"] | None = Field(
        None, description="lora: keep the frozen base in 4 bits (QLoRA; needs bitsandbytes)"
    )
    virtual_tokens: Count | None = Field(None, description="prefix, prompt, p_tuning: how many stand before each text")
    encoder_width: Count | None = Field(
        None, description="prefix, p_tuning: hidden width of the MLP that computes them; prefix: none = no MLP"
    )
    init_text: Name | None = Field(
        None, description="prompt: start from this text's embeddings; default: those of random tokens"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_knobs(cls, values: Any) -> Any:
        """The defaults of the chosen kind, so that a resolved recipe says what was used."""
        if not isinstance(values, dict):
            return values
        kind = values.get("kind")
        defaults = ADAPTER_KNOBS.get(kind, {}) if isinstance(kind, str) else {}
        return {**values, **{name: value for name, value in defaults.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _check_knobs(self) -> AdapterSettings:
        read = ADAPTER_KNOBS[self.kind]
        for name in sorted(set(type(self).model_fields) - {"kind"} - set(read)):
            if getattr(self, name) is not None:
                kinds = ", ".join(kind for kind, knobs in ADAPTER_KNOBS.items() if name in knobs)
                mine = f"{self.kind} reads {', '.join(sorted(read)) or 'no other knob'}"
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and adapter kind: {self.kind} does not read it; leave it out "
                    f"({mine}; {name} is read by {kinds})"
                )
        if self.targets == ():
            raise ValueError("targets is empty; name at least one layer, or leave it out")
        if self.kind == "ia3" and self.targets != "all-linear":
            strangers = sorted(set(self.feedforward or ()) - set(self.targets or ()))
            if strangers:
                raise ValueError(f"feedforward {strangers} are none of the targets {list(self.targets or ())}")
        return self
