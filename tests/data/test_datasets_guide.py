"""Every dataset file in docs/datasets.md is read, scanned and put in order as it stands there."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config import jsonc
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.scan import scan_datasets

GUIDE = Path(__file__).parents[2] / "docs/datasets.md"
BLOCKS = re.findall(r"^```jsonc\n(\[.*?\n?\])\n```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
HUB = ("huggingface", "s3://", "https://")  # examples that need a server have tests of their own


def make_world(folder: Path) -> None:
    """Write the folders and files that the examples name."""
    for place, count, height in (("pictures", 5, 640), ("held_out", 2, 704)):
        (folder / place).mkdir()
        for number in range(count):
            size = (640 + 64 * number, height)
            path = folder / place / f"{number}.png"
            Image.new("RGB", size, (number, height // 4, 0)).save(path)
            path.with_suffix(".txt").write_text("zorbo, a cube, red, on a table\nzorbo")
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars/a.tar", "w") as archive:
        archive.add(folder / "pictures", "p")
    for place, level in (("masks", 255), ("regularisation", 9)):
        (folder / place).mkdir()
        for number in range(5):
            Image.new("L", (640 + 64 * number, 640), level).save(folder / place / f"{number}.png")
            (folder / place / f"{number}.txt").write_text("a cube")
    for place in ("marked", "cut_out"):
        (folder / place).mkdir()
        for number in range(2):
            image = Image.new("RGB", (640, 640 + number), (number, 9, len(place)))
            image.putalpha(Image.new("L", image.size, 200))
            (image if place == "cut_out" else image.convert("RGB")).save(
                folder / place / f"{number}.png"
            )
            (folder / place / f"{number}.txt").write_text("a cube")
    for number in range(2):
        Image.new("L", (640, 640 + number), 255).save(folder / f"marked/{number}.mask.png")
    rows = (f'{{"file": "{number}.png", "title": "t", "tags": "x, y"}}\n' for number in range(5))
    (folder / "captions.jsonl").write_text("".join(rows))


def test_the_guide_has_its_examples() -> None:
    assert len(BLOCKS) >= 7


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", " ", text)[:40] for text in BLOCKS])
def test_an_example_of_the_guide_works(block: str, tmp_path: Path) -> None:
    if any(word in block for word in HUB):
        pytest.skip("needs a server")
    make_world(tmp_path)
    file = tmp_path / "multidatabackend.json"
    file.write_text(block, encoding="utf-8")
    entries = jsonc.parse_jsonc(block, "example").value
    options = DataOptions(max_bad_sample_fraction=0)
    found = read_dataset_file(file, options, {})
    assert found.notices == ()
    masks = [entry for entry in entries if entry.get("dataset_type") == "conditioning"]
    assert len(found.train) + len(found.eval) == len(entries) - len(masks)
    placed = scan_datasets([*found.train, *found.eval], options, 1, lambda event: None).samples
    train = [item for item in placed if item.sample.dataset != "held-out"]
    order = SampleOrder(train, found.train, 1, 2, options)
    visits = [
        v for number in range(order.batches_per_epoch) for v in order.micro_batch(number).visits
    ]
    first = [item.sample for item in train if found.train[0].id == item.sample.dataset]
    seen = {train[visit.sample_index].sample.file for visit in visits}
    assert {sample.file for sample in first} <= seen
    has_masks = bool(masks) or "alpha_mask" in block
    samples = [item.sample for item in train] if "alpha_mask" in block else first
    assert all((sample.mask is not None) == has_masks for sample in samples)
    if all(dataset.regularisation_target for dataset in found.train[1:]):
        assert len(seen) == len({item.sample.file for item in train})
