"""What the adapters share: their register, tables, numbers and words."""

from collections.abc import Callable, Sequence
from typing import Any

from .parts import Section, Table, number, percent, plain_words
from .samples import show_worst

Data = dict[str, Any]
Adapter = Callable[[Data], Section]
MOST_ROWS = 200

_ADAPTERS: dict[str, Adapter] = {}


def adapter(kind: str) -> Callable[[Adapter], Adapter]:
    """Register what makes sections of a kind."""

    def keep(function: Adapter) -> Adapter:
        _ADAPTERS[kind] = function
        return function

    return keep


def section_of(data: Data, samples: Any = None, bounds: tuple[float, float] = (0.0, 1.0)) -> Section:
    """The section that data make; what is not known, or not as it should be, is shown as a plain table."""
    kind = data.get("kind")
    make = _ADAPTERS.get(kind) if isinstance(kind, str) else None
    if make is None:
        section = _plain_section(data, "")
    elif isinstance(data.get("error"), str):
        section = _failed(data)
    else:
        try:
            section = make(data)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as e:
            words = f"The data are not of the form that this version knows ({type(e).__name__}: {e})."
            section = _plain_section(data, words)
    section.data = data
    show_worst(section, samples, bounds)
    return section


def _title(data: Data) -> str:
    return str(data.get("kind", "data")).replace("_", " ").strip().capitalize() or "Data"


def _plain_section(data: Data, trouble: str) -> Section:
    verdict = trouble or "This version of the report has no words of its own for this kind of data."
    section = Section(
        str(data.get("kind", "data")), _title(data), "attention" if trouble else "info", verdict + " They stand below."
    )
    if trouble:
        section.advice = "Make the figures again by this version of mlx-bulwark."
    rows = [(name, plain_words(value)) for name, value in data.items() if name != "kind"]
    section.tables.append(table("Everything that was given", ("name", "value"), rows))
    return section


def _failed(data: Data) -> Section:
    section = Section(str(data["kind"]), _title(data), "problem", f"It could not be done: {data['error']}")
    section.advice = "Mend this and run it again: until then nothing is known here."
    return section


def table(
    caption: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    numeric: str = "",
    marked: Any = (),
    strong: Any = (),
) -> Table:
    """A table; ``numeric`` names columns of numbers, and what does not fit is counted."""
    places = frozenset(i for i, c in enumerate(columns) if c in numeric.split("|"))
    left_out = max(0, len(rows) - MOST_ROWS)
    return Table(caption, columns, rows[:MOST_ROWS], places, frozenset(strong), frozenset(marked), left_out)


def real(value: Any) -> float:
    """A number; those that JSON lacks come as words."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def blank(value: Any) -> str:
    """A number as a person reads it; nothing where there is none."""
    return "" if value is None else number(value)


def interval(share: float, n: int) -> str:
    """95 % interval of a share of n by Clopper and Pearson, in words."""
    from scipy.stats import beta

    hits = round(share * n)
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return f"{percent(float(low))} to {percent(float(high))}"


def few(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, in a sentence."""
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def count(n: int, thing: str, plural: str = "") -> str:
    """So many things, in words."""
    return f"{n:,} {thing if n == 1 else plural or thing + 's'}"
