"""Judge an acceleration's final figures against its target. JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quincunx.measure.tasks.scale import ERROR, Scale, scale_in

__all__ = [
    "asked_in_words",
    "better_for_free",
    "free_in_words",
    "judge",
    "macs_allowed",
    "next_in_words",
    "points_lost",
    "restored_in_words",
    "shortcoming",
    "worse",
]

# report an unrequested loss first if it is at least this many points of accuracy, with this significance
_MUCH, _SURE = 2.0, 0.01
# compare figures as they are printed
_DIGITS = 2
_ELSE = "a larger --batch, or other --method candidates, may save more time"


def points_lost(result: Mapping[str, Any]) -> float:
    """Return the score lost on the test images, first stage to last: points of accuracy, or the task's unit.

    Example:
        >>> round(points_lost({"stages": [{"error": 0.1}, {"error": 0.125}]}), 6)
        2.5
    """
    scale = scale_in(result)
    return scale.lost(float(result["stages"][0][scale.key]), float(result["stages"][-1][scale.key]))


def macs_allowed(asked: str | float, before: int) -> float:
    """Return the MACs that "50%" of those before, or a number, allows."""
    text = str(asked)
    return float(text[:-1]) / 100 * before if text.endswith("%") else float(text)


def asked_in_words(target: Mapping[str, Any], scale: Scale = ERROR) -> str:
    """Describe a target in words, a loss on the task's scale.

    Example:
        >>> asked_in_words({"speedup": 1.5, "max_drop": 1.0})
        'at least 1.5x faster, at most 1 point of accuracy lost'
    """
    words = {
        "speedup": lambda v: f"at least {v:g}x faster",
        "latency_ms": lambda v: f"at most {v:g} ms",
        "macs": lambda v: f"at most {_macs_in_words(v)}",
        "max_drop": lambda v: f"at most {scale.amount(v)} of {scale.of_what()} lost",
    }
    return ", ".join(words[key](value) for key, value in target.items())


def _macs_in_words(asked: str | float) -> str:
    text = str(asked)
    return f"{text} of the MACs" if text.endswith("%") else f"{float(text) / 1e6:g} M MACs"


def judge(result: Mapping[str, Any], alternatives: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any] | None:
    """Judge a target by an acceleration's final test error, time and MACs; None without a target.

    Args:
        result: the content of ``accelerate.json``.
        alternatives: "speedup" and "drop" of other choices (on the test images, before fine-tuning).

    Returns:
        "met"; "parts": for each requirement "what", "asked", "found" and "met"; "words": a sentence;
        "next": the next step, None if there is none.
    """
    record = result.get("search")
    if not record:
        return None
    parts = [_part(what, asked, result) for what, asked in record["target"].items()]
    met = all(part["met"] for part in parts)
    # failed parts come first
    phrases = [part["words"] for part in sorted(parts, key=lambda part: bool(part["met"]))]
    words = f"Target {'met' if met else 'missed'}: {'; '.join(phrases)}."
    return {
        "met": met,
        "parts": parts,
        "words": words,
        "next": None if met else _next(result, parts, alternatives),
    }


def _part(what: str, asked: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    whole, cost = result["whole"], result["cost"]
    if what == "speedup":
        found = float(whole["speedup"]["median"])
        met, words = round(found, _DIGITS) >= asked, f"{found:.2f}x faster (asked: {asked:g}x)"
    elif what == "latency_ms":
        found = 1e3 * float(whole["seconds_after"])
        met, words = round(found, _DIGITS) <= asked, f"{found:.2f} ms a batch (asked: at most {asked:g} ms)"
    elif what == "macs":
        found = float(cost["after"]["macs"])
        met = found <= macs_allowed(asked, cost["before"]["macs"])
        share = 100 * found / cost["before"]["macs"]
        words = f"{found / 1e6:.1f} M MACs, {share:.1f}% (asked: at most {_macs_in_words(asked)})"
    else:
        found = points_lost(result)
        met = round(found, _DIGITS) <= asked
        words = f"{_lost(found, result)} (asked: at most {asked:g})"
    return {"what": what, "asked": asked, "found": found, "met": bool(met), "words": words}


def _lost(points: float, result: Mapping[str, Any]) -> str:
    """Describe the loss of accuracy, on which images, and whether after fine-tuning."""
    tested = result["images"]["test"] if "images" in result else result["data"]["test"]
    own = result["data"].get("labelled", True) or "task" in result
    on = f"{tested:,} test images" if own else f"the network's own answers to {tested:,} test images"
    tuned = result.get("recipe") and result.get("put_back") is None
    when = "after fine-tuning" if tuned else "without fine-tuning"
    scale = scale_in(result)
    if points <= 0:
        return f"no {scale.of_what()} lost on {on}, {when}"
    return f"{scale.amount(points, 2)} of {scale.of_what()} lost on {on}, {when}"


def _next(
    result: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], alternatives: Sequence[Mapping[str, Any]]
) -> str:
    """Return the next step for the parts that failed."""
    failed = {part["what"]: part for part in parts if not part["met"]}
    advice: list[str] = []
    if "max_drop" in failed:
        advice.append(_finetune(result))
        advice += [
            _alternative(other, failed["max_drop"]["asked"], scale_in(result)) for other in alternatives
        ]
    for what in ("speedup", "latency_ms", "macs"):
        if what in failed:
            advice += _less(what, failed[what], result)
    return "; ".join(advice)


def _alternative(other: Mapping[str, Any], allowed: float, scale: Scale) -> str:
    """Describe a slower choice, and how to ask for it if it loses no more than is allowed."""
    told = f"{other['speedup']:.2g}x {_costs(other['drop'], scale)}"
    # rounded down, so that it is surely within reach
    asked = int(20 * other["speedup"]) / 20
    return f"{told} (--speedup {asked:g})" if other["drop"] <= allowed and asked > 1 else told


def _costs(drop: float, scale: Scale) -> str:
    return f"costs {scale.amount(drop, 1)} before fine-tuning" if drop > 0 else "costs nothing"


def _finetune(result: Mapping[str, Any]) -> str:
    recipe = result.get("recipe")
    if not recipe:
        return "add --finetune-epochs 5"
    if any("fine-tuning (not kept" in stage.get("name", "") for stage in result["stages"]):
        # every epoch was worse than none
        return f"fine-tune at a lower rate, as with --lr {recipe['lr'] / 10:.2g}"
    more = f"fine-tune for longer, as with --finetune-epochs {2 * int(recipe['epochs'])}"
    return more if recipe.get("distill") else f"{more} --distill 0.5"


def _less(what: str, part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return what can be reached for time or MACs, and how to reach more."""
    record = result["search"]
    left = sum("time budget" in (row["why_not"] or "") for row in record["candidates"])
    advice = [f"a longer --time-budget: {left} candidates were not tried"] if left else []
    free = result.get("input") is not None or result.get("format_gain") is not None
    if not (record["chosen"] or free) or result.get("put_back") is not None:
        return [*advice, f"nothing here saves time; {_ELSE}"]
    if what == "speedup":
        reached = int(20 * part["found"]) / 20
        advice.append(f"--speedup {reached:g} is within reach" if reached > 1 else _ELSE)
    elif what == "latency_ms":
        advice.append(f"--latency-ms {1.02 * part['found']:.3g} is within reach")
    else:
        advice.append(f"--macs {part['found']:.0f} is within reach")
    return advice


