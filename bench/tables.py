"""The tables of both README.md, made from rows: what stands between `<!-- bench:NAME -->` and `<!-- /bench -->`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from io import StringIO
from math import isnan, log, nan
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

from bench.rows import RESULTS, ROOT, Row, read_rows
from lofi_fast.errors import InputError

MISSING = "not measured"
EXPECTED = (("demo", "true"), ("demo", "rolled"), ("ceiling", "true"))  # these have a line even without a row
TIOUS = ("0.3", "0.5", "0.7")
SAME = ("commit", "dirty", "machine", "device", "precision", "settings")  # what seeds must share to be averaged
HEADER = (
    "what", "seeds", *(f"mAP@{tiou} (%)" for tiou in TIOUS), "average mAP (%)",
    "training (min)", "peak memory", "machine", "date, commit",
)  # fmt: skip
OPS_HEADER = (
    "operator", "shape", "dtype", "against", "forward", "forward + backward", "peak memory", "ours, of the copy roof",
)  # fmt: skip
KERNELS_HEADER = (
    "operator", "kernel", "layout", "launches", "registers", "spilled bytes", "shared bytes",
    "widest load / store (bits)",
)  # fmt: skip
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
ACTIVITYNET = 10_024  # training videos
FITS_BUDGETS = (2, 4, 8, 11, 16, 24)  # GB
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str], pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Bring the pages up to date; with --check only say whether they are (0) or not (1)."""
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 when a page is out of date")
    args = parser.parse_args(argv)
    texts = [_read(page) for page in pages]
    status = 0
    for name in TABLES:
        if read_rows(results / f"{name}.jsonl") and not any(f"<!-- bench:{name} -->" in text for text in texts):
            print(f"no page has a place for the rows of {name}.jsonl: add <!-- bench:{name} --> and <!-- /bench -->")
            status = int(args.check)
    for name, (draw, sources) in FIGURES.items():
        figure, digest = results / f"{name}.svg", _digest(results, sources)
        if not (results / f"{name}.jsonl").exists() or _drawn_from(figure) == digest:
            continue
        if args.check:
            print(f"{_name(figure)} is out of date: run python -m bench tables")
            status = 1
        elif drawn := draw(results):
            figure.write_text(drawn + digest, encoding="utf-8")
            print(f"{_name(figure)} drawn")
    for page, before in zip(pages, texts, strict=True):
        after = filled(before, results, _name(page))
        if before == after:
            print(f"{_name(page)} is up to date")
        elif args.check:
            print(f"{_name(page)} is out of date: run python -m bench tables")
            status = 1
        else:
            page.write_text(after, encoding="utf-8")
            print(f"{_name(page)} rewritten")
    return status


def _name(path: Path) -> str:
    """From the repository's root, where it lies below it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _drawn_from(figure: Path) -> str:
    """The digest at the figure's end; empty without a figure."""
    return figure.read_text(encoding="utf-8").splitlines(keepends=True)[-1] if figure.exists() else ""


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{_name(page)}: {error.strerror}; it holds the markers that tables go between") from error


