"""The page: complete, inert, honest about what is missing, and equal to the results it was made from."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import HOSTILE, STAGES

from qklens.report.page import render, write_report
from qklens.report.story import headline, key_numbers, sections
from qklens.studies.results import Results, Verdict

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if dict(attrs).get("id"):
            self.ids.append(str(dict(attrs)["id"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="session")
def pages(
    outcomes: dict[str, Results], drawings: dict[str, dict[str, str]], manifest: dict[str, Any]
) -> dict[str, str]:
    return {name: render(outcomes[name], manifest, drawn) for name, drawn in drawings.items()}


def test_every_page_parses_and_has_every_section(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        page = Page(text)
        for stage in (*STAGES, "verdict", "summary", "completeness", "gauge", "methods", "provenance"):
            assert stage in page.ids, (name, stage)
            assert ("a", {"href": f"#{stage}"}) in [(t, {"href": a.get("href")}) for t, a in page.tags], (name, stage)
        assert len(page.ids) == len(set(page.ids)), name


def test_a_page_fetches_and_runs_nothing(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        for tag, attrs in Page(text).tags:
            assert tag not in {"script", "iframe", "object", "embed", "link", "img", "base", "form"}, (name, tag)
            for key, value in attrs.items():
                assert not key.startswith("on"), (name, tag, key)
                if key in {"href", "src", "xlink:href"}:
                    assert str(value).startswith("#"), (name, tag, value)
        assert "http" not in re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", text).replace("http-equiv", ""), (
            name
        )
        assert "@import" not in text
        assert "url(http" not in text


def test_the_policy_forbids_everything_but_inline_styles(pages: dict[str, str]) -> None:
    policies = [
        str(attrs["content"])
        for tag, attrs in Page(pages["full"]).tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "script-src" not in policies[0]


def test_hostile_text_is_shown_and_not_obeyed(pages: dict[str, str]) -> None:
    text = pages["hostile"]
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "{{7*7}}" in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 30
    assert HOSTILE[:24] in Page(text).text, "escaped text should read as it was written"


def test_the_same_results_give_the_same_page(
    outcomes: dict[str, Results], pages: dict[str, str], manifest: dict[str, Any], tmp_path: Path
) -> None:
    write_report(outcomes["task_not_solved"], manifest, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == pages["task_not_solved"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numbers_on_the_page_are_the_results_numbers(pages: dict[str, str], outcomes: dict[str, Results]) -> None:
    text, results = Page(pages["full"]).text, outcomes["full"]
    assert "100% \u2192 48.1%" in text
    assert "On 258 prompts per condition (129 items in both option orders)" in text
    assert "restore 94% of the lost margin" in text
    assert "13.7% of the summed size of all contrastive terms" in text
    assert "3.1e\u22126" in text
    z = [
        r.z
        for r in results.zscores
        if (r.query_role, r.key_role, r.null) == ("refuse_redirect", "harm_detection", "matched")
    ]
    assert f"matched null: \u2212{abs(sum(z) / len(z)):.1f}" in text
    assert "9f" * 32 in text
    assert "qklens study harm-pressure --out run" in text


def test_a_skipped_stage_gives_its_reason(outcomes: dict[str, Results]) -> None:
    for section in sections(outcomes["task_not_solved"])[1:-1]:
        assert section.paragraphs == ("Not run: the model does not solve the task, so there is nothing to explain.",)
        assert not section.ran
    origin = sections(outcomes["late_flip"])[12]
    assert origin.stage == "origin"
    assert origin.paragraphs == ("Not run: no base model was given.",)


def test_a_stage_without_rows_or_reason_says_so(make: Callable[..., Results]) -> None:
    section = {s.stage: s for s in sections(make(partners=[], skipped={}))}["partners"]
    assert section.paragraphs[0].startswith("Not measured")


def test_headlines_follow_the_verdict_and_the_numbers(outcomes: dict[str, Results]) -> None:
    assert headline(outcomes["full"]).startswith("Accuracy falls from 100% to 48.1%")
    assert "points to attention" in headline(outcomes["full"])
    assert "53% of the questions" in headline(outcomes["task_not_solved"])
    assert "restore 3% of the lost margin" in headline(outcomes["late_flip"])
    assert headline(outcomes["no_effect"]).startswith("No effect of harm: accuracy falls from 99% to 98%")


@pytest.mark.parametrize("mechanism", list(Verdict.model_fields["mechanism"].annotation.__args__))
@pytest.mark.parametrize("bare", [False, True])
def test_every_mechanism_has_a_headline(make: Callable[..., Results], mechanism: str, bare: bool) -> None:
    verdict = {"mechanism": mechanism, "confidence": 0.5, "rule": "r", "evidence": []}
    gone: dict[str, Any] = {"heads_details": None, "heads": [], "belief": None, "zscores": []} if bare else {}
    results = make(verdict=verdict, **gone)
    text = headline(results)
    assert text.endswith(".")
    assert "  " not in text
    assert "not available" not in text
    assert len(key_numbers(results)) == 6


def paragraphs(results: Results, stage: str) -> str:
    return " ".join({s.stage: s for s in sections(results)}[stage].paragraphs)


def test_the_tokens_that_draw_the_heads_are_named(make: Callable[..., Results], outcomes: dict[str, Results]) -> None:
    text = paragraphs(outcomes["full"], "heads")
    assert "58.7% of its attention on \u201c<|user|>\u201d (chat template before the user's text; 6% with no" in text
    assert "bleach" not in text, "a token of an option is not what draws a head off the options"
    assert "chat template's tokens take 8% of the attention with no intent, 60% under harm and 10%" in text
    drawn = {n.label: n for n in key_numbers(outcomes["full"])}[
        "Attention on the token that draws a selected head most under harm"
    ]
    assert drawn.value == "58.7%"
    assert "\u201c<|user|>\u201d" in drawn.detail
    rows = [row.model_dump() for row in outcomes["full"].heads]
    for row in rows:
        row["top_tokens"][0]["attention"]["harm"] = 0.1
    still = paragraphs(make(heads=rows), "heads")
    assert "No single token outside the options gains a tenth of" in still
    assert "<|user|>" not in still


def test_what_a_benign_intent_does_to_the_heads_is_said(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    assert "A benign intent is not shown to lower" in paragraphs(outcomes["full"], "heads")
    rows = [row.model_dump() for row in outcomes["full"].heads]
    chosen = [row for row in rows if row["selected"]]
    chosen[0]["attention_change"]["benign"] = (-0.1, -0.12, -0.08)
    text = paragraphs(make(heads=rows), "heads")
    assert "25% of the change under harm" in text
    assert "not specific to harm" not in text
    chosen[0]["attention_change"]["benign"] = (-0.3, -0.35, -0.25)
    name = f"L{chosen[0]['layer']}H{chosen[0]['head']}"
    assert f"At {name} most of the change is therefore not specific to harm" in paragraphs(make(heads=rows), "heads")


def test_few_items_are_said_in_the_headline_and_the_verdict(make: Callable[..., Results]) -> None:
    verdict = {"mechanism": "late_flip", "confidence": 0.5, "rule": "r", "evidence": []}
    assert "tentative" not in headline(make(verdict=verdict))
    results = make(verdict={**verdict, "caveats": ["the report half holds 4 items", HOSTILE]})
    assert headline(results).endswith("This is tentative; the caveats are below.")
    assert "Caveat: The report half holds 4 items." in paragraphs(results, "verdict")
    page = render(results, {}, {})
    assert page.index("The report half holds 4 items.") < page.index('class="numbers"'), "it stands under the headline"
    assert "<script>alert" not in page


def test_a_verdict_that_is_its_own_word_stands_once(
    make: Callable[..., Results], outcomes: dict[str, Results], manifest: dict[str, Any]
) -> None:
    verdict = {"mechanism": "undetermined", "confidence": 0.5, "rule": "r", "evidence": []}
    text = Page(render(make(verdict=verdict), manifest, {})).text
    assert not re.search(r"undetermined\W+undetermined", text)
    assert "Verdict: undetermined, confidence" in text
    assert "(attention_harm_key)" in paragraphs(outcomes["full"], "verdict")


def test_the_best_of_the_random_draws_stands_beside_the_steered_accuracy(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    rows = [row.model_dump() for row in outcomes["full"].steering]
    chosen = next(r for r in rows if r["chosen"] and r["stage"] == "steer_all")
    random = next(r for r in rows if r["control"] == "random" and r["stage"] == "steer_all" and r["chosen"])
    random |= {"draws": (0.41, 0.6, 10)}
    results = make(steering=rows)
    detail = key_numbers(results)[-1].detail
    assert f"best control: 60%, best of 10 random directions; random mean {100 * random['accuracy']:.1f}%" in detail
    assert "mean of 10 draws, which range from 41% to 60%" in paragraphs(results, "steer_all")
    assert "gains at least half as much" not in paragraphs(results, "steer_all")
    random["draws"] = (0.41, chosen["accuracy"], 10)
    assert "best of 10 random directions gains at least half as much" in paragraphs(make(steering=rows), "steer_all")


def test_strength_zero_is_not_called_chosen(make: Callable[..., Results], outcomes: dict[str, Results]) -> None:
    rows = [row.model_dump() for row in outcomes["full"].steering]
    for row in rows:
        row["chosen"] = row["strength"] == 0
    results = make(steering=rows)
    both = {s.stage: s for s in sections(results)}["steer_key"]
    assert len(both.paragraphs) == 1, "two variants that no strength helped are told once"
    assert (
        "layers 2-4; harm detection up on the incorrect option, layers 0-4: in none of these cases"
        in both.paragraphs[0]
    )
    assert "chosen on the discovery half) accuracy" not in both.paragraphs[0]
    assert key_numbers(results)[-1].value == "no strength helped"
    assert "Nothing is steered here" in paragraphs(results, "transfer")


def test_variants_with_the_same_outcome_are_told_once(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    rows = [r.model_dump() for r in outcomes["full"].steering if r.stage == "steer_key" and "down on" in r.variant]
    twin = [{**row, "variant": "the same at every head"} for row in rows]
    text = {s.stage: s for s in sections(make(steering=rows + twin))}["steer_key"].paragraphs
    assert len(text) == 1
    assert "; the same at every head: at strength \u22121.6 (chosen" in text[0]


def test_the_errors_interval_is_named_where_it_excludes_zero(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    rows = [row.model_dump() for row in outcomes["full"].error_terms]
    rows = [{**row, "ci": {**row["ci"], "error": (-0.9, -0.1)}} for row in rows]
    text = paragraphs(make(error_terms=rows), "error_terms")
    assert "the error's interval excludes zero: part of the effect there has no name" in text
    assert "it does not" not in text


def test_a_control_that_works_is_said(outcomes: dict[str, Results]) -> None:
    assert "A control also works" in paragraphs(outcomes["late_flip"], "steer_all")
    assert "A control also works" not in paragraphs(outcomes["full"], "steer_all")


def test_an_interval_that_includes_no_effect_is_said(outcomes: dict[str, Results]) -> None:
    down, up = {s.stage: s for s in sections(outcomes["full"])}["steer_key"].paragraphs
    assert "no effect is shown" in down
    assert "no effect" not in up
    assert "The interval includes zero" in paragraphs(outcomes["no_effect"], "heads")
    assert "includes chance" in paragraphs(outcomes["task_not_solved"], "behaviour")
    assert "includes chance" not in paragraphs(outcomes["full"], "behaviour")


def test_a_belief_that_is_gone_is_not_called_kept(make: Callable[..., Results], outcomes: dict[str, Results]) -> None:
    found = outcomes["full"].belief
    assert found is not None
    values = found.model_dump()
    assert "still represents" in paragraphs(outcomes["full"], "belief")
    values["by_condition"]["harm"] |= {"auc": 0.52, "auc_ci": (0.45, 0.6)}
    assert "not shown that the feature still" in paragraphs(make(belief=values), "belief")
    values["by_condition"]["harm"] |= {"auc": 0.2, "auc_ci": (0.1, 0.3)}
    assert "prefers the incorrect option" in paragraphs(make(belief=values), "belief")


def test_a_pair_without_the_matched_null_supports_no_claim(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    rows = [row.model_dump() for row in outcomes["full"].zscores if row.null == "random_pairs"]
    assert "No claim: the matched null is missing" in paragraphs(make(zscores=rows), "zscores")


def test_a_broken_decomposition_is_not_called_complete(make: Callable[..., Results], manifest: dict[str, Any]) -> None:
    broken = {"max_relative_error": 0.02, "error_share": 0.1, "max_relative_error_by_head": [[0.02]], "n_scores": 1}
    assert "should not be trusted" in render(make(completeness=broken), manifest, figures={})


def test_unknown_numbers_do_not_break_the_page(outcomes: dict[str, Results], manifest: dict[str, Any]) -> None:
    def blank(value: object) -> object:
        if isinstance(value, dict):
            return {key: blank(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [blank(inner) for inner in value]
        return float("nan") if isinstance(value, float) else value

    text = Page(render(Results.model_validate(blank(outcomes["full"].model_dump(by_alias=True))), manifest)).text
    assert "not available" in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
