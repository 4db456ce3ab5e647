"""Charts to SVG files: no browser, no network, the same bytes for the same results.

Vega numbers its clip paths with a counter that lives as long as the process, and several figures share one page, so ids
are renumbered per figure and carry the figure's name.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import altair as alt
import vl_convert

from qklens.report.figures.style import FONT, Drawing

SVG = "http://www.w3.org/2000/svg"
_URL = re.compile(r"url\(#([^)]+)\)")
_ALLOWED = frozenset(
    {"svg", "g", "path", "rect", "line", "text", "tspan", "defs", "clipPath", "linearGradient", "stop"}
)
_EMPTY = re.compile(r"M0,0h0v0h0Z|")


def to_svg(drawing: Drawing, name: str) -> str:
    """The drawing as one SVG element whose ids all begin with `name`.

    Raises:
        ValueError: the renderer wrote an element that a figure has no use for, such as a link or a script.
    """
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    raw = vl_convert.vegalite_to_svg(drawing.to_dict(validate=False), vl_version=version, allowed_base_urls=[])
    ET.register_namespace("", SVG)
    # The renderer's own output, in which all foreign text is escaped.
    root = ET.fromstring(raw)  # noqa: S314
    _prune(root)
    _rename(root, name)
    root.set("font-family", FONT)
    return ET.tostring(root, encoding="unicode") + "\n"


def _prune(element: ET.Element) -> None:
    """Drops what is invisible or repeated, and the renderer's per-mark roles: the page labels a figure as one image."""
    for key in list(element.attrib):
        if key.startswith("aria-") or key in {"role", "pointer-events", "font-family", "class"}:
            del element.attrib[key]
    for child in list(element):
        tag = child.tag.rpartition("}")[2]
        if tag not in _ALLOWED:
            raise ValueError(f"figure: unexpected <{tag}> in the drawing")
        hidden = child.get("display") == "none"
        bare = tag == "path" and not child.get("stroke") and not child.get("fill")
        if hidden or (bare and child.get("opacity") is None) or _EMPTY.fullmatch(child.get("d", "?")):
            element.remove(child)
        else:
            _prune(child)


def _rename(root: ET.Element, name: str) -> None:
    names: dict[str, str] = {}
    for element in root.iter():
        old = element.get("id")
        if old is not None:
            names[old] = f"{name}-{len(names)}"
            element.set("id", names[old])
    for element in root.iter():
        for key, value in element.attrib.items():
            if "url(#" in value:
                element.set(key, _URL.sub(lambda match: f"url(#{names[match.group(1)]})", value))
