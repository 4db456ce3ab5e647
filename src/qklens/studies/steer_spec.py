"""A sweep of steering as a value: which direction, how much of it, where, and on which side; a file can hold it.

Every combination of side, layer range and head subset is steered at every strength, under every condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from qklens.data.render import Condition
from qklens.errors import QklensError, nearest
from qklens.interventions.steer import ALL_TOKENS, Head
from qklens.models.edits import Side
from qklens.strict import Strict, complaint
from qklens.studies.head_names import head_name, head_named

Mode = Literal["add", "scale", "clamp", "ablate"]
CHOSEN, ALL = "chosen", "all"
ANSWER = "answer"
_MOST_LAYERS = 10_000
_SHIFTS = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
_STRENGTHS: dict[str, tuple[float, ...]] = {
    "add": _SHIFTS,
    "clamp": _SHIFTS,
    "scale": (0.0, 0.5, 1.0, 2.0),
    "ablate": (1.0,),
}
_TOKENS: dict[str, tuple[str, ...]] = {
    "query": (ANSWER,),
    "key": ("correct", "incorrect"),
    "value": ("correct", "incorrect"),
    "residual": (ALL_TOKENS,),
}


def _several(value: object) -> object:
    """One thing stands for a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _subsets(value: object) -> object:
    return tuple(_several(some) for some in value) if isinstance(value, list | tuple) else ((value,),)


def _ranges(value: object) -> object:
    """Layer ranges: a layer, a text like `0-2`, or a list of layers each."""
    return tuple(_range(some) for some in value) if isinstance(value, list | tuple) else (_range(value),)


def _range(value: object) -> object:
    if not isinstance(value, str):
        return _several(value)
    first, dash, last = value.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)) or len(value) > 13:
        raise ValueError(f"is {value!r}; expected a layer, a range as 0-2, or a list of layers")
    if not int(first) <= int(last or first) < _MOST_LAYERS:
        raise ValueError(f"is {value!r}; expected the lower layer first, as 0-2, and less than {_MOST_LAYERS}")
    return tuple(range(int(first), int(last or first) + 1))


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Layer = Annotated[int, Field(strict=True, ge=0)]
_Token = Annotated[str, Field(strict=True, min_length=1)] | Annotated[int, Field(strict=True)]
_Nonempty = Field(min_length=1)


