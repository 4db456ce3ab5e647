"""A feature card as a record: what `qklens dict show --json` prints and a study's results hold."""

from __future__ import annotations

from pydantic import Field

from qklens.analyses.passages import Group
from qklens.strict import Strict


class CardText(Strict):
    """The text that a card was read on."""

    name: str
    sha256: str = Field(description="of its name and bytes")
    windows: int
    tokens: int
    unknown: float = Field(description="share of tokens that stand for unknown words")


class CardToken(Strict):
    """One token of an example."""

    text: str = Field(description="its characters, raw; foreign text")
    activation: float


class Example(Strict):
    """One token at which the feature was looked at, with what stands around it."""

    group: Group = Field(description="`text`, or the condition of a prompt")
    where: str = Field(description="which window, or which item and option order")
    item: str | None
    place: str | None = Field(description="the part of the prompt that the token belongs to")
    position: int = Field(description="token position in the window or prompt")
    activation: float
    at: int = Field(description="which of `tokens` it is")
    tokens: list[CardToken]
    decile: int | None = Field(default=None, description="which tenth of the active tokens it stands for, 0 weakest")


class Density(Strict):
    """How often and how strongly the feature is active on a group of passages, first tokens left out."""

    group: Group
    tokens: int
    active: int
    share: float = Field(description="active / tokens")
    mean: float | None = Field(description="mean activation where it is active")
    largest: float
    least: float = Field(description="most negative activation, 0 for a source that has none")
    edges: list[float] = Field(description="of the histogram, log10 |activation|; empty where it is never active")
    counts: list[int]


class PlaceActivation(Strict):
    """The feature at one part of the prompts of one condition."""

    condition: Group
    place: str
    tokens: int
    share: float = Field(description="of these tokens, how many it is active on")
    mean: float = Field(description="mean activation over all of them")


class Promoted(Strict):
    """A token and its direct logit; see `direct_logits`."""

    token: str = Field(description="decoded; foreign text")
    token_id: int
    logit: float


class Neighbour(Strict):
    """Another feature."""

    feature: str
    cosine: float


class FeatureCard(Strict):
    """One feature of a source at one layer."""

    feature: str
    layer: int
    dictionary: str
    model: str
    norm: float = Field(description="length of its decoder direction at this layer")
    roles: list[str] = Field(description="roles that it holds in a study")
    label: str | None = Field(default=None, description="one line from a language model; foreign text")
    density: list[Density] = Field(description="one a group")
    top: list[Example] = Field(description="text: the windows with its largest activations, one token each")
    bottom: list[Example] = Field(description="likewise most negative")
    deciles: list[Example] = Field(description="text: one random token from each tenth of its active tokens")
    prompts: list[Example] = Field(description="the prompts with its largest activations, by condition")
    places: list[PlaceActivation]
    promoted: list[Promoted] = Field(description="tokens of largest direct logit")
    suppressed: list[Promoted]
    logit_scale: float = Field(description="the final norm's scale at which direct logits are taken")
    nearest: list[Neighbour] = Field(description="features of largest cosine at this layer")
    opposite: list[Neighbour]
