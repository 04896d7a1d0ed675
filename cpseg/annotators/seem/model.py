"""SEEM (Zou et al., 2023) in plain torch: Focal-T and Focal-L, by the original parameter names.

An image goes through a FocalNet (Yang et al., 2022), a pixel decoder (one transformer on the
coarsest map, then a feature pyramid) and a mask decoder (Mask2Former's: queries that attend
within their own masks). A class is the text embedding of its name. Only convolutions, linear
maps, norms and attention; no deformable attention.

Nothing here tells a padded pixel from a real one, so an image on a larger canvas gets other
masks: pad each image to a multiple of 32 only, and batch only images of one size.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpseg import _checks
from cpseg.errors import InputError

__all__ = ["SEEM", "SEEMConfig"]

_STRIDE = 32
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


@final
@dataclass(frozen=True, slots=True)
class SEEMConfig:
    """The sizes of a SEEM. The defaults are Focal-T's; ``focal_t()`` and ``focal_l()`` name both.

    Args:
        block: ``"focal_dw"`` (Focal-T) or ``"focal"`` (Focal-L).
        embed_dim: Channels of the first stage; each further stage doubles them.
        depths: Blocks of each stage.
        focal_levels: Depthwise convolutions in each modulation.
        dim: Width of decoders, queries and text encoder.
        heads: Attention heads of both decoders.
        feedforward: Hidden width of the decoders' feed-forward layers.
        encoder_layers: Transformer layers of the pixel decoder.
        decoder_layers: Layers of the mask decoder.
        queries: Object queries, Q.
        text_vocabulary: Tokens of the text encoder; the last one ends a text.
        text_context: Most tokens of a text.
        text_layers: Layers of the text encoder.
        text_heads: Attention heads of the text encoder.

    Examples:
        >>> SEEMConfig.focal_l().block, SEEMConfig.focal_l().depths
        ('focal', (2, 2, 18, 2))
    """

    block: Literal["focal_dw", "focal"] = "focal_dw"
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    focal_levels: int = 3
    dim: int = 512
    heads: int = 8
    feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 9
    queries: int = 101
    text_vocabulary: int = 49408
    text_context: int = 77
    text_layers: int = 12
    text_heads: int = 8

    def __post_init__(self) -> None:
        if self.block not in ("focal_dw", "focal"):
            raise InputError(f"block must be 'focal_dw' or 'focal'; got {self.block!r}")
        if len(self.depths) != 4:
            raise InputError(f"depths must name four stages; got {self.depths}")
        if self.dim % 32:
            raise InputError(f"dim must be a multiple of 32 (group norms); got {self.dim}")
        for name in ("heads", "text_heads"):
            if self.dim % getattr(self, name):
                raise InputError(f"{name} must divide dim = {self.dim}; got {getattr(self, name)}")

    @classmethod
    def focal_t(cls) -> "SEEMConfig":
        """The sizes of ``seem_focalt_v0.pt`` and ``seem_focalt_v1.pt``."""
        return cls()

    @classmethod
    def focal_l(cls) -> "SEEMConfig":
        """The sizes of ``seem_focall_v0.pt`` and ``seem_focall_v1.pt``."""
        return cls(block="focal", embed_dim=192, depths=(2, 2, 18, 2), focal_levels=4)


@final
class SEEM(nn.Module):
    """SEEM: images and class embeddings to class and mask logits of its queries.

    The weights are random until a checkpoint is loaded: see
    :func:`cpseg.annotators.seem.load_checkpoint`.

    Examples:
        >>> tiny = SEEMConfig(embed_dim=8, depths=(1, 1, 1, 1), focal_levels=2, dim=32, heads=4,
        ...                   feedforward=64, encoder_layers=1, decoder_layers=3, queries=7,
        ...                   text_vocabulary=64, text_context=12, text_layers=2, text_heads=4)
        >>> model = SEEM(tiny).eval()
        >>> texts = model.text_embeddings(torch.tensor([[1, 5, 63], [1, 9, 63]]))
        >>> classes, masks = model(torch.zeros(1, 3, 40, 56), texts)
        >>> classes.shape, masks.shape
        (torch.Size([1, 7, 2]), torch.Size([1, 7, 16, 16]))
    """

    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: _FocalNet = _FocalNet(config)
        self.sem_seg_head: _Head = _Head(config)

    def forward(self, images: Tensor, class_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the object queries.

        Args:
            images: RGB on the scale 0..255, any dtype. Shape ``(B, 3, H, W)``.
            class_embeddings: A row per class. Shape ``(C, dim)``.

        Returns:
            Class logits, shape ``(B, Q, C)``, and mask logits, shape ``(B, Q, h, w)`` with h and
            w a quarter of H and W rounded up to multiples of 32.
        """
        pyramid, mask_features = self._features(images)
        predictor = self.sem_seg_head.predictor
        queries, masks = predictor(pyramid, mask_features, None)
        return predictor.class_logits(queries, class_embeddings), masks

    def refer(self, images: Tensor, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One mask per text: the query that fits the text best, whether or not anything does.

        A text gets the mask of *one* object, and an absent thing gets a mask too: there is no
        score of presence. All texts are seen together, so a text's mask depends on the others.

        Args:
            images: A single image, RGB on the scale 0..255. Shape ``(1, 3, H, W)``.
            token_ids: Tokens of the raw texts. Shape ``(T, L)``.
            attention_mask: Nonzero where a token is one of the text's. Shape ``(T, L)``.

        Returns:
            Mask logits. Shape ``(T, h, w)``, of the padded image at a quarter of its size.
        """
        if len(images) != 1:
            raise InputError(f"images must hold one image to refer to; got {len(images)}")
        if attention_mask.shape != token_ids.shape:
            raise InputError(
                f"attention_mask must have the shape of token_ids, "
                f"{_checks.describe(token_ids.shape)}; got {_checks.describe(attention_mask.shape)}"
            )
        predictor = self.sem_seg_head.predictor
        tokens, texts = predictor.lang_encoder(token_ids)
        pyramid, mask_features = self._features(images)
        queries, masks = predictor(pyramid, mask_features, tokens[attention_mask.bool()][None])
        fit = _unit(queries[0] @ predictor.class_embed) @ _unit(texts).T  # (Q, T)
        return masks[0][fit.argmax(0)]

    def text_embeddings(self, token_ids: Tensor) -> Tensor:
        """Normalized embeddings of texts.

        Args:
            token_ids: Token ids of each text up to the end-of-text token; what follows is
                padding and changes nothing. Shape ``(T, L)``.

        Returns:
            Embeddings. Shape ``(T, dim)``.
        """
        return _unit(self.sem_seg_head.predictor.lang_encoder(token_ids)[1])

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The decoder's inputs: maps at strides 32, 16, 8, and mask features at stride 4."""
        _checks.check_tensor("images", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"images must have shape (B, 3, H, W); got {_checks.describe(images.shape)}"
            )
        weight = self.backbone.patch_embed.proj.weight
        # float32 first: the original's constants are float32 numbers in a float64 model too
        scale = torch.tensor((_MEAN, _STD), dtype=torch.float32, device=images.device)
        mean, std = scale.to(weight.dtype)[:, None, :, None, None]
        x = (images.to(weight.dtype) - mean) / std
        return self.sem_seg_head.pixel_decoder(self.backbone(_pad(x, _STRIDE)))


class _FocalNet(nn.Module):
    """Features at strides 4, 8, 16, 32, each under its own norm."""

    norm0: nn.LayerNorm
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm

    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        widths = [config.embed_dim * 2**i for i in range(4)]
        # Focal-L's stem pads by 2, not 3: its map is shifted, and the weights expect that.
        stem = 3 if config.block == "focal_dw" else 2
        self.patch_embed: _Downsample = _Downsample(3, widths[0], kernel=7, stride=4, padding=stem)
        self.layers: nn.ModuleList = nn.ModuleList(
            _Stage(config, widths[i], depth, widths[i + 1] if i < 3 else None)
            for i, depth in enumerate(config.depths)
        )
        for i, width in enumerate(widths):
            setattr(self, f"norm{i}", nn.LayerNorm(width))

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        x = self.patch_embed(x)
        norms = (self.norm0, self.norm1, self.norm2, self.norm3)
        for layer, norm in zip(self.layers, norms, strict=True):
            x, onward = layer(x)
            features.append(norm(x).permute(0, 3, 1, 2))
            x = onward
        return features


class _Stage(nn.Module):
    def __init__(self, config: SEEMConfig, width: int, depth: int, onward: int | None) -> None:
        super().__init__()
        block = _DepthwiseBlock if config.block == "focal_dw" else _PostNormBlock
        self.blocks = nn.ModuleList(block(width, config.focal_levels) for _ in range(depth))
        self.downsample = (
            None if onward is None else _Downsample(width, onward, kernel=3, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's features before their norm, and the next stage's input made from them."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is None:
            return x, x
        return x, self.downsample(x.permute(0, 3, 1, 2))


class _Downsample(nn.Module):
    """A strided convolution and a norm: ``(B, C, H, W)`` to ``(B, H, W, C)``."""

    def __init__(self, width: int, onward: int, *, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj: nn.Conv2d = nn.Conv2d(width, onward, kernel, stride, padding)
        self.norm: nn.LayerNorm = nn.LayerNorm(onward)
        self._stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(_pad(x, self._stride)).permute(0, 2, 3, 1))


class _DepthwiseBlock(nn.Module):
    """Focal-T's block: a depthwise convolution before each half, norms after the sums."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.gamma_2 = nn.Parameter(torch.ones(width))
        self.dw1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width)
        self.modulation: _Modulation = _Modulation(width, levels)
        self.dw2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp: _MLP = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _channels_first(self.dw1, x)
        x = self.norm1(x + self.gamma_1 * self.modulation(x))
        x = x + _channels_first(self.dw2, x)
        return self.norm2(x + self.gamma_2 * self.mlp(x))


class _PostNormBlock(nn.Module):
    """Focal-L's block: norms on the branches."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.gamma_2 = nn.Parameter(torch.ones(width))
        self.norm1 = nn.LayerNorm(width)
        self.modulation: _Modulation = _Modulation(width, levels)
        self.norm2 = nn.LayerNorm(width)
        self.mlp: _MLP = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.norm1(self.modulation(x))
        return x + self.gamma_2 * self.norm2(self.mlp(x))


class _Modulation(nn.Module):
    """Focal modulation: a query times a gated sum of ever wider contexts."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, 2 * width + levels + 1)
        self.h = nn.Conv2d(width, width, 1)
        self.proj = nn.Linear(width, width)
        self.focal_layers = nn.ModuleList(
            # The one-element sequence gives the parameter its original name.
            nn.Sequential(
                nn.Conv2d(width, width, 3 + 2 * k, padding=1 + k, groups=width, bias=False)
            )
            for k in range(levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        width, levels = x.shape[-1], len(self.focal_layers)
        mixed = self.f(x).permute(0, 3, 1, 2)
        query, context, gates = mixed.split((width, width, levels + 1), dim=1)
        total = torch.zeros_like(context)
        for k, layer in enumerate(self.focal_layers):
            context = functional.gelu(layer(context))
            total = total + context * gates[:, k : k + 1]
        everywhere = functional.gelu(context.mean((2, 3), keepdim=True))
        total = (total + everywhere * gates[:, levels:]) / (levels + 1)
        return self.proj((query * self.h(total)).permute(0, 2, 3, 1))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Head(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.pixel_decoder: _PixelDecoder = _PixelDecoder(config)
        self.predictor: _Predictor = _Predictor(config)


class _PixelDecoder(nn.Module):
    """A transformer on the coarsest map, then a feature pyramid down to stride 4."""

    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        dim, width = config.dim, config.embed_dim
        self.adapter_1: _ConvNorm = _ConvNorm(width, dim, 1)
        self.layer_1: _ConvNorm = _ConvNorm(dim, dim, 3)
        self.adapter_2: _ConvNorm = _ConvNorm(2 * width, dim, 1)
        self.layer_2: _ConvNorm = _ConvNorm(dim, dim, 3)
        self.adapter_3: _ConvNorm = _ConvNorm(4 * width, dim, 1)
        self.layer_3: _ConvNorm = _ConvNorm(dim, dim, 3)
        self.layer_4: _ConvNorm = _ConvNorm(dim, dim, 3)
        self.mask_features: nn.Conv2d = nn.Conv2d(dim, dim, 3, padding=1)
        self.input_proj: nn.Conv2d = nn.Conv2d(8 * width, dim, 1)
        # transformer.encoder.layers: the original's names
        layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.encoder_layers))
        self.transformer: nn.ModuleDict = nn.ModuleDict(
            {"encoder": nn.ModuleDict({"layers": layers})}
        )

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        fine, middle, coarse, coarsest = features
        x = self.input_proj(coarsest)
        shape = x.shape
        position = _sine_position(x)
        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.transformer.get_submodule("encoder.layers").children():
            tokens = layer(tokens, position)
        y = functional.relu(self.layer_4(tokens.transpose(1, 2).reshape(shape)))
        pyramid = [y]
        steps = (
            (coarse, self.adapter_3, self.layer_3),
            (middle, self.adapter_2, self.layer_2),
            (fine, self.adapter_1, self.layer_1),
        )
        for feature, adapter, layer in steps:
            size = feature.shape[-2:]
            y = adapter(feature) + functional.interpolate(y, size=size, mode="nearest")
            y = functional.relu(layer(y))
            pyramid.append(y)
        return pyramid[:3], self.mask_features(pyramid[3])


class _ConvNorm(nn.Conv2d):
    """A convolution without bias and a group norm of 32 groups."""

    def __init__(self, width: int, dim: int, kernel: int) -> None:
        super().__init__(width, dim, kernel, padding=kernel // 2, bias=False)
        self.norm: nn.GroupNorm = nn.GroupNorm(32, dim)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name for it)
        return self.norm(super().forward(input))


class _Attention(nn.Module):
    """Multi-head attention with the parameter names of ``torch.nn.MultiheadAttention``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self._heads = heads
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """``(B, N, dim)``; ``allowed`` is bool, True where a query may look, ``(..., N, M)``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).reshape(*x.shape[:2], self._heads, -1).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _EncoderLayer(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.self_attn: _Attention = _Attention(config.dim, config.heads)
        self.linear1 = nn.Linear(config.dim, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, config.dim)
        self.norm1 = nn.LayerNorm(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        placed = x + position
        x = self.norm1(x + self.self_attn(placed, placed, x))
        return self.norm2(x + self.linear2(functional.relu(self.linear1(x))))


class _SelfAttention(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.self_attn: _Attention = _Attention(config.dim, config.heads)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, place: Tensor, allowed: Tensor | None) -> Tensor:
        placed = x + place
        return self.norm(x + self.self_attn(placed, placed, x, allowed))


class _CrossAttention(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.multihead_attn: _Attention = _Attention(config.dim, config.heads)
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self, x: Tensor, place: Tensor, memory: Tensor, position: Tensor, allowed: Tensor
    ) -> Tensor:
        return self.norm(x + self.multihead_attn(x + place, memory + position, memory, allowed))


class _FeedForward(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.dim, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(functional.relu(self.linear1(x))))


class _MaskEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(functional.relu(second(functional.relu(first(x)))))


class _Predictor(nn.Module):
    """The mask decoder, with the text encoder inside it as in the original's names."""

    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        dim, depth = config.dim, config.decoder_layers
        self.query_feat: nn.Embedding = nn.Embedding(config.queries, dim)
        self.query_embed: nn.Embedding = nn.Embedding(config.queries, dim)
        self.level_embed: nn.Embedding = nn.Embedding(3, dim)
        self.class_embed: nn.Parameter = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.decoder_norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.mask_embed: _MaskEmbed = _MaskEmbed(dim)
        self.transformer_self_attention_layers: nn.ModuleList = nn.ModuleList(
            _SelfAttention(config) for _ in range(depth)
        )
        self.transformer_cross_attention_layers: nn.ModuleList = nn.ModuleList(
            _CrossAttention(config) for _ in range(depth)
        )
        self.transformer_ffn_layers: nn.ModuleList = nn.ModuleList(
            _FeedForward(config) for _ in range(depth)
        )
        self.lang_encoder: _Language = _Language(config)

    def forward(
        self, pyramid: list[Tensor], mask_features: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Final queries ``(B, Q, dim)`` under their norm, and mask logits ``(B, Q, h, w)``.

        With text tokens ``(1, N, dim)`` a second copy of the queries talks with the tokens, and
        what comes back is that copy; tokens never look at the image.
        """
        batch = len(mask_features)
        x = self.query_feat.weight.expand(batch, -1, -1)
        place = self.query_embed.weight.expand(batch, -1, -1)
        count = x.shape[1]
        if tokens is not None:
            place = torch.cat((place, tokens), 1)
        memories = [
            feature.flatten(2).transpose(1, 2) + level
            for feature, level in zip(pyramid, self.level_embed.weight, strict=True)
        ]
        positions = [_sine_position(feature) for feature in pyramid]
        masks = self._masks(x, mask_features)
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross, along, feed) in enumerate(layers):
            level = i % 3
            allowed = _inside(masks, pyramid[level].shape[-2:])
            x = cross(x, place[:, :count], memories[level], positions[level], allowed)
            if tokens is not None:
                x = torch.cat((x, tokens), 1)
            x = feed(along(x, place, None))
            if tokens is not None:
                x, tokens = x[:, :count], x[:, count:]
            masks = self._masks(x, mask_features)
        return self.decoder_norm(x), masks

    def class_logits(self, queries: Tensor, class_embeddings: Tensor) -> Tensor:
        """Scaled cosine of queries ``(B, Q, dim)`` and classes ``(C, dim)``: ``(B, Q, C)``."""
        scale = self.lang_encoder.logit_scale.exp()
        return scale * _unit(queries @ self.class_embed) @ class_embeddings.T

    def _masks(self, queries: Tensor, mask_features: Tensor) -> Tensor:
        embedded = self.mask_embed(self.decoder_norm(queries))
        return torch.einsum("bqd,bdhw->bqhw", embedded, mask_features)


class _Language(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.lang_encoder: _TextEncoder = _TextEncoder(config)
        self.lang_proj: nn.Parameter = nn.Parameter(
            torch.randn(config.dim, config.dim) * config.dim**-0.5
        )
        self.logit_scale: nn.Parameter = nn.Parameter(torch.ones(()))

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Every token ``(T, L, dim)``, and each text at its end token ``(T, dim)``."""
        _checks.check_integers("token_ids", token_ids)
        context = self.lang_encoder.positional_embedding.shape[0]
        if token_ids.ndim != 2 or not 1 <= token_ids.shape[1] <= context:
            raise InputError(
                f"token_ids must have shape (T, L) with L between 1 and {context}; "
                f"got {_checks.describe(token_ids.shape)}"
            )
        tokens = self.lang_encoder(token_ids) @ self.lang_proj
        end = token_ids.argmax(1)  # the end-of-text token has the highest id; its first place
        return tokens, tokens[torch.arange(len(tokens), device=tokens.device), end]


class _TextEncoder(nn.Module):
    """CLIP's text transformer: causal, so what follows the end of a text changes nothing."""

    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.positional_embedding: nn.Parameter = nn.Parameter(
            torch.randn(config.text_context, config.dim) * 0.01
        )
        self.token_embedding: nn.Embedding = nn.Embedding(config.text_vocabulary, config.dim)
        self.resblocks: nn.ModuleList = nn.ModuleList(
            _TextBlock(config) for _ in range(config.text_layers)
        )
        self.ln_final: _TextNorm = _TextNorm(config.dim)

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        x = self.token_embedding(token_ids) + self.positional_embedding[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for block in self.resblocks:
            x = block(x, causal)
        return self.ln_final(x)


class _TextBlock(nn.Module):
    def __init__(self, config: SEEMConfig) -> None:
        super().__init__()
        self.attn: _Attention = _Attention(config.dim, config.text_heads)
        self.ln_1: _TextNorm = _TextNorm(config.dim)
        self.mlp: _TextMLP = _TextMLP(config.dim)
        self.ln_2: _TextNorm = _TextNorm(config.dim)

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, causal)
        return x + self.mlp(self.ln_2(x))


class _TextMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))  # the quick GELU it was trained with


class _TextNorm(nn.Module):
    """A layer norm computed in float32, whatever the model's dtype, as the original does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(dim))
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-12)
        return self.weight * y.to(x.dtype) + self.bias


def _channels_first(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on ``(B, H, W, C)``."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and the right, up to multiples."""
    height, width = x.shape[-2:]
    return functional.pad(x, (0, -width % multiple, 0, -height % multiple))


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; the small number is the original's."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-7)


def _inside(masks: Tensor, size: torch.Size) -> Tensor:
    """Where each query may look: inside its mask, or everywhere if that is empty."""
    small = functional.interpolate(masks, size=size, mode="bilinear", align_corners=False)
    inside = small.sigmoid().flatten(2) >= 0.5
    return (inside | ~inside.any(-1, keepdim=True))[:, None]  # (B, 1, Q, HW): all heads


def _sine_position(x: Tensor) -> Tensor:
    """Sines and cosines of the place in a map ``(B, C, H, W)``: ``(1, H * W, C)``, y before x."""
    _, width, *sizes = x.shape
    half = width // 2
    index = torch.arange(half, dtype=x.dtype, device=x.device)
    scale = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)
    parts: list[Tensor] = []
    for size in sizes:
        place = torch.arange(1, size + 1, dtype=x.dtype, device=x.device)
        angle = (place / (size + 1e-6) * 2 * torch.pi)[:, None] / scale
        # sines at even channels, cosines at odd ones
        parts.append(torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), 2).flatten(1))
    rows, columns = parts
    shape = (rows.shape[0], columns.shape[0], half)
    both = torch.cat((rows[:, None].expand(shape), columns[None].expand(shape)), 2)
    return both.flatten(0, 1)[None]
