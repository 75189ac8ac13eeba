"""The strongest contexts of many units at once, in memory that tokens do not add to."""

import torch

from saelens_scaffold.inspect.output import Context

BEFORE, AFTER = 15, 8
"""Tokens of a context before and after the strongest one."""


class StrongestContexts:
    """
    The contexts in which units (latents, or ends of directions) are strongest.

    A sequence gives each unit at most one, or a unit that is strong for a while would fill
    its list with one place. Kept are n_units * n_contexts windows, whatever is read.

    Args:
        n_units: Number of units.
        n_contexts: Contexts kept of each.
        device: Where the activations are.

    Attributes:
        values: Strongest activations, largest first, -inf for none, shape
            (n_units, n_contexts).
        sequence: Numbers of their sequences, of that shape.
        position: Their positions in these, of that shape.
        tokens: Tokens around them, -1 beyond the sequence, shape
            (n_units, n_contexts, BEFORE + 1 + AFTER).
        activations: Activations of these, of that shape.
    """

    def __init__(self, n_units: int, n_contexts: int, device: torch.device | str):
        shape = (n_units, n_contexts)
        window = (*shape, BEFORE + 1 + AFTER)
        self.values = torch.full(shape, -torch.inf, device=device)
        self.sequence = torch.full(shape, -1, device=device)
        self.position = torch.full(shape, -1, device=device)
        self.tokens = torch.full(window, -1, dtype=torch.int32, device=device)
        self.activations = torch.zeros(window, device=device)

    @torch.no_grad()
    def update(
        self,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        acts: torch.Tensor,
        first_sequence: int,
    ) -> None:
        """
        Args:
            tokens: Shape (n_sequences, seq).
            counts: Mask of the tokens that may be the strongest, of that shape.
            acts: Activations of all tokens, shape (n_sequences, seq, n_units).
            first_sequence: Number of the first sequence.
        """
        n_kept, length = self.values.shape[1], tokens.shape[1]
        best, position = acts.masked_fill(~counts[..., None], -torch.inf).max(dim=1)
        both = torch.cat([self.values, best.T.to(self.values)], dim=1)
        self.values, order = both.topk(n_kept, dim=1)
        old = order.clamp(max=n_kept - 1)
        for of in (self.sequence, self.position, self.tokens, self.activations):
            index = old.view(*old.shape, *[1] * (of.ndim - 2)).expand_as(of)
            of.copy_(of.gather(1, index))

        unit, slot = (order >= n_kept).nonzero(as_tuple=True)
        sequence = order[unit, slot] - n_kept
        at = position[sequence, unit]
        window = at[:, None] + torch.arange(-BEFORE, AFTER + 1, device=at.device)
        inside = (window >= 0) & (window < length)
        window = window.clamp(0, length - 1)
        self.sequence[unit, slot] = sequence + first_sequence
        self.position[unit, slot] = at
        around = tokens[sequence[:, None], window].where(inside, -1)
        self.tokens[unit, slot] = around.to(self.tokens.dtype)
        around = acts[sequence[:, None], window, unit[:, None]] * inside
        self.activations[unit, slot] = around.to(self.activations.dtype)

    def windows(self, unit: int, scale: float) -> list[Context]:
        """
        The contexts of a unit, strongest first.

        Args:
            unit: Which.
            scale: Activation that becomes 127.
        """
        levels = self.activations[unit] * (127 / scale if scale else 0)
        levels = levels.round().clamp(-127, 127).int()
        is_there = self.tokens[unit] >= 0
        return [
            Context(
                sequence=int(self.sequence[unit, slot]),
                position=int(self.position[unit, slot]),
                peak=int(is_there[slot, :BEFORE].sum()),
                tokens=self.tokens[unit, slot][is_there[slot]].tolist(),
                values=levels[slot][is_there[slot]].tolist(),
            )
            for slot in self.values[unit].isfinite().nonzero()[:, 0].tolist()
        ]
