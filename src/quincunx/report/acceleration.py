"""The page of one acceleration, from its result file and its artifact's spec. Reads JSON only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import ERROR, scale_in
from quincunx.networks.spec import lines_to_load, read_spec
from quincunx.reading import one_line, read_json
from quincunx.report.figures import (
    Dot,
    Mark,
    Picture,
    draw_candidate_scores,
    draw_layer_times,
    draw_tradeoff,
    on_front,
)
from quincunx.report.page import render
from quincunx.report.positions import draw_on_sample, draw_plain
from quincunx.report.results import label_of, speed_words
from quincunx.report.verdict import (
    asked_in_words,
    better_for_free,
    free_in_words,
    next_in_words,
    points_lost,
    restored_in_words,
    shortcoming,
    worse,
)
from quincunx.writing import write_text

__all__ = [
    "acceleration_sentences",
    "first_sentences",
    "read_acceleration",
    "search_sentences",
    "usage",
    "whole",
    "write_acceleration_report",
]

# layers that are named
_SHOWN = 6


# losses that the front shows: so many times the result's own, or so many points
_SHOWN_LOSS, _SHOWN_POINTS = 3.0, 20.0


def acceleration_sentences(result: dict[str, Any]) -> list[str]:
    """Describe the gain and the cost in sentences."""
    cost, whole = result["cost"], result["whole"]
    speed = whole["speedup"]
    before, after = (cost[key]["macs"] for key in ("before", "after"))
    many = "s" if whole["threads"] > 1 else ""
    times = [f"{1e3 * whole[f'seconds_{key}']:.2f} ms {key}" for key in ("before", "after")]
    sentences = [
        f"{before / 1e6:.1f} M MACs became {after / 1e6:.1f} M, {before / after:.2f} times fewer; the whole "
        f"network at batch {result['batch']} on {whole['threads']} thread{many} is "
        f"{speed_words(speed['median'], speed['q1'], speed['q3'])}: {', '.join(times)}."
    ]
    sentences = [*first_sentences(result), *sentences]
    if "bytes" in result:
        kept = [f"{result['bytes'][key] / 1e6:.2f}" for key in ("before", "after")]
        sentences.append(f"Its weights take {kept[1]} MB on disk, {kept[0]} MB before.")
    if "int8" in result:
        sentences.append(_int8_in_words(result["int8"]))
    if result.get("search"):
        sentences += search_sentences(result["search"])
    if result.get("format_gain"):
        sentences.append(
            f"The search chose {result['dtype']}, by itself {result['format_gain']:.2f} times as fast as "
            "float32; the times before are those in float32."
        )
    if result.get("input"):
        height, width = result["input"]
        sentences.append(
            "The search chose a smaller input: the network is the same, give it images of "
            f"{height} x {width}."
        )
    tested = result["data"]["test"]
    scale = scale_in(result)
    for stage in result["stages"]:
        own = (
            ""
            if result["data"].get("labelled", True) or "task" in result
            else "the original network's answers to "
        )
        of = "of" if scale == ERROR else "on"
        text = (
            f"Test {scale.name} {stage['name']}: {scale.shown(stage[scale.key])} {of} {own}{tested:,} images"
        )
        if "lost" in stage:
            test = stage.get("test", "McNemar")
            counts = ("lost", "won") if test == "McNemar" else ("worse", "better")
            text += f" ({stage['lost']} {counts[0]}, {stage['won']} {counts[1]}; {test} p = {stage['p']:.2g})"
        sentences.append(f"{text}.")
    sentences += _further(result)
    sentences += _ended(result)
    sentences += free_in_words(result)
    slower = [row for row in result["layers"] if row["speedup"]["median"] < 1]
    gained = [row for row in slower if row.get("gain", 0.0) > 1]
    if gained:
        told = ", ".join(
            f"{row['name']} (the network takes {row['gain']:.2f} times as long without it)" for row in gained
        )
        sentences.append(f"No faster alone, but within the network: {told}.")
    if result.get("search") is None and (rest := [row["name"] for row in slower if row not in gained]):
        sentences.append(f"No faster than before: {', '.join(rest)}.")
    if result.get("unfused"):
        sentences.append(f"The whole network is timed, and to be used, without qx.fuse: {result['unfused']}.")
    return sentences


def _further(result: dict[str, Any]) -> list[str]:
    """Describe the further figures of a task, before and after."""
    first, last = (result["stages"][i].get("further", {}) for i in (0, -1))
    told = [f"{name.replace('_', ' ')} {first[name]:.4g} before, {last[name]:.4g} after" for name in first]
    return [f"Beside it: {'; '.join(told)}."] if told else []


def _ended(result: dict[str, Any]) -> list[str]:
    """Return a sentence if fine-tuning took fewer epochs than planned."""
    done, planned = result.get("epochs"), (result.get("recipe") or {}).get("epochs")
    if done is None or planned is None or done >= planned:
        return []
    parts = (result.get("verdict") or {"parts": ()})["parts"]
    reached = all(part["met"] for part in parts if part["what"] == "max_drop")
    why = "the accuracy asked for was reached" if reached else "it no longer got better"
    return [f"Fine-tuning ended after {done} of {planned} epochs: {why}."]


def first_sentences(result: dict[str, Any]) -> list[str]:
    """Return the sentences to read first: nothing was gained or the network is ruined, the verdict on a
    target, doubts about the input."""
    sentences = [text for text in (restored_in_words(result), worse(result)) if text]
    verdict = result.get("verdict")
    if verdict:
        sentences.append(verdict["words"])
        if verdict["next"]:
            sentences.append(f"Next: {verdict['next']}.")
    free = better_for_free(result)
    sentences += [free] if free else []
    return sentences + [f"Doubtful: {doubt}" for doubt in result.get("doubts", ())]


def search_sentences(record: dict[str, Any], judged: bool = True) -> list[str]:
    """Describe what a search was asked for and what it expected, without the verdict.

    Args:
        record: of the search.
        judged: whether the network was made and judged; otherwise the sentences are predictions.
    """
    usable = sum(row["why_not"] is None for row in record["candidates"])
    last = record["attempts"][-1] if record["attempts"] else None
    asked = asked_in_words(record["target"], scale_in(record))
    sentences = [] if judged else [_prediction(record)]
    many = len(record["candidates"])
    tried = f" {many} candidates, {usable} of them faster than what they would replace." if many else ""
    sentences.append(f"{'Asked' if judged else 'Target'}: {asked}.{tried}")
    if last is not None and last["layers"] and record.get("chosen", True):
        times = [1e3 * last[key] for key in ("before", "predicted", "after")]
        off = 100 * (times[1] / times[2] - 1)
        sentences.append(
            f"The choice in the whole network, when it was chosen: {times[0]:.2f} ms before, "
            f"{times[1]:.2f} ms predicted, {times[2]:.2f} ms measured ({off:+.0f}%), "
            f"{last['speedup']:.2f}x faster."
        )
    if len(record.get("together", [])) > 1:
        sentences.append(_chosen_again(record["together"]))
    return sentences


def _chosen_again(tried: Sequence[Mapping[str, Any]]) -> str:
    """Describe the choices that followed when the first one lost more than its layers lose alone."""
    first, others = tried[0], tried[1:]
    which = next((number for number, one in enumerate(tried) if one["taken"]), 0)
    taken = tried[which]
    times = f"{first['together'] / first['alone']:.1f} times " if first["alone"] > 0 else "more than "
    many = f"{len(others)} further choice{'s' * (len(others) > 1)}"
    end = (
        f"the best of them is {taken['together'] / first['together']:.2f} times as far from the original"
        if which and first["together"] > 0
        else "none of them came closer, so the first stayed"
    )
    return (
        f"Together the layers first chosen change the answers {times}what they change alone; {many} made "
        f"from what layers lose within the network: {end}."
    )


def _prediction(record: dict[str, Any]) -> str:
    """Describe what a dry run expects, and on which images."""
    attempts, target, scale = record["attempts"], record["target"], scale_in(record)
    speed = float(attempts[-1]["speedup"]) if attempts and record["chosen"] else 1.0
    sentences = [f"{speed:.2f}x faster"]
    if "macs" in target:
        sentences.append(f"{record['macs'] / 1e6:.1f} M MACs")
    on = f"{record.get('images', 0):,} calibration images, before fine-tuning"
    sentences.append(
        f"{scale.amount(record['drop'], 2)} of {scale.of_what()} lost on {on}"
        if "drop" in record
        else f"what {scale.of_what()} is lost is not predicted without --max-drop"
    )
    verdict = "would be met" if record["met"] else "would be missed"
    missed = shortcoming(record)
    why = f" ({'; '.join(missed)})" if missed and not record["met"] else ""
    lost = record.get("drop", 0.0) > target.get("max_drop", 0.0)
    fit = f"; fine-tuning, such as --finetune-epochs 5, may win {scale.of_what()} back" if lost else ""
    return f"Prediction, nothing is kept: {'; '.join(sentences)}. The target {verdict}{why}{fit}."


def _int8_in_words(facts: dict[str, Any]) -> str:
    """Say what of a network is in eight bits."""
    layers, kept = facts["layers"], list(facts["kept"])
    first = f"{layers} {'convolution computes' if layers == 1 else 'convolutions compute'} in eight bits"
    if not kept:
        return f"{first}."
    shown = ", ".join(kept[:_SHOWN]) + (f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else "")
    return f"{first}; {shown} in {facts.get('rest', 'float32')}."


def usage(result: dict[str, Any], folder: str | Path) -> list[str]:
    """Return lines of Python that load the accelerated network from a folder.

    Example:
        >>> for line in usage({"network": {"kind": "factory", "factory": "mynets:make"}}, "fast"):
        ...     print(line)
        import quincunx as qx
        from mynets import make
        model = qx.fuse(qx.load("fast/model", factory=make))
    """
    *imports, loaded = lines_to_load(result["network"], Path(folder) / "model")
    size = result.get("input")
    note = f"  # give it images of {size[0]} x {size[1]}" if size else ""
    dtype = result.get("dtype", "float32")
    lower = "" if dtype == "float32" else f", torch.{dtype}"
    fused = loaded if result.get("unfused") else f"qx.fuse({loaded}{lower})"
    first = ["import torch"] if lower and fused != loaded else []
    return [*first, "import quincunx as qx", *imports, f"model = {fused}{note}"]


def read_acceleration(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's ``accelerate.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file that is not JSON, or not the result of an acceleration.
    """
    place = Path(folder) / "accelerate.json"
    result = read_json(place)
    if not isinstance(result, dict) or result.get("kind") != "accelerate" or result.get("schema") != 1:
        raise ValueError(f"{place}: not the result of an acceleration")
    with whole(place):
        _check(result)
    return result


