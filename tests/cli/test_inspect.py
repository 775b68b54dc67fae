"""simpletuner inspect on a dataset with one of each flaw."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageFilter

from simpletuner.cli import command_group
from simpletuner.cli.token_counter import find_token_counter
from simpletuner.config.schema import ModelOptions
from tests.data.test_image_quality import drawing

with_tokenizers = pytest.mark.skipif(
    find_spec("tokenizers") is None, reason="it comes with transformers, which needs torch"
)


def run(*words: str) -> Result:
    return CliRunner().invoke(command_group, ["inspect", *words], catch_exceptions=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images; a.. are sound, the others have one flaw each, by their name."""
    folder = tmp_path_factory.mktemp("data") / "photos <b>"
    folder.mkdir()
    captions = {}
    for number in range(6):
        name = f"a{number}"
        drawing(number, 256).save(folder / f"{name}.png")
        captions[name] = f"oil painting of zorbo number {number}, with {number + 2} shapes"
    drawing(0, 256).save(folder / "copy.png")
    captions["copy"] = "oil painting of zorbo, the same file again"
    drawing(1, 256).resize((300, 300)).save(folder / "near.jpg", quality=80)
    captions["near"] = "oil painting of zorbo, saved again"
    drawing(8, 256).filter(ImageFilter.GaussianBlur(4)).save(folder / "soft.png")
    captions["soft"] = "oil painting without the word"
    drawing(9, 64).save(folder / "tiny.png")
    captions["tiny"] = "oil painting of zorbo, tiny"
    Image.new("RGB", (256, 256), "teal").save(folder / "plain.png")
    captions["plain"] = "oil painting of zorbo, tiny"
    drawing(10, 256).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:3000])
    (folder / "broken.png").write_bytes(b"not an image")
    captions["broken"] = captions["cut"] = ""
    for name, text in captions.items():
        if text:
            (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def found(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    page = tmp_path_factory.mktemp("page") / "inspect.html"
    words = ["--resolution", "256", "--trigger", "zorbo", "--max_train_steps", "24"]
    result = run(str(photos), *words, "--json", "--html", str(page))
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    report["page"] = page.read_text("utf-8")
    return report


def test_each_flaw_is_found_with_what_to_do(found: dict[str, Any]) -> None:
    findings = {finding["code"]: finding for finding in found["findings"]}
    assert set(findings) == {
        "unusable_files",
        "damaged_images",
        "identical_images",
        "near_duplicates",
        "enlarged_images",
        "blurred_images",
        "blank_images",
        "missing_captions",
        "equal_captions",
        "trigger_missing",
        "competing_phrases",
    }
    assert all(finding["advice"] for finding in findings.values())
    about = {
        code: [name.rpartition("/")[2] for name in finding["sample_ids"]]
        for code, finding in findings.items()
    }
    assert about["unusable_files"] == ["broken.png"]
    assert about["missing_captions"] == ["cut.png"]
    assert about["damaged_images"] == ["cut.png"]
    assert about["identical_images"] == ["a0.png", "copy.png"]
    assert about["near_duplicates"] == ["a1.png", "near.jpg"]
    assert about["enlarged_images"] == ["tiny.png"]
    assert about["blurred_images"] == ["soft.png"]
    assert about["blank_images"] == ["plain.png"]
    assert about["equal_captions"] == ["plain.png", "tiny.png"]
    assert about["trigger_missing"] == ["cut.png", "soft.png"]
    assert "'oil painting'" in findings["competing_phrases"]["message"]


def test_counts_sizes_buckets_and_passes(found: dict[str, Any]) -> None:
    assert found["images"] == 12
    (dataset,) = found["datasets"]
    assert (dataset["passes"], found["steps"]) == (2.0, 24)
    assert dataset["rejected"] == {"not_an_image": 1}
    assert found["sizes"]["smallest_px"] == [64, 64]
    assert found["sizes"]["largest_px"] == [300, 300]
    assert [(item["width_px"], item["images"]) for item in found["buckets"]] == [(256, 12)]
    assert found["captions"]["trigger"]["images"] == 10


class PageReader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else_and_escapes_names(found: dict[str, Any]) -> None:
    page = found["page"]
    reader = PageReader()
    reader.feed(page)
    assert reader.sources
    assert all(source.startswith("data:image/webp;base64,") for source in reader.sources)
    assert "script" not in reader.tags
    assert "default-src 'none'" in page
    assert "photos &lt;b&gt;" in page
    assert "photos <b>" not in page


def test_the_summary_is_text_and_headers_only_decodes_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("simpletuner.data.statistics.load_upright", refuse)
    result = run(str(photos), "--headers-only", "--resolution", "256")
    assert result.exit_code == 0, result.output
    assert "12 images" in result.stdout
    assert "images were not decoded" in result.stdout
    assert "warning: 1 group of images that are the same file" in result.stdout


@with_tokenizers
def test_nothing_is_written_to_the_dataset_and_torch_is_not_imported(photos: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    code = (
        "import sys; from simpletuner.cli import command_group; "
        f"command_group(['inspect', {str(photos)!r}, '--resolution', '256', '--model_flavour',"
        " 'nano'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nano/tokenizer/tokenizer.json" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before


def test_a_dataset_file_with_a_held_out_copy(photos: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (held / "x.png").write_bytes((photos / "a3.png").read_bytes())
    (held / "x.txt").write_text("a copy")
    file = tmp_path / "datasets.json"
    entries = [
        {"id": "photos", "instance_data_dir": str(photos), "resolution": 256, "repeats": 3},
        {
            "id": "held",
            "dataset_type": "eval",
            "instance_data_dir": str(held),
            "resolution": 256,
        },
    ]
    file.write_text(json.dumps(entries))
    result = run("--dataset", str(file), "--json", "--headers-only", "--num_train_epochs", "2")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    codes = [finding["code"] for finding in report["findings"]]
    assert "held_out_leak" in codes
    assert {item["id"]: item["passes"] for item in report["datasets"]} == {
        "photos": 8.0,
        "held": None,
    }


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--json"], "nothing to inspect"),
        (["nowhere"], "nowhere is not a folder"),
        (["one", "two"], "several folders"),
        (["one", "--dataset", "x.json"], "both name a dataset"),
        (["--html"], "needs a value"),
        (["--resolutoin", "3", "one"], "did you mean 'resolution'"),
    ],
)
def test_a_wrong_command_has_one_message(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert part in str(result.exception)


@with_tokenizers
def test_tokens_are_an_estimate_without_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = find_token_counter(ModelOptions(pretrained_model_name_or_path=str(tmp_path)))
    assert counter.source.startswith("estimated")
    assert counter.count("a photo of a cat") == 5
    nano = find_token_counter(ModelOptions(model_flavour="nano"))
    assert nano.count("a red circle") == len(["a", "red", "circle"]) + 1
