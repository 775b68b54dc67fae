"""The name table of an architecture: native module names, diffusers' names and fused matrices.

Native names are those of the model's author, which ComfyUI and kohya's tools use as well. A native
matrix may hold several of diffusers' modules, stacked along the rows, which are the outputs; the
columns (inputs) are the same on both sides. The table of an architecture is in its model family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

_BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


@dataclass(frozen=True)
class NativeModule:
    """A native matrix: diffusers' modules in the order of its rows.

    row_ratios: rows of each part divided by the model's width; only used for several parts.
    last_is_flexible: the last part has all remaining rows, whatever its ratio says.
    """

    parts: tuple[str, ...]
    row_ratios: tuple[int, ...] = (1,)
    last_is_flexible: bool = False


@dataclass(frozen=True)
class ModuleNames:
    """The name table of one architecture. "{}" in a name stands for the number of the block.

    title: name of the architecture in messages. native_modules: native name -> its parts.
    modules_outside_blocks: names of both kinds that are not inside a block. unsupported_keys: part
    of a LoRA file's key -> why such a file cannot be loaded, in addition to the general reasons.
    """

    title: str
    native_modules: Mapping[str, NativeModule]
    modules_outside_blocks: tuple[str, ...] = ()
    unsupported_keys: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _native_by_diffusers_name(self) -> dict[str, tuple[str, int]]:
        return {
            part: (native, position)
            for native, module in self.native_modules.items()
            for position, part in enumerate(module.parts)
        }

    @cached_property
    def _native_by_underscored_name(self) -> dict[str, str]:
        return {dots_to_underscores(name): name for name in self.native_modules}

    @cached_property
    def _diffusers_by_underscored_name(self) -> dict[str, str]:
        return {dots_to_underscores(name): name for name in self._native_by_diffusers_name}

    def diffusers_names(self, native: str) -> tuple[str, ...]:
        """Return diffusers' modules of a native one, in the order of rows; empty if unknown."""
        template, number = split_block_number(native)
        module = self.native_modules.get(template)
        return () if module is None else tuple(part.format(number) for part in module.parts)

    def locate_in_native(self, diffusers: str) -> tuple[str, int] | None:
        """Return the native matrix that holds a module's rows, and the module's position in it."""
        template, number = split_block_number(diffusers)
        location = self._native_by_diffusers_name.get(template)
        return None if location is None else (location[0].format(number), location[1])

    def numbered_part_to_diffusers(self, written: str) -> str | None:
        """Return diffusers' name: double_blocks.3.img_attn.qkv.1 -> ...attn.to_k.

        A native module of one part has no number. None if unknown.
        """
        parts = self.diffusers_names(written)
        if len(parts) == 1:
            return parts[0]
        native, _, number = written.rpartition(".")
        parts = self.diffusers_names(native)
        if len(parts) > 1 and number.isdecimal() and int(number) < len(parts):
            return parts[int(number)]
        return None

    def underscores_to_dots(self, underscored: str, native: bool) -> str | None:
        """Return the dotted name: double_blocks_3_img_attn_qkv -> double_blocks.3.img_attn.qkv.

        native: the name is a native one, else diffusers'. None if unknown.
        """
        template, number = split_block_number(underscored)
        table = self._native_by_underscored_name if native else self._diffusers_by_underscored_name
        dotted = table.get(template)
        return None if dotted is None else dotted.format(number)

    def part_heights(self, native: str, width: int) -> list[int]:
        """Return the number of rows of each part of a native matrix. width: of the model."""
        template, _ = split_block_number(native)
        return [ratio * width for ratio in self.native_modules[template].row_ratios]

    def fused_row_slices(self, native: str, total: int, width: int) -> list[slice]:
        """Return the rows of each part in a native matrix of `total` rows.

        width: of the model, which is the number of columns of the matrix. Raises ValueError for
        impossible sizes.
        """
        module = self.native_modules[split_block_number(native)[0]]
        if len(module.parts) == 1:
            return [slice(0, total)]
        heights = self.part_heights(native, width)
        if module.last_is_flexible:
            heights[-1] = total - sum(heights[:-1])
        if heights[-1] <= 0 or sum(heights) != total:
            names = ", ".join(part.rpartition(".")[2] for part in module.parts)
            raise ValueError(f"{total} rows cannot hold {names} of width {width}")
        ends = [sum(heights[: number + 1]) for number in range(len(heights))]
        return [slice(end - height, end) for end, height in zip(ends, heights)]


def dots_to_underscores(name: str) -> str:
    """Return the name with underscores, as kohya's tools write it."""
    return name.replace(".", "_")


def split_block_number(name: str) -> tuple[str, str]:
    """Split off the block's number: ("double_blocks.{}.img_attn.qkv", "3")."""
    number_match = _BLOCK_NUMBER.search(name)
    return (
        (name, "")
        if number_match is None
        else (f"{name[: number_match.start()]}{{}}{name[number_match.end() :]}", number_match[0])
    )
