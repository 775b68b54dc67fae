"""What a person reads is plain English in the field's own terms: docstrings, messages, pages, docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "simpletuner"

# A docstring starts with a verb in the imperative or with a noun phrase.
OPENERS = re.compile(
    r"^(?:What|Of|Where|Whether|Who|Whose|How|Nearer|By|To|From|In|On|With|As|At|That|Those"
    r"|Once|Beside|It|They|Nothing|Nobody|Says|Tells)\b"
)

# Phrase -> what to write instead. They are looked for in docstrings, comments, string literals
# that hold a sentence, the catalogues of the pages, and the documentation.
BANNED = {
    r"\bpictures?\b": "image",
    r"\b(?:told|tells?|telling)\b": "reported, logged, returned",
    r"\b(?:goes|go|going|gone|went) on\b": "resume, continue",
    r"\banew\b": "again, from scratch",
    r"\balike\b": "the same way",
    r"\b(?:dearer|cheapest of all)\b": "more expensive",
    r"\bbeside\b": "next to, with, in addition to",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bheed(?:s|ed)?\b": "respect",
    r"\berrs\b": "is less accurate",
    r"\bnumber types?\b": "dtype, precision",
    r"\ba comma list\b": "comma-separated list",
    r"\b(?:recompute|recomputes|recomputed) blocks?\b|\bblocks? (?:are |is )?recomputed\b": "gradient checkpointing, checkpointed blocks",  # noqa: E501
    r"\bdraws? (?:the |an? )?(?:image|preview|sample)s?\b|\b(?:images|previews) (?:are|is) drawn\b": "generate",  # noqa: E501
    r"\bfor ever\b": "permanently, without limit",
    r"\bnobody\b": "no user, no caller",
    r"\b(?:lies|lie|lay) (?:in|on|at|beside|below|there|under|outside|ready|about|where)\b": "is in",
    r"\b(?:stands?|stood) (?:in|on|at|beside|before|below|there|for itself|still)\b": "is in",
    r"\ba word\b(?! (?:of|in|per))|\bwithout a word\b": "a notice, silently",
    r"\bhas to do with\b": "concerns, matches",
    r"(?<!there )(?<!There )(?<!this )\bis no (?!longer\b|more\b|less\b|\w+er\b)": "is not a",
    r"\bmust insists\b|\binsists?\b": "requires",
    r"\bas (?:little|few|much|many) as can be\b": "as little as possible",
    r"\bcannot be told from\b": "cannot be distinguished from",
    r"\bthe other way round\b": "the reverse",
    r"\bby (?:now|and by)\b": "already",
    r"\bit is (?:so|thus)\b": "",
    r"\bwhat (?:is|was) (?:left|kept|asked|meant|there|known|seen|said|due|read|made)\b": "name the thing",
    r"\bsuch an? one\b|\bthat one's\b": "name the thing",
    r"\bgives? out\b": "provides",
    r"\bsay(?:s)? (?:it )?again\b": "repeat",
    r"\b1 (?:images|samples|steps|files|captions|batches|buckets|visits|datasets|blocks)\b": "singular and plural",  # noqa: E501
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), better) for pattern, better in BANNED.items()]
# Words that stand on disk, on the network or in a user's own folder names.
ALLOWED = re.compile(
    r"`[^`]*`|\ba picture of $|^pictures and captions$|https?://\S+|/pictures\b|\bpictures/|\"pictures\"|'pictures'|=pictures\b"
)


@lru_cache(maxsize=1)
def python_files() -> dict[Path, tuple[str, ast.Module]]:
    """Return the text and the syntax tree of each file, parsed once for all tests."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    return {path: (text, ast.parse(text)) for path, text in texts.items()}


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string literal that holds more than one word, f-strings part by part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        found = re.search(r"(?:^|\s)#\s(.*)$", line) if "#" in line else None
        if found:
            yield number, found[1]


def violations(text: str) -> list[str]:
    text = ALLOWED.sub("", text)
    return [
        f"{match[0]!r} -> {better}"
        for pattern, better in PATTERNS
        for match in pattern.finditer(text)
    ]


def test_docstrings_start_with_a_verb_or_a_noun() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path, (_, tree) in python_files().items()
        for line, text in docstrings(tree)
        if OPENERS.match(text)
    ]
    assert not found, "\n".join(found)


def test_no_banned_phrase_in_the_package() -> None:
    found = []
    for path, (text, tree) in python_files().items():
        for line, words in (*sentences(tree), *comments(text)):
            found += [f"{path.relative_to(ROOT)}:{line}: {one}" for one in violations(words)]
    assert not found, f"{len(found)} phrases\n" + "\n".join(found)


def catalogues_and_docs() -> list[Path]:
    pages = [*ROOT.glob("web/src/i18n/en/*.ts"), *ROOT.glob("web/src/i18n/en.ts")]
    docs = list(ROOT.glob("docs/**/*.md"))
    return [*pages, *docs, *ROOT.glob("*.md"), *ROOT.glob("recipes/**/*.md")]


def test_no_banned_phrase_in_pages_and_docs() -> None:
    found = []
    for path in sorted(catalogues_and_docs()):
        if path.name in ("es.md", "hi.md"):
            continue
        code = False
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if text.lstrip().startswith("```"):
                code = not code
            if not code:
                found += [f"{path.relative_to(ROOT)}:{line}: {one}" for one in violations(text)]
    assert not found, f"{len(found)} phrases\n" + "\n".join(found)


def test_a_banned_phrase_is_found() -> None:
    assert violations("The pictures lie in that folder.")
    assert violations("x is no size") == ["'is no ' -> is not a"]
    assert not violations("There is no such file; `pictures` is a folder.")
    assert OPENERS.match("What came of reading.")
