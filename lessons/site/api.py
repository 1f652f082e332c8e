"""The API reference: Markdown pages from the sources of `minirl_edu`, read with `ast` and never imported.

A docstring here is Markdown with two habits of Python's own: indented blocks are equations, tables or code, set as they
stand, and `Args:`, `Attributes:` and `Raises:` open lists. Names of the library in single backticks become links.
"""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "minirl_edu"
INDENTED = re.compile(r"((?:^[ ]{4}.*\n|^\n(?=[ ]{4}))+)", re.MULTILINE)
SECTION = re.compile(r"(?:^|\n)(Args|Attributes|Raises|Returns):\n$")
UNIT = re.compile(r"course\.(unit\d\d|variants)\.py$")  # exercises with their solutions: data, not an interface
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Undocumented(Exception):
    """Public names without a docstring; the message lists them, one a line."""


class Module(NamedTuple):
    """A source file: its dotted name, the page it gets (relative to the repository) and its syntax tree."""

    name: str
    page: Path
    tree: ast.Module


def read_modules(root: Path) -> list[Module]:
    """Every module of the library below `root`, packages before what is in them."""
    modules = []
    for path in sorted((root / PACKAGE).rglob("*.py"), key=lambda path: [*path.parts[:-1], path.stem]):
        relative = path.relative_to(root).with_suffix("")
        package = relative.name == "__init__"
        page = relative.with_name("index") if package else relative
        name = ".".join((relative.parent if package else relative).parts)
        modules.append(Module(name, page.with_suffix(".md"), ast.parse(path.read_text(encoding="utf-8"))))
    return modules


