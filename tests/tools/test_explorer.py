"""The explorer in the report: what a reader can do there, in a browser, and how large it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import Page
from explorer_data import write_explorer_data

from lightning_limber.tools.explorer_section import SMALL, explorer_section
from lightning_limber.tools.report import main

RUN = "document.getElementById('x-run').selectedOptions[0].textContent"
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def write_run(folder: Path) -> Path:
    """The least that a report is made of."""
    folder.mkdir(parents=True)
    rows = [f"a/b,1,{layer},image,fvu,0.5,0.4,0.6" for layer in (0, 3, 6)]
    (folder / "probe.csv").write_text(
        "run,epoch,layer,group,metric,value,low,high\n" + "\n".join(rows) + "\n"
    )
    return folder


# -- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "most"),
    [
        ({"layers": 11, "images": 12, "latents": 400}, 1e6),
        ({"layers": 26, "images": 12, "grid": (16, 16), "tokens": 256, "latents": 1500}, 6e6),
    ],
    ids=["default", "gemma"],
)
def test_a_page_stays_small(tmp_path, size, most):
    """Of the default run and of Gemma 2 2B; the first epoch is there too where both fit."""
    for epoch in (0, 1, 2):
        write_explorer_data(tmp_path, epoch, seed=epoch, **size)
    section = explorer_section([("a/b", tmp_path)])
    assert len(section.encode()) < most
    [run] = json.loads(re.search(r"json\">(.*?)</script>", section)[1])
    both = sum(map(len, run["epochs"].values())) <= SMALL
    assert list(run["epochs"]) == (["0", "2"] if both else ["2"])


def test_a_run_without_it_has_no_section(tmp_path):
    assert explorer_section([("a/b", tmp_path)]) == ""
    main([str(write_run(tmp_path / "a")), "-o", "out.html"])
    assert "explorer" not in Path("out.html").read_text()


def test_names_and_captions_close_no_script(tmp_path):
    """Nor does a name that looks like a placeholder of the page take its data's place."""
    write_explorer_data(tmp_path)
    section = explorer_section([("</script><b>{{DATA}}", tmp_path)])
    assert section.count("</script>") == section.count("<script") == 2
    assert "{{DATA}}" not in section
    [run] = json.loads(re.search(r"json\">(.*?)</script>", section)[1])
    assert run["name"] == "</script><b>{{DATA}}"


# -- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Of a page with two runs: the first has two epochs, the second no places in the image."""
    root = tmp_path_factory.mktemp("explorer")
    runs = [write_run(root / name) for name in ("patches", "queries")]
    for epoch in (0, 1):
        write_explorer_data(runs[0], epoch, seed=epoch)
    write_explorer_data(runs[1], grid=None, tokens=7, neuronpedia=True)
    out = root / "out.html"
    main([*map(str, runs), "-o", str(out)])
    return out.as_uri()


@pytest.fixture
def page(browser, address):
    """Opens the page at a hash; in the end there was no error, and nothing was asked of the network."""
    browser.errors.clear()
    browser.requests.clear()

    def visit(hash: str = "", **window: int) -> Page:
        browser.open(address + hash, **(window or DESK))
        browser.run("document.getElementById('explorer').scrollIntoView()")
        browser.wait("!document.querySelector('#explorer .x-all').hidden")
        return browser

    yield visit
    assert not browser.errors
    assert not browser.requests


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText").replace("\n", " ")


def at(page: Page) -> dict[str, str]:
    """What the address names."""
    return page.run("Object.fromEntries(new URLSearchParams(location.hash.slice(10)))")


