"""Findings of a run in words, with what to change: for the terminal, train.log and the report."""

from __future__ import annotations

import math

from simpletuner.events.event_types import (
    CaptionFitMeasured,
    Event,
    KnowledgeCompared,
    PromptsChosen,
    RateChosen,
    RateTried,
    SampleLossesMeasured,
    VerdictReached,
    WeightChangeMeasured,
)

MAX_NAMED_IMAGES = 5
FORGOTTEN_ERRORS = 2.0  # standard errors of the difference
RISEN_ERRORS = 2.0  # of the change since step 0, from which on the loss has risen
# Ratios of norms below and above which the change is called too small and too strong: cautious
# limits that no run of `python -m benchmarks.nano.weight_change` contradicts.
LEARNT_NOTHING_BELOW = 1e-3
FAR_TOO_STRONG_ABOVE = 0.5


def describe_finding(event: Event) -> str:
    """Return one line about an event that holds a finding; of another event its kind."""
    match event:
        case VerdictReached():
            return describe_verdict(event)
        case PromptsChosen():
            return describe_prompts(event)
        case SampleLossesMeasured():
            return describe_sample_losses(event)
        case CaptionFitMeasured():
            return describe_caption_fit(event)
        case WeightChangeMeasured():
            return describe_weight_change(event)
        case KnowledgeCompared():
            return describe_knowledge(event)
        case RateTried():
            if event.loss is None:
                return f"learning rate {event.rate:g} diverged before step {event.steps}"
            change = f"{event.change:+.5f} ± {event.change_se:.5f} from the best so far"
            return f"learning rate {event.rate:g}, step {event.steps}: {event.loss:.5f}, {change}"
        case RateChosen():
            return describe_choice(event)
        case _:
            return event.kind


def describe_prompts(event: PromptsChosen) -> str:
    """Return the names of the validation prompts, and whether a user has edited them."""
    names = ", ".join(name for name, *_ in event.prompts)
    return f"step {event.step}: validation prompts{' edited' if event.edited else ''}: {names}"


def describe_verdict(event: VerdictReached) -> str:
    """Return one or two sentences: what the held-out losses say, and what to do."""
    change = f"{event.change:+.4f} ± {event.change_se:.4f}"
    at = f"step {event.step}"
    match event.verdict:
        case "learning":
            return (
                f"still learning at {at}: the held-out loss changed by {change} since step "
                f"{event.since_step}. More steps should help (max_train_steps)"
            )
        case "flat" if event.since_step == 0 and event.change > RISEN_ERRORS * event.change_se:
            return (
                f"not learning: the held-out loss rose by {change} since step 0. Lower "
                "learning_rate (simpletuner tune finds one)"
            )
        case "flat" if event.since_step == 0:
            return (
                f"not learning: the held-out loss changed by {change} since step 0. If the images "
                "do not change either, raise learning_rate (simpletuner tune finds one) or look at "
                "the captions"
            )
        case "flat":
            return (
                f"flat since step {event.since_step}: the held-out loss changed by {change} from "
                f"there to {at}. Steps after {event.since_step} have no measurable effect; train "
                "that many, or stop by early_stopping"
            )
        case "overfitting":
            return (
                f"overfitting since step {event.since_step}: the held-out loss changed by {change} "
                f"from there to {at}. Use checkpoint-{event.best_step} where it was saved, or "
                f"train {event.best_step} steps; more images, a lower learning_rate or a lower "
                "lora_rank move that point"
            )
    return (
        f"too few measurements of the held-out loss at {at} to say whether it still learns; "
        "a lower eval_steps_interval gives more"
    )


def describe_sample_losses(event: SampleLossesMeasured) -> str:
    """Return which images resist, with their losses before and after."""
    count = len(event.losses)
    if not event.resisting:
        return f"loss of {count} images ({event.split}): none resists"
    named = [
        f"{name} ({event.losses[name][0]:.4f} to {event.losses[name][1]:.4f})"
        for name in event.resisting[:MAX_NAMED_IMAGES]
        if name in event.losses
    ]
    more = len(event.resisting) - len(named)
    listed = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    verb = "image resists" if len(event.resisting) == 1 else "images resist"
    return (
        f"{len(event.resisting)} of {count} training {verb}: the loss fell far less than that of "
        f"the others. Does the caption describe the image? {listed}"
    )


def describe_caption_fit(event: CaptionFitMeasured) -> str:
    """Return the images whose caption fits hardly better than the captions of other images."""
    count = len(event.margins)
    if not event.unfit:
        return f"captions of {count} images compared with those of others: no doubtful one"
    named = ", ".join(event.unfit[:MAX_NAMED_IMAGES])
    more = len(event.unfit) - MAX_NAMED_IMAGES
    listed = named + (f" and {more} more" if more > 0 else "")
    return (
        f"the captions of {len(event.unfit)} of {count} training images fit hardly better than "
        f"those of other images. Check whether they describe their images: {listed}"
    )


def describe_choice(event: RateChosen) -> str:
    """Return the chosen rate, how sure it is, and what to do at the edge of the rates."""
    sentence = f"learning rate {event.rate:g}: loss {event.loss:.5f} on {event.images} images"
    if event.runner_up is not None:
        sentence += (
            f"; that of {event.runner_up:g} differs by {event.change:+.5f} ± {event.change_se:.5f}"
        )
        if abs(event.change) <= event.change_se:
            sentence += ", which is within the error: both will do"
    if event.at_edge:
        sentence += (
            ". It is at the edge of the rates that were tried: try more beyond it with --rates"
        )
    return f"{sentence}. The search cost {event.cost:.2f} of a run"


def describe_weight_change(event: WeightChangeMeasured) -> str:
    """Return how much the weights changed, where most, and what to change at the extremes.

    Before the end of a run a small change is not a fault: the rate may still be warming up.
    """
    sentence = f"step {event.step}: the trained weights changed by {event.total:.2%} of their norm"
    if event.blocks:
        most = max(event.blocks, key=lambda name: event.blocks[name])
        sentence += f" (most in {most}: {event.blocks[most]:.2%})"
    if event.total < LEARNT_NOTHING_BELOW and event.step < event.total_steps:
        sentence += ", too little to see so far"
    elif event.total < LEARNT_NOTHING_BELOW:
        sentence += (
            ". So small a change has no visible effect: raise learning_rate, or train longer"
        )
    elif event.total > FAR_TOO_STRONG_ABOVE:
        sentence += (
            ". That is far too strong, and destroys what the base knows: lower learning_rate, or "
            "use an earlier checkpoint"
        )
    return sentence


def describe_knowledge(event: KnowledgeCompared) -> str:
    """Return what the base could do before and can do now, and what keeps more of it.

    The error is that of the differences between the prompts before and after. Where they cannot be
    paired, the errors are added as if the prompts were other ones, which overstates the error.
    """
    scale, unit = (100, " %") if event.unit == "share" else (1, f" {event.unit}")
    digits = 0 if event.unit == "share" else 3
    change = event.after - event.before
    error = event.change_se
    if error is None:
        error = math.hypot(event.before_se, event.after_se)
    sentence = (
        f"what the base could do ({event.metric}): {scale * event.before:.{digits}f} before, "
        f"{scale * event.after:.{digits}f}{unit} at step {event.step} "
        f"({scale * change:+.{digits}f} ± {scale * error:.{digits}f})"
    )
    if change < -FORGOTTEN_ERRORS * error:
        return (
            f"{sentence}: some of it is forgotten. Fewer steps, a lower learning_rate or "
            "regularisation keep more"
        )
    return f"{sentence}: no measurable loss" if change <= 0 else sentence
