"""Other libraries' names for our optimizers, and the names of optimizers that are not here.

No library is called. A name is read as an optimizer with the same update; states in fewer bits than
ours are kept in ours, which are more accurate and larger.
"""

from __future__ import annotations

from collections.abc import Mapping

# The optimizers that round bf16 weights stochastically; the others round to the nearest number.
STOCHASTIC_OPTIMIZERS = ("adamw_bf16", "adamw_8bit", "muon")

OPTIMIZER_ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("torch-adamw", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged"), "adamw"),
    "sdnq-adamw+no_quant": "adamw_bf16",
    **dict.fromkeys(
        (
            "adamw8bit",
            "ao-adamw8bit",
            "ao-adamw4bit",
            "ao-adamwfp8",
            "bnb-adamw8bit",
            "bnb-adamw8bit-paged",
            "sdnq-adamw",
        ),
        "adamw_8bit",
    ),
    **dict.fromkeys(("torch-adafactor", "optimi-adafactor", "sdnq-adafactor"), "adafactor"),
    **dict.fromkeys(
        (
            "optimi-lion",
            "bnb-lion",
            "bnb-lion-paged",
            "bnb-lion8bit",
            "bnb-lion8bit-paged",
            "sdnq-lion",
        ),
        "lion",
    ),
    "adamw_schedulefree+no_kahan": "adamw_schedulefree",
    **dict.fromkeys(("sdnq-muon", "sdnq-muon+quantized_matmul"), "muon"),
}

_COUPLED_REASON = "Adam adds the weight decay to the gradient; use adamw"
_COUPLED_8BIT_REASON = "Adam adds the weight decay to the gradient; use adamw_8bit"
_PLAIN_REASON = "is not supported; the nearest is adamw"
_SGD_REASON = "steps of one size for all weights learn a LoRA poorly; use adamw"
REFUSED_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(("torch-adam", "optimi-adam", "bnb-adam", "torch-sparseadam"), _COUPLED_REASON),
    **dict.fromkeys(
        ("ao-adam8bit", "ao-adam4bit", "ao-adamfp8", "bnb-adam8bit"), _COUPLED_8BIT_REASON
    ),
    **dict.fromkeys(
        (
            "torch-nadam",
            "torch-radam",
            "torch-rmsprop",
            "torch-adagrad",
            "torch-adadelta",
            "torch-adamax",
            "optimi-radam",
            "optimi-ranger",
            "optimi-adan",
            "bnb-adagrad",
            "bnb-ademamix",
            "bnb-ademamix-paged",
        ),
        _PLAIN_REASON,
    ),
    **dict.fromkeys(("torch-sgd", "torch-asgd", "optimi-sgd"), _SGD_REASON),
    **dict.fromkeys(
        ("bnb-adagrad8bit", "bnb-ademamix8bit", "bnb-ademamix8bit-paged"),
        "is not supported; the nearest is adamw_8bit",
    ),
    "optimi-stableadamw": "is not supported; the nearest is adamw with max_grad_norm",
    "adamw_schedulefree+aggressive": "is not supported; use adamw_schedulefree",
    "soap": "is not supported; the nearest is muon",
    "dadaptation": "is not supported; the nearest is prodigy",
    "sdnq-came": "is not supported; the nearest is adafactor",
}
