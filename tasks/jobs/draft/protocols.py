"""How much to train and how fast, by the teacher's size, each with its source.

HALO: arXiv 2601.22156. RADLADS: arXiv 2505.03005. "Measured here": benchmarks/results/smollm2_h200.md.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOY, _SMALL, _LARGE = 20_000_000, 500_000_000, 12_000_000_000
"""Parameters: up to _TOY as the shipped teacher; up to _SMALL as SmolLM2-135M; beyond _LARGE nobody published rates by
size, and RADLADS's are taken."""


@dataclass(frozen=True)
class Effort:
    """Tokens of the three stages; 0: without that stage. distill_long: of distill's, at four times its context.
    finetune_context: wanted, in tokens; the teacher's positions limit it. loses: beside the next larger effort."""

    name: str
    align: int
    distill: int
    words: str
    loses: str = ""
    distill_long: int = 0
    finetune: int = 0
    finetune_context: int = 16384

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return self.align + self.distill + self.finetune


@dataclass(frozen=True)
class Rates:
    """Learning rates, start and end: of align, and of mixers and the rest in distill. source: for the recipe."""

    align: tuple[float, float]
    mixers: tuple[float, float]
    rest: tuple[float, float]
    schedule: str
    source: str


_LARGE_EFFORTS = (
    Effort(
        "trial",
        align=20_000_000,
        distill=60_000_000,
        words="to see that everything works, and where it goes; nothing to publish (ours)",
        loses="a third of the tokens cost 0.06 of KL and 0.04 of WikiText-2's ratio (measured here, 135M, pure)",
    ),
    Effort(
        "short",
        align=100_000_000,
        distill=250_000_000,
        words="the least of RADLADS (table 2: distill 250 to 700 M tokens), without its third stage",
        loses="nothing is trained beyond 512 tokens: bits per byte at 2,048 were 1.12 of the teacher's, at 512 1.02 "
        "(measured here, 135M, pure), and recall ends there",
    ),
    Effort(
        "usual",
        align=100_000_000,
        distill=500_000_000,
        finetune=100_000_000,
        words="RADLADS, table 2: 100 M + 500 M at 512 tokens, 100 M at 16,384",
        loses="100 M tokens of align for 320 M gave needles at 32K of 87.8 % for 92.5 %, common sense of 55.2 for 55.4 "
        "(HALO, 1.7B, hybrid)",
    ),
    Effort(
        "full",
        align=320_000_000,
        distill=1_000_000_000,
        finetune=1_000_000_000,
        words="HALO: 320 M + 1 B at 512 tokens, 1 B at 16,384; it saw no gain beyond",
    ),
)
_SMALL_EFFORTS = (
    Effort(
        "trial",
        align=8_000_000,
        distill=20_000_000,
        words="to see that everything works, and where it goes; nothing to publish (ours)",
        loses="0.06 of KL and 0.04 of WikiText-2's ratio (measured here, pure)",
    ),
    Effort(
        "short",
        align=16_000_000,
        distill=60_000_000,
        words="measured here: 0.92 of the teacher over chance, 1.02 of its bits per byte, no needle found (pure)",
        loses="nothing is trained beyond 512 tokens: bits per byte at 2,048 were 1.12 of the teacher's (measured here)",
    ),
    Effort(
        "usual",
        align=40_000_000,
        distill=140_000_000,
        distill_long=40_000_000,
        words="the shipped recipes smollm2-135m-*: 40 M of align, 100 M at 512 and 40 M at 2,048 tokens (ours)",
    ),
)
_TOY_EFFORTS = (
    Effort(
        "usual",
        align=262_144,
        distill=786_432,
        finetune=32_768,
        finetune_context=1024,
        words="the shipped recipe smoke (ours)",
    ),
)


def efforts(parameters: int) -> tuple[Effort, ...]:
    """For a teacher of that size, the cheapest first."""
    return _TOY_EFFORTS if parameters <= _TOY else _SMALL_EFFORTS if parameters <= _SMALL else _LARGE_EFFORTS


def is_toy(parameters: int) -> bool:
    """Whether a teacher is as small as the shipped ones: benchmarks tell nothing of it."""
    return parameters <= _TOY


def is_small(parameters: int) -> bool:
    """Whether a teacher is at most as SmolLM2-135M and its like."""
    return parameters <= _SMALL


def rates(parameters: int, *, hybrid: bool) -> Rates:
    """For a teacher of that size."""
    if parameters <= _TOY:
        return Rates((6e-3, 2e-4), (2e-3, 1e-4), (5e-4, 1e-5), "cosine", "ours, of the shipped recipe smoke")
    if parameters <= _SMALL:
        source = "ours, of the shipped recipes smollm2-135m-*"
        return Rates((2e-3, 1e-5), (6e-4, 1e-5), (2e-4, 1e-5), "cosine", source)
    if parameters > _LARGE or (not hybrid and parameters > _LARGE / 2):
        return Rates((1e-3, 1e-5), (1e-5, 1e-5), (1e-5, 1e-5), "constant", "RADLADS, table 2, at 7B and 32B")
    start = 1e-4 if parameters <= 2.5e9 else 5e-5 if parameters <= 6e9 else 3e-5
    return Rates(
        (1e-3, 1e-5), (start, 1e-5), (start, 1e-5), "cosine", "HALO, by size: 1e-4 at 1.7B, 5e-5 at 4B, 3e-5 at 8B"
    )
