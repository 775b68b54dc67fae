"""The messages of the package that the pages show, read from its source, as templates with {}."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.unsupported_options import unsupported_options
from simpletuner.data import dataset_fields
from simpletuner.data.source_fields import SOURCE_FIELDS
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.schemas.base import JobState

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"
# Modules whose sentences reach a page. What only a terminal prints (the launcher, accelerate's files,
# remote sources) is English.
MODULES = (
    *(f"config/{name}_constraints" for name in ("distributed", "flow", "preservation")),
    *(f"config/{name}_constraints" for name in ("tuning", "validation")),
    *(f"config/{name}" for name in ("constraints", "load", "option_values", "option_layers", "option")),
    *(f"config/{name}" for name in ("optimizer_arguments", "optimizer_names", "output_folder", "paths")),
    *(f"config/{name}" for name in ("patterns", "precisions", "loss_weights", "evaluation_models")),
    *("config/foreign_values", "data/ineffective_fields", "data/text_sets"),
    *(f"config/{name}" for name in ("lycoris_config", "documents", "jsonc", "unsupported_options")),
    *(f"data/{name}" for name in ("dataset_file", "caption_filters", "caption_table_field")),
    *(f"data/{name}" for name in ("mask_datasets", "resize_crop_fields", "variation_fields")),
    *(f"server/{name}" for name in ("api_errors", "caption_desk", "caption_files", "comparisons")),
    *(f"server/{name}" for name in ("config_validation", "dataset_items", "dataset_service")),
    *(f"server/{name}" for name in ("device_demand", "draft_store", "failure_advice", "file_responses")),
    *(f"server/{name}" for name in ("generation_service", "image_index", "job_config", "job_folder")),
    *(f"server/{name}" for name in ("folder_browser", "inspection_service")),
    *(f"server/{name}" for name in ("job_service", "lora_library", "manager", "plan_service")),
    *(f"server/{name}" for name in ("preferences", "run_artifacts", "run_prompts", "run_service")),
    *(f"server/{name}" for name in ("start_checks", "storage", "thumbnails", "trash", "uploads")),
    *(f"server/{name}" for name in ("workspace", "token_auth", "api/configs", "api/datasets", "api/system")),
)  # fmt: skip
# Modules whose sentences are in the notes of a run and in the lists of rejected images.
MODULES += (
    *(f"data/{name}" for name in ("batch_sources", "captions", "caption_tables", "image_plugins")),
    *(f"data/{name}" for name in ("image_files", "masks", "pixels", "regularisation", "scan")),
    *(f"data/{name}" for name in ("crop_assignment", "dataset_findings", "image_choices")),
    *("events/findings", "training/hold_out", "training/resume", "training/run_start"),
)
# Literals of those modules that no page shows: patterns, headers, parts of JSON, an example.
HIDDEN = re.compile(
    r"^\(|^\[|^Input should$|\\[bsd]|; charset=|^attachment|^private, |headers up to|^\{\"algo|^cosine_with"
    r"|^out of host memory\||^No space left on device\|| at \(line|^simpletuner "
)
LETTERS = re.compile(r"[A-Za-z]{2,}")


def package_templates() -> dict[str, str]:
    """Return every template with the module, option or table that it comes from."""
    templates: dict[str, str] = {}
    for module in MODULES:
        text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
        for template in literals(ast.parse(text)):
            templates.setdefault(template, module)
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        if not where.startswith(("cli/", "server/", "events/")):
            for template in issued_messages(ast.parse(path.read_text(encoding="utf-8"))):
                templates.setdefault(template, where)
    for row in unsupported_options():
        templates.setdefault(row.reason, "unsupported_options.toml")
    for template, where in declared_sentences():
        templates.setdefault(template, where)
    return templates


def declared_sentences() -> Iterator[tuple[str, str]]:
    """Yield the reasons and bounds that options and fields declare."""
    fields: Mapping[str, Option] = {
        **dataset_fields.COMMON_FIELDS,
        **dataset_fields.MASK_FIELDS,
        **dataset_fields.CACHE_FIELDS,
        **dataset_fields.IMAGE_FIELDS,
    }
    for name, option in {**all_options(), **fields}.items():
        if name in SOURCE_FIELDS:
            continue
        for reason in (*option.refused_values.values(), *option.unmet_errors.values()):
            yield reason, name
    for reason in (*dataset_fields.REFUSED_BY_REASON, *dataset_fields.UNNEEDED_BY_REASON):
        yield reason, "dataset_fields"
    for reason in NOT_SETTABLE.values():
        yield reason, "form_schema"


def issued_messages(tree: ast.AST) -> Iterator[str]:
    """Yield the literals in the events by which a training notes or warns of something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("NoticeIssued", "WarningIssued")
        ):
            yield from literals(ast.Module([ast.Expr(node)], []))


