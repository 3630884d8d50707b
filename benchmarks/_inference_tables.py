"""What the stored results of the inference benchmark say: summaries, Markdown tables, and a plot."""

import statistics
from collections.abc import Iterable, Mapping
from itertools import groupby, product
from pathlib import Path
from typing import Any

from _inference_masks import DISTRIBUTIONS
from _inference_systems import SYSTEMS

BASELINE = "inductor"
Result = Mapping[str, Any]


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest values."""
    ordered, position = sorted(values), q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def speedup(result: Result, name: str, over: str) -> float | None:
    """How many times faster a system is than another: the median of the ratios within the rounds."""
    own, other = (result["systems"].get(system, {}).get("seconds") for system in (name, over))
    return statistics.median(b / a for a, b in zip(own, other, strict=True)) if own and other else None


def summarized(result: dict[str, Any]) -> dict[str, Any]:
    """Add to each system what its rounds come to."""
    for name, system in result["systems"].items():
        if "seconds" in system:
            system["median_ms"], system["p10_ms"], system["p90_ms"] = (
                1000 * quantile(system["seconds"], q) for q in (0.5, 0.1, 0.9)
            )
            system["speedup"] = speedup(result, name, BASELINE)
    return result


def median_run(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in which `autosparse` was as fast as in the median one, with the speed-ups in all of them."""
    ordered = sorted(results, key=lambda result: speedup(result, "autosparse", BASELINE) or 0.0)
    names = [name for name in SYSTEMS if any("seconds" in r["systems"].get(name, {}) for r in results)]
    of_runs = {name: [found for r in results if (found := speedup(r, name, BASELINE))] for name in names}
    return ordered[(len(results) - 1) // 2] | {"speedups_of_runs": of_runs}


def median_speedup(result: Result, name: str) -> float | None:
    """Over the baseline: of several runs the median."""
    of_runs = result.get("speedups_of_runs", {}).get(name)
    return statistics.median(of_runs) if of_runs else speedup(result, name, BASELINE)


def lines(result: Result) -> Iterable[str]:
    """One line per system that ran."""
    for name, system in result["systems"].items():
        if "seconds" in system:
            ratio = f"{system['speedup']:.2f}x" if system["speedup"] else ""
            if len(result["speedups_of_runs"][name]) > 1:
                ratio += f", median of runs {_over_baseline(result, name)}"
            idle = max(system["idle_cpu_seconds"])
            spread = f"{system['p10_ms']:.2f}-{system['p90_ms']:.2f}"
            yield f"{name:16} {system['median_ms']:9.2f} ms ({spread}) {ratio}" + (
                f", used {idle:.2f} s of CPU while others ran" if idle > 0.05 else ""
            )


def _latency(result: Result) -> str:
    found = [value for value in result["core_to_core_ns"] if value is not None]
    return f"{min(found):.0f}-{max(found):.0f}" if found else "-"


def _times(value: float | None) -> str:
    return f"{value:.2f}" if value else "-"


def _over_baseline(result: Result, name: str) -> str:
    """The speed-up; of several runs the median, with the lowest and the highest."""
    of_runs = result.get("speedups_of_runs", {}).get(name, [])
    found = _times(median_speedup(result, name))
    return f"{found} ({min(of_runs):.2f}-{max(of_runs):.2f})" if len(of_runs) > 1 else found


def _faster_at_low_precision(result: Result) -> str:
    """The dense bfloat16 systems that are faster than sparse float32, and by how much."""
    dense = [name for name, system in SYSTEMS.items() if system.low_precision and not name.startswith("autosparse")]
    found = {name: speedup(result, name, "autosparse") for name in dense}
    ratios = {name: ratio for name, ratio in found.items() if ratio}
    if not ratios:
        return "-"
    return ", ".join(f"{name} ({ratio:.2f}x)" for name, ratio in ratios.items() if ratio > 1) or "none"


def _column(result: Result) -> tuple[int, int]:
    return result["batch"], DISTRIBUTIONS.index(result["distribution"])


def _group(result: Result) -> tuple[Any, ...]:
    machine = result["machine"]
    return result["model"], *_column(result), machine["device"], machine["features"], result["threads"]


def _versions(results: Iterable[Result]) -> str:
    found = {
        (package, number)
        for result in results
        for system in result["systems"].values()
        for package, number in system.get("versions", {}).items()
        if package != "python"
    }
    return ", ".join(f"{package} {number}" for package, number in sorted(found))


def _skipped(results: Iterable[Result]) -> list[str]:
    reasons = {
        (name, system["skipped"])
        for result in results
        for name, system in result["systems"].items()
        if "skipped" in system
    }
    return [f"{name} was skipped: {reason}" for name, reason in sorted(reasons)]


def print_tables(results: list[dict[str, Any]]) -> None:
    """One table per network, batch size and distribution; plain numbers are speed-ups over frozen Inductor."""
    for _, group in groupby(sorted(results, key=_group), key=_group):
        rows = sorted(group, key=lambda result: result["sparsity"])
        model, batch, distribution, threads = (rows[0][key] for key in ("model", "batch", "distribution", "threads"))
        names = [name for name in SYSTEMS if any("seconds" in row["systems"].get(name, {}) for row in rows)]
        machine = ", ".join([rows[0]["machine"]["device"], *rows[0]["machine"]["features"]])
        print(f"\n**{model}, batch {batch}, {distribution}** ({machine}; threads: {threads})\n")
        shown = [name for name in names if name != BASELINE]
        over = [name for name in ("onnxruntime", "deepsparse") if name in names]
        columns = ["sparsity", f"{BASELINE}, ms", *shown, *(f"autosparse over {name}" for name in over)]
        columns += ["dense bf16 that is faster than autosparse", "core to core, ns"]
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for row in rows:
            baseline = row["systems"].get(BASELINE, {}).get("median_ms")
            cells = [f"{row['sparsity']:g}", _times(baseline), *(_over_baseline(row, n) for n in shown)]
            cells += [_times(speedup(row, "autosparse", name)) for name in over]
            print(f"| {' | '.join([*cells, _faster_at_low_precision(row), _latency(row)])} |")
        print(f"\n{_versions(rows)}")
        for line in _skipped(rows):
            print(f"\n{line}")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over frozen Inductor against sparsity; one panel per network, batch size and distribution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted({result["model"] for result in results})
    columns = sorted({_column(result) for result in results})
    size = (3.2 * len(columns) + 1.6, 2.7 * len(rows) + 0.6)
    figure, grid = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    for panel, (model, column) in zip(grid.flat, product(rows, columns), strict=True):
        chosen = [result for result in results if result["model"] == model and _column(result) == column]
        _draw_panel(panel, sorted(chosen, key=lambda result: result["sparsity"]))
    labels = {
        label: line for panel in grid.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8)
    figure.supxlabel("sparsity", fontsize=9)
    figure.supylabel("times faster than Inductor with freezing, float32", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_panel(panel: Any, results: list[dict[str, Any]]) -> None:
    if not results:
        panel.set_axis_off()
        return
    panel.axhline(1, color="grey", linewidth=1)
    for index, (name, system) in enumerate(SYSTEMS.items()):
        points = [(r["sparsity"], ratio) for r in results if (ratio := speedup(r, name, BASELINE))]
        if points and name != BASELINE:
            color, width = ("black", 2.5) if name == "autosparse" else (f"C{index}", 1.2)
            dashes = "--" if system.low_precision else "-"
            panel.plot(*zip(*points, strict=True), dashes, marker="o", markersize=3, c=color, lw=width, label=name)
    panel.set_title(f"{results[0]['model']}, batch {results[0]['batch']}, {results[0]['distribution']}", fontsize=9)
    panel.set_xticks([result["sparsity"] for result in results])
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=8)
