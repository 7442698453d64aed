"""The report of a comparison: one page that needs nothing else, and Markdown with the same tables."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dernkit.compare.analysis import analyse
from dernkit.compare.report import write_report
from dernkit.compare.rows import read_rows, write_rows
from dernkit.errors import CheckpointError, RecipeError
from tests.unit.planted_rows import DOMAINS, METRIC, STRENGTHS, planted

BASELINE = "prune-frequency"
VOID = {"meta", "br", "hr", "img", "link"}
FEW = {BASELINE: 1.0, "dern": 0.5}


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self._open):
            self.texts.append(data)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = planted(tmp_path_factory.mktemp("comparison"), refused="m-smoe")
    write_report(folder, metric=METRIC, baseline=BASELINE)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text())


def report(out: Path, **changes: str) -> str:
    write_report(out, **({"metric": METRIC, "baseline": BASELINE} | changes))
    return (out / "report.html").read_text()


def table_after(markdown: str, title: str) -> list[list[str]]:
    """Cells of the table below a heading of the Markdown."""
    block = markdown.split(f"### {title}\n\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in block.splitlines()]


def test_the_page_names_every_recipe_model_and_domain(page: Page) -> None:
    said = " ".join(page.texts)
    assert all(name in said for name in (*STRENGTHS, "mixtral", "qwen2-moe", "original"))
    assert {"overview", "pareto", "tables", "refused", "ranks", "domains", "alike", "stability", "again"} <= set(
        page.ids
    )


def test_every_figure_is_on_the_page_and_a_file_of_its_own(out: Path, page: Page) -> None:
    drawn = {file.stem for file in (out / "plots").glob("*.svg")}
    kinds = {name.partition("-")[0] for name in drawn}
    assert kinds == {
        *("pareto", "domains", "use", "scores", "moved"),
        *("error", "alike", "cosines", "mean", "stability"),
    }
    assert drawn <= set(page.ids)
    assert page.tags.count("svg") == len(drawn)
    domains = next((out / "plots").glob("domains*.svg")).read_text()
    assert all(f">{name}<" in domains for name in (*DOMAINS, "dern", "prune-random"))


def test_the_page_needs_no_other_file_no_network_and_no_script(out: Path, page: Page) -> None:
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert page.references
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in page.references)
    assert "@import" not in (out / "report.html").read_text()


def test_ids_are_those_of_one_thing_each_and_references_lead_to_them(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {one[1:] for one in page.references if one.startswith("#")} <= set(page.ids)


def test_files_of_figures_are_whole_svg_documents(out: Path) -> None:
    for file in (out / "plots").iterdir():
        root = ElementTree.parse(file).getroot()
        assert root.tag.endswith("svg")
        assert "background" in root.attrib["style"]


def test_the_same_rows_give_the_same_bytes(out: Path, tmp_path: Path) -> None:
    again = planted(tmp_path, refused="m-smoe")
    first = {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    write_report(again, metric=METRIC, baseline=BASELINE)
    assert {file.relative_to(again): file.read_bytes() for file in again.rglob("*") if file.is_file()} == first


def test_a_planted_difference_is_marked_in_both_documents(out: Path, page: Page) -> None:
    header, _, *lines = table_after(
        (out / "report.md").read_text(), r"Change of perplexity/bits\_per\_byte from the original"
    )
    found = {line[0]: line[1:] for line in lines}
    assert header == ["recipe", "mixtral 0.75", "mixtral 0.5", "qwen2-moe 0.75", "qwen2-moe 0.5", "mean rank"]
    assert all("▲" in cell for cell in found["dern"][:4])
    assert all("▼" in cell for cell in found["prune-random"][:4])
    assert found["m-smoe"][2:4] == ["refused", "refused"]
    assert next(iter(found)) in ("dern", "dern-gate")
    assert [text for text in page.texts if "▲" in text]


def test_the_sentence_comes_first(out: Path) -> None:
    sentence = analyse(read_rows(out / "results.parquet"), metric=METRIC, baseline=BASELINE).sentence
    text = (out / "report.html").read_text()
    assert text.index(html.escape(sentence)) < text.index("<main>")
    assert (out / "report.md").read_text().split("\n\n")[1].replace("\\", "") == sentence


def test_what_was_refused_is_named_once_with_its_places(out: Path, page: Page) -> None:
    why = "m-smoe: must have as many experts as groups. Got 32 instead. Lower plan.keep."
    assert page.texts.count(why) == 1
    assert "keep 0.75, mixed, seed 0, 1, 2; keep 0.5, mixed, seed 0, 1, 2" in page.texts
    assert why in (out / "report.md").read_text()


def test_markdown_tables_have_as_many_cells_as_their_header(out: Path) -> None:
    text = (out / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_shows_the_files_of_figures(out: Path) -> None:
    shown = re.findall(r"\]\((plots/[^)]*)\)", (out / "report.md").read_text())
    assert sorted(shown) == sorted(f"plots/{file.name}" for file in (out / "plots").iterdir())


def test_how_to_make_it_again_is_told(page: Page) -> None:
    said = " ".join(page.texts)
    for fact in (
        "0, 1, 2",
        "128 × 256 = 32,768 tokens",
        "torch 2.13.0",
        "120 in 5",
        "0000000000000000",
        "perplexity (",
    ):
        assert fact in said
    assert any("use: dern-gate" in text for text in page.texts)


def test_one_model_one_recipe_one_seed_and_no_stability_are_enough(tmp_path: Path) -> None:
    shape = {"models": ["mixtral"], "strengths": {BASELINE: 1.0}, "keeps": [0.5], "seeds": 1}
    page = Page(report(planted(tmp_path, stability=False, **shape)))  # type: ignore[arg-type]
    assert "stability" not in page.ids and "refused" not in page.ids
    assert any("Ranks need three recipes" in text for text in page.texts)


def test_nothing_but_refusals_are_a_report_too(tmp_path: Path) -> None:
    shape = {"models": ["mixtral"], "strengths": {BASELINE: 1.0}, "stability": False}
    page = Page(report(planted(tmp_path, refused=BASELINE, **shape)))  # type: ignore[arg-type]
    assert {"refused", "again"} <= set(page.ids)
    assert "pareto" not in page.ids


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    odd = 'a<b>&"x"|`_*$y$[k=1]'
    out = planted(tmp_path, models=["mixtral"], strengths={BASELINE: 1.0, odd: 0.5}, stability=False)
    page = Page(report(out))
    assert odd in page.texts
    assert page.tags.count("b") == 0
    assert any(html.escape(odd, quote=False) in file.read_text() for file in (out / "plots").glob("error*.svg"))
    line = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("| a&lt;b"))
    assert html.unescape(re.sub(r"\\(.)", r"\1", re.split(r"(?<!\\)\|", line)[1].strip())) == odd


def test_forty_recipes_are_all_in_the_tables_and_captions_say_what_is_not_drawn(tmp_path: Path) -> None:
    many = {BASELINE: 1.0} | {f"dern[threshold={i / 40}]": 0.5 + i / 100 for i in range(40)}
    out = planted(tmp_path, models=["mixtral"], strengths=many, keeps=[0.5], seeds=2, stability=False)
    page = Page(report(out))
    assert all(page.texts.count(name) >= 2 for name in many if name != BASELINE)
    said = " ".join(page.texts)
    for caption in ("the others, 33, in grey", "Left out: 21 recipes with more damage", "Left out: 35 recipes"):
        assert caption in said
    heat = next((out / "plots").glob("domains*.svg")).read_text()
    assert f">{BASELINE}<" in heat


def test_where_higher_is_better_a_fall_is_damage(tmp_path: Path) -> None:
    out = planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=False, higher=True)
    report(out)
    text = (out / "report.md").read_text()
    *_, dern, pruned = table_after(text, r"Change of perplexity/bits\_per\_byte from the original")
    assert dern[0] == "dern"
    assert "−" in dern[1] and "▲" in dern[1]
    assert pruned[0] == f"**{BASELINE} (baseline)**"
    assert "fall of perplexity" in next((out / "plots").glob("pareto*.svg")).read_text()


def test_figures_of_an_older_report_go(tmp_path: Path) -> None:
    out = planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=True)
    report(out)
    (out / "stability.json").unlink()
    report(out)
    assert not list((out / "plots").glob("stability*"))
    assert not list(out.rglob("*.partial"))


def test_rows_without_facts_of_layers_make_a_report_without_those_figures(tmp_path: Path) -> None:
    out = planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=False)
    rows = [replace(row, layers=(), details={}) for row in read_rows(out / "results.parquet")]
    write_rows(rows, out / "results.parquet")
    page = Page(report(out))
    assert "layers-1" not in page.ids and "alike" not in page.ids
    assert "again" in page.ids


@pytest.mark.parametrize("content", ["", "[]", '{"points": [{"model": "mixtral"}]}', '{"points": 3}'])
def test_a_broken_stability_is_refused_with_its_file(tmp_path: Path, content: str) -> None:
    out = planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=False)
    (out / "stability.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"stability.json: must hold the stability of a comparison. Got "):
        report(out)
    assert not (out / "report.html").exists()


def test_no_results_an_unknown_metric_and_an_unknown_baseline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold the results of dernkit compare"):
        report(tmp_path)
    out = planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=False)
    with pytest.raises(RecipeError, match="perplexity/bits"):
        report(out, metric="perplexity/bits")
    with pytest.raises(RecipeError, match="prune-often"):
        report(out, baseline="prune-often")


def test_without_the_packages_that_draw_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RecipeError, match=r"without jinja2 instead. Run pip install 'dernkit\[compare\]'"):
        report(planted(tmp_path, models=["mixtral"], strengths=FEW, keeps=[0.5], stability=False))
