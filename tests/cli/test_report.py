"""curv report: the page that a person opens."""

from __future__ import annotations

import html
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pages import Page

import curvature as cv

CHEAP = ("--question", "eigenvalues", "--question", "rates", "-k", 2)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_a_report_is_a_page_beside_its_numbers(curv):
    said = curv("report", "./task.py:make", *CHEAP, "--out", "run")
    assert said.code == 0 and "report.html" in said.err and "rates: gradient descent" in said.out
    page = Page(text := Path("run/report.html").read_text())
    assert page.tags.count("svg") == 2 and "curv report ./task.py:make --question eigenvalues" in text
    found = cv.Report.load("run")
    assert found.names == ("eigenvalues", "rates")


def test_the_command_on_the_page_makes_the_same_page(curv):
    assert curv("report", "./task.py:make", *CHEAP, "--seed", 3, "--params", "first*", "--out", "one").code == 0
    text = Path("one/report.html").read_text()
    command = text[text.index("<pre>curv report ") + 5 :].partition("</pre>")[0]
    assert curv(*shlex.split(html.unescape(command))[1:], "--out", "two").code == 0
    one, two = (cv.Report.load(folder)["eigenvalues"].values for folder in ("one", "two"))
    assert one.equal(two)


def test_without_out_it_goes_where_its_name_says(curv):
    said = curv("report", "./task.py:make", *CHEAP, "--format", "json")
    assert json.loads(said.out)["kind"] == "Report" and Path("report/report.html").exists()
    again = curv("report", "./task.py:make", *CHEAP)
    assert again.code == 2 and "--overwrite" in again.err


def test_a_wrong_question_is_answered_with_all(curv):
    said = curv("report", "./task.py:make", "--question", "spektrum")
    assert said.code == 2 and "spectrum" in said.err and not Path("report").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_it(curv, tmp_path):
    curv("report", "./task.py:make", *CHEAP, "--out", "run")
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--no-first-run", f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr")  # fmt: skip
    page = Path("run/report.html").resolve().as_uri()
    shown = subprocess.run([CHROMIUM, *quiet, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert Page(shown.stdout).tags.count("svg") == 2
    assert "CONSOLE" not in shown.stderr  # what it could not load, or would not run


def test_a_stranger_gets_it_from_ordinary_weights_in_two_commands(curv, task):
    torch.save(task.Net().state_dict(), "net.pt")
    said = curv("report", "net.pt")
    assert said.code == 2 and all(option in said.err for option in ("--arch", "--loss", "--data"))
    given = ("--arch", "./task.py:Net", "--loss", "cross-entropy", "--data", "train.npz")
    assert curv("report", "net.pt", *given, "--question", "rates").code == 0
    assert Path("report/report.html").exists()
