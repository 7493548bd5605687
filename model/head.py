"""The language-model head, with the loss inside.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from .loss import loss_of_logits, token_loss


class LMHead(nn.Linear):
    """Logits, or the loss without them, in this module's own forward: there ZeRO-3 has gathered its weight."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    @classmethod
    def around(cls, linear: nn.Linear) -> "LMHead":
        """A head that holds this layer's weight. Raises ValueError where the layer has a bias."""
        if linear.bias is not None:
            raise ValueError("the language-model head has no bias; give a linear layer without one")
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features)
        head.weight = linear.weight
        if getattr(linear, "_is_hf_initialized", False):  # transformers' mark on a layer that `post_init` leaves alone
            head._is_hf_initialized = True
        return head.train(linear.training)

    def forward(
        self,
        x_BSH: Tensor,
        shift_labels_BS: Tensor | None = None,
        num_items: Tensor | float | None = None,
        z_loss_weight: float = 0.0,
    ) -> Tensor:
        if shift_labels_BS is None:
            return super().forward(x_BSH)
        return token_loss(x_BSH.flatten(0, 1), self.weight, shift_labels_BS.flatten(), num_items, z_loss_weight)


def head_loss(
    head: nn.Module, x_BSH: Tensor, shift_labels_BS: Tensor, num_items: Tensor | float | None, z_loss_weight: float
) -> Tensor:
    """The loss by whatever stands in the head's place: an adapter around it (peft's LoRA, say) knows logits only."""
    if isinstance(head, LMHead):
        loss: Tensor = head(x_BSH, shift_labels_BS, num_items, z_loss_weight)
        return loss
    logits_TV = head(x_BSH).flatten(0, 1)
    return loss_of_logits(logits_TV, shift_labels_BS.flatten(), num_items, z_loss_weight)
