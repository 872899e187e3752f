"""Which configs a training step or an accuracy table visits (EQ-Net sections 3.1, 3.3 and 3.4).

`SandwichSampler` draws the largest, random and smallest subnets of one training step. `MeanBitsSampler` draws subnets
around given mean bit-widths for the table of the accuracy predictor: subnets with independent uniform layers all have
about the same mean. It is the closed form of what the official code ("search/01", after AttentiveNAS) reads off 500,000
random configs: the distribution of each layer's bits given the mean. Departs from that table by covering the whole
reachable range, where random configs never come.

Among all distributions over configs with expected mean `t = sum_l share_l E[b_l]`, the one of maximum entropy has
independent layers with `p_l(b) ~ exp(lambda share_l b)`, where `share_l` is the part of the layer in the weighting of
the mean (weights, or input elements) and `lambda` depends on `t` alone.

Shape legend: `N` configs, `G` genes of the space, `S` genes of one slot, `B` formats of the longest gene in one form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqnet.space.cost import slot_sizes
from eqnet.space.qconfig import Form, QuantConfig
from eqnet.space.space import Genomes, QuantSpace, Slot

Floats = NDArray[np.float64]
_SLOTS: tuple[Slot, Slot] = ("weight", "act")
_TILTS = 4001  # entries of the table lambda -> mean; its inverse keeps expected means within 1e-5 bits of the target
_CHUNK = 2048  # configs per block of probabilities


class SandwichSampler:
    """Largest, random and smallest subnets, in the order of one training step."""

    def __init__(
        self,
        space: QuantSpace,
        num_random: int = 1,
        form_per: Literal["layer", "net"] = "layer",
        within: Sequence[QuantSpace] = (),
    ) -> None:
        """Chooses what to draw.

        Args:
            space: the training space; layers it fixes stay fixed.
            num_random: random subnets between the largest and the smallest.
            form_per: draw granularity and symmetries for each "layer" on its own (the paper), or once for each "net".
            within: restrictions of the space, such as those to hardware targets. Each subnet lies in one of them, drawn
                anew; its largest and smallest are those of that restriction. None: the whole space.

        Raises:
            ValueError: a negative count, an unknown `form_per`, or "net" in a space whose layers share no form.
        """
        if num_random < 0:
            raise ValueError(f"num_random must not be negative; got {num_random}.")
        if form_per not in ("layer", "net"):
            raise ValueError(f"form_per must be 'layer' or 'net'; got {form_per!r}.")
        if form_per == "net" and not all(part.forms for part in within or (space,)):
            raise ValueError("no form is shared by all layers of the space; use form_per='layer'.")
        self.space, self.num_random = space, num_random
        self._allowed = [self._masks(part, form_per) for part in within or (space,)]

    def _masks(self, part: QuantSpace, form_per: Literal["layer", "net"]) -> list[NDArray[np.bool_]]:
        """Formats [G, F] of the space that a subnet of a part may draw from, one mask for each form it may have."""
        forms: Sequence[Form | None] = part.forms if form_per == "net" else (None,)
        index = self.space.translation(part)
        masks = []
        for form in forms:
            mask = np.zeros(self.space.bits.shape, bool)
            genes, formats = np.nonzero(part.formats_in(form))
            mask[genes, index[genes, formats]] = True
            masks.append(mask)
        return masks

    def sample(self, rng: np.random.Generator) -> list[QuantConfig]:
        """`[largest, random, ..., smallest]`; random bits are uniform over the choices of each quantizer."""
        bits = self.space.bits
        configs = []
        for position in ("largest", *("random",) * self.num_random, "smallest"):
            masks = self._allowed[rng.integers(len(self._allowed))]
            allowed = masks[rng.integers(len(masks))]
            if position == "largest":
                allowed = allowed & (bits == np.where(allowed, bits, 0).max(1, keepdims=True))
            elif position == "smallest":
                allowed = allowed & (bits == np.where(allowed, bits, bits.max()).min(1, keepdims=True))
            keys = np.where(allowed, rng.random(allowed.shape), -1.0)
            configs.append(self.space.decode(keys.argmax(1)))
        return configs


class _Tilt:
    """The tilted distribution of one slot: target mean bits -> odds of the formats of every gene.

    Attributes:
        minimum: smallest reachable mean bits.
        maximum: largest reachable mean bits.
    """

    def __init__(self, bits: Floats, share: Floats) -> None:
        """Tabulates mean bits over the tilt `lambda`.

        Args:
            bits: bit-widths of the formats, NaN for padding, [S, B].
            share: part of each gene in the weighting of the mean, [S]; sums to 1 (0 if nothing is weighted).
        """
        self.minimum = float(share @ np.nanmin(bits, 1)) if len(bits) else 0.0
        self.maximum = float(share @ np.nanmax(bits, 1)) if len(bits) else 0.0
        self._valid = ~np.isnan(bits)
        slopes = share[:, None] * bits
        self._ends = np.stack([np.nanmin(slopes, 1), np.nanmax(slopes, 1)]) if len(bits) else np.zeros((2, 0))
        self._slopes = np.where(self._valid, slopes, self._ends[0][:, None])
        # At both ends even the gene of the smallest share prefers a step of one bit by e^50: only one config is left.
        reach = np.arcsinh(50 / share[share > 0].min(initial=1.0))
        self._steps = np.linspace(-reach, reach, _TILTS)  # of arcsinh(lambda): fine around 0, coarse towards the ends
        means = []
        for steps in np.array_split(self._steps, 8):
            odds = self._odds(steps)
            expected = np.einsum("nsb,sb->ns", odds, np.nan_to_num(bits))
            means.append(expected / np.einsum("nsb->ns", odds) @ share)
        self._means = np.maximum.accumulate(np.concatenate(means))

    def odds(self, targets: Floats) -> Floats:
        """Unnormalised probabilities of the formats for target means [N], float64 [N, S, B], 0 for padding."""
        return self._odds(np.interp(targets, self._means, self._steps))

    def _odds(self, steps: Floats) -> Floats:
        tilts = np.sinh(steps)[:, None]
        largest = tilts * np.where(tilts < 0, *self._ends)
        odds: Floats = tilts[:, :, None] * self._slopes
        odds -= largest[:, :, None]
        np.exp(odds, out=odds)
        odds *= self._valid
        return odds


class MeanBitsSampler:
    """Random configs around target mean weight and activation bits, one form per config.

    The expected mean equals the target; a sample scatters around it, ever less towards the ends of the range, where
    only the smallest or the largest config is left. Means are weighted as in `eqnet.space.cost`; fixed layers keep
    their bits. If the layers of the space share no form, every quantizer draws its own.
    """

    def __init__(self, space: QuantSpace) -> None:
        """Solves for the tilt of every form of the space."""
        self.space = space
        self.forms: tuple[Form | None, ...] = space.forms or (None,)
        self._genes = {slot: np.flatnonzero(space.is_weight == (slot == "weight")) for slot in _SLOTS}
        self._formats: dict[
            tuple[Form | None, Slot], NDArray[np.intp]
        ] = {}  # [S, B] -> index of the format in its gene
        self._tilts: dict[tuple[Form | None, Slot], _Tilt] = {}
        solved: dict[tuple[Slot, bytes], _Tilt] = {}  # forms usually have the same bits, hence the same tilt
        for slot, genes in self._genes.items():
            sizes = {layer.name: size for layer, size in zip(space.layers, slot_sizes(space, slot), strict=True)}
            size = np.array([sum(sizes[name] for name in space.genes[g].layers) for g in genes])
            share = size / max(size.sum(), 1.0)
            for form in self.forms:
                allowed = space.formats_in(form)[genes]
                formats = np.argsort(~allowed, axis=1, kind="stable")[:, : allowed.sum(1).max(initial=1)]
                rows = np.arange(len(genes))[:, None]
                bits = np.where(allowed[rows, formats], space.bits[genes][rows, formats], np.nan)
                key = (slot, bits.tobytes())
                if key not in solved:
                    solved[key] = _Tilt(bits, share)
                self._formats[form, slot], self._tilts[form, slot] = formats, solved[key]

    def sample(
        self,
        rng: np.random.Generator,
        n: int,
        weight_bits: ArrayLike | None = None,
        act_bits: ArrayLike | None = None,
        forms: Sequence[Form] | None = None,
    ) -> Genomes:
        """Draws configs.

        Args:
            rng: source of randomness.
            n: number of configs.
            weight_bits: target mean weight bits, one number or one per config; None draws each target uniformly from
                the whole reachable range.
            act_bits: target mean activation bits, likewise.
            forms: the forms to draw from, uniformly; None for all forms of the space.

        Returns:
            Genomes int16 [n, G].

        Raises:
            ValueError: a form that the space lacks, or a target outside the reachable range.
        """
        chosen = self.forms if forms is None else tuple(forms)
        unknown = [form.name for form in chosen if form is not None and form not in self.forms]
        if unknown or not chosen:
            raise ValueError(
                f"the space has no form {', '.join(unknown)}." if unknown else "forms is empty; give at least one."
            )
        drawn = rng.integers(len(chosen), size=n)
        out = np.zeros((n, self.space.num_genes), np.int16)
        for slot, wanted in zip(_SLOTS, (weight_bits, act_bits), strict=True):
            unit = rng.random(n)
            for k, form in enumerate(chosen):
                rows = np.flatnonzero(drawn == k)
                tilt = self._tilts[form, slot]
                if wanted is None:
                    targets = tilt.minimum + unit[rows] * (tilt.maximum - tilt.minimum)
                else:
                    targets = np.broadcast_to(np.asarray(wanted, float), (n,))[rows]
                    self._check(targets, tilt, slot)
                for i in range(0, len(rows), _CHUNK):
                    block = rows[i : i + _CHUNK]
                    out[np.ix_(block, self._genes[slot])] = self._draw(rng, targets[i : i + _CHUNK], form, slot)
        return out

    def _draw(self, rng: np.random.Generator, targets: Floats, form: Form | None, slot: Slot) -> NDArray[np.intp]:
        """Formats of the genes of one slot, [N, S], by inversion of the cumulative distribution."""
        cumulative = self._tilts[form, slot].odds(targets).cumsum(-1)
        # Divided by its own last entry the sum reaches 1 exactly at the last format, so padding is never drawn.
        passed = rng.random((*cumulative.shape[:2], 1)) >= cumulative / cumulative[..., -1:]
        formats = self._formats[form, slot]
        drawn: NDArray[np.intp] = formats[np.arange(len(formats)), passed.sum(-1)]
        return drawn

    @staticmethod
    def _check(targets: Floats, tilt: _Tilt, slot: Slot) -> None:
        outside = ~((targets > tilt.minimum - 1e-9) & (targets < tilt.maximum + 1e-9))
        if outside.any():
            reachable = f"{tilt.minimum:g} to {tilt.maximum:g}"
            raise ValueError(f"mean {slot} bits of {targets[outside][0]:g} are out of reach; give {reachable}.")
