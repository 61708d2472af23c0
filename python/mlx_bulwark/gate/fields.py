"""Rules of one field against its values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from .copies import check_unique
from .report import NAMED_ROWS, Mask
from .rules import Field, Outlier, Trusted
from .statistics import Array, ChannelStatistics, Float64, by_row, channels, laid_out, pieces

if TYPE_CHECKING:
    from .check import Check

_FAMILIES = {"floating": "f", "integer": "iu", "number": "fiub"}
_MOST_TOLD = 5  # values, in a message


def check_field(check: Check, name: str, rule: Field) -> None:
    """Hold one field against all its rules."""
    a = check.batch.arrays[name]
    sound = _type(check, name, rule, a) & _shape(check, name, rule, a)
    if not sound:
        return
    if a.dtype.kind in "fiub":
        _numbers(check, name, rule, a)
    else:
        _others(check, name, rule, a)
    if rule.unique:
        check_unique(check, name)
    if rule.values is not None or rule.shares is not None or rule.distinct is not None or _counted(rule):
        _values(check, name, rule, a)


def _type(check: Check, name: str, rule: Field, a: Array) -> bool:
    has = check.batch.dtypes[name]
    if rule.dtype is None:
        return True
    kinds = _FAMILIES.get(rule.dtype)
    fits = a.dtype.kind in kinds if kinds else has == rule.dtype
    if fits:
        check.holds("dtype", name, f"be {rule.dtype}")
        return True
    if a.dtype.kind == "O" and rule.dtype not in ("text", "datetime"):
        bad = by_row(np.array([not _is_number(v) for v in a.ravel()], bool), len(a)).any(axis=1)
        if bad.any():
            check.rows("type", name, bad, f"hold values of {rule.dtype}", "{} rows hold something else")
            return False
    check.data("dtype", name, 1, f"be {rule.dtype}", f"is {has}")
    return False


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _shape(check: Check, name: str, rule: Field, a: Array) -> bool:
    if rule.shape is None:
        fits = rule.axis is None or rule.axis < a.ndim - 1
        if not fits:
            check.data("shape", name, 1, f"have an axis {rule.axis} in a row", f"has shape {list(a.shape)}")
        return fits
    words = "have rows of shape [" + ", ".join("any" if s is None else str(s) for s in rule.shape) + "]"
    bad = a.ndim - 1 != len(rule.shape)
    for size, wanted in zip(a.shape[1:], rule.shape, strict=False):
        if isinstance(wanted, str):
            low, high = check.schema.axes.get(wanted, (0, None))
            bad |= check.axes.setdefault(wanted, size) != size or size < low or (high is not None and size > high)
            words += f" with {wanted} {check.axes[wanted]}" if check.axes[wanted] != size else ""
        elif wanted is not None:
            bad |= size != wanted
    if bad:
        check.data("shape", name, max(1, len(a)), words, f"has rows of shape {list(a.shape[1:])}")
    else:
        check.holds("shape", name, words)
    return not bad


def _numbers(check: Check, name: str, rule: Field, a: Array) -> None:
    if rule.earliest is not None or rule.latest is not None:
        check.data("type", name, 1, "be datetimes", f"is {check.batch.dtypes[name]}")
    width = channels(a, rule.axis)
    lists = [rule.low, rule.high]
    lists += [rule.outlier.center, rule.outlier.scale] if rule.outlier else []
    lists += [rule.trusted.values or None] if rule.trusted else []
    wanted = {len(v) for v in lists if isinstance(v, tuple)}
    if wanted and wanted != {width}:
        check.data("shape", name, 1, f"have the {max(wanted)} channels of its rules", f"has {width}")
        return
    s = check.channel_statistics(name, rule)
    moments = {"mean": s.mean.tolist(), "std": s.std.tolist()} if check.reads_moments(rule) else {}
    check.statistics[name] = {
        "count": s.count.tolist(),
        **moments,
        "minimum": s.minimum.tolist(),
        "maximum": s.maximum.tolist(),
        "missing": s.nans.tolist(),
        "infinite": s.infs.tolist(),
    }
    _budget(check, "missing", name, rule, a, s.nans, rule.missing)
    _budget(check, "infinite", name, rule, a, s.infs, rule.infinite)
    _range(check, name, rule, a, s)
    for what, limits, values in (("mean", rule.mean, s.mean), ("std", rule.std, s.std)):
        if limits is not None:
            bad = ((values < limits[0]) | (values > limits[1])) & (s.count > 0)
            extreme = values[bad]
            check.data(
                what,
                name,
                int(bad.sum()),
                f"have a {what} from {limits[0]:g} to {limits[1]:g}",
                f"has {extreme[0]:g}" + (f" in {len(extreme)} channels" if len(extreme) > 1 else "")
                if len(extreme)
                else "",
            )
    if rule.outlier:
        _outliers(check, name, rule, rule.outlier, a, s)
    if rule.trusted:
        _like_trusted(check, name, rule, rule.trusted, a, s)


def _budget(check: Check, what: str, name: str, rule: Field, a: Array, found: Float64, share: float) -> None:
    total = float(found.sum())
    if a.dtype.kind != "f" and not total:
        return
    limit = f"have at most {share:.3%} {what} values" if share else f"have no {what} values"
    if total <= share * a.size:
        check.holds(what, name, limit)
        return
    bad = np.isnan if what == "missing" else np.isinf
    check.rows(what, name, _rows(a, lambda part: bad(part)), limit, "{} rows have", int(total))


def _range(check: Check, name: str, rule: Field, a: Array, s: ChannelStatistics) -> None:
    if rule.low is None and rule.high is None:
        return
    low = np.asarray(-np.inf if rule.low is None else rule.low, np.float64)
    high = np.asarray(np.inf if rule.high is None else rule.high, np.float64)
    limit = f"lie in [{_bound(rule.low, '-inf')}, {_bound(rule.high, 'inf')}]"
    seen = s.count > 0
    if not ((s.minimum < low) & seen).any() and not ((s.maximum > high) & seen).any():
        check.holds("range", name, limit)
        return

    def outside(part: Array) -> Mask:
        x = laid_out(part, rule.axis)
        wide = x if x.dtype.kind != "f" else x.astype(np.float64)
        return np.asarray((np.isfinite(wide) & ((wide < low) | (wide > high))).reshape(len(part), -1))

    bad, count = _counted_rows(a, outside)
    least, most = s.minimum[seen].min(), s.maximum[seen].max()
    check.rows("range", name, bad, limit, f"{{}} rows do not, from {least:g} to {most:g}", count)


def _bound(bound: Any, none: str) -> str:
    if bound is None:
        return none
    return (
        "its low"
        if isinstance(bound, tuple) and none == "-inf"
        else "its high"
        if isinstance(bound, tuple)
        else f"{bound:g}"
    )


def _outliers(check: Check, name: str, rule: Field, limit: Outlier, a: Array, s: ChannelStatistics) -> None:
    center, scale = np.asarray(limit.center, np.float64), np.asarray(limit.scale, np.float64)
    reach = np.where(scale > 0, limit.limit * scale, np.inf)
    low, high = center - reach, center + reach
    words = f"lie within {limit.limit:g} robust standard deviations of the median"
    seen = s.count > 0
    if not (((s.minimum < low) | (s.maximum > high)) & seen).any():
        check.holds("outlier", name, words)
        return

    def outside(part: Array) -> Mask:
        x = laid_out(part, rule.axis).astype(np.float64)
        return np.asarray((np.isfinite(x) & ((x < low) | (x > high))).reshape(len(part), -1))

    bad, count = _counted_rows(a, outside)
    check.rows("outlier", name, bad, words, "{} rows do not", count)


def _like_trusted(check: Check, name: str, rule: Field, trusted: Trusted, a: Array, s: ChannelStatistics) -> None:
    if not trusted.values or not a.size:
        return
    alpha = check.alpha
    n, m = np.asarray(trusted.values, np.float64), s.count
    if trusted.low:
        low, high = np.asarray(trusted.low), np.asarray(trusted.high)
        beyond = np.zeros(len(m))
        for part in pieces(a):
            x = laid_out(a[part], rule.axis)
            beyond += (np.isfinite(x) & ((x < low) | (x > high))).sum(0)
        r = np.asarray(trusted.outside, np.float64)
        p = stats.betabinom.sf(beyond - 1, np.maximum(m, 1), np.maximum(r, 1e-9), n + 1 - r)
        _test(
            check, "quantiles", name, (p < alpha) & (m > 0), "have as many values beyond its trusted quantiles", beyond
        )
    if trusted.mean:
        std = np.asarray(trusted.std)
        error = np.sqrt(std**2 / np.maximum(n, 1) + s.std**2 / np.maximum(m, 1))
        off = np.abs(s.mean - np.asarray(trusted.mean))
        enough = (m >= _LEAST_FOR_MEAN) & (n >= _LEAST_FOR_MEAN)
        freedom = np.maximum(np.minimum(m, n) - 1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(off > 0, off / error, 0)
        p = 2 * stats.t.sf(z, freedom)
        _test(check, "trusted_mean", name, (p < alpha) & enough, "have the mean of the trusted values", s.mean)
    missing = int(s.nans.sum())
    if rule.missing:
        total = trusted.missing + sum(trusted.values)
        p = _more_than(missing, a.size, trusted.missing, total)
        check.data(
            "trusted_missing",
            name,
            missing if p < alpha else 0,
            f"miss values as seldom as trusted data, {trusted.missing} of {total}",
            f"misses {missing} of {a.size}",
        )


_LEAST_FOR_MEAN = 30


def _test(check: Check, what: str, name: str, bad: Mask, limit: str, values: Float64) -> None:
    at = np.flatnonzero(bad)
    found = (
        f"has {values[at[0]]:g}" + (f", and {len(at) - 1} further channels" if len(at) > 1 else "") if len(at) else ""
    )
    check.data(what, name, len(at), limit, found)


def _more_than(k: int, m: int, c: int, n: int) -> float:
    """Fisher's exact test, one-sided: k of m against c of n."""
    return float(stats.hypergeom.sf(k - 1, n + m, c + k, m))


