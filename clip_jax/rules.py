"""Ordered (regex, value) rules over parameter names: decay, sharding.

The first rule that is found in a leaf's path, such as `image/transformer/block_0/mlp/in/kernel`, gives its value.
Coverage is asserted both ways, so that neither a new parameter nor a stale rule goes unnoticed.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def leaf_paths(tree: Any) -> list[str]:
    """Returns the `/`-joined path of every leaf, in the order of `jax.tree.leaves`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def apply_rules(rules: Rules[T], tree: Any, *, all_used: bool = True) -> Any:
    """Returns a tree like `tree` with each leaf replaced by its rule's value.

    Args:
      rules: (regex, value) pairs, searched in order; values must not be None.
      tree: any pytree; only the paths of its leaves matter.
      all_used: refuse a rule that no leaf takes.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that matches no leaf.
    """
    paths = leaf_paths(tree)
    taken = [_first_match(rules, path) for path in paths]
    if unmatched := [path for path, index in zip(paths, taken, strict=True) if index is None]:
        raise ValueError(f"no rule matches {', '.join(unmatched)} (rules: {', '.join(regex for regex, _ in rules)})")
    if all_used and (idle := [regex for i, (regex, _) in enumerate(rules) if i not in taken]):
        raise ValueError(f"no parameter takes the rules {', '.join(idle)}")
    return jax.tree.unflatten(jax.tree.structure(tree), [rules[i][1] for i in taken if i is not None])


def _first_match(rules: Rules[T], path: str) -> int | None:
    return next((i for i, (regex, _) in enumerate(rules) if re.search(regex, path)), None)