def better_for_free(result: Mapping[str, Any]) -> str | None:
    """Return a sentence if a format or a smaller input is the better answer; else None.

    It is as fast as the result and loses no more, or it meets a target that the result misses.

    Example:
        >>> row = {"name": "input 24 x 24", "size": [24, 24], "speedup": {"median": 1.7}, "drop": 0.5}
        >>> result = {"free": {"rows": [row]}, "whole": {"speedup": {"median": 1.5}}}
        >>> better_for_free({**result, "stages": [{"error": 0.1}, {"error": 0.12}]})[:67]
        'A smaller input is the better answer here: input 24 x 24 is 1.70x a'
    """
    scale = scale_in(result)
    speed, lost = float(result["whole"]["speedup"]["median"]), points_lost(result)
    rows = _free_rows(result)
    missed = (result.get("verdict") or {"met": True})["met"] is False
    meeting = [row for row in rows if missed and _meets(row, result)]
    better = [row for row in rows if row["speedup"]["median"] >= speed and row["drop"] <= lost]
    if meeting:
        row = min(meeting, key=lambda row: float(row["drop"]))
        does = "meets the target" if row["drop"] <= lost else "meets the target at a higher loss"
    elif better:
        row, does = max(better, key=lambda row: float(row["speedup"]["median"])), "is the better answer"
    else:
        return None
    what, allow = ("A smaller input", "size") if row["size"] else ("Another number format", "format")
    return (
        f"{what} {does} here: {_row_in_words(row, scale)}, this network {speed:.2f}x and "
        f"{scale.amount(lost, 2)}; --allow {allow} takes it."
    )


def next_in_words(result: Mapping[str, Any], folder: str | Path) -> str:
    """Return the line that says what to do with a result: mend what is missing first, else use it.

    Args:
        result: the content of ``accelerate.json``.
        folder: where it lies; commands name it.

    Example:
        >>> done = {"stages": [{"error": 0.1}, {"error": 0.1}], "whole": {"speedup": {"median": 1.5}}}
        >>> next_in_words(done, "fast")
        'Next: use it by the lines below, or in another engine: quincunx export fast --out fast.onnx.'
    """
    verdict, scale = result.get("verdict"), scale_in(result)
    if verdict and verdict["next"]:
        return f"Next: {verdict['next']}."
    if result.get("put_back") is not None or float(result["whole"]["speedup"]["median"]) <= 1:
        return (
            "Next: nothing here is faster, so try a larger --batch, another --method, or --speedup 1.2, with "
            "which a search leaves out what saves no time."
        )
    first, last = result["stages"][0], result["stages"][-1]
    lost = points_lost(result)
    if worse(result) or (lost > _much(first, scale) and not result.get("recipe")):
        return f"Next: {_finetune(result)}, to win {scale.of_what()} back."
    if better_for_free(result):
        return "Next: compare with the better answer named above before you use this one."
    use = f"use it by the lines below, or in another engine: quincunx export {folder} --out fast.onnx"
    if last.get("p", 1.0) <= _SURE and lost > 0 and not result.get("recipe"):
        return f"Next: {_finetune(result)} may win the {scale.amount(lost, 2)} back; or {use}."
    return f"Next: {use}."


