"""The files of a run: whole, inert, and without a word to any other host."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import BytesIO, StringIO
from zipfile import ZipFile

import pandas as pd
import pytest

from mega_core import frames
from mega_core.records import Report
from pages.components import run_files
from pages.components.anatomy_pictures import MAKERS
from pages.components.run_pictures import LOOKS, pictures_of
from tests.service import generated
from tests.ui.fake import EVIL, WORKS

PNG = b"\x89PNG\r\n\x1a\n"
FOREIGN = re.compile(r"(?:src|href|url\()\s*=?\s*[\"'(]?\s*(?:https?:)?//", re.IGNORECASE)


def opened(data: bytes) -> dict[str, bytes]:
    with ZipFile(BytesIO(data)) as box:
        return {name: box.read(name) for name in box.namelist()}


class TestJson:
    def test_it_has_the_words_it_shows_and_comes_back(self):
        data = run_files.run_json(WORKS)
        plain = json.loads(data)
        assert plain["labels"]["verdict"].startswith("Rome is now the most likely answer")
        assert plain["labels"]["outcome"] == "works"
        assert plain["labels"]["columns"]["answers"]["prob"] == "float"
        assert all(frame.equals(WORKS.frames[name]) for name, frame in Report.from_json(data).frames.items())


class TestTables:
    def test_every_table_is_there_twice_and_the_same(self):
        files = opened(run_files.tables_zip(WORKS))
        assert set(files) == {f"{name}.{kind}" for name in WORKS.frames for kind in ("csv", "parquet")}
        for name, frame in WORKS.frames.items():
            assert frames.from_parquet(files[f"{name}.parquet"], name).equals(frame)
            assert len(pd.read_csv(BytesIO(files[f"{name}.csv"]), encoding="utf-8-sig")) == len(frame)

    def test_no_cell_is_a_formula(self):
        for name, data in opened(run_files.tables_zip(EVIL)).items():
            if name.endswith(".csv"):
                cells = pd.read_csv(StringIO(data.decode("utf-8-sig")), dtype=str, keep_default_na=False)
                for column in cells.select_dtypes(exclude="number"):
                    formulas = [c for c in cells[column] if c.startswith(("=", "@"))]
                    assert not formulas, name


class TestPictures:
    def test_every_table_of_a_view_has_its_picture(self):
        assert set(LOOKS) <= set(MAKERS)
        names = [picture.name for picture in pictures_of(WORKS)]
        assert names == [
            "next-tokens", "evidence", *(f"map-{c}" for c in ("new", "true", "difference")),
            *(f"profile-{c}" for c in ("new", "true", "difference")),
        ]  # fmt: skip

    def test_heads_and_stress_are_drawn_when_the_run_has_them(self):
        heads = [
            {"state": s, "case": 0, "layer": layer, "head": h, "candidate": "new", "contribution": 0.1 * h}
            for s in ("before", "after") for layer in range(2) for h in range(3)
        ]  # fmt: skip
        stress = [
            {"state": "after", "case": 0, "kind": k, "prompt": "p", "p_new": 0.5, "p_true": 0.1, "says_true": False,
             "prefers_true": False}
            for k in ("said", "asked")
        ]  # fmt: skip
        more = {"head_scores": frames.from_rows(heads, "head_scores"), "stress": frames.from_rows(stress, "stress")}
        report = replace(WORKS, digest="3" * 64, frames={**WORKS.frames, **more})
        names = [picture.name for picture in pictures_of(report)]
        assert names[-2:] == ["head-scores", "stress"]

    def test_a_picture_that_cannot_be_drawn_costs_no_other(self, monkeypatch, caplog):
        def fail(*_, **__):
            raise ValueError("no such picture")

        monkeypatch.setattr("pages.components.run_pictures.readings.of_evidence", fail)
        names = [picture.name for picture in pictures_of(WORKS)]
        assert "next-tokens" in names
        assert "evidence" not in names
        assert "can't be drawn" in caplog.text

    @pytest.mark.slow
    def test_they_are_pictures_and_load_nothing(self):
        files = opened(run_files.charts_zip(EVIL))
        assert len(files) == 16
        for name, data in files.items():
            if name.endswith(".png"):
                assert data.startswith(PNG)
            else:
                assert data.startswith(b"<svg")
                assert not FOREIGN.search(data.decode().replace('xmlns:xlink="http://www.w3.org/1999/xlink"', ""))
                assert b"<script" not in data
                assert b"<image" not in data

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_a_run_holds_its_pictures_do_not_fail_it(self, seed):
        assert list(pictures_of(generated.report(seed)))


class TestReport:
    @pytest.fixture(scope="class")
    def page(self) -> str:
        return run_files.report_html(EVIL).decode()

    def test_it_allows_itself_nothing(self, page):
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
        assert not re.search(r"<(script|img|iframe|link|object|embed|form|base)\b", page, re.IGNORECASE)
        assert not re.search(r"\son\w+\s*=\s*[\"']", page)
        assert not FOREIGN.search(page)

    def test_hostile_texts_stay_texts(self, page):
        assert "&lt;img src=x onerror=alert(1)&gt;" in page
        assert "&lt;script&gt;window.__x=1&lt;/script&gt;" in page

    def test_it_says_what_the_page_says(self, page):
        assert "<h1>" in page
        assert "=HYPERLINK(&#34;http://evil.example&#34;) is now the most likely answer" in page
        assert page.count("<svg") == 8
        assert "imported" not in page.split("<body>")[1].split("</header>")[0]

    def test_ids_of_its_pictures_do_not_meet(self, page):
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        assert all(f'id="{name}"' in page for name in re.findall(r"url\(#([^)]+)\)", page))

    def test_an_imported_run_says_so_with_its_first_id(self, monkeypatch):
        monkeypatch.setattr("pages.components.run_report.pictures_of", lambda _: [])
        page = run_files.report_html(replace(WORKS, digest="9" * 64, origin=WORKS.digest)).decode()
        assert "Imported." in page
        assert WORKS.digest in page
        assert "9" * 64 not in page
        assert "no table that a picture could be drawn from" in page


def test_several_runs_are_one_archive_with_a_folder_each():
    data = run_files.several_zip([WORKS, EVIL], ["run.json", "tables"], b"list")
    files = opened(data)
    assert files["runs.csv"] == b"list"
    assert f"run-{WORKS.digest[:12]}-rome-eiffel-tower-rome/run.json" in files
    assert all(re.fullmatch(r"[a-z0-9./_-]+", name) and ".." not in name for name in files)
    assert data == run_files.several_zip([WORKS, EVIL], ["run.json", "tables"], b"list")