@contextmanager
def whole(place: Path) -> Iterator[None]:
    """Within: a result file is read; a value of it that is missing or of another kind is the file's fault.

    Raises:
        ValueError: in place of whatever such a value raised; names the file.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place}: not a whole result, {str(error)[:200]} is missing") from error
    except (AttributeError, LookupError, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a whole result ({one_line(error)[:200]})") from error


def _check(result: dict[str, Any]) -> None:
    """Read every field that pages use, so that an error can name the file."""
    label_of(result["network"]), result["method"]["name"], result["data"]["name"]
    result["how"], result["skipped"].items(), result["maps"].items(), len(result["stages"])
    whole, cost = result["whole"], result["cost"]
    ratios = [whole["speedup"], *(row["speedup"] for row in result["layers"])]
    seconds = [whole, *result["layers"]]
    for number in (
        *(result["batch"], result["calibration"], result["data"]["test"], whole["threads"], whole["rounds"]),
        *(cost[when]["macs"] for when in ("before", "after")),
        *(stage[scale_in(result).key] for stage in result["stages"]),
        *(ratio[key] for ratio in ratios for key in ("median", "q1", "q3")),
        *(timed[key] for timed in seconds for key in ("seconds_before", "seconds_after")),
        *(row[key] for row in result["layers"] for key in ("macs_before", "macs_after")),
    ):
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{number!r} where a number belongs")
    if not result["stages"] or not cost["after"]["macs"]:
        raise ValueError("no stage, or no multiplication")
    for text in (result["data"]["name"], *(row["name"] for row in result["layers"])):
        if not isinstance(text, str):
            raise ValueError(f"{text!r} where a name belongs")
    for size in result.get("bytes", {}).values():
        float(size)
    for key in ("command", "commit", "time", "cpu", "cores", "capability", "quincunx", "torch", "python"):
        result["environment"][key]


def write_acceleration_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``report.html`` beside ``accelerate.json``: one self-contained file.

    Args:
        folder: of the result and its artifact.
        out: the page, or a folder for it; by default ``report.html`` in ``folder``.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: no result or no artifact in the folder.
        ValueError: a file that is not JSON, or not the result of an acceleration.
        ModuleNotFoundError: the ``report`` extra is not installed.
    """
    folder = Path(folder)
    result = read_acceleration(folder)
    replaced = read_spec(folder / "model")["model"].get("replaced", {})
    with whole(folder / "accelerate.json"):
        html = _page(result, replaced, folder)
    page = folder if out is None else Path(out)
    if page.is_dir() or out is None:
        page = page / "report.html"
    write_text(page, html)
    return page


