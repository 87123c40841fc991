"""What the figures say: ratios to the copy and to the best peer, as Markdown, JSON and a plot."""

import json
from pathlib import Path

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import PEERS

MODES = ("warm", "cold")
NOTES = (
    "The original notes quote, on a GPU that they do not name: forward 1.11 ms at 1x3x480x640; "
    "forward 0.41 ms and backward 0.08 ms at 8x3x32x64."
)
MEANING = (
    "Warm: the call inside a loop with buffers reused; cold: one call as a user makes it. "
    "Copy: the time to copy as many bytes as the case must read and write once, into an array "
    "that is there already (warm) or by a jitted call (cold). Median [quartiles] in ms. "
    "Smooth flows are of 8 pixels, random ones of +-64. All gradients: with the value. "
    "xla: a few lines of jnp, gathers or scatters, under jit."
)


def relate(entry: dict, entries: list[dict], case: Case) -> dict:
    """The entry with its bandwidth, and its ratios to the copy and to the best peer."""
    copies = next((other for other in entries if other["peer"] == "copy"), {})
    peers = [e for e in entries if e["peer"] not in ("jaxwarp", "copy") and "error" not in e]
    entry["bytes"] = case.bytes()
    for mode in MODES:
        if mode not in entry:
            continue
        figure = entry[mode]
        figure["gb_per_s"] = case.bytes() / figure["median_ms"] / 1e6
        if mode in copies:
            figure["to_copy"] = figure["median_ms"] / copies[mode]["median_ms"]
        timed = [(peer[mode]["median_ms"], peer["peer"]) for peer in peers if mode in peer]
        if entry["peer"] == "jaxwarp" and timed:
            best, figure["best_peer"] = min(timed)
            figure["faster_than_best_peer"] = best / figure["median_ms"]
    return entry


def errors(data: dict) -> list[str]:
    return [
        f"{Case(**entry['case'])}: {entry['peer']}: {entry['error']}"
        for entry in data["results"]
        if "error" in entry
    ]


def header(data: dict) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    missing = [f"Not measured: {peer} ({why})." for peer, why in data["missing"].items()]
    return "\n\n".join([facts, *missing])


def footer(data: dict, folder: Path) -> str:
    found = [f"ERROR: {text}" for text in errors(data)]
    left = [f"Out of time, not run: {name}" for name in data["not run"]]
    where = f"{len(data['results'])} results in {data['seconds']:.0f} s: {folder}/results.md"
    return "\n".join([*found, *left, where])


def line(case: Case, entries: list[dict]) -> str:
    texts = []
    for entry in entries:
        if "error" in entry:
            texts.append(f"{entry['peer']} ERROR {entry['error']}")
        elif "warm" in entry:
            texts.append(f"{entry['peer']} {_short(entry['warm']['median_ms'])}")
    return f"{case}: " + ", ".join(texts) + " (ms, warm)"