def test_pointing_reads_a_patch_and_a_click_keeps_it(page):
    here = page()
    here.point(".x-cell[data-token='6']")
    assert "row 2, column 3, layer 3" in text(here, "#x-now h3")
    here.click(".x-cell[data-token='9']")
    here.point(".x-cell[data-token='3']")
    assert "row 3, column 2" in text(here, "#x-now h3")
    assert at(here) == {"run": "0", "image": "0", "epoch": "1", "layer": "3", "patch": "9"}
    here.click(".x-cell[data-token='9']")  # Again lets go.
    here.point(".x-cell[data-token='3']")
    assert "row 1, column 4" in text(here, "#x-now h3")
    assert here.run("document.querySelectorAll('#x-layers tbody tr').length") == 3
    assert here.run("document.querySelectorAll('#x-now .x-list')[0].children.length") == 5
    here.click(".x-cell[data-token='0']")
    assert "Never counted" in text(here, "#x-now")


def test_the_control_is_a_switch(page):
    here = page("#explorer&patch=6&layer=3")
    image = text(here, "#x-now")
    here.click("#x-control")
    control = text(here, "#x-now")
    assert "of random words at this image" in control
    assert at(here)["control"] == "1"
    numbers = [re.findall(r"norm (\S+)", said) for said in (image, control)]
    assert numbers[0] != numbers[1]
    here.click("#x-control")
    assert text(here, "#x-now") == image


def test_a_latent_shows_where_it_fires(page):
    """Latent 0 is the strongest of the second patch on every image."""
    here = page("#explorer&patch=1&layer=3")
    here.click("#x-now .x-pickable")
    assert text(here, "#x-pick h3").startswith("Latent 1 of layer 3")
    assert "activation of latent 1" in text(here, "#x-scale")
    assert "Strongest on these words of training captions" in text(here, "#x-pick")
    assert here.run("document.querySelectorAll('#x-pick .x-list li').length") == 3
    shown = "[...document.querySelectorAll('#x-grid .x-cell')].map(c => c.style.getPropertyValue('--heat'))"
    heat = here.run(shown)
    assert heat[1].startswith("rgb(")
    assert "transparent" in heat
    strip = here.run("[...document.querySelectorAll('.x-strip button')].map(b => b.dataset.image)")
    assert sorted(strip) == ["1", "2"]
    here.click(".x-strip button")
    assert at(here)["image"] == strip[0]
    assert at(here)["latent"] == "1"
    here.press("Escape")
    assert here.run("document.getElementById('x-pick').hidden")
    assert "latent" not in at(here)


def test_a_word_of_the_caption_lights_up_what_agrees(page):
    here = page("#explorer&patch=1&layer=3")
    lit = "[...document.querySelectorAll('.x-cell.x-agrees')].map(c => +c.dataset.token)"
    assert here.run(lit) == []
    here.click("#x-caption button:nth-of-type(2)")
    assert "“red” at layer 3: latents on" in text(here, "#x-agree")
    assert 1 in here.run(lit)
    assert here.run("document.querySelector('#x-now .x-pickable').classList.contains('x-hit')")
    count = int(re.search(r"latents on (\d+) of 16", text(here, "#x-agree"))[1])
    assert 1 <= count <= len(here.run(lit)) <= 16
    assert at(here)["word"] == "red"
    here.click("#x-caption button:nth-of-type(2)")
    assert here.run(lit) == []


def test_keys(page):
    here = page("#explorer&patch=5&layer=3")
    here.run("document.querySelector('.x-cell[data-token=\"5\"]').focus()")
    for key, patch in [("ArrowRight", 6), ("ArrowDown", 10), ("ArrowLeft", 9), ("ArrowUp", 5)]:
        here.press(key)
        assert at(here)["patch"] == str(patch), key
    for _ in range(3):  # Not over the edge of the picture.
        here.press("ArrowLeft")
    assert at(here)["patch"] == "4"
    here.press("]")
    assert at(here)["layer"] == "6"
    here.press("]")  # The last.
    here.press("[")
    assert at(here)["layer"] == "3"
    here.press("Escape")
    assert "patch" not in at(here)
    focused = here.run("document.activeElement.dataset.token")
    assert focused == "4"
    assert here.run("document.querySelectorAll('.x-cell[tabindex=\"0\"]').length") == 1


