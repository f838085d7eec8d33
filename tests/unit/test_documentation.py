"""The documents name only what is there, and all that must be named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from cli.main import vlmq
from shared.errors import BY_CODE, VlmqError
from shared.finetunes import FINETUNE_TRANSITIONS
from shared.jobs import TRANSITIONS
from shared.metrics import METRICS
from shared.settings import Settings
from shared.statuses import status_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "docs" / "api.md",
    ROOT / "docs" / "metrics.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]

_MIB = 1024**2


def rows_under(text: str, heading: str) -> Iterator[list[str]]:
    """The cells of the rows of the first table whose header starts with ``heading``."""
    lines = iter(text[text.index(f"| {heading} |") :].splitlines())
    next(lines), next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" |")]


def quoted(cell: str) -> str:
    """What a cell holds between its first back-ticks."""
    found = re.match(r"`([^`]+)`", cell.strip())
    assert found is not None, cell
    return found[1]


def errors() -> list[type[VlmqError]]:
    """The public errors; engines' and tests' own subclasses left out."""
    return [kind for kind in BY_CODE.values() if kind.__module__ == "shared.errors"]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as ``section.key`` with its default."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def shown(name: str, default: Any) -> str:
    """A default as the README writes it."""
    if name == "node.name":
        return "the host's name"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ", ".join(f"`{part}`" for part in default)
    if isinstance(default, Path):
        return f"`{str(default).replace(str(Path.home()), '~')}`"
    if isinstance(default, str):
        return f"`{default}`"
    if name.endswith("_bytes") and default % _MIB == 0:
        mib = default // _MIB
        return f"{mib // 1024} GiB" if mib % 1024 == 0 else f"{mib} MiB"
    return str(default)


def test_every_error_code_is_documented_with_its_status() -> None:
    """The table of docs/api.md has each public error once, with its status and retryability."""
    documented = [
        (quoted(code), int(status), again) for code, status, again, _ in rows_under(API, "Code")
    ]
    expected = [
        (kind.code, status_of(kind()), "yes" if kind.retryable else "no") for kind in errors()
    ]
    assert sorted(documented) == sorted(expected)


def test_the_settings_of_the_readme_exist_with_these_defaults() -> None:
    """Each row names a setting there is, and the default it really has."""
    settings = dict(leaves(Settings))
    for name, default, _ in rows_under(README, "Setting"):
        key = quoted(name)
        assert key in settings, f"there is no setting {key}"
        assert default == shown(key, settings[key].default), key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_named_in_passing_exist(document: Path) -> None:
    """A quoted ``section.key`` or ``VLMQ_SECTION__KEY`` anywhere is a setting."""
    settings = dict(leaves(Settings))
    text = document.read_text()
    sections = "|".join(sorted({name.partition(".")[0] for name in settings if "." in name}))
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)(?=[`=])", text))
    named -= {f"{section}.toml" for section in sections.split("|")}
    named = {name for name in named if not name.endswith((".py", ".app"))}
    unknown = {name for name in named if name not in settings and not _is_module(name)}
    assert not unknown
    for section, key in re.findall(r"VLMQ_([A-Z]+)__([A-Z_]+)", text):
        if section != "APPI":  # the README's example of a misspelling
            assert f"{section}.{key}".lower() in settings


def _is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_named_exist(document: Path) -> None:
    """``vlmq batch submit --watch`` and the like: the commands, and the options given to them."""
    for line in _command_lines(document.read_text()):
        command, words = _resolve(line.split()[1:])
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in {*known, "--help"}, f"{line}: no option {word}"


def _command_lines(text: str) -> list[str]:
    """What follows ``vlmq`` in shell blocks and quoted words, up to what ends a command."""
    spans: list[str] = []
    language: str | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line.removeprefix("```") if language is None else None
        elif language is None:
            spans += re.findall(r"`([^`]+)`", line)
        elif language == "sh":
            spans.append(line)
    found = (re.search(r"(?:^|[\s/])(vlmq [a-z][^#|;]*)", span) for span in spans)
    return [match[1].strip() for match in found if match]


def _resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = vlmq
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_every_command_is_in_the_readme() -> None:
    """The table of commands is complete."""
    listed = {quoted(row[0]) for row in rows_under(README, "Command")}
    assert listed == set(_all_commands(vlmq, "vlmq"))


def _all_commands(group: click.Group, name: str) -> Iterator[str]:
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _all_commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}"


def test_every_route_is_in_the_readme() -> None:
    """The table of routes is that of the application."""
    listed = {re.sub(r"\{\w+\}", "*", quoted(row[0])) for row in rows_under(README, "Route")}
    assert listed == set(_routes())


def _routes() -> Iterator[str]:
    for path in sorted((ROOT / "api" / "routes").glob("*.py")):
        found = re.findall(r'@blueprint\.(\w+)\("([^"]+)"\)', path.read_text())
        for method, rule in found:
            yield f"{method.upper()} {re.sub('<[^>]+>', '*', rule)}"


def test_the_table_of_states_is_the_one_in_the_code() -> None:
    """ARCHITECTURE.md shows the transitions of shared/jobs.py."""
    documented = {
        quoted(state): set(re.findall(r"`(\w+)`", following))
        for state, _, following in rows_under(ARCHITECTURE, "State")
    }
    assert documented == {
        state.value: {to.value for to in following} for state, following in TRANSITIONS.items()
    }


def test_the_table_of_a_fine_tunes_states_is_the_one_in_the_code() -> None:
    """ARCHITECTURE.md shows the transitions of shared/finetunes.py."""
    documented = {
        quoted(state): set(re.findall(r"`(\w+)`", following))
        for state, _, following in rows_under(ARCHITECTURE, "Fine-tune is")
    }
    assert documented == {
        state.value: {to.value for to in following}
        for state, following in FINETUNE_TRANSITIONS.items()
    }


def test_every_metric_is_documented_as_it_is() -> None:
    """The table of docs/metrics.md is that of the code: names, kinds, labels, help."""
    documented = [
        (quoted(name), kind, re.findall(r"`(\w+)`", labels), text)
        for name, kind, labels, text in rows_under(
            (ROOT / "docs" / "metrics.md").read_text(), "Metric"
        )
    ]
    assert documented == [(m.name, m.kind, list(m.labels), m.help) for m in METRICS]


def test_the_file_map_is_complete() -> None:
    """Each source file is listed once with a few words, and nothing else is."""
    section = ARCHITECTURE[ARCHITECTURE.index("## File map") :]
    listed = re.findall(r"^- `([^`]+)`: \S.*$", section, flags=re.MULTILINE)
    present = [
        str(path.relative_to(ROOT))
        for folder in ("api", "workers", "shared", "cli")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".lua"}
    ]
    assert sorted(listed) == sorted(present)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_cited_exist(document: Path) -> None:
    """Whoever follows a promise to its proof finds it."""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", document.read_text()):
        source = ROOT / path
        assert source.exists(), path
        if name:
            tree = ast.walk(ast.parse(source.read_text()))
            names = {node.name for node in tree if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{path} has no test {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Files that documents link to exist, and so do the headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target
