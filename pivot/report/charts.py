"""Line charts and interval bars as inline SVG; colours are the page's, so one figure serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26
MAX_POINTS = 240  # of a curve; more cannot be told apart at this width
SMOOTHING = 0.9  # weight of the past in the bold curve over a noisy one


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is 1 to 6, of the page's palette."""

    name: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    smooth: bool = False  # draw it faintly, with its running mean on top
    spread: Sequence[tuple[float, float]] | None = None  # an interval around each point


@dataclass(frozen=True)
class Chart:
    """A figure with its title and what the reader should know."""

    title: str
    series: Sequence[Series]
    note: str = ""
    log: bool = False
    bounds: tuple[float, float] | None = None  # of y; None: from the data
    level: float | None = None  # a dashed line, such as chance
    peak: bool = False  # the legend tells the highest value, not the last

    @property
    def is_empty(self) -> bool:
        return not any(series.xs for series in self.series)

    def last(self, series: Series) -> str:
        values = running_mean(series.ys) if series.smooth else series.ys
        if not values:
            return ""
        return f"{format_number(max(values))} at most" if self.peak else format_number(values[-1])

    def svg(self) -> Markup:
        return _draw(self)


def format_number(value: float) -> str:
    """At most three digits that matter: 0.123, 12.3, 1,230, 1.2e-06."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean without a bias to the first values."""
    means, total, weight = [], 0.0, 0.0
    decay = min(SMOOTHING, 1 - 4 / (len(values) + 4))
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that lie in [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Data to pixels."""

    def __init__(self, chart: Chart) -> None:
        self.log = chart.log
        xs = [x for series in chart.series for x in series.xs]
        ys = [y for series in chart.series for y in series.ys if not chart.log or y > 0]
        ys += [end for series in chart.series for pair in series.spread or () for end in pair]
        ys += [chart.level] if chart.level is not None else []
        self.x_low, self.x_high = min(xs), max(xs)
        low, high = chart.bounds or (min(ys, default=0.1), max(ys, default=1.0))
        if self.log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.0 if chart.bounds else 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
        self.y_low, self.y_high = low - margin, high + margin

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            value = math.log10(max(value, 10**self.y_low))
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.y_low, self.y_high)
        decades = [10.0**e for e in range(math.ceil(self.y_low), math.floor(self.y_high) + 1)]
        if len(decades) > 5:
            decades = decades[:: math.ceil(len(decades) / 5)]
        if len(decades) >= 2:
            return decades
        linear = nice_ticks(10**self.y_low, 10**self.y_high)
        return [tick for tick in linear if tick > 0]


def _draw(chart: Chart) -> Markup:
    axes = _Axes(chart)
    parts = [_grid(axes)]
    if chart.level is not None:
        y = axes.y(chart.level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for series in chart.series:
        if series.xs:
            parts.append(_curve(axes, series))
    label = escape(f"{chart.title}: " + ", ".join(f"{s.name} {chart.last(s)}" for s in chart.series))
    body = "".join(parts)
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>')


def _grid(axes: _Axes) -> str:
    parts = []
    for tick in axes.y_ticks():
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    ticks = [tick for tick in nice_ticks(axes.x_low, axes.x_high, 5) if tick == int(tick)]
    for tick in ticks:
        x = axes.x(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{int(tick):,}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(parts)


def _curve(axes: _Axes, series: Series) -> str:
    parts = []
    for i, (low, high) in enumerate(series.spread or ()):
        x, y1, y2 = axes.x(series.xs[i]), axes.y(low), axes.y(high)
        parts.append(f'<line class="spread c{series.colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    if series.smooth and len(series.xs) > 8:
        parts.append(_path(axes, series.xs, series.ys, f"faint c{series.colour}"))
        parts.append(_path(axes, series.xs, running_mean(series.ys), f"line c{series.colour}"))
    else:
        parts.append(_path(axes, series.xs, series.ys, f"line c{series.colour}"))
    if len(series.xs) <= 24:
        for x, y in zip(series.xs, series.ys, strict=True):
            title = escape(f"{series.name}, step {x:.0f}: {format_number(y)}")
            dot = f'<circle class="dot c{series.colour}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3">'
            parts.append(f"{dot}<title>{title}</title></circle>")
    return "".join(parts)


def _path(axes: _Axes, xs: Sequence[float], ys: Sequence[float], classes: str) -> str:
    size = -(-len(xs) // MAX_POINTS)
    points = []
    for start in range(0, len(xs), size):
        some_x, some_y = xs[start : start + size], ys[start : start + size]
        points.append(f"{axes.x(sum(some_x) / len(some_x)):.1f},{axes.y(sum(some_y) / len(some_y)):.1f}")
    return f'<polyline class="{classes}" points="{" ".join(points)}"/>'


def interval_bar(
    points: Sequence[tuple[float, float, float]], labels: Sequence[str], *, level: float | None = None
) -> Markup:
    """Shares with their intervals on a line from 0 to 1, the last one filled: where it was, where it is."""
    width, height, inset = 280, 28 + 12 * len(points), 8

    def x(value: float) -> float:
        return inset + value * (width - 2 * inset)

    bottom = height - 16
    parts = [f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="{bottom}" y2="{bottom}"/>']
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        edge = x(share) + {"start": -inset, "middle": 0, "end": inset}[anchor]
        parts.append(f'<line class="axis" x1="{x(share)}" x2="{x(share)}" y1="{bottom - 3}" y2="{bottom + 3}"/>')
        parts.append(f'<text x="{edge}" y="{height - 2}" text-anchor="{anchor}">{100 * share:.0f} %</text>')
    if level is not None:
        parts.append(f'<line class="level" x1="{x(level):.1f}" x2="{x(level):.1f}" y1="2" y2="{bottom}"/>')
    for i, ((value, low, high), label) in enumerate(zip(points, labels, strict=True)):
        title = escape(f"{label}: {100 * value:.1f} %")
        y, now = 8 + 12 * i, "now" if i == len(points) - 1 else "then"
        parts.append(f'<line class="whisker {now}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>')
        circle = f'<circle class="mark {now}" cx="{x(value):.1f}" cy="{y}" r="4">'
        parts.append(f"{circle}<title>{title}</title></circle>")
    return Markup(f'<svg class="interval" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(parts)}</svg>')
