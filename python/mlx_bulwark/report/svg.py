"""Plots as inline SVG.

Written by hand and not by matplotlib: colours are classes of the page's style, so that one drawing serves both themes,
letters are text that scales and is read aloud, nothing needs an inline style, which the page's policy forbids, and a
plot is some kilobytes.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 400, 250  # about the width of a telephone, so that letters are readable there
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 20, 46
LINE = 16  # height of a line of the legend
CHARACTER = 6.8  # width of a letter of 12 px, about
COLOURS = 6
MOST_POINTS = 1500  # of a line: more are not seen


@dataclass(frozen=True)
class Series:
    """Points of one line, or of dots alone."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    steps: bool = False
    dots: bool = False
    line: bool = True


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line."""

    name: str
    y: float


@dataclass(frozen=True)
class Axes:
    """What the axes say, and their ranges where the data do not decide."""

    x: str
    y: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    percent: bool = False
    whole: bool = False  # along x there are whole numbers alone


@dataclass
class _Scale:
    low: float
    high: float
    first: float
    last: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def line_chart(
    title: str, axes: Axes, series: Sequence[Series], levels: Sequence[Level] = (), marks: Series | None = None
) -> str:
    """Draw lines over common axes.

    Args:
        title: What the plot shows, in a sentence: read aloud in its place.
        axes: Names and ranges of the axes.
        series: Lines or dots; values that are not finite are gaps.
        levels: Horizontal lines.
        marks: Points that stand out.

    Returns:
        str: An ``<svg>`` element; all text in it is escaped.
    """
    everything = [*series, *([marks] if marks else [])]
    names = [s.name for s in everything] if len(everything) > 1 else []
    rows = _legend_rows(names)
    height = HEIGHT + LINE * len(rows)
    xs = [v for s in everything for v in s.x]
    ys = [v for s in everything for v in s.y] + [level.y for level in levels]
    across = _scale(axes.x_range or _range(xs), LEFT, WIDTH - RIGHT)
    up = _scale(axes.y_range or _range(ys, margin=0.08), HEIGHT - BOTTOM, TOP)
    parts = _frame(axes, across, up)
    for level in levels:
        y = up(level.y)
        parts.append(_filled('<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, WIDTH - RIGHT, y, y))
        parts.append(
            _filled(
                '<text class="small" x="{}" y="{}" text-anchor="end">{}</text>',
                WIDTH - RIGHT,
                round(y - 4, 1),
                level.name,
            )
        )
    for place, s in enumerate(series):
        parts += _drawn(s, f"s{place % COLOURS}", across, up)
    if marks is not None:
        parts += _dots(marks, "mark", across, up, 4)
    parts += _legend(rows, names, len(series))
    return _svg(title, height, parts)


def bar_chart(title: str, x: str, labels: Sequence[str], values: Sequence[float], marked: Sequence[bool]) -> str:
    """Draw horizontal bars, one a label.

    Args:
        title: What the plot shows, in a sentence.
        x: Name of the axis.
        labels: Names of the bars.
        values: Their lengths, at least 0. The axis goes to 1 at least, so that next to nothing looks like it.
        marked: Which stand out.
    """
    row = 24
    height = TOP + row * len(labels) + BOTTOM
    left = min(150.0, 14 + CHARACTER * max((len(name) for name in labels), default=0))
    most = int((left - 10) / CHARACTER)
    across = _scale((0.0, max([*values, 1.0])), left, WIDTH - RIGHT)
    bottom = height - BOTTOM
    parts = []
    for tick in across.ticks:
        parts += _tick_down(across(tick), TOP, bottom, _tick_text(tick, across.ticks, False))
    for i, (name, value, stands_out) in enumerate(zip(labels, values, marked, strict=True)):
        y = TOP + row * i
        shown = name if len(name) <= most else name[: most - 1] + "…"
        parts.append(
            _filled('<text x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>', left - 6, y + 16, shown, name)
        )
        length = max(0.0, across(value) - left)
        kind = "bar-marked" if stands_out else "bar"
        parts.append(
            _filled(
                '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="2"/>',
                kind,
                left,
                y + 4,
                round(length, 1),
                row - 8,
            )
        )
    parts.append(_x_name(x, left, height))
    return _svg(title, height, parts)


def _filled(template: str, *values: object) -> str:
    """The template with values in it, escaped: the only way by which data get into a drawing."""
    return template.format(*(html.escape(str(v)) for v in values))


def _svg(title: str, height: float, parts: list[str]) -> str:
    head = _filled('<svg role="img" viewBox="0 0 {} {}" aria-label="{}">', WIDTH, height, title)
    return head + "".join(parts) + "</svg>"


def _frame(axes: Axes, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    bottom = HEIGHT - BOTTOM
    for tick in up.ticks:
        y = up(tick)
        parts.append(_filled('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, WIDTH - RIGHT, y, y))
        text = _tick_text(tick, up.ticks, axes.percent)
        parts.append(_filled('<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT - 6, y + 4, text))
    along = [t for t in across.ticks if t == round(t)] if axes.whole else across.ticks
    for tick in along:
        parts += _tick_down(across(tick), bottom, bottom + 4, _tick_text(tick, along, False))
    parts.append(_filled('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, WIDTH - RIGHT, bottom, bottom))
    middle = (TOP + bottom) / 2
    parts.append(
        _filled(
            '<text class="name" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>', middle, axes.y
        )
    )
    parts.append(_x_name(axes.x, LEFT, HEIGHT))
    return parts


def _x_name(name: str, left: float, height: float) -> str:
    return _filled(
        '<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>',
        round((left + WIDTH - RIGHT) / 2, 1),
        height - 8,
        name,
    )


def _tick_down(x: float, top: float, bottom: float, text: str) -> list[str]:
    return [
        _filled('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', x, x, top, bottom),
        _filled('<text x="{}" y="{}" text-anchor="middle">{}</text>', x, bottom + 14, text),
    ]


def _drawn(s: Series, colour: str, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    if s.line:
        path = _path(s, across, up)
        parts.append(_filled('<path class="line {}" d="{}"/>', colour, path))
    if s.dots:
        parts += _dots(s, colour, across, up, 2.5)
    return parts


def _path(s: Series, across: _Scale, up: _Scale) -> str:
    words, pen, last = [], "M", 0.0
    stride = max(1, math.ceil(len(s.x) / MOST_POINTS))
    for x, y in list(zip(s.x, s.y, strict=True))[::stride]:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        to = (across(_within(x, across)), up(_within(y, up)))
        if s.steps and pen == "L":
            words.append(f"L{to[0]:g} {last:g}")
        words.append(f"{pen}{to[0]:g} {to[1]:g}")
        pen, last = "L", to[1]
    return "".join(words)


def _dots(s: Series, kind: str, across: _Scale, up: _Scale, radius: float) -> list[str]:
    stride = max(1, math.ceil(len(s.x) / MOST_POINTS))
    return [
        _filled(
            '<circle class="dot {}" cx="{}" cy="{}" r="{}"/>',
            kind,
            across(_within(x, across)),
            up(_within(y, up)),
            radius,
        )
        for x, y in list(zip(s.x, s.y, strict=True))[::stride]
        if math.isfinite(x) and math.isfinite(y)
    ]


def _within(value: float, scale: _Scale) -> float:
    return min(max(value, scale.low), scale.high)


def _legend_rows(names: list[str]) -> list[list[int]]:
    rows: list[list[int]] = []
    width = float(WIDTH)
    for i, name in enumerate(names):
        need = 34 + CHARACTER * len(name)
        if width + need > WIDTH - LEFT - RIGHT:
            rows.append([])
            width = 0.0
        rows[-1].append(i)
        width += need
    return rows


def _legend(rows: list[list[int]], names: list[str], lines: int) -> list[str]:
    parts = []
    for r, row in enumerate(rows):
        x, y = float(LEFT), HEIGHT + LINE * r + 4
        for i in row:
            if i < lines:
                parts.append(_filled('<path class="line s{}" d="M{} {}h18"/>', i % COLOURS, round(x, 1), y))
            else:
                parts.append(_filled('<circle class="dot mark" cx="{}" cy="{}" r="4"/>', round(x + 9, 1), y))
            parts.append(_filled('<text x="{}" y="{}">{}</text>', round(x + 23, 1), y + 4, names[i]))
            x += 34 + CHARACTER * len(names[i])
    return parts


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    finite = [float(v) for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(high) * 0.5 or 0.5
        return low - spread, high + spread
    return low - margin * (high - low), high + margin * (high - low)


def _scale(limits: tuple[float, float], first: float, last: float) -> _Scale:
    low, high = limits
    step = _step((high - low) / 5)
    ticks = [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return _Scale(low, high, first, last, ticks)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _tick_text(value: float, ticks: Sequence[float], as_percent: bool) -> str:
    if as_percent:
        return f"{100 * value:.3g} %"
    gap = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    digits = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap else 0
    if abs(round(gap, digits) - gap) > 1e-6 * gap:  # steps of 2.5
        digits += 1
    if digits > 4 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"