def _scores(record: dict[str, Any] | None) -> Picture | None:
    """Draw the cost and saving of each usable candidate, with the chosen ones marked."""
    if record is None:
        return None
    chosen = {(tuple(row["layers"]), row["label"]) for row in record["chosen"]}
    dots = [
        Dot(
            row["label"].partition(",")[0],
            1e6 * row["seconds_saved"][1],
            max(row["loss"], 0.0),
            (tuple(row["layers"]), row["label"]) in chosen,
        )
        for row in record["candidates"]
        if row["why_not"] is None and row["loss"] is not None
    ]
    return draw_candidate_scores(dots) if dots else None


def _page(result: dict[str, Any], replaced: dict[str, Any], folder: Path) -> str:
    rows = result["layers"]
    positions = draw_on_sample(result.get("sample"), replaced)
    times = [(row["name"], 1e3 * row["seconds_before"], 1e3 * row["seconds_after"]) for row in rows]
    tried = _tried(result)
    return render(
        "acceleration.html.jinja",
        title=f"{label_of(result['network'])} by {result['method']['name']}",
        result=result,
        rows=rows,
        first=[s for s in first_sentences(result) if not s.startswith("Next: ")],
        sentences=[s for s in acceleration_sentences(result) if s not in first_sentences(result)],
        next=next_in_words(result, folder),
        usage=usage(result, folder),
        times=draw_layer_times(times, f"Time of each layer, batch {result['batch']}"),
        front=_front(result),
        dropped=bool(_dropped(result)),
        tried=tried,
        lost_name=_lost_name(result) if any(row["lost"] is not None for row in tried) else "",
        scores=_scores(result.get("search")),
        positions=positions,
        masks=draw_plain(result, replaced, grids=not positions),
    )


