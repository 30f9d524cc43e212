"""Seconds of a step before any has run, on a card by name: an estimate, for planning. A training measures.

A step at full fidelity takes what its encoder computes and what it moves, at the rates of the card (memory/cards.py),
and what the host needs besides:

    seconds = 3 * 2 * multiply_adds / (COMPUTE * peak) + bytes / (BANDWIDTH * bandwidth) + HOST

Forward computes once, backward twice as much; convolutions and the light operators between them take turns, so the two
times are added up. The two shares of the maker's peaks are what a network as a whole reaches, not its best kernel. They
were set by steps on an NVIDIA H200 (TSM-R18, bf16, one graph over 100 snippets of 224 px: 32.5 ms of the encoder, 47.8
ms of the whole step with one video; bench/results/step.jsonl), where large products reach 0.78 of the peak, large
copies 0.87, and the operators 0.67 to 0.91 of those. Other cards were not measured: expect a factor of up to 1.5
either way. Small steps, of less than some 20 ms, are the host's time, and take longer than this says.

What any other plan takes is that times its cost (`plans.relative_cost`), which is the order in which the planner tries
them: so there is one model of time, and the highest rung is sought in it. On a slow card a graph of few snippets runs
for longer than the host needs to launch it, so what counts as few depends on the card (`launch_bound`).
"""

from __future__ import annotations

from lofi_fast.fidelity import Fidelity
from lofi_fast.memory.cards import PROFILES, Profile
from lofi_fast.memory.step_bytes import Setting

COMPUTE = 0.5  # of the tensor cores' peak
BANDWIDTH = 0.65  # of the memory's peak
GRAPH = 0.005  # seconds that the host needs to launch a graph's forward and backward; 50 graphs took 259 ms there
HOST = 0.011  # seconds of a step at least, for the kernels of head, loss and optimiser, which are small


def full_step_seconds(setting: Setting, full: Fidelity, batch: int, card: Profile) -> float:
    """Of a step of `batch` videos of cost 1 (`plans.relative_cost`): at full fidelity, many videos at once."""
    frames = batch * full.num_frames
    operations = 3 * 2 * setting.encoder.multiply_adds(full.side)
    moved = setting.itemsize * setting.encoder.moved(full.side)
    per_frame = operations / (COMPUTE * card.tflops * 1e12) + moved / (BANDWIDTH * card.bandwidth * 1e9)
    return frames * per_frame + HOST


def launch_bound(setting: Setting, full: Fidelity, batch: int, card: Profile) -> float:
    """Frame pixels in one graph of the encoder below which the host takes longer to launch it than the card to run
    it, for `plans.relative_cost`.
    """
    return GRAPH * batch * full.num_frames * full.side**2 / full_step_seconds(setting, full, batch, card)


def slowest(setting: Setting, full: Fidelity, batch: int, card_class: int) -> Profile:
    """Of all known cards of a class and of larger ones, the one on which a step takes the longest: it stands for the
    card that a budget alone does not tell, so that a larger budget never means a slower card.
    """
    cards = [card for card in PROFILES if card.card_class >= card_class]
    return max(cards, key=lambda card: full_step_seconds(setting, full, batch, card))
