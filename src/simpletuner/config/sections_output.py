"""Sections about what a run reports and writes: validation, logging, publishing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from simpletuner.config.option import Effect, Not, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

IMAGES = {"validation_disable": False}
IMAGES_OR_SCORES = {**IMAGES, "evaluation_type": Not("none")}
SCORES = {"evaluation_type": Not("none")}
PROMPTS = {
    "validation_prompt": Not(None),
    "user_prompt_library": Not(None),
    "validation_prompt_library": True,
}
HELD_OUT = {"eval_loss_disable": False}
START_IMAGES = {"validation_image": Not(None), "validation_using_datasets": True}
TRACKERS = {"report_to": Not("none")}


class ValidationOptions(OptionSection):
    """Validation images and held-out loss."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    validation_disable: bool = option(
        False, "Generate no validation images.", level="common", resume_policy="free"
    )
    validation_step_interval: int = option(
        100,
        "Steps between validations; 0 is none before the end of the run.",
        level="basic",
        unit="steps",
        resume_policy="free",
        aliases=("validation_steps",),
        needs=IMAGES,
        ge=0,
    )
    validation_prompt: str | None = option(
        None,
        "Prompt of the validation images.",
        level="basic",
        resume_policy="free",
        needs=IMAGES,
    )
    user_prompt_library: str | None = option(
        None,
        "JSON file of more prompts: an object of short name -> prompt.",
        level="common",
        resume_policy="free",
        path="file",
        needs=IMAGES,
    )
    validation_prompt_library: bool = option(
        False,
        "Also generate the forty built-in prompts, and ten about the trigger word where "
        "modelspec_trigger or instance_prompt names one.",
        resume_policy="free",
        needs=IMAGES,
    )
    validation_negative_prompt: str = option(
        "",
        "Negative prompt (used only when validation_guidance_real > 1).",
        level="common",
        resume_policy="free",
        needs={**IMAGES, "validation_guidance_real": Not(1.0)},
    )
    validation_guidance_real: float = option(
        1.0,
        "Classifier-free guidance scale: 1 is a single pass; 2 to 3 follow the prompt more "
        "closely and take twice as long.",
        level="common",
        resume_policy="free",
        aliases=("validation_guidance",),
        needs_any=IMAGES_OR_SCORES,
        ge=1,
        le=30,
    )
    validation_num_inference_steps: int = option(
        20,
        "Number of sampling steps: 20 for previews, 28 to 32 for higher quality.",
        level="common",
        unit="steps",
        resume_policy="free",
        needs_any=IMAGES_OR_SCORES,
        ge=1,
        le=1000,
    )
    validation_resolution: str | None = option(
        None,
        'Size of the validation images: "512", "512x768" or a comma-separated list; null is the '
        "training resolution.",
        level="common",
        unit="px",
        resume_policy="free",
        needs=IMAGES,
    )
    num_validation_images: int = option(
        1,
        "Number of images per prompt and size.",
        unit="images",
        resume_policy="free",
        needs=IMAGES,
        ge=1,
        le=64,
    )
    validation_seed: int | None = option(
        None,
        "Seed of the validation images; null is seed.",
        resume_policy="free",
        needs=IMAGES,
        ge=0,
        lt=2**63,
    )
    validation_preview: bool = option(
        False,
        "Show rough previews on the run's page while validation images are sampled. The finished "
        "images are the same with and without them.",
        level="common",
        resume_policy="free",
        needs=IMAGES,
    )
    validation_preview_steps: int = option(
        1,
        "Sampling steps from one preview to the next; there are at most two previews a second.",
        unit="steps",
        resume_policy="free",
        needs={**IMAGES, "validation_preview": True},
        ge=1,
    )
    disable_benchmark: bool = option(
        False,
        "Skip the images and scores of the base model at step 0.",
        resume_policy="free",
        needs_any=IMAGES_OR_SCORES,
    )
    validation_image: str | None = option(
        None,
        "Start the validation images of all prompts from this image instead of pure noise; a "
        "square validation_resolution is an area in which it keeps its aspect ratio.",
        resume_policy="free",
        path="file",
        needs=IMAGES,
        needs_any=PROMPTS,
    )
    validation_denoise: float = option(
        0.5,
        "Noise level at which validation images start that start from an image: how much of it is "
        "replaced; 1 ignores it.",
        resume_policy="free",
        needs_any=START_IMAGES,
        gt=0,
        le=1,
    )
    validation_using_datasets: bool = option(
        False,
        "Also generate validation images that start from four images of the eval datasets (or of "
        "eval_dataset_id; the training images without one), with their captions as prompts.",
        resume_policy="free",
        needs=IMAGES,
    )
    validation_strengths: str = option(
        "0.5",
        "LoRA strengths at which the validation images are generated once more at the end: a "
        "comma-separated list such as 0.25,0.5; or none.",
        level="common",
        resume_policy="free",
        needs={"model_type": "lora", **IMAGES},
        pattern=r"^(none|\d(\.\d+)?( *, *\d(\.\d+)?)*)$",
    )
    eval_loss_disable: bool = option(
        False,
        "Do not measure the held-out loss; eval datasets are held out all the same.",
        resume_policy="free",
    )
    eval_steps_interval: int | None = option(
        None,
        "Steps between measurements of the held-out loss; null is at every checkpoint, or as "
        "eval_epoch_interval says.",
        level="common",
        unit="steps",
        resume_policy="free",
        needs=HELD_OUT,
        ge=1,
    )
    eval_epoch_interval: float | None = option(
        None,
        "Epochs between measurements of the held-out loss, and between scores where no "
        "evaluation_step_interval is given; 0.5 is twice per epoch.",
        unit="epochs",
        resume_policy="free",
        zero_is_null=True,
        gt=0,
    )
    num_eval_images: int = option(
        64,
        "Number of images for the held-out loss.",
        unit="images",
        resume_policy="free",
        needs=HELD_OUT,
        ge=1,
    )
    eval_sigma_count: int = option(
        8,
        "Number of noise levels per image for the held-out loss.",
        unit="levels",
        needs=HELD_OUT,
        ge=1,
        le=64,
    )
    eval_dataset_id: str | None = option(
        None, "Measure the held-out loss on this eval dataset only.", resume_policy="free"
    )
    evaluation_type: str = option(
        "none",
        "Scores of generated images, of the base and during training: none, or a comma-separated "
        "list of clip (agreement with the prompt), retention (the same for built-in prompts, which "
        "shows what is forgotten), likeness (to the training images), diversity "
        "(of the samples of one prompt), shapes (chroma-nano's world) and zorbo (the concept of "
        "the example).",
        resume_policy="free",
        affects={"plan"},
    )
    pretrained_evaluation_model_name_or_path: str | None = option(
        None,
        "Model of clip, likeness and diversity: a CLIP, or for the last two a DINOv2 (folder or "
        "repository with safetensors files); null is openai/clip-vit-large-patch14.",
        resume_policy="free",
        path="hub",
        needs=SCORES,
        affects={"plan"},
    )
    evaluation_prompts: int | None = option(
        None,
        "Number of prompts per score; null is 40 for clip, 40 for retention, 40 for likeness, 10 "
        "for diversity, 64 for shapes, 32 for zorbo. clip, likeness and diversity use the "
        "validation prompts, else the built-in ones.",
        unit="prompts",
        resume_policy="free",
        needs=SCORES,
        ge=1,
        le=10000,
    )
    evaluation_step_interval: int | None = option(
        None,
        "Steps between scores; null is at the start (base model) and at the end, or as "
        "eval_epoch_interval says.",
        unit="steps",
        resume_policy="free",
        needs=SCORES,
        ge=1,
    )


