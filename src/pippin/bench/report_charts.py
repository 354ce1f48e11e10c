"""Plots as SVG that take their colours from the page, and so follow it from light to dark. No scripts, no network."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pygal
from pygal.style import Style

# Pygal leaves a finder for its plugins behind, of Python 2's kind: Python 3.11 warns of it at every later import.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder) is not pygal.PluginImportFixer]

WIDTH, HEIGHT = 620, 330
NUM_COLORS = 6  # as many as report.html.j2 defines

SVG = "{http://www.w3.org/2000/svg}"
ET.register_namespace("", SVG[1:-1])
# What XML can't hold, even escaped.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over the same labels; None where there is no value. ``kind``: ``line`` or ``bar``."""

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    kind: str = "line"
    x_title: str = ""
    note: str = ""


def svg(chart: Chart, color_of: Callable[[str], int]) -> str:
    """The plot alone, without its title; ``color_of`` numbers the colour of a series."""
    colors = [f"var(--series-{color_of(name) % NUM_COLORS})" for name in chart.series]
    num_bars = len(chart.labels) * len(chart.series)
    side = 6 if chart.kind == "line" or num_bars > 3 else 180 - 50 * num_bars  # one bar alone would be a wall
    options: dict[str, Any] = {
        "style": _style(colors),
        "js": [],
        "disable_xml_declaration": True,
        "explicit_size": False,
        "width": WIDTH,
        "height": HEIGHT,
        "include_x_axis": True,
        "show_legend": len(chart.series) > 1,
        "legend_at_bottom": True,
        "legend_box_size": 11,
        "truncate_legend": -1,
        "truncate_label": -1,
        "x_title": _clean(chart.x_title) or None,
        "y_title": _clean(chart.unit),
        "max_scale": 6,
        "min_scale": 3,
        "margin": 6,
        "margin_left": side,
        "margin_right": side,
        "formatter": number,
        "value_formatter": number,
        "x_labels": [_clean(label) for label in chart.labels],
        "dots_size": 4,
        "stroke_style": {"width": 2.5},
        "print_values": chart.kind == "bar",
        "print_values_position": "top",
        "rounded_bars": 2,
    }
    plot = (pygal.Bar if chart.kind == "bar" else pygal.Line)(**options)
    for name, values in chart.series.items():
        plot.add(_clean(name), list(values))
    return _bare(ET.fromstring(plot.render(is_unicode=True)), chart.title)


def _bare(root: ET.Element, title: str) -> str:
    """Without scripts; values become titles, which browsers show under the pointer."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}script" or (child.tag == f"{SVG}title" and parent is root):
                parent.remove(child)
            elif child.tag == f"{SVG}desc":
                if child.get("class") != "value":
                    parent.remove(child)
                child.tag, child.attrib = f"{SVG}title", {}
    root.set("role", "img")
    root.set("aria-label", _clean(title))
    return ET.tostring(root, encoding="unicode")


def _clean(text: str) -> str:
    return NO_XML.sub("", text)


def number(value: float | None) -> str:
    """With three digits that matter; thousands as k, millions as M."""
    if value is None:
        return ""
    if abs(value) < 1e-6:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g} {letter}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _style(colors: Sequence[str]) -> Style:
    return Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--text)",
        foreground_strong="var(--text)",
        foreground_subtle="var(--line)",
        guide_stroke_color="var(--line)",
        major_guide_stroke_color="var(--line)",
        guide_stroke_dasharray="0",
        major_guide_stroke_dasharray="0",
        opacity=".9",
        opacity_hover="1",
        stroke_width="2.5",
        stroke_opacity="1",
        transition="0s",
        font_family="inherit",
        label_font_size=12,
        major_label_font_size=12,
        legend_font_size=13,
        title_font_size=13,
        value_font_size=11,
        no_data_font_size=14,
        colors=tuple(colors),
        value_colors=("var(--text)",) * len(colors),
    )
