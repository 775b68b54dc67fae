from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import documents
from simpletuner.config.compare_configs import training_differences
from simpletuner.config.flags import parse_flags
from simpletuner.config.load import (
    LoadedConfig,
    config_from_resolved,
    load_config,
    resolved_options,
    try_load_config,
)
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

QUICKSTART = """{
  "model_type": "lora",
  "model_family": "chroma",
  "model_flavour": "base",
  "output_dir": "/workspace/chroma-output",
  "network_rank": 16,
  "learning_rate": 2.0e-4,
  "mixed_precision": "bf16",
  "gradient_checkpointing": true,
  "pretrained_model_name_or_path": null
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "multidatabackend.json").write_text("[]")
    return tmp_path


def read(
    folder: Path, config: Any = None, flags: str = "", environ: dict[str, str] | None = None
) -> LoadedConfig:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
    return load_config(parse_flags(flags.split()), environ=environ or {}, cwd=folder)


def problems(
    folder: Path, config: Any = None, flags: str = "", environ: dict[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, config, flags, environ)
    return [str(problem) for problem in caught.value.problems]


def test_the_quickstart_loads_letter_by_letter(folder: Path) -> None:
    loaded = read(folder, QUICKSTART)
    assert loaded.config.adapter.lora_rank == 16
    assert loaded.config.optimizer.learning_rate == 2e-4
    assert loaded.config.model.pretrained_model_name_or_path is None
    assert loaded.config.training.output_dir == "/workspace/chroma-output"
    assert loaded.config.data.data_backend_config == str(folder / "multidatabackend.json")
    assert loaded.config.training.max_train_steps == 1000
    assert loaded.origins["lora_rank"] == "config.json:6:3"
    assert loaded.notices[0] == "config.json:6:3: network_rank is read as lora_rank"


@pytest.mark.parametrize("layers", list(itertools.product([False, True], repeat=3)))
def test_precedence(folder: Path, layers: tuple[bool, bool, bool]) -> None:
    in_file, in_environment, in_flags = layers
    loaded = read(
        folder,
        {"seed": 1} if in_file else {},
        "--seed 3" if in_flags else "",
        {"SIMPLETUNER_SEED": "2"} if in_environment else {},
    )
    expected = (3, "--seed") if in_flags else (2, "SIMPLETUNER_SEED") if in_environment else None
    expected = expected or ((1, "config.json:1:2") if in_file else (42, "default"))
    assert (loaded.config.training.seed, loaded.origins["seed"]) == expected


def test_null_is_the_default_even_over_another_layer(folder: Path) -> None:
    loaded = read(folder, {"lora_alpha": 4, "seed": None}, "--lora_alpha null")
    assert loaded.config.adapter.lora_alpha is None
    assert loaded.config.training.seed == 42


@pytest.mark.parametrize(
    "spelled", ["--learning-rate 1e-5", "--learning_rate=1e-5", "learning_rate=1e-5"]
)
def test_flag_spellings(folder: Path, spelled: str) -> None:
    assert read(folder, {}, spelled).config.optimizer.learning_rate == 1e-5


def test_bare_flags_and_negative_numbers() -> None:
    words = [
        "--use_ema",
        "seed=3",
        "--use_dora",
        "false",
        "--lr_end",
        "-1",
        "--validation_prompt=--x y",
        "--env",
    ]
    assert parse_flags([*words, "--rehearse", "--seed", "4"], ["rehearse"]) == [
        ("use_ema", None), ("seed", "3"), ("use_dora", "false"), ("lr_end", "-1"),
        ("validation_prompt", "--x y"), ("env", None), ("rehearse", None), ("seed", "4"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="network_rank: needs a value"):
        load_config(parse_flags(["--network-rank"]), environ={}, needs_data=False)
    with pytest.raises(ConfigError, match="'stray' is not the value of an option"):
        parse_flags(["stray"])


@pytest.mark.parametrize("alias", list(option_aliases()))
def test_aliases(folder: Path, alias: str) -> None:
    option = all_options()[option_aliases()[alias]]
    number = 0.5 if "less than 1" in option.bounds else 7.0
    value = {"integer": 7, "number": number, "choice": "".join(option.choices[-1:]), "text": "x"}
    loaded = read(folder, {alias: value[option.kind]})
    assert resolved_options(loaded.config)[option.name] == value[option.kind]
    assert f"{alias} is read as {option.name}" in loaded.notices[0]


def test_an_option_under_two_names_is_refused(folder: Path) -> None:
    assert problems(folder, '{"lora_rank": 4,\n"network_rank": 8}') == [
        "config.json:2:1: network_rank: lora_rank is given too, and is the same option"
    ]


@pytest.mark.parametrize("names", [("seed", "--seed"), ("learning-rate", "learning_rate")])
def test_two_spellings_of_an_option_are_refused(folder: Path, names: tuple[str, str]) -> None:
    (problem,) = problems(folder, {names[0]: 1e0, names[1]: 2e0})
    assert problem.endswith(f"{names[1]}: {names[0]} is given too, and is the same option")
    assert read(folder, dict.fromkeys(names, 1e0)).config.training.seed in (1, 42)


def test_blank_is_not_given_where_null_may_stand(folder: Path) -> None:
    """Left empty as the quickstart says, or saved by a form."""
    nullable = {name: " " for name, option in all_options().items() if option.nullable}
    assert len(nullable) > 20
    loaded = read(folder, {**nullable, "max_train_steps": 3}, "", {"SIMPLETUNER_SEED": " "})
    assert loaded.config.model.pretrained_model_name_or_path is None
    assert loaded.config.data.data_backend_config == str(folder / "multidatabackend.json")
    assert problems(folder, {"learning_rate": ""}) == [
        'config.json:1:2: learning_rate = "": must be a number'
    ]


def test_written_as_text(folder: Path) -> None:
    loaded = read(
        folder,
        {
            "--gradient_checkpointing": "false", "learning_rate": "1e-5", "max_train_steps": "1e3",
            "seed": 7.0,
            "validation_resolution": 512, "mixed_precision": "BF16", "optimizer": "optimi-lion",
            "num_train_epochs": 0, "flow_schedule_shift": 0,
        },
    )  # fmt: skip
    run = loaded.config
    assert run.model.gradient_checkpointing is False
    assert (run.optimizer.learning_rate, run.training.max_train_steps, run.training.seed) == (
        1e-5,
        1000,
        7,
    )
    assert (run.validation.validation_resolution, run.model.mixed_precision) == ("512", "bf16")
    assert (run.optimizer.optimizer, run.flow.flow_schedule_shift) == ("lion", None)
    assert any("optimizer optimi-lion is read as lion" in note for note in loaded.notices)


def test_a_length_given_later_takes_the_place_of_the_other(folder: Path) -> None:
    loaded = read(folder, {"num_train_epochs": 3}, "max_train_steps=7")
    assert (loaded.config.training.max_train_steps, loaded.config.training.num_train_epochs) == (
        7,
        None,
    )
    assert any("replaces num_train_epochs" in note for note in loaded.notices)
    with pytest.raises(ConfigError, match="num_train_epochs is given too"):
        read(folder, {"num_train_epochs": 3, "max_train_steps": 7})


def test_what_always_holds_may_be_asked_for(folder: Path) -> None:
    loaded = read(folder, {"offload_during_startup": True})
    assert any("offload_during_startup is always on" in note for note in loaded.notices)


def test_lists_and_regular_expressions(folder: Path) -> None:
    assert read(
        folder, {}, 'lora_target_modules=["to_q","to_k"]'
    ).config.adapter.lora_target_modules == [
        "to_q",
        "to_k",
    ]
    assert (
        read(folder, {}, "lora_target_modules=[tq].*to_q").config.adapter.lora_target_modules
        == "[tq].*to_q"
    )
    assert problems(folder, {"lora_target_modules": "(to_q"})[0].startswith(
        "config.json:1:2: lora_target_modules: is not"
    )


def test_environment_in_texts(folder: Path) -> None:
    config = {"tracker_run_name": "on {env:NODE}", "seed": "{env:LUCK}"}
    loaded = read(folder, config, "", {"NODE": "n1", "LUCK": "9"})
    assert (loaded.config.logging.tracker_run_name, loaded.config.training.seed) == ("on n1", 9)
    assert problems(folder, config, "", {"NODE": "n1"}) == [
        "config.json:1:39: seed: {env:LUCK}: the environment variable LUCK is not set"
    ]


def test_wrapper_and_schema_key(folder: Path) -> None:
    loaded = read(folder, '{"$schema": "x", "seed": 5}')
    assert loaded.config.training.seed == 5
    loaded = read(folder, '{"_metadata": {"v": 1},\n "config": {"--seed": 6}}')
    assert (loaded.config.training.seed, loaded.origins["seed"]) == (6, "config.json:2:13")


def test_toml(folder: Path) -> None:
    (folder / "config.toml").write_text(
        '# hello\nseed = 8\n\n"learning_rat" = 1\nnetwork_rank = 2\n'
    )
    assert problems(folder) == [
        "config.toml:4:1: learning_rat: unknown option; did you mean 'learning_rate'?"
    ]
    (folder / "config.toml").write_text("seed = 8\nnetwork_rank = 2\n")
    loaded = read(folder)
    assert (loaded.config.training.seed, loaded.config.adapter.lora_rank) == (8, 2)
    assert loaded.origins["seed"] == "config.toml:1:1"
    (folder / "config.toml").write_text("seed = = 8\n")
    assert problems(folder)[0].startswith("config.toml:1:8: ")


def test_everything_wrong_at_once(folder: Path) -> None:
    config = """{
  "learning_rat": 1,
  "network_rank": 0,
  "lr_scheduler": "cosin",
  "seed": true,
  "controlnet": true,
  "init_lora": "nope.safetensors",
  "max_train_steps": 5,
  "num_train_epochs": 5,
  "base_model_precision": "int2-quanto",
  "lora_init_type": "loftq",
  "learning_rate": 1e400
}"""
    assert problems(folder, config) == ["config.json:12:20: 1e400 is too large"]
    found = problems(
        folder,
        config.replace("1e400", '"nan"'),
        "--sed 3 --use_ema 1 --lora_alpha",
        {"SIMPLETUNER_LORA_RNK": "1"},
    )
    assert found == [
        "config.json:2:3: learning_rat: unknown option; did you mean 'learning_rate'?",
        "config.json:3:3: lora_rank = 0: must be at least 1, at most 1024",
        'config.json:4:3: lr_scheduler = "cosin": allowed: constant, linear, cosine, polynomial; '
        "did you mean 'cosine'?",
        "config.json:5:3: seed = true: must be a whole number",
        "config.json:6:3: controlnet: is a method of other models: it does not exist for Chroma",
        'config.json:7:3: init_lora = "nope.safetensors": does not exist (looked for nope.safetensors)',
        "config.json:8:3: max_train_steps: num_train_epochs is given too; set the length of the run with one of them",  # noqa: E501
        'config.json:10:3: base_model_precision = "int2-quanto": two bits lose too much of Chroma; '
        "nf4 is the smallest; allowed: no_change, int8, int4, nf4, fp8",
        "config.json:11:3: lora_init_type = \"loftq\": LoftQ changes the base's weights; pissa initialises "
        "from the base, quantized or not; allowed: default, gaussian, olora, pissa",
        "config.json:12:3: learning_rate = nan: must be a finite number",
        "SIMPLETUNER_LORA_RNK: lora_rnk: unknown option; did you mean 'lora_rank'?",
        "--lora_alpha: needs a value",
        "--sed: unknown option; did you mean 'seed'?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({".*": -1}, "lr_by_module: '.*': -1: must be greater than 0"),
        ({".*": 2, "x": 0}, "lr_by_module: 'x': 0: must be greater than 0"),
        (0.5, 'lr_by_module = "0.5": must be an object such as {"single_transformer_blocks.*": 2}'),
    ],
)
def test_what_is_wrong_in_an_object_is_named(folder: Path, value: Any, message: str) -> None:
    assert problems(folder, {"lr_by_module": value}) == [f"config.json:1:2: {message}"]


def test_foreign_variables_are_told_and_let_be(folder: Path) -> None:
    loaded = read(
        folder, {}, "", {"SIMPLETUNER_STATE_DIR": "/x", "SIMPLETUNER_SEED": "", "PATH": "/bin"}
    )
    assert (
        loaded.notices[0] == "SIMPLETUNER_STATE_DIR is not the variable of an option and is ignored"
    )
    assert loaded.config.training.seed == 42
    assert read(folder, {}, "", {"SIMPLETUNER_WEB_UI_CONFIG": "/x"}).notices


@pytest.mark.parametrize("text", ["[1]", "3", '"x"'])
def test_not_an_object(folder: Path, text: str) -> None:
    assert problems(folder, text) == [
        "config.json:1:1: the file must hold one object, {...}, of options"
    ]


def test_sections_are_flat(folder: Path) -> None:
    assert problems(folder, {"model": {}}) == [
        "config.json:1:2: model: options are written at the top level, without sections"
    ]


def test_lookup(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, cwd=tmp_path)
    assert str(caught.value).startswith(
        "no configuration: none of config.json, config.jsonc, config.toml, config.env, config/config.json"
    )
    assert "\n" not in str(caught.value)
    assert load_config(environ={}, cwd=tmp_path, needs_data=False).config_path is None
    for place in (
        "config/few/config.jsonc",
        "config/config.toml",
        "config.jsonc",
        "other/mine.json",
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if path.suffix == ".toml" else "{}")
        (path.parent / "multidatabackend.json").write_text("[]")
    assert load_config(environ={}, cwd=tmp_path).config_path == tmp_path / "config.jsonc"
    (tmp_path / "config.jsonc").unlink()
    assert load_config(environ={}, cwd=tmp_path).config_path == tmp_path / "config/config.toml"
    loaded = load_config(environ={}, cwd=tmp_path, env_name="few")
    assert loaded.config_path == tmp_path / "config/few/config.jsonc"
    assert loaded.config.data.data_backend_config == str(
        tmp_path / "config/few/multidatabackend.json"
    )
    assert (
        load_config((), tmp_path / "other/mine.json", environ={}, cwd=tmp_path).config_path
        == tmp_path / "other/mine.json"
    )
    for arguments in ({"env_name": "many"}, {"config_path": "no.json"}, {"example": "no"}):
        with pytest.raises(ConfigError):
            load_config(environ={}, cwd=tmp_path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--config and --env each name"):
        load_config((), "other/mine.json", "few", environ={}, cwd=tmp_path)


def test_paths_beside_the_file_come_first(tmp_path: Path) -> None:
    config = tmp_path / "config" / "a"
    config.mkdir(parents=True)
    for place in (tmp_path, config):
        (place / "prompts.json").write_text("{}")
    (tmp_path / "sets.json").write_text("[]")
    (tmp_path / "model").mkdir()
    text = {
        "user_prompt_library": "prompts.json", "data_backend_config": "sets.json",
        "pretrained_model_name_or_path": "model", "pretrained_t5_model_name_or_path": "who/what",
    }  # fmt: skip
    (config / "config.json").write_text(json.dumps(text))
    run = load_config(environ={}, cwd=tmp_path, env_name="a").config
    assert run.validation.user_prompt_library == str(config / "prompts.json")
    assert run.data.data_backend_config == str(tmp_path / "sets.json")
    assert run.model.pretrained_model_name_or_path == str(tmp_path / "model")
    assert run.model.pretrained_t5_model_name_or_path == "who/what"
    (config / "config.json").write_text('{"pretrained_model_name_or_path": "./gone"}')
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(environ={}, cwd=tmp_path, env_name="a")


def test_home_is_read_in_every_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "x.safetensors").write_bytes(b"")
    names = ("output_dir", "cache_dir", "resume_from_checkpoint", "init_lora")
    flat = resolved_options(read(folder, dict.fromkeys(names, "~/x.safetensors")).config)
    assert [flat[name] for name in names] == [str(folder / "x.safetensors")] * 4
    assert read(folder, {"output_dir": "out"}).config.training.output_dir == "out"


@pytest.mark.parametrize(
    "text", ["~nobody/x.json", "x" * 5000, "a\0b", "C:\\loras\\x.json", "folder"]
)
def test_paths_that_lead_nowhere_are_told(folder: Path, text: str) -> None:
    (folder / "folder").mkdir()
    (problem,) = problems(folder, {"init_lora": text})
    assert "does not exist" in problem or "is a folder" in problem
    with pytest.raises(ConfigError, match="--config"):
        load_config((), text, environ={}, cwd=folder)


def test_a_windows_path_with_single_backslashes_is_told(folder: Path) -> None:
    assert problems(folder, r'{"output_dir": "C:\new"}') == [
        r'config.json:1:2: output_dir = "C:\new": has control characters; write \\ or / between folders'
    ]
    assert read(folder, r'{"output_dir": "C:\\new"}').config.training.output_dir == r"C:\new"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b'{"a": "\xe9"}', "is not UTF-8"), (None, "cannot be read")],
)
def test_files_that_cannot_be_read(
    folder: Path, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.json").write_bytes(content or b"")
    if content is None:

        def refuse(*_: Any, **__: Any) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(documents, "read_bounded_text", refuse)
    (problem,) = problems(folder)
    assert problem.startswith("config.json:")
    assert message in problem


def test_weights_named_as_the_configuration_are_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match="is larger than 16 MiB"):
        load_config((), "model.safetensors", environ={}, cwd=folder)


def test_data_section_is_handed_back_though_others_are_wrong(folder: Path) -> None:
    (folder / "config.json").write_text('{"seed": -1}')
    tried = try_load_config(environ={}, cwd=folder)
    assert tried.loaded is None
    assert tried.data_options is not None
    (folder / "config.json").write_text('{"resolution": "big"}')
    assert try_load_config(environ={}, cwd=folder).data_options is None


def test_round_trip_through_a_run_folder(folder: Path) -> None:
    run = read(
        folder, {"lora_rank": 4, "lora_target_modules": ["to_q"], "max_train_steps": 3}
    ).config
    flat = json.loads(json.dumps(resolved_options(run)))
    assert list(flat) == list(all_options())
    assert config_from_resolved(flat) == run
    assert config_from_resolved({"seed": 3, "of_another_version": 1}).training.seed == 3
    with pytest.raises(ConfigError, match="lora_rank = 0"):
        config_from_resolved({"lora_rank": 0})


def test_secrets_stay_out_of_the_run_folder(folder: Path) -> None:
    hooks = [
        {
            "webhook_type": "raw",
            "callback_url": "{env:HOOK}",
            "auth_token": "{env:TOKEN}",
            "ssl_no_verify": True,
        }
    ]
    environ = {"HOOK": "https://h/sesame", "TOKEN": "sesame"}
    loaded = read(folder, {"webhook_config": hooks}, "", environ)
    assert loaded.config.logging.webhook_config[0]["auth_token"] == "sesame"  # type: ignore[index]
    assert "sesame" not in json.dumps(resolved_options(loaded.config))
    assert resolved_options(loaded.config)["webhook_config"][0]["webhook_type"] == "raw"


def test_what_may_change_on_resume() -> None:
    old = resolved_options(RunConfig())
    new = {
        **old,
        "learning_rate": 2e-4,
        "max_train_steps": 9,
        "validation_prompt": "x",
        "device": "cuda",
        "lora_rank": 8,
    }
    assert training_differences(old, new) == [
        "lora_rank was 16, is 8",
        "learning_rate was 0.0001, is 0.0002",
    ]
    assert training_differences({}, old) == []
    for name in (
        "max_train_steps",
        "checkpoint_step_interval",
        "vae_batch_size",
        "report_to",
        "output_dir",
    ):
        assert all_options()[name].resume_policy == "free", name
    for name in (
        "seed",
        "train_batch_size",
        "optimizer",
        "chroma_sigma_density",
        "vae_cache_sample",
        "use_ema",
    ):
        assert all_options()[name].resume_policy == "fixed", name


def test_one_mistake_is_told_once(tmp_path: Path, folder: Path) -> None:
    """A default standing in for a bad value, or a configuration not found, brings no further
    complaints.
    """
    assert len(problems(folder, {"resolution": "big", "resolution_type": "area"})) == 1
    assert len(try_load_config(environ={}, cwd=tmp_path / "empty", env_name="many").problems) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 16_000 + " = 1",
        "[" + "a" + ".a" * 16_000 + "]",
        "x = " + "[" * 5_000 + "]" * 5_000,
        "x = " + "{a = " * 5_000 + "1" + "}" * 5_000,
        "# large\n" * 40_000,
        "a . a" + " . a" * 5_000 + " = 1",
    ],
)
def test_toml_is_bounded_before_it_is_parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.tomllib, "loads", lambda text: pytest.fail("parsed"))
    with pytest.raises(ConfigError, match=r"levels|too large"):
        documents.parse_document(text, ".toml", "x.toml")


def test_dots_and_brackets_in_toml_strings_are_not_counted() -> None:
    text = "validation_prompt = '" + "a." * 100 + "[" * 100 + "'\n# " + "[" * 100 + "\n"
    text += 'b = """' + "[{" * 100 + '"""\n'
    assert documents.parse_document(text, ".toml", "x.toml").value["b"] == "[{" * 100


def test_long_toml_texts_take_linear_time() -> None:
    """Each of these needs minutes with a pattern that backtracks at every start."""
    for text in ("a='''" + "'" * 250_000, '"' * 250_000, "a = " + "1_" * 100_000, "#" * 250_000):
        before = time.process_time()
        with contextlib.suppress(ConfigError):
            documents.parse_document(text, ".toml", "x.toml")
        assert time.process_time() - before < 5
