"""Hooks of MkDocs: generate the API pages, and adapt Markdown written for GitHub.

A public name is a name that a module lists in ``__all__``. Each such module gets a page under ``api/``, generated at
build time, so the reference cannot differ from the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "mmscale", "launchers")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_FENCE_WORDS = re.compile(r"\A(```\w+) [^\n]*")
_CODE = re.compile(r"`[^`\n]+`")
_LINK_OUT = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def public_names() -> dict[str, list[str]]:
    """Return the names in ``__all__`` of each module that has one, by the module's dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPO / package).rglob("*.py")):
            names = _names_in_all(ast.parse(path.read_text(encoding="utf-8")))
            if names:
                parts = path.relative_to(REPO).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = names
    return found


def _names_in_all(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the API pages to the last group of the navigation."""
    assert isinstance(config.nav, list)
    (pages,) = config.nav[-1].values()
    pages.append({"API": [{module: f"api/{module}.md"} for module in public_names()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each module that has public names."""
    for module, names in public_names().items():
        members = "".join(f"        - {name}\n" for name in names)
        text = f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n      members:\n{members}"
        files.append(File.generated(config, f"api/{module}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt what GitHub and MkDocs treat differently.

    * The site holds no copy of the repository, so the path of a file replaces a link to it.
    * In a code span of a table, ``\\|`` becomes ``|``.
    * A fence keeps its language and loses further words (`bash s3`, which tests read).

    Raises:
        PluginError: a link leads to a file that does not exist.
    """

    def path_of(match: re.Match[str]) -> str:
        text, target = match[1], (REPO / "docs" / page.file.src_uri).parent / match[2]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: the link [{text}]({match[2]}) leads to no file")
        path = str(target.resolve().relative_to(REPO))
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    def adapt(line: str) -> str:
        if line.startswith("|"):
            line = _CODE.sub(lambda code: code[0].replace("\\|", "|"), line)
        return _LINK_OUT.sub(path_of, line)

    parts = _FENCE.split(markdown)
    return "".join(
        _FENCE_WORDS.sub(r"\1", part)
        if part.startswith("```")
        else "".join(adapt(line) for line in part.splitlines(keepends=True))
        for part in parts
    )
