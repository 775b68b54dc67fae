from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DiskFull, DownloadError, ModelError
from simpletuner.models.chroma import model_files
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.weights import hub_download


def answer(kind: type[Exception]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, object]]]:
    """Stands in for the hub: what asking says, what downloading says, and what was asked for."""

    def install(asked: Exception | str, fetched: Exception | Path) -> list[dict[str, object]]:
        calls: list[dict[str, object]] = []
        revisions: list[object] = []

        class Api:
            def model_info(self, repo: str, **arguments: object) -> SimpleNamespace:
                if isinstance(asked, Exception):
                    raise asked
                revisions.append(arguments["revision"])
                folder = fetched if isinstance(fetched, Path) else Path("nowhere")
                weights = [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]
                return SimpleNamespace(
                    siblings=[SimpleNamespace(rfilename=one, size=1) for one in weights]
                )

        def fetch(repo: str, **arguments: object) -> str:
            calls.append({"repo": repo, "asked": [None, *revisions][-1], **arguments})
            if isinstance(fetched, Exception):
                raise fetched
            return str(fetched)

        monkeypatch.setattr(hub_download, "HfApi", Api)
        monkeypatch.setattr(hub_download, "snapshot_download", fetch)
        monkeypatch.setattr(hub_download, "try_to_load_from_cache", lambda *_, **__: None)
        return calls

    return install


def test_a_local_folder_is_taken_as_it_lies(checkpoint: Path) -> None:
    source = model_files.locate_files(ModelOptions(pretrained_model_name_or_path=str(checkpoint)))
    assert source.transformer == checkpoint / "transformer"
    assert (source.tokenizer, source.revision, source.variant) == (checkpoint / "tokenizer", "", "")


@pytest.mark.parametrize("nested", [True, False])
def test_parts_may_come_from_elsewhere(checkpoint: Path, tmp_path: Path, nested: bool) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    source = model_files.locate_files(
        ModelOptions(
            pretrained_model_name_or_path=str(checkpoint),
            pretrained_transformer_model_name_or_path=str(
                other if nested else other / "transformer"
            ),
            pretrained_t5_model_name_or_path=str(other if nested else other / "text_encoder"),
        )
    )
    assert source.transformer == other / "transformer"
    assert source.text_encoder == other / "text_encoder"
    assert source.tokenizer == (other if nested else checkpoint) / "tokenizer"
    assert source.vae == checkpoint / "vae"


def test_an_incomplete_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "half"))
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="half/vae is not a vae folder"):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path=str(folder)))


@pytest.mark.parametrize("name", ["chroma.safetensors", "owner/chroma-q8.gguf", "./model.pt"])
def test_a_single_file_that_is_not_there_is_no_repository(name: str) -> None:
    with pytest.raises(ModelError, match=r"does not exist; expected a single weight file"):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path=name))


def test_a_mistyped_folder_is_no_repository() -> None:
    with pytest.raises(ModelError, match="neither an existing file or folder nor a hub repository"):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path="./models/my-chroma"))


@pytest.mark.parametrize(
    ("flavour", "repo"),
    [
        ("base", "lodestones/Chroma1-Base"),
        ("hd", "lodestones/Chroma1-HD"),
        ("flash", "lodestones/Chroma1-Flash"),
    ],
)
def test_flavours_download_only_the_parts(
    hub: Callable, checkpoint: Path, flavour: str, repo: str
) -> None:
    calls = hub("c0ffee", checkpoint)
    source = model_files.locate_files(ModelOptions(model_flavour=flavour))
    assert (source.name, source.revision) == (repo, checkpoint.name)
    assert calls[0]["repo"] == repo
    # The branch by its name, or the cache would not know it without network; then the commit found
    # there.
    assert [call["revision"] for call in calls] == [None, checkpoint.name]
    small, weights = (call["allow_patterns"] for call in calls)
    assert not any(pattern.endswith(".safetensors") for pattern in small)
    assert "transformer/diffusion_pytorch_model.safetensors" in weights


REPOSITORY = [
    "model_index.json", "README.md", "Chroma1-HD.safetensors", "diffusion_pytorch_model.safetensors",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "tokenizer/spiece.model",
]  # fmt: skip


def chosen(parts: list[str], variant: str, files: list[str]) -> set[str]:
    small, weights = hub_download.file_patterns(parts, variant, CHROMA_FORMAT)
    return set(filter_repo_objects(files, allow_patterns=[*small, *weights]))


def test_one_copy_of_the_weights_is_downloaded() -> None:
    plain = {
        name
        for name in REPOSITORY
        if "/" in name and "fp16" not in name and not name.endswith(".bin")
    }
    assert chosen(list(model_files.COMPONENTS), "", REPOSITORY) == plain | {"model_index.json"}
    half = {
        name
        for name in chosen(list(model_files.COMPONENTS), "fp16", REPOSITORY)
        if name.endswith(".safetensors")
    }
    assert half == {name for name in REPOSITORY if "fp16" in name}


