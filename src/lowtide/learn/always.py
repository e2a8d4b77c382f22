"""Products with the few weights that are read whatever the mask: outliers and exact columns."""

from __future__ import annotations

import warnings

import torch


class Always:
    """Weights that are read whatever the mask, few of [out, in]: in rows and in columns, compressed.

    A dense product would take as long as that of a slice; for one weight in 250, which is what outliers are, this took
    a sixth to a half of that (SmolLM2's shapes, one thread; a trial that left no results file). On other devices than
    the processor they are a dense product like any other.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        if weights.device.type != "cpu":
            self.by_rows, self.by_columns = weights, weights.T
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            self.by_rows, self.by_columns = weights.to_sparse_csr(), weights.T.contiguous().to_sparse_csr()

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y f32 [T, out] += weights x, for x f32 [T, in]."""
        y.T.addmm_(self.by_rows, x.T)

    def add_back(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x f32 [T, in] += what y f32 [T, out] says of it."""
        x.T.addmm_(self.by_columns, y.T)

    def dense(self) -> torch.Tensor:
        """f32 [out, in]."""
        return self.by_rows if self.by_rows.layout == torch.strided else self.by_rows.to_dense()
