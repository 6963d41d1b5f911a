"""Charts of the report as SVG: lines, spans, a heat map, sparklines. The page's style gives them their colours.

Every chart is one SVG with a title for those who cannot see it; classes c0 ... c7 are colours, d0 ... d3 dashes, and
`ramp` takes its colour from --p, a place between the two ends of a scale. Coordinates are rounded to tenths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 34  # margins around the plot
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
COLOURS, DASHES = 8, 4
SPARK_WIDTH, SPARK_HEIGHT = 72, 18
LABEL_WIDTH, ROW_HEIGHT, HEAD = 122, 13, 40  # of heat maps


@dataclass(frozen=True)
class Line:
    """values: y at x = 1, 2, ... or at `at`; None and what a logarithm cannot show leave gaps.

    look: classes, as "c0 d1"; place: in [0, 1] between the ends of a scale of colours, in place of a colour.
    """

    label: str
    values: Sequence[float | None]
    look: str = "c0"
    at: Sequence[float] | None = None
    place: float | None = None


def looks(groups: Sequence[str]) -> list[str]:
    """Classes of lines: one colour for each group, dashes within it."""
    used: dict[str, list[int]] = {}
    found = []
    for name in groups:
        group = used.setdefault(name, [len(used), 0])
        found.append(f"c{group[0] % COLOURS} d{(group[1] + group[0] // COLOURS) % DASHES}")
        group[1] += 1
    return found


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> Markup:
    """Lines over an x axis of whole numbers and a logarithmic y axis."""
    placed = [_points(line) for line in lines]
    xs = [x for points in placed for x, _ in points if x is not None]
    ys = [y for points in placed for _, y in points if y is not None]
    if not ys:
        return _svg(title, _text(WIDTH / 2, HEIGHT / 2, "not known", "middle"))
    axis, x_axis = _Axis.log(min(ys), max(ys)), _Axis.whole(min(xs), max(xs))
    parts = [_frame(x_axis, axis, x_label, y_label)]
    for line, points in zip(lines, placed, strict=True):
        parts.append(_line(line, [(_x(x_axis, x), _y(axis, y)) for x, y in points]))
    return _svg(title, Markup("").join(parts))


@dataclass(frozen=True)
class Bar:
    """From the lowest to the highest value of what `label` says; look: a class."""

    label: str
    low: float
    high: float
    look: str = "c0"


def spans(bars: Sequence[Bar], title: str, x_label: str, y_label: str) -> Markup:
    """A vertical bar for each, in their order, on an axis that includes 0."""
    if not bars:
        return _svg(title, _text(WIDTH / 2, HEIGHT / 2, "none", "middle"))
    axis = _Axis.linear(min(0.0, *(bar.low for bar in bars)), max(0.0, *(bar.high for bar in bars)))
    x_axis = _Axis.whole(0.5, len(bars) + 0.5)
    width = max(0.6, 0.7 * (WIDTH - LEFT - RIGHT) / len(bars))
    parts = [_frame(x_axis, axis, x_label, y_label)]
    for i, bar in enumerate(bars, 1):
        top, bottom = _y(axis, bar.high), _y(axis, bar.low)
        where = f'x="{_x(x_axis, i) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
        rect = Markup('<rect class="bar {}" {}><title>{}</title></rect>')
        parts.append(rect.format(bar.look, Markup(where), bar.label))
    return _svg(title, Markup("").join(parts))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    x_label: str,
    marked: Sequence[int | None] | None = None,
) -> Markup:
    """Cells on a logarithmic scale of colours, dark where errors are large; `marked` names a column of each row."""
    shown = [value for row in values for value in row if _positive(value)]
    if not shown:
        return _svg(title, _text(WIDTH / 2, HEIGHT / 2, "none", "middle"))
    low, high = math.log10(min(shown)), math.log10(max(shown))
    width = (WIDTH - LABEL_WIDTH - 4) / len(columns)
    height = HEAD + ROW_HEIGHT * len(rows) + 24
    parts = [_scale(10**low, 10**high, x_label)]
    for j, name in enumerate(columns):
        parts.append(_text(LABEL_WIDTH + (j + 0.5) * width, HEAD - 5, name, "middle", "small"))
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = HEAD + ROW_HEIGHT * i
        parts.append(_text(LABEL_WIDTH - 6, top + 9.8, name, "end", "small"))
        for j, value in enumerate(row):
            if not _positive(value):
                continue
            place = 0.5 if high == low else (math.log10(value) - low) / (high - low)
            left, tip = LABEL_WIDTH + j * width, f"{name}, {columns[j]}: {value:.3g}"
            where = f'x="{left:.1f}" y="{top}" width="{width - 1:.1f}" height="{ROW_HEIGHT - 1}"'
            cell = Markup('<rect class="cell" style="--p:{}%" {}><title>{}</title></rect>')
            parts.append(cell.format(f"{100 * place:.0f}", Markup(where), tip))
            if marked is not None and marked[i] == j:
                frame = f'x="{left + 0.5:.1f}" y="{top + 0.5}" width="{width - 2:.1f}" height="{ROW_HEIGHT - 2}"'
                parts.append(Markup('<rect class="chosen" {}/>').format(Markup(frame)))
    return _svg(title, Markup("").join(parts), height)


def sparkline(values: Sequence[float], title: str) -> Markup:
    """A small line without axes, on a logarithmic scale; nothing for fewer than two values."""
    points = [(i, math.log10(value)) for i, value in enumerate(values) if _positive(value)]
    if len(points) < 2:
        return Markup("")
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, reach = max(points[-1][0], 1), high - low or 1.0
    shown = [(1 + x / last * (SPARK_WIDTH - 2), 1 + (high - y) / reach * (SPARK_HEIGHT - 2)) for x, y in points]
    size = Markup('viewBox="0 0 {0} {1}" width="{0}" height="{1}"').format(SPARK_WIDTH, SPARK_HEIGHT)
    body = Markup('<svg class="spark" {} role="img"><title>{}</title><path d="{}"/></svg>')
    return body.format(size, title, _path(shown))


@dataclass(frozen=True)
class _Axis:
    """low, high: the ends, in logarithms where `logarithmic`; ticks: values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def log(cls, low: float, high: float) -> _Axis:
        """Ticks at decades, and between them where those are few."""
        first, last = math.log10(low), math.log10(high)
        pad = max(0.04 * (last - first), 0.02)
        first, last = first - pad, last + pad
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            decades = range(math.floor(first), math.ceil(last) + 1)
            ticks = [f * 10.0**d for d in decades for f in factors if first <= math.log10(f) + d <= last]
            if len(ticks) >= 3:
                break
        return cls(first, last, tuple(ticks[:: -(-len(ticks) // 8)]), True)

    @classmethod
    def linear(cls, low: float, high: float) -> _Axis:
        """With a little room at both ends."""
        reach = high - low or abs(high) or 1.0
        low, high = low - 0.04 * reach, high + 0.04 * reach
        return cls(low, high, cls._even(low, high, 10.0 ** math.floor(math.log10(reach / 4))))

    @classmethod
    def whole(cls, low: float, high: float) -> _Axis:
        """Ticks at whole numbers; the ends are the given ones."""
        low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
        return cls(low, high, cls._even(low, high, max(1.0, 10.0 ** math.floor(math.log10((high - low) / 4)))))

    @staticmethod
    def _even(low: float, high: float, unit: float) -> tuple[float, ...]:
        """Multiples of 1, 2, 5 or 10 units, six at most or so."""
        step = unit * next(f for f in (1, 2, 5, 10) if high - low <= 6.5 * f * unit or f == 10)
        return tuple(i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))

    def place(self, value: float) -> float:
        """Where a value lies, in [0, 1]."""
        value = math.log10(value) if self.logarithmic else value
        return (value - self.low) / (self.high - self.low)


def _x(axis: _Axis, value: float | None) -> float | None:
    return None if value is None else LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, value: float | None) -> float | None:
    return None if value is None else HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _points(line: Line) -> list[tuple[float | None, float | None]]:
    """(x, y), (None, None) where there is a gap."""
    at = range(1, len(line.values) + 1) if line.at is None else line.at
    return [(x, y) if _positive(y) else (None, None) for x, y in zip(at, line.values, strict=True)]


def _path(points: Sequence[tuple[float | None, float | None]]) -> str:
    """An SVG path, begun anew after each gap."""
    found, drawing = [], False
    for x, y in points:
        if x is not None:
            found.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = x is not None
    return "".join(found)


def _line(line: Line, points: Sequence[tuple[float | None, float | None]]) -> Markup:
    if line.place is None:
        kind = Markup('class="line {}"').format(line.look)
    else:
        kind = Markup('class="line thin ramp" style="--p:{}%"').format(f"{100 * line.place:.0f}")
    path = Markup('<path {} d="{}"><title>{}</title></path>').format(kind, _path(points), line.label)
    gap = (None, None)
    beside = zip([gap, *points], points, [*points[1:], gap], strict=False)
    alone = [here for before, here, after in beside if here != gap and before == after == gap]
    dot = Markup('<circle {} cx="{:.1f}" cy="{:.1f}" r="1.3"/>')
    return path + Markup("").join(dot.format(kind, x, y) for x, y in alone)


def _frame(x_axis: _Axis, axis: _Axis, x_label: str, y_label: str) -> Markup:
    """Grid lines, ticks, names of the axes."""
    parts = []
    for tick in axis.ticks:
        y = _y(axis, tick)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, f"{y:.1f}", WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, y + 3.8, _number(tick), "end"))
    floor = HEIGHT - BOTTOM
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, floor, WIDTH - RIGHT))
    for tick in x_axis.ticks:
        parts.append(_text(_x(x_axis, tick), floor + 14, _number(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle", "name"))
    parts.append(_text(1, 10, y_label, "start", "name"))
    return Markup("").join(parts)


def _scale(low: float, high: float, x_label: str) -> Markup:
    """A heat map's scale of colours, above its columns' names."""
    count, width = 20, 6
    left = LABEL_WIDTH + 38
    cells = [
        Markup('<rect class="cell" style="--p:{}%" x="{}" y="6" width="{}" height="8"/>').format(
            f"{100 * i / (count - 1):.0f}", left + i * width, width + 0.3
        )
        for i in range(count)
    ]
    ends = [
        _text(left - 5, 13.5, _number(float(f"{low:.1g}")), "end", "small"),
        _text(left + count * width + 5, 13.5, _number(float(f"{high:.1g}")), "start", "small"),
    ]
    return Markup("").join([*cells, *ends, _text(LABEL_WIDTH - 6, HEAD - 5, x_label, "end", "small name")])


def _number(value: float) -> str:
    """A tick's value: 0.003, 3·10⁻⁵, −20."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    digits, exponent = f"{value:.3e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPT)}"
    digits = digits.rstrip("0").rstrip(".").replace("-", "−")
    return power if digits == "1" else f"{digits}·{power}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    more = Markup(' class="{}"').format(kind) if kind else Markup("")
    return Markup('<text x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(f"{x:.1f}", f"{y:.1f}", anchor, more, text)


def _svg(title: str, body: Markup, height: int = HEIGHT) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>').format(
        WIDTH, height, escape(title), body
    )