def test_an_address_is_a_view(page):
    here = page("#explorer&run=0&image=2&epoch=0&patch=1&layer=6&latent=2&control=1&word=red")
    assert at(here)["epoch"] == "0"
    assert here.run("document.getElementById('x-epoch').value") == "0"
    assert (
        here.run("[...document.getElementById('x-thumbs').children].map(b => b.ariaPressed)")[2] == "true"
    )
    assert "row 1, column 2, layer 6" in text(here, "#x-now h3")
    assert text(here, "#x-pick h3").startswith("Latent 2 of layer 6")
    assert here.run("document.getElementById('x-control').checked")
    assert here.run("document.querySelector('#x-caption [aria-pressed=true]').textContent") == "red"
    # One that was written for other data opens what is there.
    page("#explorer&run=7&image=70&epoch=9&patch=999&layer=4&latent=x&word=__proto__")


def test_a_word_of_a_lens_shows_where_else_it_is_said(page):
    """On this image by colour, on others by their strongest patch; at another layer it stays."""
    here = page("#explorer&patch=2&layer=3")
    first = "#x-now [data-lens]"
    word = here.run(f"document.querySelector('{first}').dataset.lens")
    here.click(first)
    assert text(here, "#x-pick h3").startswith(f"“{word}” by the logit lens, layer 3")
    assert "Grey: at this layer not to be believed." in text(here, "#x-pick")
    coloured = (
        "[...document.querySelectorAll('#x-grid .x-cell')].map(c => c.style.getPropertyValue('--heat'))"
    )
    count = sum(heat.startswith("rgb(") for heat in here.run(coloured))
    shares = r"of (\d+) of this image.s 16 tokens, of (\d+) of all images. 48"
    here_of, all_of = map(int, re.search(shares, text(here, "#x-pick")).groups())
    # The first token is never counted, and is coloured all the same.
    assert 1 <= here_of <= count <= here_of + 1 <= all_of + 1
    assert at(here)["lens"] == word
    here.press("]")
    assert text(here, "#x-pick h3").startswith(f"“{word}” by the logit lens, layer 6")
    assert "Grey" not in text(here, "#x-pick")
    here.click("#x-now [data-nearest]")
    near = here.run("document.querySelector('#x-now [data-nearest]').dataset.nearest")
    assert text(here, "#x-pick h3").startswith(f"“{near}” as nearest text, layer 6")
    assert at(here)["near"] == near
    assert "lens" not in at(here)
    again = page(here.run("location.hash"))
    assert text(again, "#x-pick h3").startswith(f"“{near}” as nearest text, layer 6")
    again.press("Escape")
    assert again.run("document.getElementById('x-pick').hidden")


def test_the_layers_play(page):
    """By the key and by the button; from the first where the last is shown, to the last."""
    here = page("#explorer&patch=2&layer=6")
    here.press("p")
    assert at(here)["layer"] == "0"
    assert here.run("document.getElementById('x-play').getAttribute('aria-pressed')") == "true"
    here.wait("document.getElementById('x-layer-name').textContent === '6'")
    assert here.run("document.getElementById('x-play').getAttribute('aria-pressed')") == "false"
    here.click("#x-play")
    assert at(here)["layer"] == "0"
    here.click("#x-play")  # Stops.
    assert here.run("document.getElementById('x-play').getAttribute('aria-pressed')") == "false"


