"""One self-contained page of an evaluation: tables, pictures, and how to read them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from improved_diffusion.brats import MASK_CODES
from improved_diffusion.evaluation.validity import REAL_PASS

Row = Sequence[str]

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .9em; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
tr.differs td { background: #fdf0e3; }
img { max-width: 100%; margin: .5em 0; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; }
.note { color: #555; }
"""

MOST_LISTED = 200

LABELS = dict(zip(MASK_CODES[1:], ("necrotic core", "oedema", "enhancing tumour")))

FLAGS = {
    "noise_only": "noise only",
    "constant": "constant",
    "saturated": "saturated",
    "drifted_background": "background drifted",
    "off_code": "many mask pixels off the label codes",
    "mask_outside": "tumour outside the brain",
    "channels_disagree": "channels show different brains",
}
MEANS = {
    "channel_agreement": ("agreement of the channels' brain outlines (IoU)", False),
    "off_code_share": ("mask pixels off the label codes", True),
    "mask_outside_brain": ("tumour outside the brain", True),
    "empty_mask_share": ("empty masks", True),
    "tumour_area": ("tumour's share of the slice", True),
}
DISTANCES = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "ms_ssim": "MS-SSIM of random pairs",
}


def number(entry: dict[str, Any] | None, percent: bool = False) -> str:
    """``{"value", "low", "high"}`` in words; a dash where there is none."""
    if not entry or entry.get("value") is None:
        return "–"

    def short(value: float) -> str:
        if percent:
            return f"{100 * value:.3g} %"
        return f"{value:.4g}"

    text = short(entry["value"])
    if "low" in entry and "high" in entry:
        text += f" [{short(entry['low'])}, {short(entry['high'])}]"
    return text


def differs(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two numbers have intervals that do not meet."""
    if not one or not other or not {"low", "high"} <= one.keys() & other.keys():
        return False
    return one["low"] > other["high"] or other["low"] > one["high"]


def validity_rows(samples: dict[str, Any], real: dict[str, Any]) -> list[tuple[Row, bool]]:
    """Rows (measure, samples, real) of two results of :func:`.validity.report`; which differ.

    A flag that no real slice has differs also where more than 1 % of the samples surely have it:
    the limits leave out no more of the slices that they are set on, however few real patients there
    are here.
    """
    rows: list[tuple[str, dict | None, dict | None, bool]] = [
        ("without a flag", samples["valid_share"], real["valid_share"], True)
    ]
    for flag, of_channels in samples["flagged"].items():
        for channel, share in of_channels.items():
            other = real["flagged"][flag][channel]
            rows.append((f"{FLAGS[flag]}: {channel}", share, other, True))
    shares = len(rows)
    for name in ("background_level", "background_spread"):
        for channel in real[name]:
            what = name.replace("_", " ")
            rows.append(
                (f"{what}: {channel}", samples[name].get(channel), real[name][channel], False)
            )
    for name, (what, percent) in MEANS.items():
        if name in samples or name in real:
            rows.append((what, samples.get(name), real.get(name), percent))
    for code, share in real.get("label_shares", {}).items():
        own = samples.get("label_shares", {}).get(code)
        rows.append((f"{LABELS[int(code)]}'s share of the slice", own, share, True))
    return [
        (
            (what, number(own, percent), number(other, percent)),
            differs(own, other) or (i < shares and _surely_flagged(own, other)),
        )
        for i, (what, own, other, percent) in enumerate(rows)
    ]


def _surely_flagged(own: dict[str, Any], real: dict[str, Any]) -> bool:
    """Of shares with a flag; of those without, the first row, the other way round."""
    return (real["value"] == 0 and own["low"] > 1 - REAL_PASS) or (
        real["value"] == 1 and own["high"] < REAL_PASS
    )


def flagged_table(reasons: Sequence[dict[str, Any]]) -> str:
    """The first :data:`MOST_LISTED` flags, see :class:`.validity.Flags`, as an HTML table."""
    header = ("sample", "channel", "flag", "measure", "value", "limit")
    rows = [
        (
            str(reason["index"]),
            reason["channel"],
            reason["reason"],
            reason["measure"],
            f"{reason['value']:.4g}",
            f"{reason['limit']:.4g}",
        )
        for reason in reasons[:MOST_LISTED]
    ]
    text = table(header, [(row, False) for row in rows])
    if len(reasons) > MOST_LISTED:
        text += paragraph(f"{len(reasons) - MOST_LISTED} more are in evaluation.json.", note=True)
    return text


def distribution_rows(found: dict[str, Any]) -> list[tuple[Row, bool]]:
    """Rows (channel, measure, samples, floor) of :func:`.distribution.table`, and which differ."""
    names = {**DISTANCES, **{key: found["extractor"][key] for key in list(DISTANCES)[:2]}}
    rows = []
    for channel, sets in found["channels"].items():
        for key, name in names.items():
            own, floor = sets["samples"].get(key), sets.get("floor", {}).get(key)
            if key == "ms_ssim":
                floor = sets["real"]["ms_ssim"]
            rows.append(((channel, name, number(own), number(floor)), differs(own, floor)))
    return rows


def memorisation_rows(found: dict[str, Any]) -> list[tuple[Row, bool]]:
    """Rows (what, share, expected, threshold, counts) of :func:`.memorisation.report`."""
    compared = {
        "all image channels": found["joint"],
        **found["channels"],
        **({"features": found["features"]} if "features" in found else {}),
    }
    rows = []
    for what, own in compared.items():
        counts = f"{own['samples']} / {own['held_out']}"
        if "share" not in own:
            rows.append(((what, "–", "–", "–", counts), False))
            continue
        expected = f"{100 * own['expected']:.3g} %"
        row = (what, number(own["share"], True), expected, f"{own['threshold']:.4g}", counts)
        rows.append((row, own["share"]["low"] > own["expected"]))
    return rows


def table(header: Row, rows: Iterable[tuple[Row, bool]]) -> str:
    """An HTML table, in which the rows that differ are coloured."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=differs' if marked else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for row, marked in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>\n"


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page, below its caption."""
    data = base64.b64encode(png).decode()
    alt = html.escape(caption, quote=True)
    return f'{paragraph(caption)}<img alt="{alt}" src="data:image/png;base64,{data}">\n'


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A page of sections: heading and HTML."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{text}" for heading, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}</body>\n</html>\n"
    )
