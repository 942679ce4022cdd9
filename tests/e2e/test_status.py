"""The self-check with the real model, store, notebook and pictures; the glossary's search."""

from __future__ import annotations

from pages.components.words import GLOSSARY


def test_the_self_check_passes(server, window):
    one = window(server)
    one.go("/status", "Everything works.")
    one.press("Run the self-check")
    one.see("All 4 passed.")
    one.see("bit-identical afterwards")
    one.see("PNG and SVG were drawn")


def test_a_word_is_found(server, window):
    one = window(server, width=390)
    one.go("/status", "Search the words")
    one.type_into("Search the words", "over-attention")
    one.see(f"1 of {len(GLOSSARY)} words.")
    one.see("After an edit, attention heads say the new object")
    one.settle()
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 390
