"""Rows of the table `exposure`: training on inputs that the network itself has made."""

from __future__ import annotations

from collections.abc import Mapping

# Exposure bias would show with few sampling steps, which leave the path the most.
SAMPLING_STEPS = (20, 10, 4)
EXPOSURE_PROMPTS = 64  # per score, where rows differ by little
# Label, variant, options.
EXPOSURE_ROWS: tuple[tuple[str, str, Mapping[str, object]], ...] = (
    ("plain", "lesson", {}),
    *(
        (
            f"rollout, up to {length / 1000:g}",
            f"rollout-{length}",
            {
                "scheduled_sampling_probability": 0.5,
                "scheduled_sampling_max_step_offset": length,
            },
        )
        for length in (50, 100)
    ),
    *(
        (
            f"MixFlow, gamma {gamma}",
            f"mixflow-{gamma}",
            {"mixflow_enabled": True, "mixflow_gamma": gamma},
        )
        for gamma in (0.4, 0.8)
    ),
)