def test_a_repository_of_one_part_is_taken_from_its_root() -> None:
    files = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "spiece.model",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "t5xxl_fp8.safetensors",
    ]
    assert chosen(["text_encoder", "tokenizer"], "", files) == {
        name for name in files if not name.endswith((".bin", ".h5", "fp8.safetensors"))
    }


def test_what_is_not_chroma_is_refused_before_its_weights_come(
    hub: Callable, checkpoint: Path, tmp_path: Path
) -> None:
    flux = Path(shutil.copytree(checkpoint, tmp_path / "flux"))
    (flux / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    calls = hub("c0ffee", flux)
    with pytest.raises(
        ModelError, match=r"FluxTransformer2DModel.*Chroma's is ChromaTransformer2DModel"
    ):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path="somebody/flux"))
    assert len(calls) == 1


def test_parts_that_are_all_elsewhere_need_no_main_model(checkpoint: Path) -> None:
    here = str(checkpoint)
    source = model_files.locate_files(
        ModelOptions(
            pretrained_transformer_model_name_or_path=here,
            pretrained_vae_model_name_or_path=here,
            pretrained_t5_model_name_or_path=here,
        )
    )  # the hub of these tests would not answer
    assert source.tokenizer == checkpoint / "tokenizer"


def test_the_revision_is_the_main_models(hub: Callable, checkpoint: Path) -> None:
    calls = hub("c0ffee", checkpoint)
    asked = ModelOptions(revision="v2", pretrained_vae_model_name_or_path="owner/vae")
    model_files.locate_files(asked)
    assert [call["asked"] for call in calls] == [None, None, "v2", "v2"]


def test_a_folder_named_nano_is_not_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    for folder in (tmp_path / "nano", tmp_path / "wheel" / "nano"):
        shutil.copytree(checkpoint, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files.models_package, "__path__", [str(tmp_path / "wheel")])
    bundled = model_files.locate_files(ModelOptions(model_flavour="nano"))
    assert bundled.vae == tmp_path / "wheel" / "nano" / "vae"
    mine = model_files.locate_files(
        ModelOptions(model_flavour="nano", pretrained_model_name_or_path="nano")
    )
    assert mine.vae == tmp_path / "nano" / "vae"


def test_a_separate_part_is_not_downloaded_twice(hub: Callable, checkpoint: Path) -> None:
    calls = hub("c0ffee", checkpoint)
    model_files.locate_files(
        ModelOptions(pretrained_transformer_model_name_or_path=str(checkpoint / "transformer"))
    )
    patterns = [pattern for call in calls for pattern in call["allow_patterns"]]
    assert not any(pattern.startswith("transformer/") for pattern in patterns)


@pytest.mark.parametrize(
    ("asked", "fetched", "said"),
    [
        (ConnectionError("no route"), LocalEntryNotFoundError("x"), "cannot be reached.*HF_ENDPOINT=https://hf-mirror.com"),
        (answer(GatedRepoError), OSError(), "gated: accept its licence.*HF_TOKEN"),
        (answer(RepositoryNotFoundError), OSError(), "does not exist"),
        ("c0ffee", answer(GatedRepoError), "gated"),
        ("c0ffee", ConnectionError("reset by peer"), "interrupted.*reset by peer"),
    ],
)  # fmt: skip
def test_every_failure_is_one_line_with_a_way_out(
    hub: Callable, asked: Exception | str, fetched: Exception, said: str
) -> None:
    hub(asked, fetched)
    with pytest.raises(DownloadError, match=said) as caught:
        model_files.locate_files(ModelOptions())
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_says_where_to_go(hub: Callable) -> None:
    hub("c0ffee", OSError(28, "No space left on device"))
    with pytest.raises(DiskFull, match=r"lodestones/Chroma1-Base to .*no disk space left.*HF_HOME"):
        model_files.locate_files(ModelOptions())


def test_without_network_the_hub_cache_serves(hub: Callable, checkpoint: Path) -> None:
    calls = hub(ConnectionError("no route"), checkpoint)
    assert model_files.locate_files(ModelOptions()).vae == checkpoint / "vae"
    assert calls[0]["local_files_only"] is True


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_downloaded_serves_offline(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """The hub's own cache layout, read by the hub's own library, with a port where nobody listens."""
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--lodestones--Chroma1-Base"
    snapshot = Path(shutil.copytree(checkpoint, repository / "snapshots" / ("c0ffee" + 34 * "0")))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    if not whole:
        shutil.rmtree(snapshot)
        with pytest.raises(DownloadError, match="not completely in the hub cache"):
            model_files.locate_files(ModelOptions())
        return
    source = model_files.locate_files(ModelOptions())
    assert (source.transformer, source.revision) == (snapshot / "transformer", snapshot.name)


def test_a_dead_endpoint_is_noticed_in_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real call, to a port where nobody listens."""
    monkeypatch.setattr(hub_download.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_download.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    slept = list[float]()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        model_files.locate_files(ModelOptions())
    assert sum(slept) < 10
