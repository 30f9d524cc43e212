"""Cards: what is assumed about a GPU when planning for one that is not here. Nothing in this file is measured by us.

`total` is what nvidia-smi shows; `usable` is what CUDA shows as the device's total memory (the rest is the driver's
and firmware's) and no process can hold more than that. Both are the makers' and users' published readings, the lowest
where they differ between drivers (torch prints MiB of total_memory, out-of-memory messages print GiB):
    RTX 3070      8192 MiB by nvidia-smi; "total capacity of 7.78 GiB"
    RTX 2080 Ti   11264 MiB (11019 under drivers before 510); "10.75 GiB", total_memory=11019MB
    RTX 3060      12288 MiB; total_memory=11931MB to 12044MB
    RTX 4080      16376 MiB; total_memory=16049MB
    RTX 4090      24564 MiB; "23.52 GiB" to "23.64 GiB"
    RTX 3090      24576 MiB; total_memory=24259MB
    A100 40GB     40960 MiB (40536 under drivers before 510); total_memory=40536MB, "39.39 GiB" with newer drivers
    H100 80GB     81559 MiB; total_memory=81082MB to 81090MB
    A100 80GB     81920 MiB; total_memory=81153MB
    H200          143771 MiB; "139.72 GiB"
`capability` is NVIDIA's compute capability; it decides bf16 or fp16 (lofi_fast.precision).
`context` is one CUDA context of this process, see `assumed_context`. `libraries` is what cuDNN, cuBLAS and our own
kernels take outside torch's allocator once a step has run (their code is loaded when first used): a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from lofi_fast.errors import InputError

MiB, GiB = 2**20, 2**30
LIBRARIES = 250_000_000  # a guess, see above


def assumed_context(capability: tuple[int, int]) -> int:
    """Bytes that a CUDA context is assumed to hold where it cannot be measured.

    This rests on one published reading: 426 MiB on a card of capability 8.9 (142 multiprocessors, torch 2.10, CUDA 13,
    code loaded when first used). A context grows with the number of multiprocessors; 300 and 600 MB for older and
    newer architectures are guesses around that reading.
    """
    if capability < (8, 0):
        return 300_000_000
    return 450_000_000 if capability < (9, 0) else 600_000_000


@dataclass(frozen=True)
class Profile:
    """One card as assumed; bytes. The module's docstring gives the basis of every field."""

    name: str
    card_class: int  # the "11" of "an 11 GB card": its nominal memory in GiB
    total: int
    usable: int
    capability: tuple[int, int]

    @property
    def context(self) -> int:
        return assumed_context(self.capability)

    @property
    def libraries(self) -> int:
        return LIBRARIES

    @property
    def outside_torch(self) -> int:
        return self.context + self.libraries

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} ({self.usable / 1e9:.1f} GB usable, compute capability {major}.{minor}; assumed)"


# Smallest class first; the first of a class stands for it: the one with the least usable memory.
PROFILES = (
    Profile("GeForce RTX 3070", 8, 8192 * MiB, int(7.78 * GiB), (8, 6)),
    Profile("GeForce RTX 2080 Ti", 11, 11264 * MiB, int(10.75 * GiB), (7, 5)),
    Profile("GeForce RTX 3060", 12, 12288 * MiB, 11931 * MiB, (8, 6)),
    Profile("GeForce RTX 4080", 16, 16376 * MiB, 16049 * MiB, (8, 9)),
    Profile("GeForce RTX 4090", 24, 24564 * MiB, int(23.52 * GiB), (8, 9)),
    Profile("GeForce RTX 3090", 24, 24576 * MiB, 24259 * MiB, (8, 6)),
    Profile("A100 40GB", 40, 40960 * MiB, int(39.39 * GiB), (8, 0)),
    Profile("H100 80GB", 80, 81559 * MiB, 81082 * MiB, (9, 0)),
    Profile("A100 80GB", 80, 81920 * MiB, 81153 * MiB, (8, 0)),
    Profile("H200 141GB", 141, 143771 * MiB, int(139.72 * GiB), (9, 0)),
)


def profile_for(budget: int) -> Profile:
    """The smallest card class that a budget of so many bytes means: 11 GB and 11 GiB both mean the 11 GB card.

    Raises InputError when no class is so large.
    """
    for profile in PROFILES:
        if budget <= profile.card_class * GiB:
            return profile
    raise InputError(
        f"--mem-budget: no known card holds {budget / 1e9:.1f} GB; the largest is {PROFILES[-1]}, "
        "so plan on the machine itself"
    )


def profile_named(name: str) -> Profile:
    """The card whose name holds `name`, letters and digits alone ("2080ti", "rtx 4090"). Raises InputError when none
    or several do.
    """
    wanted = _letters(name)
    found = [profile for profile in PROFILES if wanted and wanted in _letters(profile.name)]
    if len(found) != 1:
        known = ", ".join(profile.name for profile in found or PROFILES)
        raise InputError(f"{name!r} is {'several cards' if found else 'no known card'}: choose one of {known}")
    return found[0]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
