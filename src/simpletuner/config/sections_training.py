"""Sections about how it is trained and watched: flow, optimizer, training, validation, logging."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.option import OptionSection, option

# A table: name, type and default; what it means; its level, bounds and other names.

STATE_TOO_SMALL_REASON = (
    "states below 8 bits are not offered; adamw_8bit and adafactor are the smallest"
)


class FlowOptions(OptionSection):
    """Noise levels and the loss"""

    chroma_sigma_density: Literal[
        "quadratic", "parabola", "quadratic-literal", "uniform", "logit-normal", "beta"
    ] = option(
        "quadratic",
        "How often each noise level is trained: quadratic raises both tails without a hole, parabola is the "
        "model author's, quadratic-literal never trains sigma 0.25 to 0.75.",
        level="common",
    )
    flow_schedule_shift: float | None = option(
        None,
        "Push noise levels up, s x / (1 + (s - 1) x); null is off, as Chroma wants.",
        zero_is_null=True,
        gt=0,
        le=100,
    )
    flow_schedule_auto_shift: bool = option(False, "Shift by the number of image tokens instead.")
    flow_sigmoid_scale: float = option(
        1.0, "Width of the normal draw before the sigmoid.", gt=0, le=100
    )
    flow_use_uniform_schedule: bool = option(
        False, "Another way to say chroma_sigma_density uniform."
    )
    flow_use_beta_schedule: bool = option(False, "Another way to say chroma_sigma_density beta.")
    flow_beta_schedule_alpha: float = option(
        2.0, "First parameter of the beta density.", gt=0, le=100
    )
    flow_beta_schedule_beta: float = option(
        2.0, "Second parameter of the beta density.", gt=0, le=100
    )
    flow_custom_timesteps: str | None = option(
        None,
        "Train these noise levels only: a comma list of sigmas up to 1, or of timesteps up to 1000.",
    )
    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = option(
        "fixed-list", "Draw from flow_custom_timesteps, or go through it in order."
    )
    flux_fast_schedule: bool = option(
        False,
        "Noise levels of a few-step model (seven of ten at 1.0); leave it off for Chroma.",
        level="common",
    )
    flux_guidance_mode: Literal["constant"] = option(
        "constant",
        "Chroma's guidance input is a constant; there is nothing to choose.",
        refused_values={
            "random-range": "Chroma has no guidance range",
            "mobius": "Chroma has no guidance range",
        },
    )
    stratified_sigmas: bool = option(
        True, "Spread the noise levels of one optimizer step evenly: same density, less variance."
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = option(
        "l2", "Loss on the velocity.", level="common"
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "How huber_c goes with the noise level."
    )
    huber_c: float = option(
        0.1, "Where huber and smooth_l1 turn from square to straight.", gt=0, le=100
    )
    input_perturbation: float = option(
        0.0, "Extra noise in what the network sees, not in its target.", ge=0, le=1
    )


class OptimizerOptions(OptionSection):
    """Optimizer and learning rate"""

    optimizer: Literal[
        "adamw",
        "adamw_bf16",
        "adamw_8bit",
        "adafactor",
        "lion",
        "prodigy",
        "adamw_schedulefree",
        "muon",
    ] = option(
        "adamw",
        "Optimizer; for full rank adamw_bf16 rounds stochastically in 4 bytes of state per weight, "
        "adamw_8bit in 2, muon learns in fewer steps.",
        level="basic",
        value_aliases={
            "torch-adamw": "adamw",
            "optimi-adamw": "adamw",
            "torch-adafactor": "adafactor",
            "optimi-lion": "lion",
            **dict.fromkeys(
                ("ao-adamw8bit", "bnb-adamw8bit", "bnb-adamw8bit-paged", "adamw8bit"), "adamw_8bit"
            ),
        },
        refused_values={
            "ao-adamw4bit": STATE_TOO_SMALL_REASON,
            "bnb-lion8bit": "lion's state is not offered in 8 bits; use "
            "adamw_8bit, which takes half of lion's memory in bf16",
        },
    )
    optimizer_config: str | None = option(
        None, "Further arguments of the optimizer, key=value,key=value."
    )
    learning_rate: float = option(1e-4, "Learning rate.", level="basic", gt=0, le=10)
    adam_beta1: float = option(0.9, "Decay of the gradient's mean.", ge=0, lt=1)
    adam_beta2: float = option(0.999, "Decay of the gradient's square.", ge=0, lt=1)
    adam_weight_decay: float = option(0.01, "Weight decay.", level="common", ge=0, le=10)
    adam_epsilon: float = option(1e-8, "Added to the denominator.", gt=0, le=1)
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = option(
        "constant",
        "Course of the learning rate over the whole run, after the warm-up.",
        level="basic",
        value_aliases={"constant_with_warmup": "constant", "cosine_with_warmup": "cosine"},
    )
    lr_warmup_steps: int = option(
        0, "Rise from 0 over this many steps.", level="common", unit="steps", ge=0
    )
    lr_end: float = option(0.0, "Where linear, cosine and polynomial end.", ge=0, le=10)
    lr_power: float = option(1.0, "Exponent of polynomial.", gt=0, le=100)
    lr_scale: bool = option(False, "Multiply the learning rate by the samples of a step.")
    lr_scale_sqrt: bool = option(
        False, "Multiply the learning rate by the root of the samples of a step."
    )
    max_grad_norm: float = option(1.0, "Gradient limit; 0 is off.", level="common", ge=0)
    grad_clip_method: Literal["norm", "value"] = option(
        "norm", "Limit the norm of the whole gradient, or each of its numbers."
    )
    optimizer_release_gradients: bool = option(
        False,
        "Step each weight inside the backward pass, as soon as its gradient is there, and free it: same "
        "numbers, no memory for gradients. Needs one batch a step and no limit on the whole norm.",
        level="common",
        resume_policy="free",
    )
    optimizer_cpu_offload_method: Literal["none", "states"] = option(
        "none",
        "states keeps the optimizer's states in host memory and brings those of one weight at a time: same "
        "numbers, slower steps. On devices that share the host's memory it changes nothing.",
        level="common",
        resume_policy="free",
        value_aliases={"torchao": "states"},
    )
    use_ema: bool = option(False, "Also keep a moving average of the weights.", level="common")
    ema_decay: float = option(0.995, "Decay of the moving average at each update.", ge=0, lt=1)
    ema_update_interval: int = option(1, "Steps between its updates.", unit="steps", ge=1)
    ema_device: Literal["cpu", "accelerator"] = option(
        "cpu", "Where it is kept.", resume_policy="free"
    )
    ema_validation: Literal["comparison", "ema_only", "none"] = option(
        "comparison",
        "Validation pictures from both weights, from the average, from the trained ones.",
        resume_policy="free",
    )


class TrainingOptions(OptionSection):
    """Length and size of the run"""

    output_dir: str = option(
        "simpletuner-results",
        "The run folder.",
        level="basic",
        resume_policy="free",
        path="new",
        min_length=1,
    )
    seed: int = option(
        42, "Where all randomness of the run comes from.", level="basic", ge=0, lt=2**63
    )
    train_batch_size: int = option(
        1,
        "Pictures that go through the network together.",
        level="basic",
        unit="pictures",
        ge=1,
        le=1024,
    )
    gradient_accumulation_steps: int = option(
        1, "Batches that make one optimizer step.", level="common", unit="batches", ge=1, le=4096
    )
    max_train_steps: int | None = option(
        None,
        "Length in optimizer steps; without this and num_train_epochs it is 1000.",
        level="basic",
        unit="steps",
        resume_policy="free",
        zero_is_null=True,
        ge=1,
    )
    num_train_epochs: int | None = option(
        None,
        "Length in passes over the data.",
        level="basic",
        unit="epochs",
        resume_policy="free",
        zero_is_null=True,
        ge=1,
    )
    nonfinite_loss_patience: int = option(
        0,
        "Steps in a row that may be skipped for a NaN or infinite loss before stopping.",
        unit="steps",
        resume_policy="free",
        ge=0,
    )


class CheckpointOptions(OptionSection):
    """Saving and going on"""

    resume_from_checkpoint: str = option(
        "latest",
        "latest goes on if there is something to go on from, must insists, never starts anew, a path takes "
        "that checkpoint.",
        level="common",
        resume_policy="free",
        path="new",
        min_length=1,
    )
    checkpoint_step_interval: int = option(
        500,
        "Steps between checkpoints.",
        level="basic",
        unit="steps",
        resume_policy="free",
        aliases=("checkpointing_steps",),
        ge=1,
    )
    checkpoint_epoch_interval: int | None = option(
        None, "Also after every n-th epoch.", unit="epochs", resume_policy="free", ge=1
    )
    checkpoints_total_limit: int = option(
        5,
        "Keep this many; older ones are removed.",
        level="common",
        unit="checkpoints",
        resume_policy="free",
        aliases=("save_total_limit",),
        ge=1,
    )


class ValidationOptions(OptionSection):
    """Pictures and held-out loss while training"""

    validation_disable: bool = option(
        False, "Draw no validation pictures.", level="common", resume_policy="free"
    )
    validation_step_interval: int = option(
        100,
        "Steps between validations.",
        level="basic",
        unit="steps",
        resume_policy="free",
        aliases=("validation_steps",),
        ge=1,
    )
    validation_prompt: str | None = option(
        None, "Prompt of the pictures.", level="basic", resume_policy="free"
    )
    user_prompt_library: str | None = option(
        None,
        "JSON file of further prompts, short name -> prompt.",
        level="common",
        resume_policy="free",
        path="file",
    )
    validation_prompt_library: Literal[False] = option(
        False,
        "There is no built-in prompt list.",
        resume_policy="free",
        refused_values={
            "true": "there is no built-in prompt list; give your own by user_prompt_library"
        },
    )
    validation_negative_prompt: str = option(
        "",
        "What guidance steers away from; read when validation_guidance_real > 1.",
        level="common",
        resume_policy="free",
    )
    validation_guidance_real: float = option(
        1.0,
        "Classifier-free guidance; 1 is a single pass, 2 to 3 follow the prompt closer, twice as slow.",
        level="common",
        resume_policy="free",
        ge=1,
        le=30,
    )
    validation_num_inference_steps: int = option(
        20,
        "Sampling steps: 20 for previews, 28 to 32 for quality.",
        level="common",
        unit="steps",
        resume_policy="free",
        ge=1,
        le=1000,
    )
    validation_resolution: str | None = option(
        None,
        'Size of the pictures: "512", "512x768" or a comma list; null is the training resolution.',
        level="common",
        unit="px",
        resume_policy="free",
    )
    num_validation_images: int = option(
        1, "Pictures per prompt and size.", unit="pictures", resume_policy="free", ge=1, le=64
    )
    validation_seed: int | None = option(
        None, "Their seed; null is seed.", resume_policy="free", ge=0, lt=2**63
    )
    disable_benchmark: bool = option(
        False, "Skip the pictures and scores of the untouched base at step 0.", resume_policy="free"
    )
    validation_strengths: str = option(
        "0.5",
        "Comma list: strengths at which the LoRA's pictures are drawn once more at the end; or none.",
        level="common",
        resume_policy="free",
        pattern=r"^(none|\d(\.\d+)?( *, *\d(\.\d+)?)*)$",
    )
    eval_steps_interval: int | None = option(
        None,
        "Steps between measurements of the held-out loss; null is every checkpoint.",
        level="common",
        unit="steps",
        resume_policy="free",
        ge=1,
    )
    num_eval_images: int = option(
        64, "Pictures in the held-out loss.", unit="pictures", resume_policy="free", ge=1
    )
    eval_sigma_count: int = option(
        8, "Noise levels at which each is measured.", unit="levels", ge=1, le=64
    )
    eval_dataset_id: str | None = option(
        None, "Measure on this eval set only.", resume_policy="free"
    )
    evaluation_type: str = option(
        "none",
        "Score pictures of unseen prompts by program: none, or a comma list of shapes (chroma-nano's world) "
        "and zorbo (the example's concept).",
        resume_policy="free",
    )
    evaluation_prompts: int | None = option(
        None,
        "Prompts of each score; null is 64 for shapes, 32 for zorbo.",
        unit="prompts",
        resume_policy="free",
        ge=1,
        le=10000,
    )
    evaluation_step_interval: int | None = option(
        None,
        "Steps between scores; null is the untouched base and the end only.",
        unit="steps",
        resume_policy="free",
        ge=1,
    )


class LoggingOptions(OptionSection):
    """Telling"""

    report_to: str = option(
        "none",
        "Trackers: none, or a comma list of tensorboard, wandb, trackio.",
        level="common",
        resume_policy="free",
    )
    tracker_project_name: str = option(
        "simpletuner", "Project in the tracker.", resume_policy="free", min_length=1
    )
    tracker_run_name: str | None = option(
        None, "Run in the tracker; null is the run folder's name.", resume_policy="free"
    )
    webhook_config: str | list[dict[str, Any]] | dict[str, Any] | None = option(
        None, "Webhooks: a file, or the object or list itself.", resume_policy="free", path="file"
    )
    log_level: Literal["debug", "info", "warning"] = option(
        "info", "How much is told.", resume_policy="free"
    )


class PublishingOptions(OptionSection):
    """What the weights say of themselves, and where they are published"""

    save_native_file: bool = option(
        False,
        "At full rank, also write one file with native names, as ComfyUI and Forge read it.",
        level="common",
        resume_policy="free",
    )
    modelspec_title: str | None = option(
        None,
        "Title inside the files and on the card; null is the run folder's name.",
        resume_policy="free",
    )
    modelspec_author: str | None = option(
        None, "Author inside the files; null says nothing.", resume_policy="free"
    )
    modelspec_trigger: str | None = option(
        None,
        "Words that call up what was trained; null is instance_prompt.",
        level="common",
        resume_policy="free",
    )
    modelspec_comment: str | None = option(
        None, "Description inside the files.", resume_policy="free"
    )
    model_card_note: str | None = option(
        None, "Text for the model card, README.md.", resume_policy="free"
    )
    model_card_safe_for_work: bool = option(
        False, "The card says safe-for-work.", resume_policy="free"
    )
    push_to_hub: bool = option(
        False,
        "At the end upload weights, card and pictures to a hub repository, in the background; a failure is "
        "told and never ends the run.",
        level="common",
        resume_policy="free",
    )
    push_checkpoints_to_hub: bool = option(
        False, "Upload each checkpoint's LoRA too.", resume_policy="free"
    )
    hub_model_id: str | None = option(
        None,
        "The repository: owner/name, or a name of your own; null is the run folder's name.",
        level="common",
        resume_policy="free",
        pattern=r"^[\w.-]+(/[\w.-]+)?$",
    )
    model_card_private: bool = option(
        True,
        "The repository is private; false makes a new one public.",
        level="common",
        resume_policy="free",
    )
