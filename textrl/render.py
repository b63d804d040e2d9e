"""Pictures of an episode: a line of text with colours, or an image. A terminal is never trusted to a model's text."""

from __future__ import annotations

import math
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .task import Task

RENDER_MODES = ["ansi", "human", "rgb_array"]
COLUMNS, LINES, SCALE = 64, 8, 2
CONTROLS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of characters that a terminal does not just show."""
END, SEAM = "<end>", " >> "
"""How the end token is shown, and what stands between prompt and response."""
CELL = (10, 6)
"""Pixels of one character before scaling: height, width."""

GLYPHS = (
    "000000000000005F00000007000700147F147F14242A7F2A12231308646236495522500005030000001C2241000041221C00"
    "14083E081408083E080800503000000808080808006060000020100804023E5149453E00427F400042615149462141454B31"
    "1814127F1027454545393C4A49493001710905033649494936064949291E0036360000005636000008142241001414141414"
    "00412214080201510906324979413E7E1111117E7F494949363E414141227F4141221C7F494949417F090909013E4149497A"
    "7F0808087F00417F41002040413F017F081422417F404040407F020C027F7F0408107F3E4141413E7F090909063E4151215E"
    "7F09192946464949493101017F01013F4040403F1F2040201F3F4038403F631408146307087008076151494543007F414100"
    "02040810200041417F0004020102044040404040000102040020545454787F484444383844444420384444487F3854545418"
    "087E0901020C5252523E7F0804047800447D40002040443D007F1028440000417F40007C041804787C080404783844444438"
    "7C14141408081414187C7C080404084854545420043F4440203C4040207C1C2040201C3C4030403C44281028440C5050503C"
    "4464544C44000836410000007F000000413608001008081008"
)
"""A 5 x 7 font for the characters 32 to 126, five columns of a byte each, the top pixel in the lowest bit."""


@dataclass
class Trace:
    """What is known of each token of an episode.

    Attributes:
        rewards: what it was paid.
        kls: `log pi - log pi_ref`, where a policy is attached and there is a reference.
        values: of the state it was said in, where an agent's values are attached.
    """

    rewards: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, reward: float, kl: Any = None, value: Any = None) -> None:
        """One more token; None for what is not known of it."""
        self.rewards.append(reward)
        if kl is not None:
            self.kls.append(float(kl))
        if value is not None:
            self.values.append(float(value))

    def shading(self) -> tuple[list[float], str]:
        """The numbers that tokens are shaded by: values or else KLs where all tokens have one, else rewards."""
        for numbers, meaning in ((self.values, "value"), (self.kls, "kl")):
            if numbers and len(numbers) == len(self.rewards):
                return numbers, meaning
        return self.rewards, "reward"


@dataclass(frozen=True)
class Picture:
    """What is drawn: a prompt, the pieces of a response, and a number for each of them.

    Attributes:
        prompt: as it was given.
        pieces: the text of each token; the end token is "<end>".
        numbers: one a piece: its reward, its KL, or the value of the state it was said in.
        meaning: which of these.
        total: the reward so far.
    """

    prompt: str
    pieces: list[str]
    numbers: list[float]
    meaning: str
    total: float

    @classmethod
    def of(cls, task: Task, prompt: str, response: Sequence[int], trace: Trace) -> Picture:
        """The picture of a response given as token ids."""
        numbers, meaning = trace.shading()
        unknown = [0.0] * (len(response) - len(numbers))  # tokens from before a run was resumed
        return cls(prompt, token_texts(task, response), unknown + numbers, meaning, sum(trace.rewards))

    def shades(self) -> list[float]:
        """Each number from -1 to 1, as a share of the largest in size."""
        largest = max((abs(x) for x in self.numbers if not math.isnan(x)), default=0.0) or 1.0
        return [x / largest for x in self.numbers]


def token_texts(task: Task, tokens: Sequence[int]) -> list[str]:
    """The text of each token by itself; the end token is "<end>"."""
    texts = task.decode([[token] for token in tokens]) if len(tokens) else []
    return [END if token == task.eos_token_id else text for token, text in zip(tokens, texts, strict=True)]


def escape(text: str) -> str:
    """The text with every control, format, line-breaking and unassigned character written out: none moves a cursor."""
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in CONTROLS else c for c in text
    )


def one_line(message: object) -> str:
    """A message without line breaks and without control characters that a file or a model may have put there."""
    return escape(" ".join(str(message).split()))


def colour(shade: float, meaning: str) -> tuple[int, int, int]:
    """Green for a good number, red for a bad one, darker for a smaller one; a KL is bad when it is large."""
    if meaning == "kl":
        shade = -shade
    if shade == 0 or math.isnan(shade):  # what failed is not known
        return (60, 60, 60)
    strength = 60 + int(140 * min(abs(shade), 1.0))
    return (30, strength, 30) if shade > 0 else (strength, 30, 30)


def ansi(picture: Picture) -> str:
    """One line: the prompt in bold, each token on a background shaded by its number, and the reward so far."""
    tokens = []
    for piece, shade in zip(picture.pieces, picture.shades(), strict=True):
        red, green, blue = colour(shade, picture.meaning)
        tokens.append(f"\x1b[97;48;2;{red};{green};{blue}m{escape(piece)}\x1b[0m")
    said = f"[reward {picture.total:+.3f}, shaded by {picture.meaning}]"
    return f"\x1b[1m{escape(picture.prompt)}\x1b[0m{SEAM}{''.join(tokens)}  {said}"


def frame(picture: Picture) -> NDArray[np.uint8]:
    """The same as an image: (H, W, 3), always of one size, the newest lines where not all fit."""
    cells = [(c, (30, 30, 30), (255, 255, 190)) for c in escape(picture.prompt) + SEAM]
    for piece, shade in zip(picture.pieces, picture.shades(), strict=True):
        cells += [(c, (255, 255, 255), colour(shade, picture.meaning)) for c in escape(piece)]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)][-(LINES - 1) :]
    status = f"reward {picture.total:+.3f}, shaded by {picture.meaning}"
    rows = [[(c, (90, 90, 90), (255, 255, 255)) for c in status], *rows]
    height, width = CELL
    image = np.full((LINES * height, COLUMNS * width, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, (character, ink, paper) in enumerate(row):
            cell = image[y * height : (y + 1) * height, x * width : (x + 1) * width]
            cell[:] = paper
            cell[1:8, :5][glyph(character)] = ink
    return image.repeat(SCALE, 0).repeat(SCALE, 1)


def glyph(character: str) -> NDArray[np.bool_]:
    """(7, 5) bool: the pixels of a character; a box for one that the font does not have."""
    place = ord(character) - 32
    if not 0 <= place < len(GLYPHS) // 10:
        box = np.ones((7, 5), dtype=np.bool_)
        box[1:-1, 1:-1] = False
        return box
    columns = np.frombuffer(bytes.fromhex(GLYPHS[10 * place : 10 * place + 10]), dtype=np.uint8)
    return (columns[None] >> np.arange(7)[:, None] & 1).astype(np.bool_)


def draw(picture: Picture, mode: str | None) -> Any:
    """The picture in a render mode; None for "human" (shown as it happens) and None."""
    if mode == "ansi":
        return ansi(picture)
    return frame(picture) if mode == "rgb_array" else None


def show(pictures: Sequence[Picture]) -> None:
    """Writes the pictures to the terminal, one a line."""
    coded = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(ansi(picture) + "\n" for picture in pictures)
    sys.stdout.write(text.encode(coded, "backslashreplace").decode(coded))  # whatever the terminal can show
    sys.stdout.flush()
