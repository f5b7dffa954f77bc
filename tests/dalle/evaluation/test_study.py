import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.cli.main import main
from dalle.evaluation.study.votes import count, read_votes

N = 8
CHROMIUM = shutil.which("chromium")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def systems(tmp_path: Path) -> list[Path]:
    """Folders of the pictures of two systems, and their captions."""
    rng = np.random.default_rng(0)
    for system in ("a", "b"):
        (tmp_path / system).mkdir()
        for number in range(N):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / system / f"{number:05}.png")
    (tmp_path / "captions.txt").write_text("".join(f"a red cube {number}\n" for number in range(N)))
    return [tmp_path / "a", tmp_path / "b", tmp_path / "captions.txt"]


def test_votes_are_counted_by_the_majority_of_a_caption(
    systems: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "study.html"
    assert run("study", *systems, "--images", 4, "--page", page) == 0
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    key = json.loads((tmp_path / "study.key.json").read_text())
    assert len(key["left"]) == 4
    # by hand: A wins two rows 2:1, B wins one 3:0, one row has one vote each
    wanted = [["A", "A", "B"], ["B", "A", "A"], ["B", "B", "B"], ["A", "B"]]
    files = []
    for voter in range(3):
        lines = ["study,voter,row,question,side,seconds"]
        for (row, left), systems in zip(key["left"].items(), wanted, strict=True):
            for question in ("realistic", "match"):
                if voter < len(systems):
                    side = "left" if systems[voter] == left else "right"
                    lines.append(f'"{key["study"]}","v{voter}",{row},{question},{side},{0.2 if voter == 2 else 3}')
        files.append(tmp_path / f"v{voter}.csv")
        files[-1].write_text("\r\n".join(lines) + "\r\n")
    votes, n_captions = read_votes(files, tmp_path / "study.key.json")
    assert n_captions == 4
    unseen = {vote.row for vote in votes if vote.voter == "v2"}
    assert [one.short for one in count([vote for vote in votes if vote.row in unseen], 3, 4)] == [1, 1]
    found = count(votes, 3, n_captions)
    for one in found:
        assert (one.first, one.second, one.tied, one.short) == (2, 1, 1, 1)
        assert one.rate == pytest.approx(2 / 3)
        assert one.agreement == pytest.approx((1 + 1 + 3 + 0) / (3 + 3 + 3 + 1))
    capfd.readouterr()
    assert run("study", "--page", page, "--votes", 3, "--count", *files) == 0
    out = capfd.readouterr().out
    assert "66.7%" in out
    assert "v2 answers within 0.20 s" in out
    assert run("study", "--page", page, "--count", files[0], files[0]) == 1
    assert "has voted on row" in capfd.readouterr().err
    files[0].write_text(files[0].read_text().replace(",3\n", ",nan\n"))
    assert run("study", "--page", page, "--count", files[0]) == 1
    assert "is no vote (nan seconds)" in capfd.readouterr().err


def test_a_study_keeps_its_key_and_its_captions_are_text(
    systems: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, captions = tmp_path / "study.html", systems[2]
    captions.write_text("</script><script>alert(1)</script>\n<!--<script>\n" + "a red cube\n" * (N - 2))
    command = ["study", *systems, "--page", page]
    assert run(*command) == 0
    # the page's own elements, and none of a caption
    assert page.read_text().count("<script") == page.read_text().count("</script") == 2
    assert "<!--" not in page.read_text()
    key = (tmp_path / "study.key.json").read_text()
    assert run(*command) == 0  # the same study
    assert run(*command, "--seed", 1) == 1
    assert "is the key of another study" in capfd.readouterr().err
    assert (tmp_path / "study.key.json").read_text() == key


@pytest.mark.slow
def test_a_study_is_voted_on_from_disk_without_a_network_and_counted(
    systems: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: `apt-get install chromium`")
    assert run("study", *systems, "--page", tmp_path / "study.html") == 0
    asked: list[str] = []
    lefts = 0
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        context = browser.new_context(offline=True, accept_downloads=True)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.goto((tmp_path / "study.html").as_uri())
        page.get_by_label("Your name or number").fill("anna")
        page.get_by_role("button", name="Begin").click()
        for number in range(2 * N):
            assert page.locator("#done").inner_text() == f"{number + 1} of {2 * N}"
            assert page.locator("#left-image").evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
            page.keyboard.press("ArrowLeft" if number % 4 else "ArrowRight")
            lefts += bool(number % 4)
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save the votes").click()
        saved.value.save_as(tmp_path / "votes.csv")
        browser.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    votes, n_captions = read_votes([tmp_path / "votes.csv"], tmp_path / "study.key.json")
    assert (len(votes), n_captions) == (2 * N, N)
    # by hand: whose picture stood on the side that was chosen
    key = json.loads((tmp_path / "study.key.json").read_text())["left"]
    lines = [line.split(",") for line in (tmp_path / "votes.csv").read_text().replace('"', "").splitlines()[1:]]
    assert sum(side == "left" for *_, side, _ in lines) == lefts
    wins = sum((key[row] == "A") == (side == "left") for _, _, row, question, side, _ in lines if question == "match")
    (matching,) = (one for one in count(votes, 1, n_captions) if one.question == "match")
    assert matching.first == wins
    capfd.readouterr()
    assert run("study", "--page", tmp_path / "study.html", "--votes", 1, "--count", tmp_path / "votes.csv") == 0
    assert f"{wins / N:.1%}" in capfd.readouterr().out