def filled(text: str, results: Path, page: str) -> str:
    """`text` of a page with every marked section replaced by the table of the rows in `results`/NAME.jsonl."""
    if text.count("<!-- bench:") != len(SECTION.findall(text)) or not SECTION.search(text):
        raise InputError(f"{page}: each table needs a line <!-- bench:NAME --> and, below it, <!-- /bench -->")

    def section(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise InputError(f"{page}: no table is called {match[2]}; there are: {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]](read_rows(results / f"{match[2]}.jsonl")) + match[3]

    return SECTION.sub(section, text)


def job_table(rows: Sequence[Row]) -> str:
    """One line for each (name, labels), from its newest measurement."""
    found = dict.fromkeys((row["name"], row["labels"]) for row in rows)
    lines = []
    for name, labels in dict.fromkeys((*EXPECTED, *sorted(found))):
        what = name if labels == "true" else f"{name}, rolled labels"
        newest = newest_measurement([row for row in rows if (row["name"], row["labels"]) == (name, labels)])
        lines.append((what, *(_cells(newest) if newest else [MISSING] * (len(HEADER) - 1))))
    return _markdown(HEADER, lines)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def newest_measurement(rows: Iterable[Row]) -> list[Row]:
    """The newest row and, of every other seed, the newest made by the same code with the same settings; by seed."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    seeds = {row["seed"]: row for row in rows if all(row[key] == rows[-1][key] for key in SAME)}
    return [seeds[seed] for seed in sorted(seeds)]


def _cells(rows: Sequence[Row]) -> list[str]:
    last = max(rows, key=lambda row: str(row["date"]))
    peaks = [row["peak"] for row in rows if row["peak"] is not None]
    machine = last["machine"] if last["device"].startswith("CPU,") else last["device"]
    return [
        ", ".join(str(row["seed"]) for row in rows),
        *(_mean(row["map_by_tiou"].get(tiou) for row in rows) for tiou in TIOUS),
        _mean(row["average_map"] for row in rows),
        _mean((row["training_seconds"] for row in rows), 1 / 60),
        f"{max(peaks) / 1e9:.2f} of {last['budget'] / 1e9:.2f} GB" if peaks else MISSING,
        f"{machine}, {last['precision'].split(' (')[0]}",
        f"{last['date'][:10]}, {last['commit'][:7]}{' with changes' if last['dirty'] else ''}",
    ]


def _mean(values: Iterable[float | None], scale: float = 100) -> str:
    """The mean, and the range when there are several; "not measured" when one is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return MISSING
        known.append(scale * value)
    spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


def ops_table(rows: Sequence[Row]) -> str:
    """For each device a table of what the other forms take as a multiple of ours, each case from its newest run."""
    rows = [row for row in rows if not row["quick"]]
    if not rows:
        return f"{MISSING}\n"
    newest: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = _case(row)
        newest[key] = max(str(row["date"]), newest.get(key, ""))
    rows = [row for row in rows if row["date"] == newest[_case(row)]]  # one run has one date
    parts = []
    for place in dict.fromkeys(map(_place, rows)):
        here = [row for row in rows if _place(row) == place]
        ours = {_case(row): row for row in here if row["ours"]}
        forms = ", ".join(dict.fromkeys(row["form"] for row in ours.values()))
        lines = [_compared(row, ours[_case(row)]) for row in here if not row["ours"]]
        parts.append(f"{_where(place)}; ours is {forms}; {_when(here)}:\n\n{_markdown(OPS_HEADER, lines)}")
    return "\n".join(parts)


def _case(row: Row) -> tuple[Any, ...]:
    return *_place(row), row["op"], row["shape"], row["dtype"]


def _place(row: Row) -> tuple[Any, ...]:
    return row["machine"], row["device"], row["threads"]


def _where(place: tuple[Any, ...]) -> str:
    machine, device, threads = place
    return device if not device.startswith("CPU,") else f"{machine}, {threads} thread{'s' * (threads > 1)}"


def _when(rows: Iterable[Row]) -> str:
    """The runs that rows come from: date and commit."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    return ", ".join(
        dict.fromkeys(
            f"{row['date'][:10]} {row['commit'][:7]}{' with changes' if row['dirty'] else ''}" for row in rows
        )
    )


def _compared(row: Row, ours: Row) -> list[str]:
    """A line: another form against ours in the same run."""
    passes = ("forward", "forward_backward")
    times = [f"{row[step]['times_ours'][0]:.1f}x" if row[step] else "" for step in passes]
    roofs = [
        f"{100 * ours[step]['of_roof']:.0f}%" for step in passes if ours[step] and ours[step]["of_roof"] is not None
    ]
    peaks = ""
    if row["peak"] is not None and ours["peak"] is not None:
        ratio = f"{row['peak'] / ours['peak']:.1f}x, " if ours["peak"] >= 2**20 else ""  # less is noise
        peaks = f"{ratio}{row['peak'] / 2**20:.0f} : {ours['peak'] / 2**20:.0f} MiB"
    return [row["op"], row["shape"], row["dtype"], row["form"], *times, peaks, " / ".join(roofs)]


def kernels_table(rows: Sequence[Row]) -> str:
    """One line for each kernel, over all its launches and targets in the operator's newest complete run."""
    rows = [row for row in rows if not row["thin"]]
    if not rows:
        return f"{MISSING}\n"
    newest = {row["op"]: "" for row in rows}
    for row in rows:
        newest[row["op"]] = max(str(row["date"]), newest[row["op"]])
    rows = [row for row in rows if row["date"] == newest[row["op"]]]
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["kernel"], row["streams"]), []).append(row)
    lines = []
    for (op, kernel, streams), group in groups.items():
        found = [target for row in group for target in row["targets"].values()]
        widest = [_range(max(map(int, target[way])) for target in found if target[way]) for way in ("loads", "stores")]
        lines.append((
            op, kernel, "channels-last, C % 64 = 0" if streams else "others",
            str(sum(len(row["launches"]) for row in group)), _range(target["registers"] for target in found),
            str(max(target["spilled"] for target in found)), _range(target["shared"] for target in found),
            " / ".join(widest),
        ))  # fmt: skip
    targets = dict.fromkeys(f"sm_{target}" for row in rows for target in row["targets"])
    versions = ", ".join(dict.fromkeys(f"Triton {row['versions']['triton']}" for row in rows))
    return f"{versions}; {', '.join(targets)}; {_when(rows)}:\n\n{_markdown(KERNELS_HEADER, lines)}"


