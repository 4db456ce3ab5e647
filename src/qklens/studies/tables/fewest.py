"""The fewest heads for a sweep's one point: which heads must see the steered direction for the margin to come back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qklens.analyses.head_search import Method
from qklens.errors import QklensError
from qklens.studies.controls import feature_layers
from qklens.studies.lab import Lab
from qklens.studies.progress import Tick, silent
from qklens.studies.steer_spec import CHOSEN, SteerSpec
from qklens.studies.tables.head_set_table import HeadSetTable, head_set_table
from qklens.studies.tables.steer_plan import Place, SteerPlan


def fewest_table(
    lab: Lab,
    spec: SteerSpec,
    method: Method = "greedy",
    named: Mapping[str, str] = MappingProxyType({}),
    *,
    tick: Tick = silent,
) -> HeadSetTable:
    """Search for the fewest heads at a spec's one strength and place.

    Args:
        lab: model, items and source.
        spec: what to steer; where it names neither heads nor layers, all heads of the layers that the feature writes
            are candidates.
        method: `greedy`, or by `attribution`.
        named: a feature that a person gave the direction's role.
        tick: given the number of steps, what to call after each.

    Raises:
        QklensError: more than one strength or place, a condition other than harm, or as `head_set_table`.
    """
    if len(spec.strengths) != 1 or spec.conditions != ("harm",):
        raise QklensError(
            f"the fewest heads are searched at one strength under harm, not at {list(spec.strengths)} under "
            f"{list(spec.conditions)}; give one, as --strengths -1.5"
        )
    shares = lab.subject.n_kv_heads < lab.subject.n_heads
    if shares and (spec.sides == ("value",) or (spec.sides == ("key",) and spec.key_scope == "group")):
        raise QklensError(
            f"heads of {lab.subject.name} share keys and values: an edit of one head's {spec.sides[0]} is an edit of "
            "its group's; use side 'query', or side 'key' with key_scope 'head'"
        )
    plan = SteerPlan(lab, spec, named)
    plan.check_names()
    if spec.heads == ((CHOSEN,),) and not spec.layers:
        layers = feature_layers(lab, plan.feature)
        every = tuple((layer, head) for layer in layers for head in range(lab.subject.n_heads))
        places = tuple(Place(side, layers, every) for side in spec.sides)
    else:
        places = plan.places
    if len(places) != 1:
        raise QklensError(
            f"the fewest heads are searched at one place, not at {'; '.join(p.words for p in places)}; give one side, "
            "layer range and head subset"
        )
    steer = plan.steer(places[0], spec.strengths[0], plan.direction)
    unrelated = plan.controls.unrelated if plan.controls else None
    draws = spec.draws if spec.controls else 0
    table = head_set_table(lab, steer, method, unrelated=unrelated, draws=draws, tick=tick)
    return table.model_copy(update={"spec": spec} if spec.controls else {"spec": spec, "beside": []})
