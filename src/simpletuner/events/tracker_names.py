"""The names of the experiment trackers, for those who check them and need no events."""

from __future__ import annotations

TRACKER_NAMES = ("tensorboard", "wandb", "trackio")