def memory_table(rows: Sequence[Row]) -> str:
    """What autograd keeps of a frame, then the peaks of a step: lean beside plain PyTorch."""
    kept = _newest(rows, ("measured", "encoder", "side", "dtype", "form"), "kept")
    peaks = _newest(rows, ("measured", "encoder", "frames", "side", "dtype", "form"), "peak")
    peaks = [row for row in peaks if row["peak"]]  # without: more than there is
    steps = _newest(rows, ("measured", "encoder", "videos", "snippets", "side", "dtype", "form"), "step")
    if not kept and not peaks and not steps:
        return f"{MISSING}\n"
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in kept:
        key = (row["encoder"], row["side"])
        cells.setdefault(key, {})[f"{row['form']}, {row['dtype']}"] = row["bytes_a_frame"]
    ways = ("plain PyTorch", "lean", "lean, 8 bits")
    forms = [f"{form}, {dtype}" for dtype in ("float32", "bfloat16") for form in ways]
    lines = []
    for (encoder, side), found in cells.items():
        numbers = [f"{found[form] / 1e6:.2f}" if form in found else MISSING for form in forms]
        lines.append((encoder, f"{side} px", *numbers))
    parts: list[str] = []
    if kept:
        parts.append(f"Kept of a frame from forward to backward, MB; {_when(kept)}:\n")
        parts.append(_markdown(("encoder", "side", *forms), lines))
    lines = []
    plain: dict[tuple[Any, ...], int] = {}
    for row in peaks:
        key = (row["frames"], row["side"], row["dtype"])
        plain.setdefault(key, row["peak"])
        lines.append((
            f"{row['frames']} frames of {row['side']} px", row["dtype"], row["form"], f"{row['peak'] / 2**20:.0f}",
            f"{plain[key] / row['peak']:.1f}x less",
        ))  # fmt: skip
    if peaks:
        where = "; ".join(dict.fromkeys(_where(_place(row)) for row in peaks))
        parts.append(f"Peak of one forward and backward above the process before it; {where}; {_when(peaks)}:\n")
        parts.append(_markdown(("step", "dtype", "form", "peak, MiB", "against plain"), lines))
    for place, here in _by_place(steps):
        lines = []
        for row in here:
            what = f"{row['videos']} x {row['snippets']} snippets of {row['side']} px"
            if row["peak"] is None:
                lines.append((what, row["dtype"], row["form"], "does not fit", "", ""))
                continue
            key = (place, what)
            plain.setdefault(key, row["peak"])
            driver = MISSING if row["driver"] is None else f"{row['driver'] / 1e9:.2f}"
            less = f"{plain[key] / row['peak']:.1f}x less"
            lines.append((what, row["dtype"], row["form"], f"{row['peak'] / 1e9:.2f}", driver, less))
        header = ("step", "dtype", "form", "above the start, GB", "as the driver shows it, GB", "against plain")
        parts.append(f"Whole step (encoder, head, loss); {_where(place)}; {_when(here)}:\n")
        parts.append(_markdown(header, lines))
    return "\n".join(parts)