def write(data: dict, folder: Path) -> None:
    """After every case: what is measured is there whenever the run ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "results.json": json.dumps(data, indent=1),
        "results.md": markdown(data),
    }.items():
        (folder / (name + ".part")).write_text(text)
        (folder / (name + ".part")).replace(folder / name)


def draw(data: dict, folder: Path) -> None:
    try:
        plot(data, folder / "results.png")
        plot_peers(data, folder / "speed.png")
    except ImportError as error:
        print(f"No plot: {error}")


def markdown(data: dict) -> str:
    parts = ["# Benchmarks", header(data), MEANING, NOTES]
    wrong = [f"- {text}" for text in errors(data)]
    parts += ["## Errors", "\n".join(wrong)] if wrong else []
    parts += ["Out of time, not run: " + "; ".join(data["not run"])] if data["not run"] else []
    for mode in MODES:
        parts += [f"## jaxwarp, {mode}", _ratios(data, mode)]
    for mode in MODES:
        parts += [f"## All peers, {mode} (ms)", _times(data, mode)]
    reasons = {(e["peer"], e["unsupported"]) for e in data["results"] if "unsupported" in e}
    parts += ["## What a peer does not have", "\n".join(f"- {p}: {r}" for p, r in sorted(reasons))]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _by_case(data: dict) -> dict[Case, dict[str, dict]]:
    grouped: dict[Case, dict[str, dict]] = {}
    for entry in data["results"]:
        grouped.setdefault(Case(**entry["case"]), {})[entry["peer"]] = entry
    return grouped


def _ratios(data: dict, mode: str) -> str:
    rows = []
    for case, entries in _by_case(data).items():
        figure = entries.get("jaxwarp", {}).get(mode)
        if figure is None:
            continue
        low, high = map(_short, figure["quartiles_ms"])
        copy = entries["copy"][mode]["median_ms"] if mode in entries.get("copy", {}) else None
        rows.append(
            [
                *str(case).split(", "),
                f"{_short(figure['median_ms'])} [{low}, {high}]",
                _short(copy) if copy else "",
                _short(figure["to_copy"]) if copy else "",
                figure.get("best_peer", ""),
                _short(figure["faster_than_best_peer"]) if "best_peer" in figure else "",
            ]
        )
    head = ["operation", "result", "size", "flow", "dtype", "jaxwarp", "copy"]
    return table([*head, "jaxwarp / copy", "best peer", "best peer / jaxwarp"], rows)


def _times(data: dict, mode: str) -> str:
    grouped = _by_case(data)
    shown = [p for p in PEERS if any(mode in entries.get(p, {}) for entries in grouped.values())]
    rows = []
    for case, entries in grouped.items():
        figures = [(entries.get(peer, {}), entries.get(peer, {}).get(mode)) for peer in shown]
        texts = [
            "ERROR" if "error" in entry else _short(figure["median_ms"]) if figure else ""
            for entry, figure in figures
        ]
        rows.append([str(case), *texts])
    return table(["case", *shown], rows)


def plot(data: dict, path: Path) -> None:
    """Left: bandwidth of jaxwarp and of the copy. Right: time against pixels."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7), layout="constrained")
    large = [
        (case, entries)
        for case, entries in _by_case(data).items()
        if all("warm" in entries.get(peer, {}) for peer in ("jaxwarp", "copy"))
    ]
    places = range(len(large))
    for peer, colour in (("copy", "0.8"), ("jaxwarp", "tab:blue")):
        widths = [entries[peer]["warm"]["gb_per_s"] for _, entries in large]
        left.barh(places, widths, color=colour, height=0.9 if peer == "copy" else 0.6, label=peer)
    left.set_yticks(places, [str(case) for case, _ in large], fontsize=6)
    left.invert_yaxis()
    left.set_xlabel("bytes that must be read and written / time, warm (GB/s)")
    left.legend()

    series: dict[str, list[tuple[int, float]]] = {}
    for case, entries in _by_case(data).items():
        if case == Case(operation="backward_warp", size=case.size) and case.size in cases.SCALING:
            for peer, entry in entries.items():
                if "warm" in entry:
                    point = case.pixels, entry["warm"]["median_ms"]
                    series.setdefault(peer, []).append(point)
    for peer, points in series.items():
        right.loglog(*zip(*sorted(points), strict=True), "o-", label=peer)
    right.set_xlabel("pixels (3 channels)")
    right.set_ylabel("backward warp, value, smooth flow, warm (ms)")
    if series:
        right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_peers(data: dict, path: Path) -> None:
    """The four main operations at 1080x1920x3: time of every library, the quickest first."""
    import matplotlib.pyplot as plt

    main = [
        Case(operation=operation, order=order, size="1080x1920x3")
        for operation in ("backward_warp", "forward_average")
        for order in ("value", "all gradients")
    ]
    known = _by_case(data)
    times = {
        case: {p: e["warm"]["median_ms"] for p, e in known.get(case, {}).items() if "warm" in e}
        for case in main
    }
    rows = max(map(len, times.values()))
    if rows == 0:
        return
    figure, axes = plt.subplots(1, 4, figsize=(13, 0.35 * rows + 0.8), layout="constrained")
    for ax, case in zip(axes, main, strict=True):
        ordered = sorted(times[case].items(), key=lambda item: item[1])
        names = [name for name, _ in ordered]
        colours = {"jaxwarp": "tab:blue", "copy": "0.8"}
        bars = ax.barh(
            names, [ms for _, ms in ordered], color=[colours.get(n, "tab:orange") for n in names]
        )
        ax.bar_label(bars, [f" {ms:.3g}" for _, ms in ordered], fontsize=8)
        ax.set_title(f"{case.operation}, {case.order}", fontsize=10)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.margins(x=0.18)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=False, labelsize=8)
    threads = data["machine"].get("threads", "?")
    figure.supxlabel(f"ms at 1080x1920x3, float32, warm, {threads} threads", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
