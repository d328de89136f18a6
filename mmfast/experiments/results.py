"""What a comparison keeps: results.json, written under a lock, and beside runs what it is rebuilt from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfast.files import locked, plain, write_json
from mmfast.methods import METHODS

FORMAT = 1
RESULTS = "results.json"
METRICS = "metrics.json"  # of a single run, in its folder
# Key of what the runs of a comparison that has ended come to.
SUMMARY = "summary"
# Key of the configuration: how settings were found, and all trials by method.
TUNING = "tuning"
# Key of a run's file: which data and settings it belongs to.
_COMPARISON = "comparison"
# Key of what tells whether the rest is what was written.
_CHECKSUM = "checksum"
# Parts of a comparison, and what in them may differ without making it another one.
_PARTS = (("data", ("source", "description", "fingerprint")), ("configuration", ("methods", TUNING)))


class Results:
    """The results of one comparison in a folder, which several processes may add to at once.

    Args:
        out: the folder.
        mine: format, versions, machine, data and configuration of this comparison, as plain values.

    Attributes:
        content: what results.json holds, as far as this process knows.
        note: what the user has to know of what was found there, or "".
    """

    def __init__(self, out: Path, mine: dict[str, Any]) -> None:
        self.out = out
        self.mine = mine
        self.content: dict[str, Any] = mine | {"runs": []}
        self.note = ""
        # What tells the file from another one, as this process has last read or written it.
        self._seen: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"Results({str(self.out)!r}, {len(self.content['runs'])} runs)"

    @property
    def path(self) -> Path:
        return self.out / RESULTS

    def open(self) -> None:
        """Take in what the folder holds; a file that is cut short is rebuilt from the runs beside it.

        Raises:
            ValueError: results.json is of another configuration, or not the results of a comparison.
        """
        if not self.out.exists():
            return
        with self._lock():
            self._take_in()

    def add(self, entry: dict[str, Any], folder: Path) -> None:
        """Add a run's entry to what the folder holds by now, and to the run's own folder."""
        entry = plain(entry)
        write_json(folder / METRICS, entry | {_COMPARISON: self._digest()}, is_plain=True)
        with self._lock():
            self._take_in()
            self._put(entry)
            # It was that of the other runs.
            self.content.pop(SUMMARY, None)
            self._write(self.content)

    def hold(self, entries: Sequence[dict[str, Any]]) -> None:
        """Take plain entries for those that the next write tells."""
        for entry in entries:
            self._put(entry)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Write beside the runs what they come to."""
        with self._lock():
            self._take_in()
            self.content[SUMMARY] = plain(summary)
            self._write(self.content)

    def _write(self, content: dict[str, Any]) -> None:
        write_json(self.path, content | {_CHECKSUM: _checksum(content)}, is_plain=True)
        self._seen = _identity(self.path)

    def find(self, method: str, seed: int) -> dict[str, Any] | None:
        """Return the entry of a run, or None."""
        runs = self.content["runs"]
        return next((e for e in runs if (e["method"], e["seed"]) == (method, seed)), None)

    def tuned(self, method: str) -> dict[str, Any] | None:
        """Return what is known of the trials of a method, or None."""
        return self.content["configuration"].get(TUNING, {}).get("methods", {}).get(method)

    def note_tuned(self, method: str, told: dict[str, Any]) -> None:
        """Let what is written from now on tell of the trials of a method."""
        for content in (self.mine, self.content):
            content["configuration"][TUNING]["methods"][method] = told

    def _put(self, entry: dict[str, Any]) -> None:
        key = (entry["method"], entry["seed"])
        others = [e for e in self.content["runs"] if (e["method"], e["seed"]) != key]
        self.content["runs"] = sorted([*others, entry], key=_place)

    def _lock(self) -> Any:
        # Held for the moment that reading and writing take.
        return locked(self.out / f".{RESULTS}.lock", wait=lambda: None)

    def _take_in(self) -> None:
        if self._seen is not None and self._seen == _identity(self.path):
            # Nobody has written since.
            return
        found = self._read()
        if found is None or not found["runs"]:
            return
        self._check_same(found)
        of_all_methods = found["configuration"]["methods"] | self.mine["configuration"]["methods"]
        tuning = _joined(found["configuration"].get(TUNING), self.mine["configuration"].get(TUNING))
        self._seen = _identity(self.path)
        known = self.content["runs"]
        self.content = found | self.mine
        self.content["configuration"] = self.mine["configuration"] | {"methods": of_all_methods} | tuning
        for entry in known:
            if self.find(entry["method"], entry["seed"]) is None:
                self._put(entry)

    def _read(self) -> dict[str, Any] | None:
        """Return what results.json holds, or what the runs beside it do where it cannot be read."""
        is_there = self.path.exists()
        if is_there:
            try:
                found = json.loads(self.path.read_text())
            except ValueError:
                found = None
            if isinstance(found, dict) and {"format", "data", "configuration", "runs"} <= set(found):
                if found["format"] != FORMAT:
                    raise ValueError(
                        f"{self.path} must have format {FORMAT}, got {found['format']}; give another --out"
                    )
                # Files of before have no checksum.
                if found.pop(_CHECKSUM, None) in (None, _checksum(found)) and _is_whole(found):
                    self._check_methods(found)
                    return found
        runs = sorted(self._records(), key=_place)
        if not runs:
            if is_there:
                raise ValueError(
                    f"{self.path} is damaged, or not the results of a comparison, and no run beside it has "
                    "the data and settings of this one: move it away, or give another --out"
                )
            return None
        kept = ""
        if is_there:
            damaged = self.path.with_name(f"{RESULTS}.damaged")
            self.path.replace(damaged)
            kept = f"could not be read and is now {damaged.name}; it "
        rebuilt = f"{len(runs)} run{'s' * (len(runs) > 1)} under {self.out / 'runs'}"
        self.note = f"{self.path} {kept or 'was gone and '}has been rebuilt from {rebuilt}."
        methods = {entry["method"]: entry["config"] for entry in runs}
        configuration = self.mine["configuration"]
        found = self.mine | {"runs": runs}
        found["configuration"] = configuration | {"methods": methods | configuration["methods"]}
        self._write(found)
        return found

    def _check_methods(self, found: dict[str, Any]) -> None:
        """Raise ValueError for runs of methods that this program does not know."""
        for name in dict.fromkeys(run["method"] for run in found["runs"]):
            if name not in METHODS:
                raise ValueError(
                    f"{self.out} has runs of a method that is not among mmfast.methods.METHODS, {name!r}: "
                    "name it there first, or give another --out"
                )

    def _records(self) -> Iterator[dict[str, Any]]:
        """Yield the entries that runs of this comparison left in their own folders."""
        configs = self.mine["configuration"]["methods"]
        drawn = self.mine["configuration"].get(TUNING, {}).get("drawn", {})
        for path in sorted((self.out / "runs").glob(f"*-seed*/{METRICS}")):
            try:
                entry = json.loads(path.read_text())
                is_mine = entry.pop(_COMPARISON, None) == self._digest() and isinstance(entry["method"], str)
            except (ValueError, TypeError, AttributeError, KeyError):
                continue
            if not is_mine:
                continue
            # None of them is left out of a comparison without a word.
            self._check_methods({"runs": [entry]})
            config = _completed(entry["method"], entry["config"], _num_modalities(self.mine, [entry]))
            mine = configs.get(entry["method"], config)
            # What was drawn is that of a trial, and may be anything.
            free = {key: mine[key] for key in drawn.get(entry["method"], ()) if key in mine}
            if mine == config | free:
                yield entry

    def _digest(self) -> str:
        """Return what tells one comparison's runs from another's: data and settings, not methods."""
        data, configuration = dict(self.mine["data"]), dict(self.mine["configuration"])
        for key in ("source", "description"):
            data.pop(key)
        configuration.pop("methods")
        if TUNING in configuration:
            configuration[TUNING] = {key: configuration[TUNING][key] for key in ("trials", "seeds")}
        return hashlib.sha256(json.dumps([data, configuration]).encode()).hexdigest()[:16]

    def _check_same(self, found: dict[str, Any]) -> None:
        differ, mine = [], self.mine
        for part, ignored in _PARTS:
            there, here = found[part], mine[part]
            # Settings that have their default are not told by either.
            told = [key for key in {**here, **there} if key not in ignored]
            for key in [key for key in told if _differ(there.get(key), here.get(key))]:
                differ.append(f"{key} is {_short(there.get(key))} there, {_short(here.get(key))} here")
        differ += _tuned_otherwise(found["configuration"].get(TUNING), mine["configuration"].get(TUNING))
        for name, config in mine["configuration"]["methods"].items():
            told = found["configuration"]["methods"].get(name, config)
            there = _completed(name, told, _num_modalities(found, found["runs"]))
            for key in [key for key in config if there.get(key) != config[key]]:
                differ.append(f"{name}.{key} is {_short(there.get(key))} there, {_short(config[key])} here")
        if not differ and found["data"].get("fingerprint") != mine["data"]["fingerprint"]:
            differ = ["the samples or their split are others"]
        if differ:
            raise ValueError(
                f"{self.path} is of another configuration: {'; '.join(differ)}; "
                "give another --out, or --overwrite to start anew (in Python out_dir and overwrite=True)"
            )