def _by_place(rows: Sequence[Row]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows of each machine, in the order of its first."""
    return [(place, [row for row in rows if _place(row) == place]) for place in dict.fromkeys(map(_place, rows))]


def step_table(rows: Sequence[Row]) -> str:
    """Speeds relative to plain PyTorch, from the newest run of each step."""
    rows = _newest(rows, ("step", "dtype", "form"))
    if not rows:
        return f"{MISSING}\n"
    header = ("step", "dtype", "form", "speed of plain PyTorch, median (p20 to p80)", "peak, MiB")
    parts = []
    for place, here in _by_place(rows):
        floors = any(row.get("times_floor") for row in here)  # rows of older versions have none
        plain: dict[tuple[Any, ...], int | None] = {}
        lines = []
        for row in here:
            median, low, high = row["faster_than_plain"]
            first = plain.setdefault((row["step"], row["dtype"]), row["peak"])
            peak = "" if not row["peak"] or not first else f"{row['peak'] / 2**20:.0f}, {first / row['peak']:.1f}x less"
            floor = [f"{row['times_floor']:.1f}x" if row.get("times_floor") else ""] * floors
            speed = f"{median:.2f}x ({low:.2f} to {high:.2f})"
            lines.append((row["step"], row["dtype"], row["form"], speed, *floor, peak))
        columns = (*header[:4], *["time of the floor"] * floors, header[4])
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(columns, lines)}")
    return "\n".join(parts)


def planner_table(rows: Sequence[Row]) -> str:
    """Over the budgets of each model in its newest run: how well peaks were predicted, and kept to."""
    if not rows:
        return f"{MISSING}\n"
    lines = []
    for model, pressure in dict.fromkeys((row["model"], row["pressure"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["pressure"]) == (model, pressure)]
        newest = max(row["date"] for row in mine)
        run = [row for row in mine if row["date"] == newest]
        went = [row for row in run if not row["refused"]]
        if not went:
            continue
        bound = [row["used"][1] for row in went if row["bound"]] or [0.0]
        span = [row["budget"] / 1e9 for row in run]
        errors = [f"{100 * max(row[key][0] for row in went):.1f}%" for key in ("error_of_peak", "error_of_added")]
        lines.append((
            model + ", beside a neighbour" * pressure, f"{len(run)}, {min(span):.2f} to {max(span):.2f} GB",
            _steps(went), *errors, f"{100 * min(bound):.0f}% to {100 * max(bound):.0f}%",
            str(sum(row["violations"] for row in went)), str(sum(row["lost"] for row in went)),
            f"{sum(row['down'] for row in went)} / {sum(row['up'] for row in went)}", _when(run),
        ))  # fmt: skip
    header = (
        "model", "budgets", "steps", "largest error of the peak", "of what a step adds", "budget used where it binds",
        "violations", "lost or repeated videos", "rungs down / up", "date, commit",
    )  # fmt: skip
    return _markdown(header, lines)


def _steps(rows: Sequence[Row]) -> str:
    """Of several trainings; of those with less left for them than the budget, how many."""
    short = sum(row.get("short", 0) for row in rows)
    return f"{sum(row['steps'] for row in rows)}{f', {short} with less left than the budget' if short else ''}"


def tuners_table(rows: Sequence[Row]) -> str:
    """Over the budgets of the newest run: what each way to find a plan came to."""
    header = (
        "way", "budget used, median (least)", "Omega, of full fidelity", "trainings that broke off",
        "steps that did not fit", "steps of search", "planning, s",
    )  # fmt: skip
    parts = []
    for place, here in _by_place([row for row in rows if not row.get("quick")]):
        newest = [row for row in here if row["date"] == max(row["date"] for row in here)]
        lines = []
        for tuner in dict.fromkeys(row["tuner"] for row in newest):
            mine = [row for row in newest if row["tuner"] == tuner]
            used = [row["used"] or 0.0 for row in mine]
            omega = fmean(row["omega"] or 0.0 for row in mine)
            broken = sum(row["trained"] < max(other["trained"] for other in newest) for row in mine)
            searched, failures = (sum(row[key] for row in mine) for key in ("searched", "failures"))
            lines.append((
                tuner, f"{100 * median(used):.0f}% ({100 * min(used):.0f}%)", f"{100 * omega:.0f}%",
                f"{broken} of {len(mine)}", str(failures), f"{searched / len(mine):.1f}",
                f"{fmean(row['planning_seconds'] for row in mine):.0f}",
            ))  # fmt: skip
        budgets = [row["budget"] / 1e9 for row in newest]
        span = f"{len(set(budgets))} budgets from {min(budgets):.2f} to {max(budgets):.2f} GB"
        parts.append(f"{_where(place)}, {span}; {_when(newest)}:\n\n{_markdown(header, lines)}")
    return "\n".join(parts) or f"{MISSING}\n"


def overhead_table(rows: Sequence[Row]) -> str:
    """The governor, and the allocators."""
    rows = _newest(rows, ("of",))
    header = ("what", "ms a step (p20 to p80)", "of the first", "peak, MiB", "varies by", "page faults a step")
    parts = []
    for place, here in _by_place(rows):
        lines = []
        for row in here:
            cells = ("", "", "", "")
            if "peak" in row:
                varies = f"{100 * row['peak_varies']:.1f}%"
                cells = (f"{row['of_default']:.2f}x", f"{row['peak'] / 2**20:.0f}", varies, f"{row['faults']:,}")
            ms, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (row["ms"], *row["spread_ms"]))
            lines.append((row["of"], f"{ms} ({low} to {high})", *cells))
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
    return "\n".join(parts) or f"{MISSING}\n"


def gpu_planner_table(rows: Sequence[Row]) -> str:
    """Each budget's newest run beside a neighbour."""
    rows = sorted(_newest(rows, ("model", "pressure", "budget")), key=lambda row: row["budget"])
    header = (
        "budget", "steps, of them with less left", "largest error of the peak", "of what a step adds",
        "used, median", "most that the driver showed", "violations", "lost or repeated videos", "rungs down / up",
        "retries",
    )  # fmt: skip
    parts = []
    for place, here in _by_place(rows):
        lines: list[Sequence[str]] = []
        for row in here:
            budget = f"{row['budget'] / 1e9:.2f} GB"
            if row["refused"]:
                lines.append((budget, f"refused: {row['refused']}", *[""] * (len(header) - 2)))
                continue
            errors = [f"{100 * row[key][0]:.1f}%" for key in ("error_of_peak", "error_of_added")]
            lines.append((
                budget, f"{row['steps']}, {row['short']}", *errors, f"{100 * row['used'][1]:.0f}%",
                f"{100 * row['seen_of_budget']:.0f}% of the budget", str(row["violations"]), str(row["lost"]),
                f"{row['down']} / {row['up']}", str(row["retries"]),
            ))  # fmt: skip
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
    return "\n".join(parts) or f"{MISSING}\n"


def data_table(rows: Sequence[Row]) -> str:
    """Decoding by each form, then what filling the cache costs and the share of a step."""
    rows = _newest(rows, ("measured", "case", "form"))
    header = ("fidelity", "form", "frames a second", "CPU ms a frame", "time of ours, median (p20 to p80)")
    parts = []
    for place, here in _by_place(rows):
        lines = []
        for row in (row for row in here if row["measured"] == "decode"):
            median, low, high = row["times_ours"]
            numbers = (f"{row['frames_a_second']:,.0f}", f"{row['cpu_ms_a_frame']:.3f}")
            lines.append((row["case"], row["form"], *numbers, f"{median:.2f}x ({low:.2f} to {high:.2f})"))
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
        for row in here:
            if row["measured"] == "cache":
                rate, size = row["frames_a_second"], row["bytes"] / row["frames"]
                parts.append(f"Filling the cache, once: {rate:,.0f} frames a second, {size:,.0f} bytes a frame.\n")
            if row["measured"] == "share":
                parts.append(f"Decoding takes {100 * row['share']:.1f}% of a step's CPU seconds ({row['case']}).\n")
    return "\n".join(parts) or f"{MISSING}\n"


def eval_table(rows: Sequence[Row]) -> str:
    """Each way to evaluate, and how many times as long as ours it takes."""
    rows = _newest(rows, ("metric", "videos", "form"))
    header = ("metric", "videos", "detections", "form", "ms", "time of ours, median (p20 to p80)")
    parts = []
    for place, here in _by_place(rows):
        lines = []
        for row in here:
            median, low, high = row["times_ours"]
            counts = (f"{row['videos']:,}", f"{row['detections']:,}")
            ratio = f"{median:.1f}x ({low:.1f} to {high:.1f})"
            lines.append((row["metric"], *counts, row["form"], f"{row['ms'][0]:,.0f}", ratio))
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
    return "\n".join(parts) or f"{MISSING}\n"


def optim_table(rows: Sequence[Row]) -> str:
    """Each optimiser's forms; the first of them is the one that trains here."""
    rows = _newest(rows, ("optimizer", "form"))
    parts = []
    for place, here in _by_place(rows):
        lines = []
        for row in here:
            median, low, high = row["times_ours"]
            ratio = f"{median:.2f}x ({low:.2f} to {high:.2f})"
            lines.append((row["optimizer"], row["form"], f"{row['ms'][0]:,.1f}", ratio))
        header = ("optimiser", "form", "ms", "time of the first, median (p20 to p80)")
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
    return "\n".join(parts) or f"{MISSING}\n"


def scaling_table(rows: Sequence[Row]) -> str:
    """Times and peaks along each curve, then the exponents."""
    sizes = ("snippets", "side", "videos", "encoder")
    rows = _newest(rows, ("along", *sizes, "dtype", "form"))
    header = (
        "along", *sizes, "form", "ms", "videos an hour", "ActivityNet's epoch, hours, extrapolated", "peak, MiB",
        "ledger, MiB",
    )  # fmt: skip
    parts = []
    for place, here in _by_place(rows):
        lines = []
        for row in here:
            cells = [str(row[name]) for name in ("along", *sizes, "form")]
            rate = 3.6e6 * row["videos"] / row["ms"][0]
            bytes_ = ["" if row[name] is None else f"{row[name] / 2**20:,.0f}" for name in ("peak", "predicted")]
            lines.append((*cells, f"{row['ms'][0]:,.0f}", f"{rate:,.0f}", f"{ACTIVITYNET / rate:,.1f}", *bytes_))
        parts.append(f"{_where(place)}; {_when(here)}:\n\n{_markdown(header, lines)}")
        slopes = [
            (along, form, *("" if isnan(slope) else f"{slope:.2f}" for slope in found))
            for (along, form), found in exponents(here).items()
        ]
        parts.append(f"Exponents:\n\n{_markdown(('of', 'form', 'time', 'peak'), slopes)}")
    return "\n".join(parts) or f"{MISSING}\n"


def exponents(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(along, form) -> slopes of log time and log peak over the log of what is changed; NaN with fewer than two."""
    found = {}
    for along, form in dict.fromkeys((row["along"], row["form"]) for row in rows if row["along"] != "encoder"):
        curve = [row for row in rows if (row["along"], row["form"]) == (along, form)]
        times = [(log(row[along]), log(row["ms"][0])) for row in curve]
        peaks = [(log(row[along]), log(row["peak"])) for row in curve if row["peak"]]
        found[along, form] = (_slope(times), _slope(peaks))
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    if len({x for x, _ in points}) < 2:
        return nan
    x, y = zip(*points, strict=True)
    return linear_regression(x, y).slope


def fits_table(rows: Sequence[Row]) -> str:
    """Cuts at some budgets; the figure shows all."""
    rows = _newest_of(rows, ("encoder", "videos", "way"))
    if not rows:
        return f"{MISSING}\n"
    lines = [(row["encoder"], str(row["videos"]), row["way"], f"{row['cost']:.2f}x", *fits_cells(row, FITS_BUDGETS),
              f"{row['full_needs'] / 1e9:.1f} GB") for row in rows]  # fmt: skip
    budgets = [f"{budget} GB" for budget in FITS_BUDGETS]
    header = ("encoder", "videos at once", "way", "time", *budgets, "full fidelity takes")
    figure = "![Highest fidelity against budget](results/fits.svg)"
    return f"{figure}\n\nComputed; {_when(rows)}:\n\n{_markdown(header, lines)}"


def fits_cells(row: Row, budgets: Sequence[int]) -> list[str]:
    """The cut that fits each budget: "full", "cut 4.6", or "nothing"."""
    points = {budget: (snippets, side) for budget, snippets, side in row["points"]}
    length, width = row["full"]
    cells = []
    for budget in budgets:
        if budget not in points:
            cells.append("nothing")
            continue
        snippets, side = points[budget]
        cut = length * width**2 / (snippets * side**2)
        cells.append("full" if cut == 1 else f"cut {cut:.1f}")
    return cells


def fits_figure(results: Path) -> str | None:
    """An SVG of `fits` rows, with crosses for the steps that `memory` measured on a GPU; None without rows."""
    rows = _newest_of(read_rows(results / "fits.jsonl"), ("encoder", "videos", "way"))
    if not rows:
        return None
    measured = [
        row
        for row in read_rows(results / "memory.jsonl")
        if row["measured"] == "step" and row["driver"] and not row["quick"]
    ]
    ways = {
        "plain PyTorch, dense SGAlign": "plain PyTorch", "lean": "ours", "lean, recompute": "ours, recompute",
        "lean, 8 bits": "ours, 8 bits",
    }  # fmt: skip
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {way: f"C{number}" for number, way in enumerate(dict.fromkeys(row["way"] for row in rows))}
    panels = list(dict.fromkeys((row["encoder"], row["videos"]) for row in rows))
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 2.9 * ((len(panels) + 1) // 2)), layout="constrained")
        axes = figure.subplots((len(panels) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for ax, (encoder, videos) in zip(axes, panels, strict=False):
            for row in (row for row in rows if (row["encoder"], row["videos"]) == (encoder, videos)):
                full = row["full"][0] * row["full"][1] ** 2
                x = [budget for budget, _, _ in row["points"]]
                y = [100 * snippets * side**2 / full for _, snippets, side in row["points"]]
                style = "--" if row["way"].endswith("recompute") else "-"
                ax.plot(x, y, style, drawstyle="steps-post", color=colours[row["way"]], label=row["way"])
            for row in measured:
                if (row["encoder"], row["videos"]) == (encoder, videos) and row["form"] in ways:
                    share = 100 * row["snippets"] * row["side"] ** 2 / full
                    ax.plot(row["driver"] / 1e9, share, "x", color=colours[ways[row["form"]]], markersize=8)
            ax.set_title(f"{encoder}, {videos} video{'s' * (videos > 1)} at once")
            ax.set_yscale("log")
            ax.set_yticks([1, 5, 25, 100], ["1%", "5%", "25%", "100%"])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        for ax in axes[-2:]:
            ax.set_xlabel("memory budget, GB")
        for ax in axes[::2]:
            ax.set_ylabel("highest fidelity, of Omega")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=(len(labels) + 1) // 2, frameon=False)
        text = StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _digest(results: Path, names: Sequence[str]) -> str:
    """Of the files of rows that a figure is drawn from: figures differ between versions of matplotlib, rows do not."""
    digest = sha256()
    for name in names:
        path = results / f"{name}.jsonl"
        digest.update(path.read_bytes() if path.exists() else b"")
    return f"<!-- rows {digest.hexdigest()[:16]} -->\n"


def _newest_of(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """As `_newest`, of rows that no machine measured."""
    found = {tuple(row[name] for name in names): row for row in sorted(rows, key=lambda row: str(row["date"]))}
    return list(found.values())


def _newest(rows: Sequence[Row], names: Sequence[str], measured: str | None = None) -> list[Row]:
    """Of rows alike in `names`, the newest; in the order they were first measured."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("quick") or (measured is not None and row["measured"] != measured):
            continue
        key = (*_place(row), *(row[name] for name in names))
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def aligned(lines: Sequence[Sequence[str]], text: int) -> str:
    """Lines of cells as columns for a terminal: the first `text` of them flush left, the others flush right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return " to ".join(str(value) for value in (known if len(known) < 2 else (known[0], known[-1]))) or "none"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "job": job_table,
    "ops": ops_table,
    "kernels": kernels_table,
    "memory": memory_table,
    "step": step_table,
    "planner": planner_table,
    "tuners": tuners_table,
    "optim": optim_table,
    "overhead": overhead_table,
    "data": data_table,
    "eval": eval_table,
    "gpu_planner": gpu_planner_table,
    "fits": fits_table,
    "scaling": scaling_table,
}
# Name -> (what draws it, the rows it is drawn from).
FIGURES: dict[str, tuple[Callable[[Path], str | None], tuple[str, ...]]] = {
    "fits": (fits_figure, ("fits", "memory")),
}
