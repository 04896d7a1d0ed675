"""Numbers and figures as HTML, and how it looks on screens, phones and paper."""

import html
import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from math import isnan
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import matplotlib.figure


def figure_of(figure: "matplotlib.figure.Figure", caption: str, *, wide: bool = False) -> str:
    buffer = io.BytesIO()
    # Nothing but the picture: the same findings give the same file.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    data = b64encode(buffer.getvalue()).decode()
    text = escaped(caption)
    kind = " class=wide" if wide else ""
    return (
        f'<figure{kind}><div class=scroll><img alt="{text}" src="data:image/png;base64,{data}">'
        f"</div><figcaption>{text}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    head = "".join(f"<th scope=col>{escaped(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th scope=row>{escaped(first)}</th>"
        + "".join(
            f'<td data-label="{escaped(name)}">{escaped(cell)}</td>'
            for name, cell in zip(header[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    kind = " class=words" if words else ""
    return (
        f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def estimate(value: Tensor, low: Tensor, high: Tensor) -> str:
    if isnan(float(low)):
        return percent(float(value))
    return f"{percent(float(value))} [{percent(float(low))}, {percent(float(high))}]"


def percent(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:.4g}%" if share > 0.999 else f"{share:.1%}"


def escaped(value: str) -> str:
    return html.escape(value, quote=True)


CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
header,main{max-width:72rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{margin:0;font-size:1.7rem;line-height:1.2}
header p{margin:.25rem 0 0;color:#555;overflow-wrap:anywhere}
h2{margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid #ddd;font-size:1.25rem}
p,ul{max-width:46rem;margin:.5rem 0}
ul{padding-left:1.3rem}
.lead{font-size:1.1rem}
.note{color:#555;font-size:.9rem}
.warning{border-left:4px solid #d55e00;background:#fdf3ec;padding:.6rem .8rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;margin:.5rem 0}
th,td{padding:.3rem .7rem .3rem 0;border-bottom:1px solid #e5e5e5;text-align:right;vertical-align:top;
white-space:nowrap}
thead th{border-bottom:2px solid #bbb;font-weight:600;vertical-align:bottom;white-space:normal}
th:first-child{text-align:left;font-weight:600}
.facts th{font-weight:400;white-space:normal}
.words td{text-align:left;white-space:normal;min-width:14rem}
.words th{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem 2rem}
figure{margin:.8rem 0;min-width:0}
figcaption{color:#555;font-size:.9rem}
img{display:block;max-width:100%;height:auto}
.grid img{width:100%;max-width:34rem}
.wide img{width:100%;max-width:60rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.7rem;font-size:.85rem}
@media (max-width:40rem){
.wide img{width:44rem;max-width:none}
table:not(.words):not(.facts) th:first-child{position:sticky;left:0;background:#fff}
.words thead{display:none}
.words tr,.words th,.words td{display:block;border:0;padding:.1rem 0}
.words tr{border-bottom:1px solid #e5e5e5;padding:.4rem 0}
.words td[data-label]::before{content:attr(data-label) ": ";color:#555}
}
@media print{
@page{margin:15mm}
body{font-size:10pt}
header,main{max-width:none;padding:0}
h2{break-after:avoid}
figure,tr,.warning{break-inside:avoid}
.scroll{overflow:visible}
.grid{grid-template-columns:1fr 1fr}
.grid img{max-width:8cm}
.wide img{width:100%;max-width:17cm}
table{font-size:8pt}
thead{display:table-header-group}
th,td{padding-right:.4rem}
}
"""
