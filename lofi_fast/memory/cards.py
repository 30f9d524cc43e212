"""Cards: what is assumed about a GPU when planning for one that is not here. Nothing in this file is measured by us.

`total` is what nvidia-smi shows; `usable` is what CUDA shows as the device's total memory (the rest is the driver's
and firmware's, and with error correction some of the memory itself) and no process can hold more than that. Both are
the makers' and users' published readings, the lowest where they differ between drivers (torch prints MiB of
total_memory, out-of-memory messages print GiB). "?": the message does not name its card, and is taken for the one whose
size it is; "as": no reading was found, and that of a card like it is taken:
    RTX 4060      8188 MiB; "7.63 GiB" ?
    RTX 3070      8192 MiB by nvidia-smi; "total capacity of 7.78 GiB"; the RTX 3060 Ti as this one
    RTX 2070, RTX 2080   8192 MiB; as the RTX 3070 with older drivers, "7.79 GiB"
    RTX 3080      10240 MiB; "9.78 GiB"; with 12 GB 12288 MiB, "11.75 GiB" ?
    RTX 2080 Ti   11264 MiB (11019 under drivers before 510); "10.75 GiB", total_memory=11019MB
    RTX 5070      12227 MiB; "11.49 GiB" ?
    RTX 4070      12282 MiB; "11.63 GiB" ?
    RTX 3060      12288 MiB; total_memory=11931MB to 12044MB
    T4            15360 MiB; "14.56 GiB" to "14.76 GiB"
    RTX 5060 Ti, 5070 Ti, 5080   16311 or 16303 MiB; "15.46 GiB" to "15.48 GiB" ?
    RTX A4000     16376 MiB; "15.61 GiB"; the RTX 4060 Ti (16380 MiB) as this one
    RTX 4080      16376 MiB; total_memory=16049MB; the Super and the RTX 4070 Ti Super as this one
    V100          16384 MiB; total_memory=16160MB; with 32 GB 32768 MiB, "31.73 GiB" ?
    L4            23034 MiB; "21.96 GiB" to "22.03 GiB" ?
    A10, A10G     23028 MiB; "21.98 GiB" to "22.06 GiB"
    RTX 4090      24564 MiB; "23.52 GiB" to "23.64 GiB"; the RTX A5000 as this one
    RTX 3090      24576 MiB; total_memory=24259MB
    RTX 5090      32607 MiB; "31.36 GiB"
    A100 40GB     40960 MiB (40536 under drivers before 510); total_memory=40536MB, "39.39 GiB" with newer drivers
    A40           46068 MiB; "44.34 GiB" to "44.52 GiB"; the L40S as this one
    RTX A6000     49140 MiB; "47.40 GiB" to "47.54 GiB"; the RTX 6000 Ada as this one
    H100 80GB     81559 MiB; total_memory=81082MB to 81090MB
    A100 80GB     81920 MiB; total_memory=81153MB
    H200          143771 MiB; "139.72 GiB"
    B200          183359 MiB; "178.35 GiB"
`capability` is NVIDIA's compute capability; it decides bf16 or fp16 (lofi_fast.precision).
`tflops` is the makers' peak of the tensor cores for dense products in fp16 (and bf16, where there is one) that are
summed in fp32, at boost clock. GeForce cards run these at half the rate of fp16 sums, which is the figure on their
boxes; so do Turing's, and the A10G against the A10. `bandwidth` is the makers' peak of the memory. H100 is the SXM
card; the PCIe one is slower. Cards without tensor cores (GTX) are not listed: they train in fp32, which the planner
does not count with on a GPU, and current builds of PyTorch leave them out.
`context` is one CUDA context of this process, see `assumed_context`. `libraries` is what cuDNN, cuBLAS and our own
kernels take outside torch's allocator once a step has run (their code is loaded when first used): a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lofi_fast.errors import InputError

MiB, GiB = 2**20, 2**30
LIBRARIES = 250_000_000  # a guess, see above


def assumed_context(capability: tuple[int, int]) -> int:
    """Bytes that a CUDA context is assumed to hold where it cannot be measured.

    This rests on one published reading: 426 MiB on a card of capability 8.9 (142 multiprocessors, torch 2.10, CUDA 13,
    code loaded when first used). A context grows with the number of multiprocessors; the others
    are guesses around that reading: 300 MB for older architectures, 600 MB for those of data centres since Hopper, 500
    MB for the GeForce cards since Blackwell, which have 36 to 170 multiprocessors.
    """
    if capability < (8, 0):
        return 300_000_000
    if capability < (9, 0):
        return 450_000_000
    return 600_000_000 if capability < (12, 0) else 500_000_000


@dataclass(frozen=True)
class Profile:
    """One card as assumed; bytes. The module's docstring gives the basis of every field."""

    name: str
    card_class: int  # the "11" of "an 11 GB card": its nominal memory in GiB
    total: int
    usable: int
    capability: tuple[int, int]
    tflops: float  # 1e12 operations a second, a multiplication and an addition counting as two
    bandwidth: float  # 1e9 bytes a second

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


