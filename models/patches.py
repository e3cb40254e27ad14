"""The first layer of a ViT: patches to tokens, as a convolution or, where that is faster, as the matrix product that it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .host import on_host
from .products import better_here, in_bf16_here, linear


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel: each patch is multiplied by the same matrix.

    On a GPU it is written as that product: for three channels cuDNN picks a convolution that takes ten times as long,
    and in float32 one that rounds to TF32. So it is on a CPU whose products are oneDNN's (products.py), in 0.6 of the time in
    bf16; on others the convolution is the faster one. Weights keep names and shapes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Images [n, 3, H, W] to [n, d, h, w]; H and W multiples of the kernel."""
        device = input.device.type
        if on_host(device) and not (in_bf16_here(input) or (input.dtype == torch.float32 and better_here())):
            return super().forward(input)
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # before what follows copies it
        (rows, columns), (n, channels, height, width) = self.kernel_size, input.shape
        cut = input.reshape(n, channels, height // rows, rows, width // columns, columns)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [n, h, w, 3 * rows * columns]
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def as_product(convolution: nn.Conv2d) -> None:
    """Let a patch projection that is there already be computed so. ValueError where patches overlap or leave gaps."""
    if convolution.stride != convolution.kernel_size or convolution.padding != (0, 0) or convolution.groups != 1:
        raise ValueError(f"patches are not cut side by side: {convolution}")
    convolution.__class__ = PatchProjection