class LoggingOptions(OptionSection):
    """Logging."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    report_to: str = option(
        "none",
        "Experiment trackers: none, or a comma-separated list of tensorboard, wandb, trackio.",
        level="common",
        resume_policy="free",
    )
    tracker_project_name: str = option(
        "simpletuner",
        "Project name in the tracker.",
        resume_policy="free",
        needs=TRACKERS,
        min_length=1,
    )
    tracker_run_name: str | None = option(
        None,
        "Run name in the tracker; null is the run folder's name.",
        resume_policy="free",
        needs=TRACKERS,
    )
    webhook_config: str | list[dict[str, Any]] | dict[str, Any] | None = option(
        None,
        "Webhooks: a JSON file, or the object or list of objects itself.",
        resume_policy="free",
        path="file",
    )
    log_level: Literal["debug", "info", "warning"] = option(
        "info", "Log verbosity.", resume_policy="free"
    )


class PublishingOptions(OptionSection):
    """Metadata and publishing."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    save_native_file: bool = option(
        False,
        "Also write one file with Chroma's native weight names, which ComfyUI and Forge read.",
        level="common",
        resume_policy="free",
        needs={"model_type": "full"},
    )
    modelspec_title: str | None = option(
        None,
        "Title in the file metadata and on the model card; null is the run folder's name.",
        resume_policy="free",
    )
    modelspec_author: str | None = option(
        None, "Author in the file metadata; null leaves it out.", resume_policy="free"
    )
    modelspec_trigger: str | None = option(
        None,
        "Trigger words in the file metadata; null is instance_prompt.",
        level="common",
        resume_policy="free",
    )
    modelspec_comment: str | None = option(
        None, "Description in the file metadata: a text or a list of lines.", resume_policy="free"
    )
    model_card_note: str | None = option(
        None, "Text for the model card (README.md).", resume_policy="free"
    )
    model_card_safe_for_work: bool = option(
        False, "Mark the model card as safe for work.", resume_policy="free"
    )
    push_to_hub: bool = option(
        False,
        "Upload the weights, the model card and the images to a Hugging Face repository at the "
        "end, in the background. A failed upload is reported and never stops the run.",
        level="common",
        resume_policy="free",
    )
    push_checkpoints_to_hub: bool = option(
        False,
        "Also upload the LoRA of each checkpoint.",
        resume_policy="free",
        needs={"push_to_hub": True, "model_type": "lora"},
        unmet_errors={
            "push_to_hub": "needs push_to_hub true",
            "model_type": (
                "a full-rank checkpoint holds only the train state for resuming; the weights are "
                "uploaded at the end. Use push_to_hub alone"
            ),
        },
    )
    hub_model_id: str | None = option(
        None,
        "Hugging Face repository: owner/name, or a name in your own account; null is the run "
        "folder's name.",
        level="common",
        resume_policy="free",
        aliases=("hub_model_name",),
        pattern=r"^[\w.-]+(/[\w.-]+)?$",
    )
    model_card_private: bool = option(
        True,
        "Create the repository as private; false creates a public one.",
        level="common",
        resume_policy="free",
    )
