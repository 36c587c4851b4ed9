"""The parts of a page of HTML that needs no other file: sections, tables, line charts, images. page.css is its style.

All that is given is HTML already, except to `show` and `definitions`, which escape what HTML would read as its own.
"""

import base64
import math
import pathlib
import struct
import zlib
from html import escape

STYLE = pathlib.Path(__file__).with_suffix(".css")


def document(title, header, sections):
    """Return a whole page.

    Args        title: for the window; header: what comes first; sections: {heading: what is below it}
    """
    links = " ".join(f'<a href="#{anchor(heading)}">{heading}</a>' for heading in sections)
    body = ""
    for heading, content in sections.items():
        body += f'<section id="{anchor(heading)}">\n<h2>{heading}</h2>\n{content}\n</section>\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE.read_text("utf-8")}</style>
</head>
<body>
<header>
{header}
<nav aria-label="sections">{links}</nav>
</header>
<main>
{body}</main>
</body>
</html>
"""


def anchor(title):
    return title.lower().replace(" ", "-")


def show(value, form=""):
    """Return a number as asked for, and all else as it is, as HTML."""
    words = {"None": "&ndash;", "True": "yes", "False": "no"}
    if str(value) in words:
        return words[str(value)]
    return escape(format(value, form) if isinstance(value, int | float) else str(value))


def definitions(values):
    items = ""
    for name, value in values.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        items += f"<div><dt>{escape(name)}</dt><dd>{show(text, '.6g' if isinstance(value, float) else '')}</dd></div>\n"
    return f'<dl class="settings">\n{items}</dl>'


def table(kind, head, rows):
    """Return a table of what is HTML already; the first of each row is its heading. What is wide can be scrolled."""
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
    columns = "".join(f'<th scope="col"><span>{cell}</span></th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0">\n<table class="{kind}">\n<thead><tr>{columns}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def chart(title, lines, kept):
    """Return lines over the epochs as a figure of SVG, 320 units wide and 190 high.

    Args        lines: {label: a number for each epoch, of which those that are not finite are left out}; kept: the
                epoch of the dashed line
    """
    points = {label: [(e, v) for e, v in enumerate(values, 1) if math.isfinite(v)] for label, values in lines.items()}
    points = {label: line for label, line in points.items() if line}
    if not points:
        return ""
    values, epochs = [v for line in points.values() for _, v in line], max(map(len, lines.values()))
    ticks = ticks_of(min(values), max(values))

    def x(epoch):
        return round(44 + 268 * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5), 1)

    def y(value):
        return round(162 - 152 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    drawn, key, told = f'<path class="kept" d="M{x(kept)} 10V162"/>', "", []
    for tick in ticks:
        drawn += f'<path d="M44 {y(tick)}H312"/><text class="end" x="38" y="{y(tick) + 4}">{tick:g}</text>'
    for epoch in sorted({1, *ticks_of(1, epochs)}):
        if epoch % 1 == 0 and 1 <= epoch <= epochs:
            drawn += f'<text x="{x(epoch)}" y="180">{epoch:g}</text>'
    for kind, (label, line) in zip(("first", "second"), points.items(), strict=False):
        drawn += f'<polyline class="{kind}" points="{" ".join(f"{x(e)},{y(v)}" for e, v in line)}"/>'
        if len(line) <= 50:
            drawn += "".join(f'<circle class="{kind}" cx="{x(e)}" cy="{y(v)}" r="2.5"/>' for e, v in line)
        key += f' <span class="{kind}">{label}</span>' if label else ""
        told.append(f"{label} from {line[0][1]:.3g} to {line[-1][1]:.3g}".strip())
    return (
        f'<figure><figcaption><b>{title}</b>{key}</figcaption><svg viewBox="0 0 320 190" role="img" '
        f'aria-label="{title} over {epochs} epochs: {", ".join(told)}">{drawn}</svg></figure>\n'
    )


def ticks_of(low, high):
    """Return round numbers, equally far apart and at most six, of which the outermost enclose low and high."""
    if high - low <= 1e-5 * max(abs(low), abs(high)):  # the digits of a tick would not tell them apart
        low, high = min(low, 0), max(high, 0) or 1
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if high - low <= 4 * factor * power)
    return [float(f"{i * step:.6g}") for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def picture(image, alt):
    """Return an image (H, W, 3) of bytes as HTML that holds all of it, as a PNG."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # 0: the row as it is, not as a difference
    png, header = b"\x89PNG\r\n\x1a\n", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of RGB
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{alt}">'