def _others(check: Check, name: str, rule: Field, a: Array) -> None:
    missing = np.isnat(a) if a.dtype.kind in "mM" else np.array([_is_missing(v) for v in a.ravel()], bool)
    rows = by_row(missing, len(a)).any(axis=1)
    limit = f"have at most {rule.missing:.3%} missing values" if rule.missing else "have no missing values"
    count = int(missing.sum())
    if count > rule.missing * a.size:
        check.rows("missing", name, rows, limit, "{} rows have", count)
    else:
        check.holds("missing", name, limit)

    if _of_numbers(rule):
        check.data("type", name, 1, "be numbers for its rules", f"is {check.batch.dtypes[name]}")
    if rule.earliest is not None or rule.latest is not None:
        _moments(check, name, rule, a)


def _of_numbers(rule: Field) -> bool:
    """Whether there are rules that would be passed over in silence if values were no numbers."""
    given = (rule.low, rule.high, rule.mean, rule.std, rule.outlier)
    return any(r is not None for r in given) or bool(rule.trusted and rule.trusted.values)


def _moments(check: Check, name: str, rule: Field, a: Array) -> None:
    limit = f"lie from {rule.earliest or 'any time'} to {rule.latest or 'any time'}"
    if a.dtype.kind != "M":
        check.data("type", name, 1, f"be datetimes that {limit}", f"is {check.batch.dtypes[name]}")
        return
    bad = np.zeros(a.shape, bool)
    if rule.earliest is not None:
        bad |= a < np.datetime64(rule.earliest)
    if rule.latest is not None:
        bad |= a > np.datetime64(rule.latest)
    check.rows("range", name, by_row(bad, len(a)).any(axis=1), limit, "{} rows do not", int(bad.sum()))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _counted(rule: Field) -> bool:
    return rule.trusted is not None and rule.trusted.counts is not None