# Smallest class first, and in a class the one with the least usable memory first, which stands for it.
PROFILES = (
    Profile("GeForce RTX 4060", 8, 8188 * MiB, int(7.63 * GiB), (8, 9), 30.2, 272),
    Profile("GeForce RTX 3070", 8, 8192 * MiB, int(7.78 * GiB), (8, 6), 40.6, 448),
    Profile("GeForce RTX 3060 Ti", 8, 8192 * MiB, int(7.78 * GiB), (8, 6), 32.4, 448),
    Profile("GeForce RTX 2070", 8, 8192 * MiB, int(7.79 * GiB), (7, 5), 29.9, 448),
    Profile("GeForce RTX 2080", 8, 8192 * MiB, int(7.79 * GiB), (7, 5), 40.3, 448),
    Profile("GeForce RTX 3080 10GB", 10, 10240 * MiB, int(9.78 * GiB), (8, 6), 59.5, 760),
    Profile("GeForce RTX 2080 Ti", 11, 11264 * MiB, int(10.75 * GiB), (7, 5), 53.8, 616),
    Profile("GeForce RTX 5070", 12, 12227 * MiB, int(11.49 * GiB), (12, 0), 61.7, 672),
    Profile("GeForce RTX 4070", 12, 12282 * MiB, int(11.63 * GiB), (8, 9), 58.3, 504),
    Profile("GeForce RTX 3060", 12, 12288 * MiB, 11931 * MiB, (8, 6), 25.5, 360),
    Profile("GeForce RTX 3080 12GB", 12, 12288 * MiB, int(11.75 * GiB), (8, 6), 61.3, 912),
    Profile("T4", 16, 15360 * MiB, int(14.56 * GiB), (7, 5), 65, 320),
    Profile("GeForce RTX 5060 Ti 16GB", 16, 16311 * MiB, int(15.46 * GiB), (12, 0), 47.4, 448),
    Profile("GeForce RTX 5070 Ti", 16, 16303 * MiB, int(15.46 * GiB), (12, 0), 87.9, 896),
    Profile("GeForce RTX 5080", 16, 16303 * MiB, int(15.46 * GiB), (12, 0), 112.6, 960),
    Profile("RTX A4000", 16, 16376 * MiB, int(15.61 * GiB), (8, 6), 76.7, 448),
    Profile("GeForce RTX 4060 Ti 16GB", 16, 16380 * MiB, int(15.61 * GiB), (8, 9), 44.1, 288),
    Profile("GeForce RTX 4080", 16, 16376 * MiB, 16049 * MiB, (8, 9), 97.5, 716),
    Profile("GeForce RTX 4080 Super", 16, 16376 * MiB, 16049 * MiB, (8, 9), 104.4, 736),
    Profile("GeForce RTX 4070 Ti Super", 16, 16376 * MiB, 16049 * MiB, (8, 9), 88.2, 672),
    Profile("V100 16GB", 16, 16384 * MiB, 16160 * MiB, (7, 0), 112, 900),
    Profile("L4", 24, 23034 * MiB, int(21.96 * GiB), (8, 9), 121, 300),
    Profile("A10", 24, 23028 * MiB, int(21.98 * GiB), (8, 6), 125, 600),
    Profile("A10G", 24, 23028 * MiB, int(21.98 * GiB), (8, 6), 70, 600),
    Profile("GeForce RTX 4090", 24, 24564 * MiB, int(23.52 * GiB), (8, 9), 165.2, 1008),
    Profile("RTX A5000", 24, 24564 * MiB, int(23.52 * GiB), (8, 6), 111.1, 768),
    Profile("GeForce RTX 3090", 24, 24576 * MiB, 24259 * MiB, (8, 6), 71, 936),
    Profile("GeForce RTX 5090", 32, 32607 * MiB, int(31.36 * GiB), (12, 0), 209.5, 1792),
    Profile("V100 32GB", 32, 32768 * MiB, int(31.73 * GiB), (7, 0), 112, 900),
    Profile("A100 40GB", 40, 40960 * MiB, int(39.39 * GiB), (8, 0), 312, 1555),
    Profile("A40", 48, 46068 * MiB, int(44.34 * GiB), (8, 6), 149.7, 696),
    Profile("L40S", 48, 46068 * MiB, int(44.34 * GiB), (8, 9), 362, 864),
    Profile("RTX A6000", 48, 49140 * MiB, int(47.40 * GiB), (8, 6), 154.8, 768),
    Profile("RTX 6000 Ada", 48, 49140 * MiB, int(47.40 * GiB), (8, 9), 364.2, 960),
    Profile("H100 80GB", 80, 81559 * MiB, 81082 * MiB, (9, 0), 989, 3350),
    Profile("A100 80GB", 80, 81920 * MiB, 81153 * MiB, (8, 0), 312, 1935),
    Profile("H200 141GB", 141, 143771 * MiB, int(139.72 * GiB), (9, 0), 989, 4800),
    Profile("B200 180GB", 180, 183359 * MiB, int(178.35 * GiB), (10, 0), 2250, 8000),
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
    """A card as people write it, letters and digits alone: "2080ti", "rtx 4090", or a class of cards, like "16GB", of
    which the one with the least usable memory stands for all. Part of a name will do where it fits one card alone, or
    is the end of one card's name alone ("4080" is not the Super). Raises InputError when it means none or several.
    """
    if of_class := re.fullmatch(r"\s*(\d+)\s*Gi?B?\s*", name, re.IGNORECASE | re.ASCII):
        found = [profile for profile in PROFILES if profile.card_class == int(of_class[1])]
        if not found:
            classes = ", ".join(f"{size}GB" for size in dict.fromkeys(profile.card_class for profile in PROFILES))
            raise InputError(f"--card {name}: no known card has so much memory; the classes are {classes}")
        return found[0]
    wanted = _letters(name)
    holding = [profile for profile in PROFILES if wanted and wanted in _letters(profile.name)]
    ending = [profile for profile in holding if _letters(profile.name).endswith(wanted)]
    exact = [profile for profile in holding if _letters(profile.name) == wanted]
    for found in (exact, ending, holding):
        if len(found) == 1:
            return found[0]
    known = ", ".join(profile.name for profile in holding or PROFILES)
    raise InputError(f"--card {name!r} is {'several cards' if holding else 'no known card'}: choose one of {known}")


# Words of a device's name that do not tell the model: maker, line, form, memory, error correction.
_BESIDE = re.compile(r"nvidia|geforce|tesla|quadro|generation|pcie|hbm\d*e?|sxm\d*|\d+gb", re.ASCII)


def profile_of(device: str) -> Profile | None:
    """The card that torch or NVML calls `device`, like "NVIDIA GeForce RTX 3090" or "NVIDIA A100-SXM4-40GB"; None where
    it is not in the table, as no laptop's card is. Of two that differ in memory alone, which the name does not always
    tell, the one with the smaller bandwidth.
    """
    model, sizes = _model(device)
    found = [profile for profile in PROFILES if _model(profile.name)[0] == model]
    told = [profile for profile in found if f"{profile.card_class}gb" in sizes]
    return min(told or found, key=lambda profile: profile.bandwidth, default=None)


def _model(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words of a name that tell the model, and those that tell its memory."""
    words = frozenset(re.findall(r"[a-z0-9]+", name.lower()))
    beside = frozenset(word for word in words if _BESIDE.fullmatch(word))
    return words - beside, frozenset(word for word in beside if word.endswith("gb"))


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
