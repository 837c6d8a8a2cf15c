"""The U-Net of Nichol & Dhariwal 2021 (section "Architecture"), for any number of channels.

Parameter names and shapes are those of openai/improved-diffusion, so that its checkpoints load.

Shapes: N batch, C channels, H height, W width, T positions (H * W), E embedding width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from improved_diffusion.fp16_util import convert_module_to_f16, convert_module_to_f32
from improved_diffusion.nn import (
    NORM_GROUPS,
    SiLUInPlace,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A layer whose ``forward`` takes the timestep's embedding [N, E] beside its input."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in a row, of which those that want the timestep's embedding get it."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double the resolution by repetition, then optionally convolve: to [N, C, 2H, 2W].

    With ``dims=3`` the first spatial dimension keeps its length.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.scale = (1, 2, 2) if dims == 3 else 2
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        if x.device.type == "cpu" and not x.is_contiguous(memory_format=layout):
            # On a CPU many times faster in this layout, the way there and back included.
            x = F.interpolate(
                x.contiguous(memory_format=layout), scale_factor=self.scale, mode="nearest"
            ).contiguous()
        else:
            x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution, or by averaging: to [N, C, H/2, W/2].

    With ``dims=3`` the first spatial dimension keeps its length.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block that is told the timestep.

    The embedding is added after the first convolution or, with ``use_scale_shift_norm``, scales
    and shifts the second normalisation (FiLM, Perez et al. 2018). The last convolution starts at
    zero, so that the block starts as its skip connection.

    :param channels: channels of the input.
    :param emb_channels: width E of the timestep's embedding.
    :param dropout: dropout rate before the last convolution.
    :param out_channels: channels of the output; ``None``: as many as the input has.
    :param use_conv: where the numbers of channels differ, a 3x3 instead of a 1x1 skip convolution.
    :param use_checkpoint: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint

        self.in_layers = nn.Sequential(
            normalization(channels),
            SiLUInPlace(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1)),
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLUInPlace(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        condition = self.emb_layers(emb).to(h.dtype)
        condition = condition.reshape(*condition.shape, *[1] * (h.dim() - 2))  # [N, C, 1, 1]
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, added to the input: [N, C, H, W] -> the same.

    :param num_heads: a divisor of ``channels``.
    """

    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"--num_heads {num_heads} does not divide the {channels} channels of an attention "
                "layer; choose a divisor"
            )
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)  # [N, C, T]
        qkv = self.qkv(self.norm(flat))
        # A head's query, key and value lie side by side: [N, heads, 3, C/heads, T]. The fast
        # kernels take each position's numbers only where they lie next to each other.
        qkv = qkv.unflatten(1, (self.num_heads, 3, -1)).transpose(-1, -2).contiguous()
        q, k, v = qkv.unbind(dim=2)  # each [N, heads, T, C/heads]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(-1, -2).flatten(1, 2)  # [N, C, T]
        return x + self.proj_out(h).reshape(x.shape)  # in the input's memory layout