def _dropped(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the choices of a search whose loss of score was measured."""
    return [
        one for one in (result.get("search") or {}).get("attempts", ()) if "drop" in one and one["layers"]
    ]


def _lost_name(result: Mapping[str, Any]) -> str:
    return f"lost ({scale_in(result).unit})" if _dropped(result) else "loss (each alone, summed)"


def _tried(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the choices that a search timed, in its order, and which are on the front of speed and loss."""
    attempts = [one for one in (result.get("search") or {}).get("attempts", ()) if one["layers"]]
    key = "drop" if _dropped(result) else "loss"
    known = [(float(one[key]), float(one["speedup"])) for one in attempts if key in one]
    best = dict(zip(known, on_front(known), strict=True))
    rows = []
    for number, one in enumerate(attempts, 1):
        lost = float(one[key]) if key in one else None
        front = lost is not None and best[lost, float(one["speedup"])]
        last = " (taken)" if number == len(attempts) else ""
        rows.append({**one, "name": f"{number}{last}", "lost": lost, "front": front})
    return rows


def _front(result: dict[str, Any]) -> Picture | None:
    """Draw the score lost against the speed-up: the result after each step, what costs nothing, and other
    choices."""
    scale, stages = scale_in(result), result["stages"]
    if len(stages) < 2:
        return None
    rows = (result.get("free") or {"rows": ()})["rows"]
    speed = float(result["whole"]["speedup"]["median"])
    found = [("the network before", "", 1.0, 0.0)]
    # a choice that ruins the network would flatten all others
    most = max(_SHOWN_LOSS * points_lost(result), _SHOWN_POINTS) if scale.unit == "points" else math.inf
    for row in (row for row in rows if row["drop"] <= most):
        kinds = [] if row["dtype"] == "float32" else [row["dtype"]]
        series = ", ".join(kinds + ["smaller input"] * (row["size"] is not None))
        found.append((series, row["name"], float(row["speedup"]["median"]), float(row["drop"])))
    found += [
        ("less speed asked, no fine-tuning", f"{other['speedup']:.2f}x", other["speedup"], other["drop"])
        for other in result.get("alternatives", ())
    ]
    found += [
        ("choices of the search", f"{one['speedup']:.2f}x", float(one["speedup"]), float(one["drop"]))
        for one in _dropped(result)
        if one["drop"] <= most
    ]
    before = stages[0][scale.key]
    found += [
        ("this network on the way", stage["name"], speed, lost)
        for stage in stages[1:-1]
        if result.get("put_back") is None and (lost := scale.lost(before, stage[scale.key])) <= most
    ]
    found.append(("this network", stages[-1]["name"], speed, points_lost(result)))
    best = on_front([(drop, gain) for _, _, gain, drop in found])
    marks = [Mark(*one, front) for one, front in zip(found, best, strict=True)]
    return draw_tradeoff(marks, [], "speed-up", f"{scale.of_what()} lost ({scale.unit})")
