"""Checks the README's file map against the tree: every tracked source file has its line, and every line a file."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Exits with the differences, if any."""
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `([^`]+)` \|", readme, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, check=True, capture_output=True).stdout.split()
    wanted = {path for path in tracked if _is_mapped(path)}
    problems = [f"README's file map lacks {path}" for path in sorted(wanted - listed)]
    problems += [f"README's file map lists {path}, which is not there" for path in sorted(listed - set(tracked))]
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(wanted)} files mapped")


def _is_mapped(path: str) -> bool:
    top = path.split("/")[0]
    return top in ("clip_jax", "configs", "benchmarks", "tests", "docs", ".ci", "launch") or "/" not in path


if __name__ == "__main__":
    main()