class UNetModel(nn.Module):
    """A U-Net that predicts noise, image or velocity from a noisy image and its timestep.

    :param in_channels: channels of the image, at least 1.
    :param model_channels: base width; the width at every level is a multiple of 32.
    :param out_channels: channels of the output: as many as the image has, or twice that where the
        variance is learned, and ``label_logits`` more.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention is used.
    :param dropout: dropout rate in the residual blocks.
    :param channel_mult: width of each level as a multiple of ``model_channels``.
    :param conv_resample: change the resolution by convolutions, else by averaging and repetition.
    :param dims: spatial dimensions, 1 to 3.
    :param num_classes: number of classes of a class-conditional model.
    :param use_checkpoint: recompute activations in the backward pass instead of keeping them.
    :param num_heads: attention heads.
    :param num_heads_upsample: attention heads on the way up; -1: as on the way down.
    :param use_scale_shift_norm: see :class:`ResBlock`.
    :param detach_variance: the second half of the output channels, the variance's, trains its rows
        of the last convolution and nothing before them.
    :param label_logits: output channels behind these two halves, see
        :mod:`improved_diffusion.label_posterior`.
    :raises ValueError: for widths that normalisation or attention cannot divide.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        detach_variance: bool = False,
        label_logits: int = 0,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"--in_channels is at least 1, not {in_channels}")
        if num_res_blocks < 1:
            raise ValueError(f"--num_res_blocks is at least 1, not {num_res_blocks}")
        widths = [int(mult * model_channels) for mult in channel_mult]
        for width in {model_channels, *widths}:
            if width < 1 or width % NORM_GROUPS:
                raise ValueError(
                    f"a level of the U-Net would be {width} channels wide, and every width must be "
                    f"a multiple of {NORM_GROUPS}: choose --num_channels {model_channels} and "
                    f"--channel_mult {','.join(f'{mult:g}' for mult in channel_mult)} accordingly"
                )
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.detach_variance = detach_variance
        self.label_logits = label_logits
        # The type in which the blocks compute; None: their own parameters'.
        self.compute_dtype: torch.dtype | None = None

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels),
            nn.SiLU(),
            linear(emb_channels, emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def res_block(channels: int, out: int) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                dropout,
                out_channels=out,
                use_scale_shift_norm=use_scale_shift_norm,
                dims=dims,
                use_checkpoint=use_checkpoint,
            )

        def attention(channels: int, heads: int) -> AttentionBlock:
            return AttentionBlock(channels, num_heads=heads, use_checkpoint=use_checkpoint)

        up_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        last_level = len(widths) - 1

        channels = model_channels
        skip_widths = [channels]
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, channels, 3, padding=1))]
        )
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_widths.append(channels)
            if level != last_level:
                down = Downsample(channels, conv_resample, dims=dims)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skip_widths.append(channels)

        self.middle_block = TimestepEmbedSequential(
            res_block(channels, channels),
            attention(channels, num_heads),
            res_block(channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skip_widths.pop(), width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, up_heads))
                if level and i == num_res_blocks:
                    layers.append(Upsample(channels, conv_resample, dims=dims))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        assert not skip_widths

        self.out = nn.Sequential(
            normalization(channels),
            SiLUInPlace(),
            zero_module(conv_nd(dims, channels, out_channels, 3, padding=1)),
        )

    @property
    def inner_dtype(self) -> torch.dtype:
        """The type in which the blocks between the first and the last convolution compute."""
        return self.compute_dtype or self.input_blocks[0][0].weight.dtype

    def convert_to_fp16(self) -> None:
        """Make the convolutions of all blocks float16."""
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            blocks.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Make the convolutions of all blocks float32."""
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            blocks.apply(convert_module_to_f32)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the network.

        :param x: noisy images [N, in_channels, H, W]; H and W are divisible by
            2 ** (number of levels - 1).
        :param timesteps: [N], as the process passes them (rescaled or not).
        :param y: class labels [N] of a class-conditional model, else ``None``.
        :return: [N, out_channels, H, W] in the type of ``x``.
        """
        h, emb = self._start(x, timesteps, y)
        skips = [h]
        _, *others = self.input_blocks
        for block in others:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            # Nothing else holds what is popped, so that its memory is free for the block.
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
        norm, activation, last = self.out
        h = activation(norm(h)).to(x.dtype)
        if not (self.detach_variance and torch.is_grad_enabled()):
            return last(h)
        half = (self.out_channels - self.label_logits) // 2
        mean, _, logits = last(h).split([half, half, self.label_logits], dim=1)
        variance = last(h.detach())[:, half : 2 * half]
        return torch.cat([mean, variance, logits], dim=1)

    def get_feature_vectors(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """The activations behind every block.

        :return: ``down`` (a list, one tensor for each input block), ``middle`` (a tensor) and
            ``up`` (a list, one tensor for each output block), in the type of ``x``.
        """
        h, emb = self._start(x, timesteps, y)
        down = [h]
        _, *others = self.input_blocks
        for block in others:
            h = block(h, emb)
            down.append(h)
        middle = h = self.middle_block(h, emb)
        up = []
        for block, skip in zip(self.output_blocks, reversed(down)):
            h = block(torch.cat([h, skip], dim=1), emb)
            up.append(h)
        return {
            "down": [h.to(x.dtype) for h in down],
            "middle": middle.to(x.dtype),
            "up": [h.to(x.dtype) for h in up],
        }

    def _start(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first convolution's output, and the embedding of timestep and class."""
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                "a class-conditional model needs labels y, and any other model takes none"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        # The first and the last convolution keep the parameters' type, float32 in training: at the
        # least noise, eight bits of bfloat16 would round away much of what there is to predict.
        first = self.input_blocks[0]
        return first(x.to(first[0].weight.dtype), emb).to(self.inner_dtype), emb


class SuperResModel(UNetModel):
    """A U-Net that also sees a low-resolution version of the image it denoises.

    :param in_channels: channels of the image; the network's input has twice as many.
    """

    def __init__(self, in_channels: int, *args: object, **kwargs: object) -> None:
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        low_res: torch.Tensor,
        **kwargs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Apply the network to ``x`` [N, C, H, W] given ``low_res`` [N, C, h, w]."""
        return super().forward(self._with_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        low_res: torch.Tensor,
        **kwargs: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        return super().get_feature_vectors(self._with_low_res(x, low_res), timesteps, **kwargs)

    @staticmethod
    def _with_low_res(x: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return torch.cat([x, upsampled], dim=1)


class SelfConditionedModel(UNetModel):
    """A U-Net that also sees its previous prediction of the image it denoises.

    Chen et al. 2023, "Analog Bits", section 3.2.

    :param in_channels: channels of the image; the network's input has twice as many.
    """

    def __init__(self, in_channels: int, *args: object, **kwargs: object) -> None:
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        y: torch.Tensor | None = None,
        x_self: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the network to ``x`` given ``x_self``, the previous prediction of x_0.

        Both are [N, C, H, W]; ``None`` stands for zeros: nothing was predicted yet.
        """
        return super().forward(self._with_prediction(x, x_self), timesteps, y)

    def get_feature_vectors(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        y: torch.Tensor | None = None,
        x_self: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        return super().get_feature_vectors(self._with_prediction(x, x_self), timesteps, y)

    @staticmethod
    def _with_prediction(x: torch.Tensor, x_self: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([x, torch.zeros_like(x) if x_self is None else x_self], dim=1)