def _values(check: Check, name: str, rule: Field, a: Array) -> None:
    flat: Any = a.ravel()
    if a.dtype.kind == "O":
        flat = [v for v in flat if not _is_missing(v)]
        found: dict[str, int] = dict(Counter(map(str, flat)))
    else:
        flat = flat[~np.isnan(flat)] if a.dtype.kind == "f" else flat
        kinds, counts = np.unique(flat, return_counts=True)
        found = dict(zip(map(value_key, kinds.tolist()), counts.tolist(), strict=True))
    if rule.values is not None:
        _allowed(check, name, rule, a, found)
    if rule.distinct is not None:
        low, high = rule.distinct
        bad = len(found) < low or (high is not None and len(found) > high)
        top = "any number of" if high is None else high
        check.data("distinct", name, int(bad), f"have {low} to {top} different values", f"has {len(found)}")
    total = sum(found.values())
    if rule.shares is not None and total:
        wrong = {
            k: found.get(k, 0) / total
            for k, (low, high) in rule.shares.items()
            if not low <= found.get(k, 0) / total <= high
        }
        told = ", ".join(f"{k}: {v:.3%}" for k, v in list(wrong.items())[:_MOST_TOLD])
        check.data("balance", name, len(wrong), "have its classes in their shares", f"has {told}")
    if rule.trusted is not None and rule.trusted.counts is not None and total:
        _same_shares(check, name, rule.trusted.counts, found)


