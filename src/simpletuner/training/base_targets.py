"""The base's own prediction as a target, and the loss towards both targets.

The base is the network with its adapter switched off: there is no second copy of the weights. The
pass is in eval mode and without gradient, so it draws no dropout and stores no activations. It sees
the same noisy latents, noise levels and captions as the training pass.

B batch · C latent channels · H W latent side (image px / stride)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from simpletuner.adapters.attachment import adapter_disabled
from simpletuner.cache.batch_types import TargetWeights, TextBatch
from simpletuner.cache.target_rules import PreservedCaption, TargetRules
from simpletuner.config.schema import FlowOptions, RunConfig, trigger_word
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.flow.objective import loss_per_sample
from simpletuner.models.family import PredictVelocity
from simpletuner.validation.inference import eval_mode


@dataclass(frozen=True)
class BaseNetwork:
    """Predicts with the base.

    every_pass: whether to run it in every micro-batch, also in those that need nothing. Processes
    that hold parts of the network must run it equally often.
    """

    transformer: nn.Module
    predict_velocity: PredictVelocity
    autocast: Callable[[], AbstractContextManager[object]]
    every_pass: bool = False

    def velocity(
        self, x_sigma: Tensor, sigma: Tensor, text: TextBatch, weights: TargetWeights | None
    ) -> Tensor:
        """Return the base's velocity of weights.base_rows, (n, C, H, W) float32."""
        wanted: Sequence[int] = () if weights is None else weights.base_rows
        rows = wanted or ((0,) if self.every_pass else ())
        if not rows:
            return x_sigma[:0]
        index = list(rows)
        # It has an autocast context of its own, so that the training pass does not find weights in
        # the cache of casts that were cast here, without gradient.
        with eval_mode(self.transformer), adapter_disabled(self.transformer), self.autocast():
            velocity = self.predict_velocity(x_sigma[index], sigma[index], text.select(rows))
        return velocity[: len(wanted)].float()


def weighted_losses(
    velocity: Tensor,
    target: Tensor,
    base_velocity: Tensor,
    sigma: Tensor,
    weights: TargetWeights | None,
    options: FlowOptions,
) -> Tensor:
    """Return the loss of every row towards both of its targets, (R,) float32.

    velocity, target: (R, C, H, W). base_velocity: of weights.base_rows. weights: None is the plain
    loss.
    """
    if weights is None:
        return loss_per_sample(velocity, target, sigma, options)
    weights = weights.to(velocity.device)
    losses = loss_per_sample(velocity, target, sigma, options, weights.data)
    if not weights.base_rows:
        return losses
    rows = list(weights.base_rows)
    towards_base = loss_per_sample(
        velocity[rows], base_velocity, sigma[rows], options, weights.base[rows]
    )
    index = losses.new_tensor(rows).long()
    return losses.index_add(0, index, towards_base)


def target_rules(run: RunConfig, backends: DatasetFile) -> TargetRules:
    """Return the targets and weights that the options and the datasets ask for."""
    options = run.preservation
    preserved, weight = None, 1.0
    if options.diff_output_preservation:
        class_caption = (options.diff_output_preservation_class or "").strip()
        preserved = PreservedCaption(class_caption, trigger_word(run) or "")
        weight = options.diff_output_preservation_multiplier
    elif options.blank_prompt_preservation:
        preserved, weight = PreservedCaption(""), options.blank_prompt_preservation_multiplier
    return TargetRules(
        {
            dataset.id: dataset.regularisation_target
            for dataset in backends.train
            if dataset.regularisation_target
        },
        options.prior_loss_weight,
        options.masked_prior_preservation_weight,
        preserved,
        weight,
    )
