"""Control groups (Linux, versions 1 and 2): the limits that a container or a job scheduler sets on memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# (limit, what is used, prefix of figures in memory.stat that include the groups inside), by version.
_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}


@dataclass(frozen=True)
class ControlGroup:
    """One group of the memory controller."""

    folder: Path
    version: int

    def limit(self) -> int | None:
        """Bytes that the group may hold; None where it has no limit. Raises OSError."""
        text = (self.folder / _FILES[self.version][0]).read_text().strip()
        return None if text == "max" else int(text)

    def set_limit(self, limit: int) -> None:
        """Limit the group to so many bytes. Raises OSError where that is not allowed or the controller is missing."""
        (self.folder / _FILES[self.version][0]).write_text(str(limit))

    def used(self) -> int:
        """Bytes that the group holds without the page cache, which the kernel gives up when needed. Raises OSError."""
        _, name, prefix = _FILES[self.version]
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return int((self.folder / name).read_text()) - cached


def control_groups() -> list[ControlGroup]:
    """The groups that this process is in, the innermost first; an empty list where the kernel has none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, ROOT / "memory") if controllers else (2, ROOT)
        own = root / name.lstrip("/")
        folders = (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
        found += [ControlGroup(folder, version) for folder in folders if (folder / _FILES[version][0]).exists()]
    return found
