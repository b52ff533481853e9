"""The report as one HTML file that needs no network: settings, tables, plots, and what is to be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from octavo_client.load.figures import LATENCY, THROUGHPUT, Column
from octavo_client.load.results import PointResult, RunResult
from octavo_client.load.table import format_figure, report_lines

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #22272e; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th { color: #6b7480; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.good { color: #2f8f5b; } .bad { color: #c8102e; } pre { white-space: pre-wrap; background: #f6f7f8; padding: .8rem; }
"""


def render(record: Mapping[str, Any], run: RunResult, svgs: Sequence[str]) -> str:
    """Return the page.

    Args:
        record: The run as JSON has it.
        run: The run.
        svgs: Its plots, as SVG elements.
    """
    faults = run.all_faults
    verdict = (
        f'<p class="bad">{len(faults)} faults</p>'
        if faults
        else '<p class="good">No wrong answer, no unexpected error.</p>'
    )
    server = record["server"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>octavo-load</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Octavo load test</h1>",
        verdict,
        f"<p>{escape(server['target'])}: octavo-server {escape(server['version'])}, "
        f"{escape(server['backend_description'])}</p>",
        _table("Throughput", run.points, THROUGHPUT),
        _table("Latency, microseconds (stages are means)", run.points, LATENCY),
        *(f"<figure>{svg}</figure>" for svg in svgs),
        "<h2>Notes</h2>",
        f"<pre>{escape(chr(10).join(report_lines(run)))}</pre>",
        "<h2>What was run</h2>",
        f"<pre>{escape(' '.join(record['command']))}</pre>",
        _facts("Workload", record["workload"]),
        *(_facts(f"Model {model['name']}", model) for model in record["models"]),
        _facts("Versions", record["versions"]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _table(title: str, points: Sequence[PointResult], columns: Sequence[Column]) -> str:
    kind = points[0].point.kind if points else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in (kind, *(c.title for c in columns)))
    body = "".join(
        f"<tr><td>{result.point.value:g}</td>"
        + "".join(f"<td>{format_figure(column, result)}</td>" for column in columns)
        + "</tr>"
        for result in points
    )
    return f'<h2>{escape(title)}</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_short(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<h2>{escape(title)}</h2><table>{rows}</table>"


def _short(value: Any) -> str:
    """Return a value as text; a list of one value over and over, as settings of layers are, as that."""
    if isinstance(value, list) and len(value) > 3 and len(set(map(str, value))) == 1:
        return f"{value[0]} ({len(value)} times)"
    return str(value)
