"""Rules of the user's own: functions with a name and a version, which a schema names and never holds."""

from collections.abc import Callable
from typing import Any

from .rules import SchemaError

Rule = Callable[[dict[str, Any]], Any]
_RULES: dict[tuple[str, str], Rule] = {}


def rule(name: str, version: str) -> Callable[[Rule], Rule]:
    """Register a rule of a domain. A schema names it by name and version; no code is ever read from a schema.

    Args:
        name: Name of the rule.
        version: Its version; change it with the code.

    Returns:
        A decorator of a function that gets NumPy arrays by field and returns bool ``[n]``: which rows are right.

    Raises:
        ValueError: Another function has this name and version.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark import gate
        >>> @gate.rule("adult", "1")
        ... def adult(fields):
        ...     return fields["age"] >= 18
        >>> schema = gate.Schema(domain=(gate.DomainRule(name="adult", version="1"),))
        >>> schema.check({"age": np.array([17, 30])}).counts["domain"]
        1
    """

    def register(function: Rule) -> Rule:
        old = _RULES.get((name, version))
        if old is not None and (old.__module__, old.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"[rule] name and version must be new but {name!r} {version!r} is {old.__qualname__}")
        _RULES[name, version] = function
        return function

    return register


def registered(name: str, version: str) -> Rule:
    """The function of a name and a version."""
    if (name, version) in _RULES:
        return _RULES[name, version]
    others = [v for n, v in _RULES if n == name]
    has = f"has versions {', '.join(others)}" if others else "has no such rule: import the module that registers it"
    raise SchemaError(f"[Schema] rule {name!r} must be registered in version {version!r} but the registry {has}")
