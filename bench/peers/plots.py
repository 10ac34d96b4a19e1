"""The pictures: throughput against latency, and memory against workers, each system on the same axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.report import OWN, commits, of
from bench.peers.summary import Row

_SIZE = (10, 6.5)
_OTHERS = 0.75  # opacity of whoever is not pool


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write what there are figures for; gives the files."""
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for workload, title in (("mlp", "MLP 784-256-10"), ("mobilenet", "MobileNetV2 224x224x3")):
        rows = [row for row in of(results, workload) if row["requests_per_s"] > 0]
        if rows:
            files.append(folder / f"peers-{workload}.png")
            _curves(rows, f"{title}: one row a request", results, files[-1])
    rows = of(results, "memory")
    if rows:
        files.append(folder / "peers-memory.png")
        _memory(rows, results, files[-1])
    return files


def _curves(rows: list[Row], title: str, results: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot

    figure, (mid, tail) = pyplot.subplots(
        1, 2, figsize=(2 * _SIZE[0] * 0.7, _SIZE[1]), sharex=True, sharey=True
    )
    for index, (system, found) in enumerate(_systems(rows)):
        found = sorted(found, key=lambda row: row["in_flight"])
        for axes, name in ((mid, "p50_ms"), (tail, "p99_ms")):
            x, y = [row["requests_per_s"] for row in found], [row[name] for row in found]
            axes.plot(x, y, label=system, **_style(system, index))
    for axes, name in ((mid, "p50"), (tail, "p99")):
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="requests/s",
            ylabel="ms",
            title=f"{name}, by requests in flight",
        )
        axes.grid(visible=True, which="both", alpha=0.2)
    levels = sorted({row["in_flight"] for row in rows})
    tail.legend(  # beside the axes: there is no corner of them that some server does not come to
        fontsize=8,
        title=f"{', '.join(map(str, levels))} in flight,\nleft to right",
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )
    _finish(figure, title, results, file)


def _memory(rows: list[Row], results: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=_SIZE)
    for index, (system, found) in enumerate(_systems(rows)):
        found = sorted(found, key=lambda row: row["workers"])
        x, y = [row["workers"] for row in found], [row["pss_mib"] / 1024 for row in found]
        axes.plot(x, y, label=system, **_style(system, index))
    axes.set(xlabel="workers", ylabel="GiB (PSS of the whole tree)", ylim=(0, None))
    axes.set_xticks(sorted({row["workers"] for row in rows}))
    axes.grid(visible=True, alpha=0.2)
    axes.legend(fontsize=8)
    _finish(figure, "805 MB model: memory against workers", results, file)


def _systems(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    names = dict.fromkeys(row["system"] for row in rows)
    return [(name, [row for row in rows if row["system"] == name]) for name in names]


def _style(system: str, index: int) -> dict[str, Any]:
    if system == OWN:
        return {"color": "black", "linewidth": 3, "marker": "o", "zorder": 3}
    markers = "osv^D<>PXd*h"
    return {
        "color": f"C{index % 10}",
        "marker": markers[index % len(markers)],
        "markersize": 5,
        "alpha": _OTHERS,
    }


def _finish(figure: Any, title: str, results: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(title)
    where = f"{results['machine']}; {results['libraries']}\n{commits(results)}; {results['date']}"
    figure.text(0.5, 0.005, where, ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