class SteerSpec(Strict):
    """What to sweep. A list of one may be written as its one thing; what is left out is filled in.

    Attributes:
        direction: a role, as refuse_redirect, or a feature's label, as L2/271.
        strengths: s of `Steer`; by default some fit for the mode. `ablate` has none: one stands for it.
        mode: `add`, `scale`, `clamp` or `ablate`.
        unit: what strength 1 is: `raw`, `activation_max` or `resid_norm`.
        sides: `residual`, `query`, `key`, `value`.
        layers: ranges of resid_pre layers, each a layer, a text as `0-2`, or a list; none where heads name theirs.
        heads: head subsets, each `chosen` (the answer-selection heads), `all`, or a list of heads as L2H4. With layers,
            the heads of a subset that lie in a range are steered. By default `chosen`, for the residual `all`.
        tokens: span names, `all`, or positions: from the prompt's first token, or from its end when negative. By
            default what the side acts on: the answer for queries, both options for keys and values, else all.
        norm: `recomputed`, or `frozen` to check the algebra.
        key_scope: under GQA, `group` or `head`.
        conditions: under which prompts.
        controls: whether each row has its controls.
        draws: how many random directions.
    """

    direction: Annotated[str, Field(strict=True, min_length=1)] = "refuse_redirect"
    strengths: Annotated[tuple[_Number, ...], BeforeValidator(_several), _Nonempty] = _SHIFTS
    mode: Mode = "add"
    unit: Literal["raw", "activation_max", "resid_norm"] = "activation_max"
    sides: Annotated[tuple[Side, ...], BeforeValidator(_several), _Nonempty] = ("query",)
    layers: Annotated[tuple[Annotated[tuple[_Layer, ...], _Nonempty], ...], BeforeValidator(_ranges)] = ()
    heads: Annotated[tuple[Annotated[tuple[str, ...], _Nonempty], ...], BeforeValidator(_subsets), _Nonempty] = (
        (CHOSEN,),
    )
    tokens: Annotated[tuple[_Token, ...], BeforeValidator(_several), _Nonempty] = (ANSWER,)
    norm: Literal["recomputed", "frozen"] = "recomputed"
    key_scope: Literal["group", "head"] = "group"
    conditions: Annotated[tuple[Condition, ...], BeforeValidator(_several), _Nonempty] = ("harm",)
    controls: Annotated[bool, Field(strict=True)] = True
    draws: Annotated[int, Field(strict=True, ge=1, le=1000)] = 10

    @classmethod
    def parse(cls, given: Mapping[str, object], where: str | None = None) -> SteerSpec:
        """A spec from keys and values.

        Args:
            given: what is said; the rest is filled in.
            where: the file that says it; None for options of the command line.

        Raises:
            QklensError: an unknown key, a value of another kind, or a combination that cannot exist.
        """
        known = tuple(cls.model_fields)
        strange = next((key for key in given if key not in known), None)
        if strange is not None:
            raise QklensError(
                f"{where}: unknown key {strange!r}; expected some of {list(known)}{nearest(str(strange), known)}"
            )
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise QklensError(_line(error, where)) from error

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:  # noqa: ANN401
        """Defaults that depend on the mode and the sides."""
        if not isinstance(given, dict):
            return given
        sides, mode = _several(given.get("sides", "query")), given.get("mode", "add")
        known = [side for side in sides if side in get_args(Side)] if isinstance(sides, tuple) else []
        tokens = {_TOKENS[side] for side in known}
        if len(tokens) > 1 and "tokens" not in given:
            raise ValueError(f"sides {list(known)} act on different tokens; say which with tokens")
        heads = ALL if "residual" in known else CHOSEN
        strengths = _STRENGTHS.get(mode, _SHIFTS) if isinstance(mode, str) else _SHIFTS
        return {"strengths": strengths, "heads": heads, "tokens": next(iter(tokens), (ANSWER,)), **given}

    @field_validator("strengths", "sides", "layers", "tokens", "conditions")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("heads")
    @classmethod
    def _named_heads(cls, subsets: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """Each subset `all`, or `chosen` and heads in one spelling."""
        spelt = []
        for subset in subsets:
            named = []
            for text in subset:
                head = head_named(text)
                if head is None and text not in (CHOSEN, ALL):
                    hint = nearest(text, (CHOSEN, ALL))
                    raise ValueError(f"is {text!r}; expected {CHOSEN!r}, {ALL!r}, or a head as L2H4 or 2.4{hint}")
                named.append(text if head is None else head_name(head))
            if ALL in named and len(named) > 1:
                raise ValueError(f"{ALL!r} stands beside {len(named) - 1} others; all heads are a subset of their own")
            spelt.append(tuple(dict.fromkeys(named)))
        return tuple(dict.fromkeys(spelt))

    @model_validator(mode="after")
    def _possible(self) -> SteerSpec:
        every = (ALL,) in self.heads
        if "residual" in self.sides:
            if self.heads != ((ALL,),):
                raise ValueError("side 'residual' edits the stream for all heads; drop heads, or ask for it by itself")
            if self.norm == "frozen":
                raise ValueError("side 'residual' has its norms recomputed; drop norm 'frozen', or the side")
        if every and not self.layers:
            raise ValueError("layers are missing; name those whose stream or heads are steered, as 0-2")
        if self.key_scope == "head" and (self.sides != ("key",) or every):
            raise ValueError("key_scope 'head' needs side 'key' alone and named or chosen heads; use 'group'")
        if self.mode == "ablate" and self.strengths != (1.0,):
            raise ValueError("mode 'ablate' has no strength; drop strengths")
        if self.mode in ("ablate", "scale") and self.unit != "activation_max":
            raise ValueError(f"mode {self.mode!r} has no unit; drop unit")
        return self


def heads_of(subset: Sequence[str]) -> list[Head]:
    """The heads that a subset names itself."""
    return [head for head in map(head_named, subset) if head is not None]


def _line(error: ValidationError, where: str | None) -> str:
    first = error.errors()[0]
    key, *rest = first["loc"] or ("",)
    at = "".join(f"[{place}]" for place in rest if isinstance(place, int))
    message = complaint(first["type"], first["msg"], first["input"])
    if first["type"] in ("too_short", "string_too_short"):
        message = "is empty; expected at least one"
    if first["type"] == "literal_error":
        known = str(first.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
        message += nearest(str(first["input"]), [name.strip("'") for name in known])
    if where is not None:
        return f"{where}: {key}{at}: {message}" if key else f"{where}: {message}"
    return f"--{str(key).replace('_', '-')}: {message}" if key else message
