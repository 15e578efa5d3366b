"""The rooms of the package lie above each other, as docs/design.md says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLES = ("clip_jax.models.variants", "clip_jax.models.text_groups", "clip_jax.evals.prompts")
"""What the config reads of rooms above it."""


def test_rooms_import_only_from_below():
    ranks = rooms_of_the_page()
    modules = {dotted(path): path for path in sorted((ROOT / "clip_jax").rglob("*.py"))}
    assert {room(module) for module in modules} - {"__init__"} == set(ranks)
    upwards = [
        f"{module} imports {imported}"
        for module, path in modules.items()
        for imported in imports(path)
        if "__init__" not in (room(module), room(imported))
        and room(imported) != room(module)
        and ranks[room(imported)] <= ranks[room(module)]
        and not (room(module) == "config" and imported in TABLES)
    ]
    assert not upwards, "\n".join(upwards)


def rooms_of_the_page() -> dict[str, int]:
    """Returns each room's row, from the top, in the first column of the page's table."""
    table = (ROOT / "docs/design.md").read_text().partition("| room of `clip_jax` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name: row for row, names in enumerate(rows) for name in re.findall(r"`(\w+)`", names)}


def room(module: str) -> str:
    """Returns the room of a module by its dotted name; `__init__` is the package itself."""
    return [*module.split("."), "__init__"][1]


def dotted(path: Path) -> str:
    """Returns the name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Gives what a file imports of the package, within functions too, as modules' names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clip_jax":
            inside = ROOT / node.module.replace(".", "/")
            for name in (alias.name for alias in node.names):
                is_module = (inside / f"{name}.py").exists() or (inside / name).is_dir()
                yield f"{node.module}.{name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "clip_jax")