def test_what_is_shown_is_copied_as_text(page):
    here = page("#explorer&patch=6&layer=3&control=1")
    here.run(
        "navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }, 0"
    )
    here.click("#x-copy")
    assert text(here, "#x-copy") == "copied"
    lines = here.run("window.copied").splitlines()
    assert lines[0] == f"{here.run(RUN)}, epoch 1, val/0"
    assert lines[1] == "caption a small red circle <b>left</b> of a large blue square"
    assert lines[3].startswith("patch in row 2, column 3, layer 3 of random words at this image")
    assert "says (logit lens), p (grey: not to be believed at this layer)" in lines
    assert "nearest text, cosine" in lines
    table = lines[lines.index("") + 1 :]
    assert [line.split("\t")[0] for line in table[:4]] == ["layer", "0", "3", "6"]
    assert {line.count("\t") for line in table[:4]} == {7}
    assert lines[-1] == here.run("location.href")


def test_true_objects_and_the_written_caption(page):
    here = page("#explorer&patch=6&layer=3")
    boxes = "[...document.querySelectorAll('#x-boxes i')].map(e => e.getBoundingClientRect().width > 0)"
    assert here.run(boxes) == [True, True]
    share = "[document.querySelector('#x-boxes i'), document.getElementById('x-frame')]"
    width, whole = here.run(f"{share}.map(e => e.getBoundingClientRect().width)")
    assert width == pytest.approx(whole / 4, abs=1)
    assert text(here, "#x-boxes i:nth-child(2)") == "large <b>"
    here.click(".x-cell[data-token='9']")  # Below a box.
    assert at(here)["patch"] == "9"
    here.click("#x-objects")
    assert here.run(boxes) == [False, False]
    assert text(here, "#x-caption p:nth-child(2)") == "the model wrote a small blue circle"
    here.click("#x-caption p:nth-child(2) button")
    assert at(here)["word"] == "blue"
    assert page("#explorer&epoch=0").run("document.querySelectorAll('#x-caption p').length") == 1


def test_tokens_without_a_place_stand_in_a_row(page):
    here = page("#explorer&run=1&patch=2&layer=0")
    assert here.run("document.getElementById('x-row').children.length") == 7
    assert here.run("document.getElementById('x-grid').children.length") == 0
    assert "token 3, layer 0" in text(here, "#x-now h3")
    here.run("document.querySelector('.x-cell[data-token=\"2\"]').focus()")
    here.press("ArrowRight")
    assert at(here)["patch"] == "3"
    link = here.run("document.querySelector('#x-now a').href")
    assert re.fullmatch(r"https://www\.neuronpedia\.org/some-model/0-res/\d+", link)


def test_a_lens_that_says_nothing_is_grey(page):
    here = page("#explorer&patch=2&layer=3")
    grey = "[...document.querySelectorAll('#x-layers tbody tr')].map(r => r.children[6].matches('.x-dim'))"
    assert here.run(grey) == [True, True, False]
    assert here.run(grey.replace("[6]", "[7]")) == [False] * 3
    assert "Do not believe it there" in text(here, "#x-grey")


def test_on_a_phone(page):
    here = page("#explorer&patch=5&layer=3", **PHONE)
    inside = "e => !e.closest('.x-wide, .x-strip, #x-thumbs') && e.getBoundingClientRect().right > 390"
    over = f"[...document.querySelectorAll('#explorer *')].filter({inside}).map(e => e.outerHTML)"
    assert here.run(over) == []
    boxes = "['.x-left', '.x-right'].map(s => document.querySelector(s).getBoundingClientRect().x)"
    left, right = here.run(boxes)
    assert left == right  # One column.
    here.click(".x-cell[data-token='10']")
    assert at(here)["patch"] == "10"
    assert here.run("document.querySelector('.x-cell').getBoundingClientRect().width") > 40


def test_markup_in_what_is_shown_is_text(page):
    here = page("#explorer&patch=1&layer=3")
    here.click("#x-now .x-pickable")
    assert "<i>" in text(here, "#x-pick")
    assert "<u>" in text(here, "#x-now")
    assert "<b>left</b>" in text(here, "#x-caption")
    made = "#x-caption b, #x-now i, #x-now u, #x-pick > div:not(.x-strip) i"
    assert not here.run(f"document.querySelectorAll('{made}').length")
