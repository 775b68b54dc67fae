"""Problems, warnings and notes in Spanish and Hindi: one catalogue, and none is missing."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from simpletuner.server import translation
from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.translation import (
    FILLED,
    MAX_ATTEMPTS,
    Template,
    catalogue,
    preferred_language,
    read_messages,
    translate,
)
from simpletuner.server.workspace import Workspace, run_id
from tests.server.message_templates import composed_templates, package_templates
from tests.server.run_folder_writer import RunFolderWriter

LANGUAGES = ("es", "hi")


def test_no_message_is_missing() -> None:
    templates = {**package_templates(), **composed_templates()}
    missing = {
        template: where for template, where in templates.items() if template not in read_messages()
    }
    assert missing == {}, "translate them in server/messages.json"
    assert sorted(set(read_messages()) - set(templates)) == [], "no module has these messages"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_value_is_in_the_translation(language: str) -> None:
    wrong = []
    for english, row in read_messages().items():
        count = len(translation.PLACEHOLDER.findall(english))
        marks = [match[1] for match in FILLED.finditer(row[language])]
        numbers = {int(mark) for mark in marks if mark} or set(range(len(marks)))
        # the words "has" and "it needs" of a sentence have no counterpart in every language
        complete = numbers == set(range(count)) or (numbers <= set(range(count)) and any(marks))
        if not complete or not row[language].strip():
            wrong.append(english)
    assert wrong == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_is_recognised(language: str) -> None:
    """Each message, with values in it, is translated by its own row."""
    wrong = []
    for english in package_templates():
        translated = read_messages()[english][language]
        message = sample_of(english)
        is_part = english[0] in " ;," or english[-1] == " "  # of other messages
        if not is_part and translated != english and translate(message, language) == message:
            wrong.append(english)
    # So few words that it is translated only with a value that is known itself, such as a reason.
    assert [
        row for row in wrong if sum(map(str.isalpha, row)) >= translation.MIN_LETTERS_OF_PLAIN
    ] == []


def sample_of(template: str) -> str:
    """Return the template with x0, x1 ... in the place of its values, and 7 for a number."""
    values = (f"x{at}" for at in range(9))
    return translation.PLACEHOLDER.sub(lambda mark: "7" if mark[1] else next(values), template)


EXAMPLES = {
    "learning_rat: unknown option; did you mean 'learning_rate'?": (
        "learning_rat: opción desconocida; ¿quisiste decir «learning_rate»?"
    ),
    "lora_rank = 0: must be at least 1, at most 8192": (
        "lora_rank = 0: debe ser como mínimo 1 y como máximo 8192"
    ),
    "config.json:7:3: snr_gamma: has no effect on Chroma": (
        "config.json:7:3: snr_gamma: no tiene efecto en Chroma"
    ),
    "skipped, because they are off or change nothing: a, b and 3 more": (
        "omitidas, porque están desactivadas o no cambian nada: a, b y 3 más"
    ),
    "c has no effect with loss_type l2: it needs loss_type huber or smooth_l1": (
        "c no tiene efecto con loss_type l2: necesita loss_type huber o smooth_l1"
    ),
    "the run is done; stop it, or remove it from the queue, first": (
        "el entrenamiento está en estado terminado; detenlo antes, o quítalo de la cola"
    ),
    "2 images have no caption (a.png, b.png). Write the missing captions on the page of the dataset, "
    "or set missing_caption to empty, filename or drop": (
        "2 imágenes sin caption (a.png, b.png). Escribe las captions que faltan en la página del "
        "dataset, o pon missing_caption a empty, filename o drop"
    ),
    # Messages of others stay as they are.
    "RuntimeError: foo is bar": "RuntimeError: foo is bar",
    "a cat is in another room": "a cat is in another room",
}


@pytest.mark.parametrize(("message", "spanish"), EXAMPLES.items())
def test_messages_in_spanish(message: str, spanish: str) -> None:
    assert translate(message, "es") == spanish
    assert translate(message, "en") == message


def test_hindi_reorders_values() -> None:
    english = '1024 means megapixels with resolution_type "area"; for the edge in pixels write "pixel_area"'
    assert translate(english, "hi") == (
        'resolution_type "area" के साथ 1024 का अर्थ मेगापिक्सेल है; पिक्सेल में भुजा के लिए "pixel_area" लिखें'
    )


@pytest.mark.parametrize(
    "message", ["a: " * 1300, "; x or y: is " * 200, "x" * 100_000, "{} is" * 500]
)
def test_the_time_is_bounded(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    match = Template.match

    def count(self: Template, text: str) -> list[str] | None:
        nonlocal calls
        calls += 1
        return match(self, text)

    monkeypatch.setattr(Template, "match", count)
    translate(message, "es")
    assert calls <= MAX_ATTEMPTS * len(catalogue("es")._templates)


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("es", "es"),
        ("hi-IN,en;q=0.5", "hi"),
        ("fr, es;q=0.4, en;q=0.8", "en"),
        *((unknown, "en") for unknown in ("", "de", "es;q=x")),
    ],
)
def test_the_language_of_a_request(accepted: str, language: str) -> None:
    assert preferred_language(accepted) == language


def test_routes_answer_in_the_language_of_the_request(tmp_path: Path) -> None:
    settings = ServerSettings(workspace=Workspace(tmp_path), host="127.0.0.1")
    client = TestClient(create_app(settings), base_url="http://127.0.0.1")
    body = {"config": {"learning_rat": 1, "lora_rank": 0}, "datasets": []}
    problems = {}
    for language in ("en", "es", "hi"):
        answer = client.post("/api/v1/validate", json=body, headers={"accept-language": language})
        problems[language] = [row["message"] for row in answer.json()["problems"]]
    assert any("unknown option" in text for text in problems["en"])
    assert any("opción desconocida" in text for text in problems["es"])
    assert any("अज्ञात विकल्प" in text for text in problems["hi"])
    plain = client.post("/api/v1/validate", json=body).json()
    assert [row["message"] for row in plain["problems"]] == problems["en"]
    missing = client.get("/api/v1/runs/none", headers={"accept-language": "es"})
    assert missing.json()["detail"][0]["message"] == "no existe ese entrenamiento"
    # Every problem of the request is translated, not only some.
    ascii_words = [text for text in problems["hi"] if not re.search("[\u0900-\u097f]", text)]
    assert ascii_words == []


def test_the_catalogue_is_sorted_and_complete() -> None:
    file = Path(translation.__file__).with_name("messages.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert all(set(row) == set(LANGUAGES) for row in rows.values())
    assert list(rows) == sorted(rows, key=lambda english: english.strip().lower())


def test_what_a_training_wrote_is_translated(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "output" / "fox").write_start()
    run.write_exit("failed", message="config.json:7:3: learning_rat: unknown option")
    settings = ServerSettings(Workspace(tmp_path))
    client = TestClient(create_app(settings), base_url="http://127.0.0.1")
    route = f"/api/v1/runs/{run_id(run.path)}"
    message = {
        language: client.get(route, headers={"accept-language": language}).json()["summary"][
            "message"
        ]
        for language in ("en", "es")
    }
    assert message == {
        "en": "config.json:7:3: learning_rat: unknown option",
        "es": "config.json:7:3: learning_rat: opción desconocida",
    }


def test_a_web_socket_asks_in_its_address() -> None:
    """A browser cannot set the headers of a WebSocket."""
    asked = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(translation.to_language_of_request("unknown option"))

    middleware = translation.LanguageMiddleware(app)
    for query in (b"language=es", b""):
        scope = {"type": "websocket", "query_string": query, "headers": []}
        asyncio.run(middleware(scope, None, None))  # type: ignore[arg-type]
    assert asked == ["opción desconocida", "unknown option"]