def _meets(row: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether a format or a smaller input meets all of a target; its MACs are not known."""
    target, speed = result["search"]["target"], float(row["speedup"]["median"])
    if "macs" in target:
        return False
    enough = round(speed, _DIGITS) >= target.get("speedup", 1.0)
    after = 1e3 * float(result["whole"]["seconds_before"]) / speed
    in_time = round(after, _DIGITS) <= target.get("latency_ms", float("inf"))
    little = round(float(row["drop"]), _DIGITS) <= target.get("max_drop", float("inf"))
    return bool(enough and in_time and little)


def free_in_words(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on what costs nothing to make, beside the result; none where nothing was tried."""
    told = [_row_in_words(row, scale_in(result)) for row in _free_rows(result)]
    return [f"Free beside it: {'; '.join(told)}."] if told else []


def _free_rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the formats and sizes that were tried and are not the result's own."""
    rows = (result.get("free") or {"rows": ()})["rows"]
    own = (result.get("dtype"), result.get("input"))
    return [row for row in rows if (row.get("dtype"), row["size"]) != own]


def _row_in_words(row: Mapping[str, Any], scale: Scale) -> str:
    speed, lost = float(row["speedup"]["median"]), float(row["drop"])
    loses = f"loses {scale.amount(lost, 2)}" if lost > 0 else "loses nothing"
    return f"{row['name']} is {speed:.2f}x as fast and {loses}"


def worse(result: Mapping[str, Any]) -> str | None:
    """Return a sentence if a network became much worse than before, with the next step; else None."""
    stages, scale = result["stages"], scale_in(result)
    lost, last = points_lost(result), stages[-1]
    allowed = ((result.get("search") or {}).get("target") or {}).get("max_drop")
    if lost <= max(_much(stages[0], scale), allowed or 0.0) or last.get("p", 0.0) > _SURE:
        return None
    tested = result["images"]["test"] if "images" in result else result["data"]["test"]
    own = "wrong" if result["data"].get("labelled", True) else "answered otherwise"
    target = {} if not result.get("search") else result["search"]["target"]
    if target:
        less = "ask for less" if "max_drop" in target else "ask for less, or add --max-drop 1"
    else:
        less = "let a search choose what loses little: --max-drop 1 in place of --method"
    if scale == ERROR:
        became = f"{100 * stages[0]['error']:.2f}% became {100 * last['error']:.2f}% {own} of {tested:,}"
    else:
        first, final = (scale.shown(stage["score"]) for stage in (stages[0], last))
        became = f"a {scale.name} of {first} became {final} on {tested:,}"
    return f"Much worse than before: {became} test images; {_finetune(result)}, or {less}."


def _much(before: Mapping[str, Any], scale: Scale) -> float:
    """Return how much lost score is reported first: two points, or a fiftieth of the score before."""
    return _MUCH if scale.unit == "points" else abs(float(before[scale.key])) * _MUCH / 100


def restored_in_words(result: Mapping[str, Any]) -> str | None:
    """Return a sentence if the network was restored because the result was no faster; else None."""
    ratio = result.get("put_back")
    if ratio is None:
        return None
    kept = "" if result.get("search") else ", or keep what is no faster with --keep-slower"
    return (
        f"Nothing was gained: the finished network was {ratio:.2f} times as fast as before, so all of it is "
        f"as it was; try a larger --batch or another --method{kept}."
    )


def shortcoming(record: Mapping[str, Any]) -> list[str]:
    """Return the missed parts of a search's target without fine-tuning, each with its figures."""
    target, attempts = record["target"], record["attempts"]
    missed: list[str] = []
    speed = float(attempts[-1]["speedup"]) if attempts else 1.0
    if "speedup" in target and speed < target["speedup"]:
        missed.append(f"{speed:.2f}x faster, where {target['speedup']:g}x is asked")
    if "latency_ms" in target and attempts and 1e3 * attempts[-1]["after"] > target["latency_ms"]:
        missed.append(f"{1e3 * attempts[-1]['after']:.2f} ms, where {target['latency_ms']:g} ms are asked")
    if "max_drop" in target and record.get("drop", 0.0) > target["max_drop"]:
        missed.append(
            f"{scale_in(record).amount(record['drop'], 1)} lost on {record.get('images', 0):,} "
            "calibration images, before "
            f"fine-tuning, where {target['max_drop']:g} are allowed"
        )
    return missed