def _completed(method: str, config: dict[str, Any], num_modalities: int) -> dict[str, Any]:
    """Return the options of a method's runs, those that are younger than the runs as they were then."""
    return METHODS[method]().config() | METHODS[method].before(num_modalities) | config


def _num_modalities(content: dict[str, Any], runs: Sequence[dict[str, Any]]) -> int:
    """Return M of results, 0 where they do not tell."""
    if shapes := content["data"].get("shapes"):
        return len(shapes)
    return max((len(run["metrics"]["contribution"]) for run in runs if "metrics" in run), default=0)


def _joined(there: dict[str, Any] | None, here: dict[str, Any] | None) -> dict[str, Any]:
    """Return the part of a configuration that tells of trials, of all methods that results know."""
    if here is None:
        return {}
    parts = {key: (there or {}).get(key, {}) | here[key] for key in ("drawn", "methods")}
    return {TUNING: here | parts}


def _tuned_otherwise(there: dict[str, Any] | None, here: dict[str, Any] | None) -> list[str]:
    """Return a phrase for everything in which the tuning of results differs from that of a comparison."""
    there, here = there or {}, here or {}
    for key, name in (("trials", "trials"), ("seeds", "seeds of trials")):
        if there.get(key) != here.get(key):
            return [f"{name} is {_short(there.get(key))} there, {_short(here.get(key))} here"]
    drawn = there.get("drawn", {})
    return [
        f"drawn for {method} is {', '.join(others)} there, {', '.join(names)} here"
        for method, names in here.get("drawn", {}).items()
        if (others := drawn.get(method, names)) != names
    ]


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what is another for each file that takes the place of `path`; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _checksum(content: dict[str, Any]) -> str:
    """Return a digest of results; numbers are told apart by how JSON writes them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(found: dict[str, Any]) -> bool:
    """Whether results have the parts that are read of them."""
    configuration, runs = found["configuration"], found["runs"]
    if not (isinstance(found["data"], dict) and isinstance(configuration, dict) and isinstance(runs, list)):
        return False
    return isinstance(configuration.get("methods"), dict) and all(
        isinstance(run, dict)
        and isinstance(run.get("method"), str)
        and isinstance(run.get("seed"), int)
        and (isinstance(run.get("metrics"), dict) or "diverged" in run)
        for run in runs
    )


def _place(entry: dict[str, Any]) -> tuple[int, int]:
    """Return by what runs are ordered: methods as they are listed everywhere, then seeds."""
    return list(METHODS).index(entry["method"]), entry["seed"]


def _differ(one: Any, other: Any) -> bool:
    """Whether two values differ; the order of modalities is that of the coalition bits, and counts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one.items()) != list(other.items())
    return one != other


def _short(value: Any) -> str:
    if isinstance(value, dict):
        # Whole: which modality differs is what one looks for.
        return ", ".join(f"{name} {item}" for name, item in value.items())
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
