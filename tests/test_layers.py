"""Who may import whom. Reads every import of the package, those inside functions too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "simpletuner"

FILES = {"atomic_io", "bounded_files", "image_decoding"}  # what every layer may do with files
ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "peers": set(),
    **{name: set() for name in FILES},
    "events": FILES | {"errors"},
    "config": FILES | {"errors", "events", "randomness"},
    "data": FILES | {"errors", "events", "randomness", "config"},
    "flow": {"errors", "randomness", "config"},
    "quantization": FILES | {"errors", "events", "config"},
    "adapters": FILES | {"errors", "events", "randomness", "config"},
    "cache": FILES | {"errors", "peers", "events", "randomness", "config", "data"},
}
ALLOWED["models"] = ALLOWED["cache"] | {"flow", "quantization", "adapters", "cache"}
ALLOWED["validation"] = ALLOWED["models"] | {"models"}
ALLOWED["training"] = ALLOWED["validation"] | {"validation"}
ALLOWED["server"] = FILES | {"errors", "events", "config", "data"}
ALLOWED["cli"] = set(ALLOWED) | {"cli"}

FORBIDDEN_THIRD_PARTY = {
    "errors": {"torch", "numpy", "PIL", "pydantic"},
    "events": {"torch", "numpy", "pydantic"},
    "config": {"torch", "numpy", "PIL", "transformers", "diffusers"},
    "data": {"torch", "transformers", "diffusers"},
    "server": {"torch", "transformers", "diffusers"},
}
ENVIRON = {"config", "training/world.py"}
ONE_FILE_ONLY = {
    "tensorboard",
    "wandb",
    "trackio",
    "bitsandbytes",
    "torchao",
    "optimum",
    "deepspeed",
    "gguf",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "pyarrow",
}


@cache
def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            if node.module == "simpletuner":
                names += [f"simpletuner.{alias.name}" for alias in node.names]
    return names


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def layer(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def test_imports_go_down() -> None:
    new = {layer(path) for path in files()} - ALLOWED.keys() - {"__init__", "__main__"}
    assert not new, "a new layer: say in ALLOWED what it may import"
    found = [
        f"{path.relative_to(SOURCE)} must not import {target}"
        for path in files()
        for target in forbidden(layer(path), imports(path))
    ]
    assert found == []


def forbidden(here: str, names: list[str]) -> Iterator[str]:
    """Yield of a layer's imports those that it must not have."""
    for name in names if here in ALLOWED else ():
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "simpletuner" and target in ALLOWED and target not in ALLOWED[here] | {here}:
            yield target
        if top in FORBIDDEN_THIRD_PARTY.get(here, set()):
            yield top


def test_no_cycles_between_files() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    known = {}
    for path in files():
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        known[".".join(parts).removesuffix(".__init__")] = path
    for module, path in known.items():
        for name in imports(path):
            if name in known and name != module:
                graph[module].add(name)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        done.add(module)

    for module in sorted(known):
        visit(module, ())


def test_environment_is_read_in_one_place() -> None:
    for path in files():
        where = path.relative_to(SOURCE).as_posix()
        if layer(path) in ENVIRON or where in ENVIRON:
            continue
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text, f"{where} reads the environment"
        assert "getenv" not in text, f"{where} reads the environment"


def test_optional_packages_are_imported_in_one_file_each() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for path in files():
        for name in imports(path):
            words = set(name.split(".")) & ONE_FILE_ONLY
            for word in words:
                where[word].add(str(path.relative_to(SOURCE)))
    assert {word: places for word, places in where.items() if len(places) > 1} == {}


def is_off(value: ast.expr) -> bool:
    """Return True for the constant False."""
    return isinstance(value, ast.Constant) and value.value is False


def test_no_pickle_and_no_shell() -> None:
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tops = {name.split(".")[0] for name in imports(path)}
        assert not {"pickle", "marshal", "shelve"} & tops, path
        # YAML can construct any object; the safe loader reads plain values only.
        assert "yaml" not in tops or path.name == "accelerate_config.py", path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                words = {keyword.arg for keyword in node.keywords if not is_off(keyword.value)}
                assert not {"shell", "trust_remote_code"} & words, path
                name = ast.unparse(node.func)
                if name.startswith("yaml."):
                    assert name == "yaml.safe_load" or "SafeLoader" in ast.unparse(node), path
                assert name not in ("torch.load", "eval", "exec", "os.system"), f"{path}: {name}"
                reads_json_only = "okenizer" in name or "rocessor" in name
                if name.endswith(".from_pretrained") and not reads_json_only:
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    safe = given.get("use_safetensors") == "True"
                    assert safe, f"{path}: {name} may open a pickle"


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    from simpletuner.training import loop\n    import torch.nn\n")
    assert imports(sample) == ["simpletuner.training", "torch.nn"]
    assert list(forbidden("server", imports(sample))) == ["training", "torch"]
    assert list(forbidden("cli", imports(sample))) == []
