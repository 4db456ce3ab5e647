"""From a spec to what is steered in one lab: the direction with its controls, and every place of the sweep.

Heads, a role's feature, its typical activation and the unrelated feature are chosen on the discovery half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch

from qklens.analyses.contrasts import ROLES, Role
from qklens.data.render import Condition, Prompt
from qklens.dictionaries.source import check_layer, feature_index
from qklens.errors import QklensError, nearest
from qklens.interventions.direction import Direction
from qklens.interventions.steer import ALL_TOKENS, Head, Steer
from qklens.models.edits import Side
from qklens.studies.choices import belief_candidates, default_heads
from qklens.studies.controls import Controls, feature_layers, find_controls
from qklens.studies.head_names import head_name
from qklens.studies.lab import Lab
from qklens.studies.roles import find_roles, role_direction
from qklens.studies.steer_spec import ALL, ANSWER, CHOSEN, SteerSpec, heads_of
from qklens.studies.tables.steer_words import place_words


@dataclass(frozen=True)
class Place:
    """Where a row steers: a side, its layers, and heads of these layers, or None for all of them and for the stream."""

    side: Side
    layers: tuple[int, ...]
    heads: tuple[Head, ...] | None

    @property
    def words(self) -> str:
        """The place as an error line names it."""
        return place_words(self.side, self.layers, self.heads)


@dataclass(frozen=True, eq=False)
class SteerPlan:
    """A spec in one lab.

    Attributes:
        lab: model, items and source.
        spec: what to sweep.
        named: features that a person gave roles.
    """

    lab: Lab
    spec: SteerSpec
    named: Mapping[str, str]

    @cached_property
    def chosen(self) -> tuple[Head, ...]:
        """The answer-selection heads whose input the source writes."""
        return default_heads(self.lab, self.lab.source.layers, self.lab.source.name)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Under which something is run; benign stands beside every row as a control."""
        return tuple(dict.fromkeys([*self.spec.conditions, *(("benign",) if self.spec.controls else ())]))

    @cached_property
    def role(self) -> Role:
        """The role asked for; another feature plays refuse-and-redirect at the answer, elsewhere harm-detection."""
        asked = self.spec.direction
        if asked in ROLES:
            return ROLES[ROLES.index(asked)]
        return "refuse_redirect" if self.spec.tokens == (ANSWER,) else "harm_detection"

    @cached_property
    def feature(self) -> int:
        """The feature that is steered."""
        source, asked = self.lab.source, self.spec.direction
        label = self.named.get(asked, asked)
        if label in source.labels or label not in ROLES:
            return feature_index(source, label)
        belief = source.labels[belief_candidates(self.lab)[0].feature]
        return find_roles(self.lab, self.chosen, belief)[0].chosen[self.role]

    @cached_property
    def direction(self) -> Direction:
        """The feature's direction; strength 1 is its largest activation where its role plays."""
        return role_direction(self.lab, self.feature, self.role)

    @cached_property
    def controls(self) -> Controls | None:
        """Random directions and an unrelated feature; features of the roles' names are none."""
        if not self.spec.controls:
            return None
        taken = {self.feature} | {i for i, label in enumerate(self.lab.source.labels) if label in ROLES}
        return find_controls(self.lab, self.direction, self.feature, self.role, taken=taken, draws=self.spec.draws)

    @cached_property
    def directions(self) -> tuple[Direction, ...]:
        """The steered one, then random ones, then the unrelated one."""
        controls = self.controls
        return (self.direction, *((*controls.random, controls.unrelated) if controls else ()))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every combination of side, layer range and head subset.

        Raises:
            QklensError: no head of a subset lies in a range, or the direction does not write a layer.
        """
        found = []
        for side, layers, subset in product(self.spec.sides, self.spec.layers or (None,), self.spec.heads):
            if subset == (ALL,):
                found.append(Place(side, tuple(sorted(layers or ())), None))
                continue
            heads = tuple(dict.fromkeys([*(self.chosen if CHOSEN in subset else ()), *heads_of(subset)]))
            within = tuple(h for h in heads if layers is None or h[0] in layers)
            if not within:
                raise QklensError(
                    f"no head of {[head_name(h) for h in heads]} lies in layers {list(layers or ())}; heads name their "
                    "layers: drop layers, or name others"
                )
            found.append(Place(side, tuple(sorted({layer for layer, _ in within})), within))
        written = feature_layers(self.lab, self.feature)
        for place in found:
            missing = next((layer for layer in place.layers if layer not in written), None)
            if missing is not None:
                raise QklensError(
                    f"feature {self.lab.source.labels[self.feature]!r} does not write resid_pre.{missing} "
                    f"({place.words}); it writes layers {list(written)}"
                )
        return tuple(dict.fromkeys(found))

    @property
    def read(self) -> tuple[Head, ...]:
        """All heads whose attention rows speak of."""
        return tuple(dict.fromkeys(head for place in self.places for head in self.read_at(place)))

    def read_at(self, place: Place) -> tuple[Head, ...]:
        """The heads whose attention one place's rows speak of."""
        return place.heads or self.chosen

    def steer(self, place: Place, strength: float, direction: Direction) -> Steer:
        """One edit."""
        where: dict[str, Any] = {"layers": place.layers} if place.heads is None else {"heads": place.heads}
        same: dict[str, Any] = {
            name: getattr(self.spec, name) for name in ("mode", "unit", "tokens", "norm", "key_scope")
        }
        return Steer(direction, strength, side=place.side, **where, **same)

    def check_names(self) -> None:
        """Refuse what the model, the source or the prompts lack, before anything is measured.

        Raises:
            QklensError: an unknown direction, layer or head, a layer that the source does not write, or a token that a
                prompt lacks.
        """
        lab, spec = self.lab, self.spec
        stray = next((role for role in self.named if role != spec.direction or role not in ROLES), None)
        if stray is not None:
            raise QklensError(f"--role {stray}: expected the role that the direction names, one of {list(ROLES)}")
        if spec.direction in self.named:
            feature_index(lab.source, self.named[spec.direction])
        elif spec.direction not in ROLES:
            try:
                feature_index(lab.source, spec.direction)
            except QklensError as error:
                hint = nearest(spec.direction, ROLES)
                raise QklensError(
                    f"direction {spec.direction!r} is no role ({', '.join(ROLES)}{hint}), and {error}"
                ) from error
        heads = [head for subset in spec.heads for head in heads_of(subset)]
        for layer, head in [*heads, *((layer, 0) for layers in spec.layers for layer in layers)]:
            lab.subject.check_head(layer, head)
            check_layer(lab.source, layer)
        for condition in self.conditions:
            for prompt in lab.prompts(condition, "report"):
                for token in spec.tokens:
                    _check_token(prompt, token, condition)

    def check_sizes(self) -> None:
        """Refuse strengths whose change the model's dtype cannot hold, and features that are never active.

        Raises:
            QklensError: names the strength and the place.
        """
        dtype = self.lab.subject.dtype
        for place, layer in [(where, layer) for where in self.places for layer in where.layers]:
            unit = self._unit(layer)
            if unit == 0 and self.spec.mode in ("add", "clamp"):
                raise QklensError(
                    f"feature {self.direction.label!r} is never active at layer {layer} where its role plays "
                    f"({self.role}), so that unit 'activation_max' is 0; use unit 'raw' or 'resid_norm'"
                )
            for strength, direction in product(self.spec.strengths, self.directions):
                change = (direction.vectors[layer].double() * (strength * unit)).to(dtype)
                fits = change.float().pow(2).sum().isfinite() & change.isfinite().all()  # norms are float32 sums
                if self.spec.mode != "ablate" and not bool(fits):
                    raise QklensError(
                        f"strength {strength:g} ({place.words}): what it adds to resid_pre.{layer} overflows "
                        f"{str(dtype).removeprefix('torch.')} or its norm; use a smaller strength"
                    )

    def _unit(self, layer: int) -> float:
        """What strength 1 adds at most, in multiples of the direction."""
        if self.spec.mode == "scale" or self.spec.unit == "activation_max":
            return self.direction.typical[layer]
        if self.spec.unit == "raw":
            return 1.0
        streams = self.lab.streams("harm", "discovery", [layer])
        largest = torch.stack([stream[layer].norm(dim=-1).max() for stream in streams]).max()
        return float(largest / self.direction.vectors[layer].norm())


def _check_token(prompt: Prompt, token: str | int, condition: Condition) -> None:
    n = len(prompt.tokens)
    if isinstance(token, str) and token != ALL_TOKENS:
        try:
            prompt.span(token)
        except QklensError as error:
            hint = nearest(token, [*(name for name, at in prompt.spans.items() if at), ALL_TOKENS])
            raise QklensError(f"tokens: {error}, under condition {condition!r}{hint}") from error
    elif isinstance(token, int) and not -n <= token < n:
        raise QklensError(f"tokens: position {token} is not in a prompt of {n} tokens; expected {-n} to {n - 1}")