def value_key(value: Any) -> str:
    """A value as the key of JSON: 1 and 1.0 are the same, truth is a number."""
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _allowed(check: Check, name: str, rule: Field, a: Array, found: dict[str, int]) -> None:
    allowed = {value_key(v) if a.dtype.kind != "O" else str(v) for v in rule.values or ()}
    wrong = [k for k in found if k not in allowed]
    limit = "hold one of " + ", ".join(sorted(allowed)[:_MOST_TOLD]) + (" ..." if len(allowed) > _MOST_TOLD else "")
    if not wrong:
        check.holds("values", name, limit)
        return
    outside = set(wrong)
    key = str if a.dtype.kind == "O" else value_key
    flat = np.array([not _is_missing(v) and key(v) in outside for v in a.ravel().tolist()], bool)
    rows = by_row(flat, len(a)).any(axis=1)
    check.rows(
        "values",
        name,
        rows,
        limit,
        "{} rows hold " + ", ".join(f"{w!r:.40}" for w in wrong[:_MOST_TOLD]).replace("{", "{{").replace("}", "}}"),
        int(flat.sum()),
    )


def _same_shares(check: Check, name: str, trusted: dict[str, int], found: dict[str, int]) -> None:
    """Fisher's exact test of every class, two-sided by doubling."""
    n, m = sum(trusted.values()), sum(found.values())
    keys = sorted(set(trusted) | set(found))
    wrong = []
    for k in keys:
        c, f = trusted.get(k, 0), found.get(k, 0)
        p = 2 * min(_more_than(f, m, c, n), _more_than(c, n, f, m))
        if p < check.alpha / len(keys):
            wrong.append(f"{k}: {f / m:.3%}, trusted {c / n:.3%}")
    check.data(
        "trusted_balance",
        name,
        len(wrong),
        "have the class shares of trusted data",
        f"has {'; '.join(wrong[:_MOST_TOLD])}",
    )


def _rows(a: Array, bad: Any) -> Mask:
    return _counted_rows(a, lambda part: bad(part).reshape(len(part), -1))[0]


def _counted_rows(a: Array, bad: Any) -> tuple[Mask, int]:
    """Which rows hold bad values, and how many values are bad, a piece at a time."""
    rows, count = np.zeros(len(a), bool), 0
    for part in pieces(a):
        found = bad(a[part])
        rows[part] = found.any(axis=1)
        count += int(found.sum())
    return rows, count


def first_rows(bad: Mask) -> tuple[int, ...]:
    """Numbers of the first bad rows."""
    return tuple(np.flatnonzero(bad)[:NAMED_ROWS].tolist())


def tests(rules: dict[str, Field]) -> Iterator[str]:
    """The tests against trusted data that these rules make, each channel one."""
    for name, rule in rules.items():
        if rule.trusted:
            width = max(1, len(rule.trusted.values))
            yield from [name] * (width * (bool(rule.trusted.low) + bool(rule.trusted.mean)) + bool(rule.missing))
            if rule.trusted.counts is not None:
                yield name
