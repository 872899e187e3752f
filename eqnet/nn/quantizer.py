"""The elastic quantizer: one table of step sizes and zero points, one row per format, one active row (EQ-Net section 3.2).

All formats of a quantizer live in two flat parameters, the step sizes, which are learned, and the zero points. Row `r` owns `C`
consecutive entries of each if it is per channel and one entry, gathered C times, if it is per tensor: EQ-Net learns both
independently (Table 4). Selecting a format writes one int64 number, so any number of configs shares one compilation, and
every learned parameter takes part in every backward pass. Zero points are calibrated and stay (see `functional`).

Rows that a step did not select have an exactly zero gradient. `eqnet.training.optimizer.SupernetAdamW` leaves entries
with zero gradient and their moments untouched, so unselected rows do not drift with momentum (the official code's did).

Departs from the official code: tables are allocated here, not in the first forward; the signedness of inputs and the
calibrated flag are buffers, so a checkpoint loads without a calibration pass; the rows follow the space, not 2..8;
the gradient scale of activations counts elements of one image (LSQ's N_F), so it does not depend on the batch.

Shape legend: `R` formats (rows), `C` channels, `S` entries of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eqnet.nn.calibration import Histogram, choose_qparams
from eqnet.nn.functional import Selected, code_range, fake_quantize_active, quantize
from eqnet.nn.kernels import EAGER, Formats, Kernels
from eqnet.space import QuantFormat


class ElasticQuantizer(nn.Module):
    """Quantizes a tensor in any of several formats.

    Args:
        formats: the rows, in order.
        channels: entries of a per-channel row; 1 for activations.
        axis: axis of the channels in the tensor, None for activations.
        ndim: dimensions of the quantized tensor; with `axis`, gives the broadcast shape of the step sizes.
        numel: elements of the weight tensor; None for activations, where it is counted per image.
        signed: initial signedness; `calibrate` decides it for activations.
    """

    scale: nn.Parameter  # [S]
    zero_point: nn.Parameter  # whole numbers [S]; not learned, but parameters are the same in all processes
    row: Tensor  # int64 [1], the active row: the only mutable state of a config
    signed: Tensor  # int64 [1]
    calibrated: Tensor  # bool [1]
    index: Tensor  # int64 [R, C], entry of each row and channel
    ranges: Tensor  # float [2, R, 2], (qmin, qmax) by signedness
    groups: Tensor  # float [R, 1], step sizes that share the tensor

    def __init__(
        self,
        formats: Sequence[QuantFormat],
        channels: int = 1,
        axis: int | None = None,
        ndim: int = 1,
        numel: int | None = None,
        signed: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.formats = tuple(formats)
        self.rows = {fmt: r for r, fmt in enumerate(self.formats)}
        self.axis, self.numel = axis, numel
        self.kernels: Kernels = EAGER
        self.broadcast = (1,) * ndim if axis is None else tuple(channels if d == axis else 1 for d in range(ndim))
        self.enabled = True
        self.observing = False
        self._observed: Histogram | None = None
        index, entries = [], 0
        for fmt in self.formats:
            width = channels if fmt.granularity == "channel" else 1
            steps = torch.arange(channels) if width > 1 else torch.zeros(channels, dtype=torch.int64)
            index.append(entries + steps)
            entries += width
        self.scale = nn.Parameter(torch.ones(entries, device=device))
        self.zero_point = nn.Parameter(torch.zeros(entries, device=device), requires_grad=False)
        ranges = [[code_range(f.bits, s) for f in self.formats] for s in (False, True)]
        groups = [[1.0 if f.granularity == "tensor" else float(channels)] for f in self.formats]
        for name, table in {
            "index": torch.stack(index),
            "ranges": torch.tensor(ranges, dtype=torch.float32),  # [signed, R, 2]
            "groups": torch.tensor(groups),
        }.items():
            self.register_buffer(name, table.to(device) if device is not None else table, persistent=False)
        self.register_buffer("row", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("signed", torch.tensor([int(signed)], dtype=torch.int64, device=device))
        self.register_buffer("calibrated", torch.tensor([False], device=device))

    def select(self, fmt: QuantFormat) -> None:
        """Makes `fmt` the active format. Raises ValueError if the quantizer has no such row."""
        if fmt not in self.rows:
            raise ValueError(f"no row for {fmt}; the quantizer has {len(self.rows)} formats.")
        self.row.fill_(self.rows[fmt])

    @property
    def format(self) -> QuantFormat:
        """The active format."""
        return self.formats[int(self.row)]

    @property
    def active(self) -> Formats:
        """What the rows of the tables mean, and the active one."""
        tables = self._buffers  # attributes of modules are slow to look up, and this runs for every tensor of a step
        names = ("index", "ranges", "groups", "signed", "row")
        return Formats(*(tables[name] for name in names))  # type: ignore[arg-type]

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale, zero point, qmin, qmax) of the active row, broadcastable to the tensor."""
        index = self.index.index_select(0, self.row)[0]
        scale, zero = (table.index_select(0, index).view(self.broadcast) for table in (self.scale, self.zero_point))
        bounds = self.ranges.index_select(0, self.signed)[0].index_select(0, self.row)[0]
        return scale, zero, bounds[0], bounds[1]

    @torch.no_grad()
    def has_integer_zero_points(self) -> bool:
        """Whether every zero point is a code of its format, and 0 where that is symmetric; a damaged file may hold others."""
        zero = self.zero_point[self.index]  # [R, C]
        low, high = self.ranges[int(self.signed)].clone().unbind(1)  # [R]
        symmetric = [fmt.symmetric for fmt in self.formats]
        low[symmetric], high[symmetric] = 0, 0
        return bool(((zero == zero.round()) & (zero >= low[:, None]) & (zero <= high[:, None])).all())

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes `x` in the active format; same shape."""
        if self.observing:
            self._observe(x)
        if not self.enabled:
            return x
        return fake_quantize_active(x, self.scale, self.zero_point, self.selected(x))

    @property
    def plain(self) -> bool:
        """Whether calling it does nothing but fake-quantize: it is on, does not observe, and nobody hooked it."""
        return self.enabled and not (self.observing or self._forward_hooks or self._forward_pre_hooks)

    def selected(self, x: Tensor) -> Selected:
        """The format that is active now, for `x`."""
        numel = x[0].numel() if self.numel is None else self.numel
        return Selected.of(self.active, self.axis, numel, self.kernels)

    @torch.no_grad()
    def quantized(self, x: Tensor, row: int) -> Tensor:
        """Fake-quantizes `x` in the format of a row, whichever is active; same shape, no gradient."""
        formats = self.active._replace(row=torch.full_like(self.row, row))
        return fake_quantize_active(x, self.scale, self.zero_point, Selected.of(formats, self.axis, 1, self.kernels))

    @torch.no_grad()
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, step size, zero point) of `x` in the active format; see `functional.quantize`."""
        return quantize(x, *self.qparams())

    @torch.no_grad()
    def inherit(self, source: ElasticQuantizer) -> None:
        """Takes the step sizes, zero points and signedness of each of its formats from a quantizer of the same tensor.

        Raises:
            ValueError: a format that `source` lacks.
        """
        for r, fmt in enumerate(self.formats):
            if fmt not in source.rows:
                raise ValueError(f"no row for {fmt}; the quantizer has {len(source.rows)} formats.")
            row = source.rows[fmt]
            self.scale[self.index[r]] = source.scale[source.index[row]].to(self.scale)
            self.zero_point[self.index[r]] = source.zero_point[source.index[row]].to(self.zero_point)
        self.signed.copy_(source.signed)
        self.calibrated.copy_(source.calibrated)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets every row from the values of `x` (EQ-Net's L2.4 search). Inputs without negative values become unsigned.

        Args:
            x: a weight tensor, or inputs of any shape.

        Raises:
            ValueError: `x` has values that are not finite, or none (inputs).
        """
        x = x.detach().to(self.scale.device, torch.float32)
        rows = range(len(self.formats))
        if self.axis is None:
            values = Histogram(x.device)
            values.add(x)
            self._set_rows(values, rows)
        else:
            for granularity, channels in (
                ("tensor", x.reshape(1, -1)),
                ("channel", x.movedim(self.axis, 0).flatten(1)),
            ):
                self._set_rows(channels, [r for r in rows if self.formats[r].granularity == granularity])
        self.calibrated.fill_(True)

    def _set_rows(self, values: Tensor | Histogram, rows: Sequence[int]) -> None:
        """Sets rows of one granularity from values [C, M], or from a histogram, which also decides the signedness."""
        if not rows:
            return
        if isinstance(values, Histogram):
            self.signed.fill_(int(float(values.low) < 0))
        bits, symmetric = zip(*((self.formats[r].bits, self.formats[r].symmetric) for r in rows), strict=True)
        found = choose_qparams(values, torch.tensor(bits), torch.tensor(symmetric), bool(self.signed))
        scale, zero = (t.to(self.scale.device) for t in found)
        for r, row_scale, row_zero in zip(rows, scale, zero, strict=True):
            entries = self.index[r, : scale.shape[1]]
            self.scale[entries], self.zero_point[entries] = row_scale, row_zero

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Counts the values of `x` and sets the active row, with which what comes next runs, from what was counted.

        Not each time, but whenever the number of tensors has doubled: the row changes less and less.
        """
        if self._observed is None:
            self._observed = Histogram(self.scale.device)
        self._observed.add(x)
        if self._observed.tensors.bit_count() == 1:
            self._set_rows(self._observed, [int(self.row)])

    @torch.no_grad()
    def finish_observation(self) -> None:
        """Sets every row from the inputs that passed while `observing`, if any did, and stops observing."""
        if self._observed is not None:
            self._set_rows(self._observed, range(len(self.formats)))
            self.calibrated.fill_(True)
        self.cancel_observation()

    def cancel_observation(self) -> None:
        """Stops observing and forgets what was observed; the rows stay as they are."""
        self.observing, self._observed = False, None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"formats={len(self.formats)}, entries={self.scale.numel()}, axis={self.axis}"