def literals(tree: ast.AST) -> Iterator[str]:
    """Yield string literals of two words and more, except docstrings and what HIDDEN matches."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("re.compile", "option"):
            skipped.update(ast.walk(node))
        if isinstance(node, ast.JoinedStr):
            skipped.update(part for part in node.values if isinstance(part, ast.Constant))
            for part in node.values:
                if isinstance(part, ast.FormattedValue) and part.format_spec is not None:
                    skipped.update(ast.walk(part.format_spec))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        template = template_of(node)
        words = template.replace("{}", "").split()
        if len(words) > 1 and LETTERS.search(template) and not HIDDEN.search(template):
            yield template


def template_of(node: ast.AST) -> str:
    """Return a string literal with {} in the place of each value, "" for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    return ""


def composed_templates() -> dict[str, str]:
    """Return the templates that are put together from parts, which no literal holds.

    Bounds with units, counted nouns, words that join values, and the states of runs.
    """
    options = [*all_options().values(), *dataset_fields.IMAGE_FIELDS.values()]
    templates = {
        re.sub(r"-?[\d.]+(e\+\d+)?", "{}", option.bounds): option.name
        for option in options
        if option.bounds
    }
    templates |= {
        f"{{}} ({option.unit})": option.name
        for option in options
        if option.bounds and len(option.unit) > 3
    }
    templates |= {option.unit: option.name for option in options if len(option.unit) > 3}
    templates |= {
        option.takes: option.name for option in options if option.kind in ("amount", "count")
    }
    templates |= {option.text: option.name for option in options if option.name in PATTERN_OPTIONS}
    templates |= dict.fromkeys(COMPOSED, "several")
    templates |= {f"state {state}": "JobState" for state in get_args(JobState) if state != "draft"}
    return templates


# Options whose help says what their pattern allows, which is the message of a wrong value.
PATTERN_OPTIONS = (
    "variant",
    "alpha_background",
    "validation_fold",
    "validation_strengths",
    "hub_model_id",
)
COUNTED = (
    "{n} image", "{n} images", "{n} GPU", "{n} GPUs", "{n} characters", "{n} file", "{n} files",
    "{n} group", "{n} groups", "{n} caption", "{n} captions",
)  # fmt: skip
JOINED = (
    "{} or {}",
    "{}, {} or {}",
    "{} {} or {}",
    "{} {}, {} or {}",
    "{} and {}",
    "{} other than {}",
)
NO_CAPTION = (
    " no caption ({}). Write the missing captions on the page of the dataset, or set missing_caption to "
    "empty, filename or drop"
)
COMPOSED = (
    *COUNTED,
    *JOINED,
    *("allowed: {}", "rank {} {}{}", "and {} more", "megapixels", "pixels"),
    *("{} has no effect with {}: it needs {}", "{} have no effect with {}: they need {}"),
    *(f"{{n}} {subject}{NO_CAPTION}" for subject in ("image has", "images have")),
    dataset_fields.CACHE_FIELDS["cache_dir"].text,
)
