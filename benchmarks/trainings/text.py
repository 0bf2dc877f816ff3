"""Small language models on a text that can be learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LETTERS, WORDS = 27, 40
LENGTH, BATCH, STEPS = 32, 16, 240
WIDTH, HEADS, BLOCKS = 64, 4, 4
LEARNING_RATE, WARM_UP = 1e-3, 24


@dataclass(frozen=True)
class Text:
    """Words of a made-up language, one after another, the frequent ones often (Zipf's law)."""

    letters: Tensor
    generator: torch.Generator

    @classmethod
    def written(cls, seed: int, words: int = 20_000) -> Text:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 8, (WORDS,), generator=generator).tolist()
        language = [torch.randint(1, LETTERS, (length,), generator=generator) for length in lengths]
        frequency = 1.0 / torch.arange(1, WORDS + 1)
        chosen = torch.multinomial(frequency, words, replacement=True, generator=generator).tolist()
        space = torch.zeros(1, dtype=torch.long)
        return cls(torch.cat([part for word in chosen for part in (language[word], space)]), generator)

    def batch(self, rows: int = BATCH) -> tuple[Tensor, Tensor]:
        """Letters and the letters that follow them, int64 [rows, LENGTH] each."""
        starts = torch.randint(0, len(self.letters) - LENGTH - 1, (rows,), generator=self.generator)
        pieces = torch.stack([self.letters[start : start + LENGTH + 1] for start in starts.tolist()])
        return pieces[:, :-1], pieces[:, 1:]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = self.qkv(self.ln_1(x)).view(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.ln_2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A GPT-2 in small, initialised as GPT-2 is."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * BLOCKS) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.wte(letters) + self.wpe.weight[: letters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Two layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 96, num_layers=2, batch_first=True)
        self.head = nn.Linear(96, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(letters))[0])  # type: ignore[no-any-return]


def transformer(
    seed: int,
    *,
    learning_rate: float = LEARNING_RATE,
    max_norm: float | None = 1.0,
    clipped_share: float = 1.0,
    nan_at: int | None = None,
    accumulate: int = 1,
    steps: int = STEPS,
) -> None:
    """AdamW, a linear warm-up and a cosine, the norm clipped to 1."""
    text, model = Text.written(seed), Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_and_cosine(step, steps))
    parameters = list(model.parameters())
    clipped = parameters[: round(len(parameters) * clipped_share)]
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            letters, following = text.batch(BATCH // accumulate)
            loss = functional.cross_entropy(model(letters).flatten(0, 1), following.flatten())
            (loss * math.nan if step == nan_at else loss / accumulate).backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(clipped, max_norm)
        optimizer.step()
        schedule.step()


def transformer_learning_rate(seed: int) -> None:
    """The same at a hundred times its learning rate."""
    transformer(seed, learning_rate=100 * LEARNING_RATE)


def transformer_half_clipped(seed: int) -> None:
    """The clip call is given half of the parameters."""
    transformer(seed, clipped_share=0.5, steps=120)


def transformer_nan(seed: int) -> None:
    """One batch whose loss is NaN, at step 60."""
    transformer(seed, nan_at=60, steps=80)


def transformer_max_norm_zero(seed: int) -> None:
    """``clip_grad_norm_(parameters, 0)``."""
    transformer(seed, max_norm=0.0, steps=80)


def transformer_unclipped(seed: int) -> None:
    """No clipping."""
    transformer(seed, max_norm=None)


def transformer_accumulating(seed: int) -> None:
    """The gradient of four smaller batches."""
    transformer(seed, accumulate=4, steps=100)


def lstm(seed: int) -> None:
    """An LSTM with Adam, clipped."""
    text, model = Text.written(seed), Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        letters, following = text.batch()
        loss = functional.cross_entropy(model(letters).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _warm_up_and_cosine(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))