def undocumented(module: Module) -> list[str]:
    """Public functions, classes and methods of a module, and the module itself, that have no docstring."""
    found = [] if ast.get_docstring(module.tree) else [module.name]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in _public(body):
            if not ast.get_docstring(node):
                found.append(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(module.tree.body, f"{module.name}.")
    return found


def pages(root: Path) -> dict[Path, str]:
    """The text of every page of the reference by its path, relative to the repository, the index among them.

    Raises Undocumented, or ValueError for a module that CONTRIBUTING's table of floors does not name.
    """
    modules = read_modules(root)
    if missing := [name for module in modules for name in undocumented(module)]:
        raise Undocumented("public names without a docstring:\n  " + "\n  ".join(missing))
    shown = [module for module in modules if not UNIT.search(f"{module.name}.py") and module.name != PACKAGE]
    links = _links(shown)
    texts = {module.page: _page(module, links) for module in shown}
    texts[Path(PACKAGE, "index.md")] = _index(root, modules, shown)
    return texts


def _public(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _page(module: Module, links: dict[str, tuple[Path, str]]) -> str:
    def prose(docstring: str) -> str:
        return markdown(docstring, {name: _href(at, module.page) for name, at in links.items()})

    parts = [f"# `{module.name}`", prose(ast.get_docstring(module.tree) or "")]
    if constants := list(_documented_values(module.tree.body)):
        parts += ["## Values", *(f"```python\n{code}\n```\n\n{prose(doc)}" for code, doc in constants)]
    for node in _public(module.tree.body):
        parts += [f"## `{node.name}`", f"```python\n{_signature(node)}\n```", prose(ast.get_docstring(node) or "")]
        if isinstance(node, ast.ClassDef):
            fields = [(code.split(":")[0], doc) for code, doc in _documented_values(node.body)]
            parts += ["\n".join(f"- `{name}`: {' '.join(prose(doc).split())}" for name, doc in fields)]
            for method in _public(node.body):
                kind = {ast.unparse(decorator) for decorator in method.decorator_list}
                code = "" if "property" in kind else f"```python\n{_signature(method)}\n```"
                parts += [f"### `{node.name}.{method.name}`", code, prose(ast.get_docstring(method) or "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _index(root: Path, modules: list[Module], shown: list[Module]) -> str:
    """The reference's first page: the floors of CONTRIBUTING's table, with the first sentence of each module."""
    table = re.findall(r"^\| (\d+) \| (.+) \|$", (root / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    floors = {int(floor): [name.strip("/") for name in re.findall(r"`([\w/]+)`", names)] for floor, names in table}
    parts_of_the_house = {module.name.split(".")[1] for module in modules if "." in module.name}
    if parts_of_the_house != (named := {name for names in floors.values() for name in names}):
        raise ValueError(f"CONTRIBUTING.md's table of floors differs from the sources: {parts_of_the_house ^ named}")
    package = next(module for module in modules if module.name == PACKAGE)
    lines = ["# API reference", "", markdown(ast.get_docstring(package.tree) or "", {}), "", "## By floor", ""]
    lines += ["A module imports only from the floors below its own.", "", "| floor | module | |", "|---|---|---|"]
    toctree = []
    for floor, names in sorted(floors.items()):
        for module in (m for name in names for m in shown if m.name.split(".")[1] == name):
            page = module.page.relative_to(PACKAGE).as_posix()
            paragraph = markdown((ast.get_docstring(module.tree) or "").split("\n\n")[0], {})
            first = " ".join(paragraph.split()).partition(". ")[0].rstrip(".").replace("|", r"\|")
            lines.append(f"| {floor} | [`{module.name.removeprefix(f'{PACKAGE}.')}`]({page}) | {first} |")
            toctree.append(f"{module.name.removeprefix(f'{PACKAGE}.')} <{page.removesuffix('.md')}>")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *toctree, "```", ""])


# ------------------------------------------------------------------------------------------------ from Python's syntax


def _signature(node: Function | ast.ClassDef) -> str:
    """How a function is called, or a class is made: its bases, and its fields or the parameters of its `__init__`."""
    decorators = [f"@{text}\n" for text in map(ast.unparse, node.decorator_list) if not text.startswith("overload")]
    if isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")]
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        if made is not None:
            return _call(f"class {node.name}", _parameters(made.args)[1:], "")
        body = [f"    {ast.unparse(field)}" for field in fields]
        return "".join(decorators) + "\n".join([f"class {node.name}{bases}{':' if body else ''}", *body])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = [p for p in _parameters(node.args) if p not in ("self", "cls")]
    return "".join(decorators) + _call(node.name, parameters, returns)


def _call(head: str, parameters: list[str], returns: str) -> str:
    line = f"{head}({', '.join(parameters)}){returns}"
    return line if len(line) <= 88 else f"{head}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){returns}"


def _parameters(arguments: ast.arguments) -> list[str]:
    def one(argument: ast.arg, default: ast.expr | None, star: str = "") -> str:
        equals = "" if default is None else f"{' = ' if argument.annotation else '='}{ast.unparse(default)}"
        return f"{star}{ast.unparse(argument)}{equals}"

    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    found = [one(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        found.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        found.append(one(arguments.vararg, None, "*"))
    elif arguments.kwonlyargs:
        found.append("*")
    found += [one(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*found, one(arguments.kwarg, None, "**")] if arguments.kwarg else found


def _documented_values(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Public assignments followed by a string: the assignment's code, shortened where it is long, and the string."""
    for node, after in itertools.pairwise(body):
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after.value.value, str):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            code = ast.unparse(node)
            if not target.startswith("_"):
                yield (code if len(code) <= 200 else f"{target} = ..."), inspect.cleandoc(after.value.value)


# ------------------------------------------------------------------------------------------------------- to Markdown


def _links(modules: list[Module]) -> dict[str, tuple[Path, str]]:
    """Where names lead: `module.name` always, the bare name if it is no everyday word and only one module has it."""
    found: dict[str, tuple[Path, str]] = {}
    twice = set()
    for module in modules:
        found[module.name] = (module.page, "")
        for node in _public(module.tree.body):
            at = (module.page, f"#{node.name.lower()}")
            found[f"{module.name.split('.')[-1]}.{node.name}"] = at
            if "_" in node.name or node.name[0].isupper():
                twice |= {node.name} & found.keys()
                found[node.name] = at
    return {name: at for name, at in found.items() if name not in twice}


def _href(at: tuple[Path, str], page: Path) -> str:
    return at[1] if at[0] == page else "../" * (len(page.parts) - 1) + at[0].as_posix() + at[1]


def markdown(docstring: str, links: dict[str, str]) -> str:
    """A docstring as Markdown; `links` says where a name in backticks leads."""
    parts: list[str] = []
    for i, text in enumerate(INDENTED.split(docstring + "\n")):
        if i % 2 == 0:
            parts.append(_inline(text, links))
        elif section := SECTION.search(parts[-1]):
            items = re.split(r"\n(?=\S)", textwrap.dedent(text).strip("\n"))
            parts[-1] = parts[-1][: section.start()]
            parts.append(f"\n\n**{section[1]}**\n\n" + "\n".join(_item(item, links) for item in items) + "\n\n")
        else:
            text = textwrap.dedent(text).strip("\n")
            parts.append(f"\n```text\n{text}\n```\n\n")
    return "".join(parts).strip()


def _item(text: str, links: dict[str, str]) -> str:
    text = " ".join(text.split())
    name, colon, rest = text.partition(": ")
    return f"- `{name}`: {_inline(rest, links)}" if colon and "`" not in name else f"- {_inline(text, links)}"


def _inline(text: str, links: dict[str, str]) -> str:
    """Escape what Markdown or MyST would read as markup outside backticks, and link the names inside them."""
    pieces = re.split(r"(`[^`]+`)", text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = piece.replace("<", "&lt;").replace("$", r"\$")
        elif piece.strip("`") in links:
            pieces[i] = f"[{piece}]({links[piece.strip('`')]})"
    return "".join(pieces)
