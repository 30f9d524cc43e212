"""Device profiles: budgets and names find the card that people mean, and the figures hang together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lofi_fast.budget import Budget
from lofi_fast.errors import InputError
from lofi_fast.memory.cards import PROFILES, Profile, assumed_context, profile_for, profile_named, profile_of
from lofi_fast.precision import BF16_CAPABILITY


@pytest.mark.parametrize("card_class", [8, 10, 11, 12, 16, 24, 32, 40, 48, 80, 141, 180])
def test_gb_and_gib_mean_the_same_card(card_class: int) -> None:
    for unit in ("GB", "GiB"):
        amount = Budget.parse(f"{card_class}{unit}").amount
        assert amount is not None
        assert profile_for(amount).card_class == card_class


def test_an_11_gb_card_is_the_turing_one_without_bf16() -> None:
    profile = profile_for(11 * 10**9)
    assert profile.name == "GeForce RTX 2080 Ti"
    assert profile.capability < BF16_CAPABILITY
    without = {other.name for other in PROFILES if other.capability < BF16_CAPABILITY}
    assert without == {"GeForce RTX 2070", "GeForce RTX 2080", "GeForce RTX 2080 Ti", "T4", "V100 16GB", "V100 32GB"}


@given(st.integers(1, 141 * 2**30), st.integers(1, 141 * 2**30))
def test_more_budget_never_means_a_smaller_card(one: int, other: int) -> None:
    small, large = profile_for(min(one, other)), profile_for(max(one, other))
    assert small.usable <= large.usable
    assert small.card_class * 2**30 >= min(one, other)


def test_a_budget_beyond_every_card_is_refused_by_its_flag() -> None:
    with pytest.raises(InputError, match=r"--mem-budget: no known card holds 200\.0 GB"):
        profile_for(200 * 10**9)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_figures_hang_together(profile: Profile) -> None:
    assert 0.93 * profile.total < profile.usable < profile.total <= profile.card_class * 2**30
    assert profile.outside_torch == profile.context + profile.libraries < 0.1 * profile.usable
    assert profile.context == assumed_context(profile.capability)
    assert profile_named(profile.name) is profile
    assert "assumed" in str(profile)
    assert 20 < profile.tflops < 3000 and 200 < profile.bandwidth < 10_000


def test_smallest_first_and_the_least_usable_stands_for_its_class() -> None:
    assert [p.usable for p in PROFILES] == sorted(p.usable for p in PROFILES)
    assert profile_for(24 * 10**9).name == "L4"
    for profile in PROFILES:
        first = profile_named(f"{profile.card_class}GB")
        assert first is profile_for(profile.card_class * 10**9) and first.usable <= profile.usable


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("2080ti", "GeForce RTX 2080 Ti"),
        ("rtx-4090", "GeForce RTX 4090"),
        ("h100", "H100 80GB"),
        ("4080", "GeForce RTX 4080"),  # not the Super
        ("2080", "GeForce RTX 2080"),  # not the Ti
        ("a10", "A10"),  # not the A100 or the A10G
        ("16GB", "T4"),
        ("8 GiB", "GeForce RTX 4060"),
    ],
)
def test_names_as_people_write_them(name: str, found: str) -> None:
    assert profile_named(name).name == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("A100", "several cards: choose one of A100 40GB, A100 80GB"),
        ("3080", "several cards"),
        ("Voodoo", "no known card"),
        ("13GB", "the classes are 8GB, 10GB"),
        (" - ", "no known"),
    ],
)
def test_names_that_mean_no_one_card(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        profile_named(name)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 2080 Ti", "GeForce RTX 2080 Ti"),
        ("NVIDIA GeForce RTX 4080 SUPER", "GeForce RTX 4080 Super"),
        ("NVIDIA GeForce RTX 3080", "GeForce RTX 3080 10GB"),  # the slower of the two that have this name
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H200", "H200 141GB"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("AMD EPYC 7763", None),
        ("", None),
    ],
)
def test_devices_as_drivers_name_them(device: str, name: str | None) -> None:
    found = profile_of(device)
    assert (None if found is None else found.name) == name
