"""BMN: boundary-matching network (Lin et al., ICCV 2019), with a class score of each proposal added.

Shapes: B windows, C channels, L snippets, D durations, N valid proposal cells (start s, duration d) with s + d < L,
d < D; proposal (s, d) covers snippets s..s+d. K classes.

The boundary-matching layer and the convolution over its samples are one `align_linear`: the (C x samples) x N tensor
never exists. The convolutions after it see proposals beside each other, so from there on they lie on a map. Its other
places hold what the layers before make of a proposal that is sampled nowhere, as in the authors' code.

The authors' code since 2020 (JJBOY/BMN-Boundary-Matching-Network) differs from the paper in two things, and
`bmn.definition` says which of both is meant. Its windows are wider: see `boundary_matching_grid`. And its map is over
(start, last snippet), L x L, so that the neighbours of a proposal start or end a snippet away, where the paper's map is
over (duration, start).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lofi_fast.config import BMNConfig, HeadConfig
from lofi_fast.head.bmn_ledger import GROUPS
from lofi_fast.head.map_head import MapHead
from lofi_fast.head.maps import AlignLinear, HeadOutput
from lofi_fast.kernels import align_linear, boundary_matching_grid, proposal_grid


def convolution(channels: int, out: int, groups: int) -> nn.Sequential:
    """Over three snippets, and a ReLU."""
    return nn.Sequential(nn.Conv1d(channels, out, 3, padding=1, groups=groups), nn.ReLU(inplace=True))


class BMN(MapHead):
    """Snippet features (B, num_features, L) -> `HeadOutput`. Weights do not depend on L, so every rung shares them.

    Labels, loss and the choice of proposals are those of `MapHead`. A proposal's score is the product of both its
    scores and of those of its start and its end.
    """

    WITH_BOUNDARIES = True

    def __init__(
        self, config: HeadConfig, bmn: BMNConfig, num_features: int, num_classes: int, full_snippets: int
    ) -> None:
        super().__init__()
        self.config, self.bmn, self.num_classes, self.full_snippets = config, bmn, num_classes, full_snippets
        hidden, bins = config.hidden, config.inner_bins
        self.base = nn.Sequential(convolution(num_features, hidden, GROUPS), convolution(hidden, hidden, GROUPS))
        self.start, self.end = (
            nn.Sequential(convolution(hidden, hidden, GROUPS), nn.Conv1d(hidden, 1, 1)) for _ in range(2)
        )
        self.sampled = convolution(hidden, hidden, 1)
        self.inner = AlignLinear(hidden, config.map_channels, bins, hidden * bins)
        narrow = config.map_channels // 4
        self.reduce = nn.Conv2d(config.map_channels, narrow, 1)
        self.middle1, self.middle2 = (nn.Conv2d(narrow, narrow, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(narrow, 2, 1)
        self.classifier = AlignLinear(num_features, num_classes, config.class_bins, num_features * config.class_bins)

    def max_duration(self, num_snippets: int) -> int:
        """D of a rung: the full grid's limit, shrunk with L so that it stays the same number of seconds."""
        return self.config.longest(num_snippets, self.full_snippets)

    def forward(self, features_BCL: Tensor) -> HeadOutput:
        length = features_BCL.shape[2]
        duration = self.max_duration(length)
        base_BCL = self.base(features_BCL)
        start_BL, end_BL = self.start(base_BCL).squeeze(1), self.end(base_BCL).squeeze(1)
        grid = boundary_matching_grid(length, duration, self.config.inner_bins, self.bmn.samples, self.bmn.definition)
        aligned_BON = F.relu(align_linear(self.sampled(base_BCL), grid, self.inner.weight, self.inner.bias))
        cells_N2 = grid.cells_on(features_BCL.device)
        proposals_B2N = self._map(aligned_BON, cells_N2, duration, length)
        class_grid = proposal_grid(length, duration, self.config.class_bins, expand=0.0, margin=0.5)
        classes_BKN = align_linear(features_BCL, class_grid, self.classifier.weight, self.classifier.bias)
        return HeadOutput(start_BL, end_BL, proposals_B2N, classes_BKN, cells_N2)

    def _map(self, x_BON: Tensor, cells_N2: Tensor, duration: int, length: int) -> Tensor:
        """The convolutions after the first, over the map of all proposals."""
        d, s = cells_N2.unbind(1)
        released = self.bmn.definition == "released"
        rows, columns = (s, s + d) if released else (d, s)
        x_BON1 = F.relu(self.reduce(x_BON.unsqueeze(3)))
        bias = self.inner.bias
        assert bias is not None
        nowhere_1O11 = F.relu(self.reduce(F.relu(bias)[None, :, None, None]))
        x = nowhere_1O11.expand(len(x_BON1), -1, length if released else duration, length).clone()
        x[:, :, rows, columns] = x_BON1.squeeze(3)
        x = F.relu(self.middle1(x))
        proposals_B2N: Tensor = self.last(F.relu(self.middle2(x)))[:, :, rows, columns]
        return proposals_B2N
