"""Values of SimpleTuner's configurations that are written in another way here."""

from __future__ import annotations

from simpletuner.config.environment import VARIABLE_PREFIX
from simpletuner.config.lycoris_config import replace_foreign_classes
from simpletuner.config.model_families import DEFAULT_FAMILY
from simpletuner.config.option_catalog import all_options
from simpletuner.config.option_layers import OptionLayers
from simpletuner.config.option_values import InvalidOptionValue, parse_value
from simpletuner.config.sections_training import ADAM_OPTIMIZERS

BUILTIN_TRACKERS = ("simpletuner", "local")
MAX_CAPTION_TOKENS = 512  # rows of T5's output that Chroma was trained with
# Arguments that optimizer_config gives every optimizer there, and the options that they are here.
COMMON_ARGUMENTS = {"weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}


def read_foreign_values(layers: OptionLayers) -> None:
    """Rewrite such values in place, each with a notice."""
    if not str(layers.values.get("resume_from_checkpoint", "latest")).strip():
        del layers.values["resume_from_checkpoint"]  # a blank field of a form: not given
    _skip_builtin_trackers(layers)
    _skip_foreign_vae(layers)
    _limit_caption_tokens(layers)
    _read_common_arguments(layers)


def read_foreign_classes(layers: OptionLayers) -> None:
    """Replace classes of another model's network in lycoris_config, once its file has been read."""
    name = "lycoris_config"
    config = layers.values.get(name)
    if not isinstance(config, dict):
        return
    family = layers.values.get("model_family", DEFAULT_FAMILY)
    layers.values[name], replaced = replace_foreign_classes(config, family)
    for foreign, own in replaced.items():
        layers.notices.append(
            f"{layers.origins[name]}: {name}: {foreign} is a class of another model and is read as "
            f"{' and '.join(own)}"
        )


def _limit_caption_tokens(layers: OptionLayers) -> None:
    """Lower tokenizer_max_length, which other models' configurations set above Chroma's limit."""
    name = "tokenizer_max_length"
    if layers.values.get(name, 0) > MAX_CAPTION_TOKENS:
        layers.notices.append(
            f"{layers.origins[name]}: {name} {layers.values[name]} is read as "
            f"{MAX_CAPTION_TOKENS}, the longest caption of Chroma"
        )
        layers.values[name] = MAX_CAPTION_TOKENS


def _read_common_arguments(layers: OptionLayers) -> None:
    """Move arguments that every optimizer has from optimizer_config to their options."""
    name = "optimizer_config"
    written = layers.values.get(name)
    optimizer = layers.values.get("optimizer", all_options()["optimizer"].default)
    rest = []
    for item in written.split(",") if isinstance(written, str) else []:
        key, _, text = (part.strip() for part in item.partition("="))
        target = COMMON_ARGUMENTS.get(key)
        if target is None or (key == "eps" and optimizer not in ADAM_OPTIMIZERS):
            rest.append(item)
            continue
        if _layer_of(layers, target) > _layer_of(layers, name):
            layers.notices.append(
                f"{layers.origins[name]}: {key} is not read, because {target} is given"
            )
            continue
        try:
            layers.values[target] = parse_value(all_options()[target], text)
        except InvalidOptionValue as error:
            layers.add_problem(layers.origins[name], f"{name}: {key} {error}", name)
            continue
        layers.origins[target] = layers.origins[name]
        layers.notices.append(f"{layers.origins[name]}: {name} {item.strip()} is read as {target}")
    if isinstance(written, str) and rest != written.split(","):
        layers.values[name] = ",".join(rest)


def _layer_of(layers: OptionLayers, option: str) -> int:
    """Return whether an option is from a file or not given (0), the environment (1) or a flag."""
    origin = layers.origins.get(option, "")
    return 2 if origin.startswith("--") else int(origin.startswith(VARIABLE_PREFIX))


def _skip_builtin_trackers(layers: OptionLayers) -> None:
    """Remove SimpleTuner's own trackers from report_to: the same records are always written."""
    written = layers.values.get("report_to")
    names = [name.strip() for name in written.split(",")] if isinstance(written, str) else []
    others = [name for name in names if name.lower() not in BUILTIN_TRACKERS]
    if len(others) < len(names):
        layers.values["report_to"] = ",".join(others) or "none"
        layers.notices.append(
            f"{layers.origins['report_to']}: report_to {written} is read as "
            f"{layers.values['report_to']}: events.jsonl in the run folder is always written"
        )


def _skip_foreign_vae(layers: OptionLayers) -> None:
    """Remove the VAE of SDXL, which SimpleTuner's forms save and do not use for Chroma."""
    name = "pretrained_vae_model_name_or_path"
    if "sdxl" in str(layers.values.get(name, "")).lower():
        layers.notices.append(
            f"{layers.origins[name]}: {name} {layers.values.pop(name)} is the VAE of another model "
            "and is not read; Chroma's own is used"
        )
