"""One spelling for an answer that models write in many ways. Nothing here decides what is equal."""

from __future__ import annotations

import re

from rlkv_eval.graders.extract import closing_brace

SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "°": r"^\circ ", "º": r"^\circ ", "π": r"\pi ", "∞": r"\infty ", "θ": r"\theta ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "²": "^2", "³": "^3", "⁴": "^4", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u200b": "",
    "，": ",", "：": ":", "（": "(", "）": ")", "％": "%", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
TABLE = str.maketrans(SYMBOLS | {chr(ord("０") + digit): str(digit) for digit in range(10)})
DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")]

REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|phantom\s*\{[^{}]*\}|phantom\b)\s*", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?=[\s()\[\]|.]|\\[{}|a-z])\s*\.?", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textsf|textnormal|mbox|hbox|operatorname)"
         r"(?=\s*\{)", r"\\text"),
        (r"\\text\s*\{\s*([-\d.,]+)\s*\}", r"\1"),
        (r"\\(?:rm|bf)\s*\{", r"\\text{"),
        (r",\s*\\!\s*(?=\d)|\{,\}(?=\d)", ","),  # 10,\!080 and 10{,}080
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)\\[,; ](?=\d{3}(?!\d))", ","),  # 10\,080
        (r"(?<!\\)\\[,;: ]|~|\\q?quad\b|\\thinspace", " "),
        (r"(?<!\\)%", r"\\%"),
        (r"\\?[€£¥₹]|\\\$|(?<![\\A-Za-z])\$(?=\d)|\\(?:pounds|euro|yen)\b", ""),
        (r"\^\s*\{?\s*\\(?:circ|degree)\b\s*\}?|\\degree\b", r"^\\circ "),
        (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}\s*", ", "),
        (r"\\(?:leq|leqslant)\b", r"\\le "),
        (r"\\(?:geq|geqslant)\b", r"\\ge "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"\\lbrack\b", "["),
        (r"\\rbrack\b", "]"),
        (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)|√\s*(\d+|[a-z])", r"\\sqrt{\1\2}"),
        (r"\*\*(?=[-\d({])", "^"),  # a power in Python
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<=\d),(?=\d{3}(?:,\d{3})*\})", ""),  # \frac{2469}{20,000}
        (r"\\frac\s*(\\[a-z]+)\s+(\w)", r"\\frac{\1}{\2}"),  # \frac\pi 2
        (r"\\(?:simeq|sim|cong)\b", r"\\approx "),
        (r"^\s*(?:=|\\approx)\s*", ""),
        (r"\^\(([^()]*)\)", r"^{\1}"),
        (r"\^(-?\d{2,})", r"^{\1}"),
        (r"_\s*\{\s*(?:\\text\s*\{)?\s*(\w+)\s*\}?\s*\}", r"_{\1}"),
        (r"_\s*(\d+)", r"_{\1}"),
        (r"(?<=[\d}])\s+(?:or|and)\s+(?=[-\\\d(])", ", "),
        (r"(?<=[\d}]),\s*(?:or|and)\s+(?=[-\\\d(])", ", "),
        (r"\s+", " "),
    )
]  # fmt: skip


def clean(answer: str) -> str:
    """The answer without delimiters and typography: Unicode signs as LaTeX, one fraction, plain digits.

    Currency signs go, units and percent stay. The text of words is kept in ``\\text{...}``.
    """
    text = unwrap(answer.translate(TABLE))
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return unwrap(REPEATING.sub(_as_fraction, text))


def _as_fraction(match: re.Match[str]) -> str:
    """0.1\\overline{6} as 1/6."""
    whole, start, period = match[1] or "0", match[2], match[3]
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    value = int(whole + start + period) - int(whole + start)
    return f"\\frac{{{value}}}{{{nines}}}"


REPEATING = re.compile(r"(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*\{(\d{1,30})\}")
UNIT_TEXT = re.compile(r"(?<=[^\\\s])\s*\\text\s*\{[^{}]*\}\s*(?:\^\s*\{?\s*-?\d\s*\}?)?$")
LABEL_TEXT = re.compile(r"^\\text\s*\{[^{}]*\}\s*[:=]?\s*(?=[-+\\(\d.])")
UNIT_WORDS = re.compile(
    r"(?<=[\d})!%])\s*(?:\s[A-Za-z]{3,}(?:[ /.-]+[A-Za-z]+)*|(?:[cmk]?m|[kmu]?g|in|ft|yd|mi|mph|km/h|m/s|rad"
    r"|[mk]?L|min|hr?s?|sec|s|h|kJ|J|N|W|V|K|Hz)\b)\.?\s*(?:\^\s*\{?-?\d\}?)?$"
)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc)")


def without_units(text: str, words: bool) -> str:
    """Without the ``\\text{...}`` at its end (or before it), and without degrees outside trigonometry.

    ``words`` drops units that are written as plain letters too; those could be variables.
    """
    text = UNIT_TEXT.sub("", LABEL_TEXT.sub("", text))
    if words:
        text = UNIT_WORDS.sub("", text)
    if not TRIGONOMETRY.search(text):
        text = re.sub(r"\s*\^\\circ\b ?", "", text)
    return text.strip()


def unwrap(text: str) -> str:
    """Without the dollars, braces or stars around it, and without punctuation at its end."""
    while True:
        before = text
        text = re.sub(r"[.,;:]+$", "", text.strip()).strip()
        for left, right in DELIMITERS:
            inside = text[len(left) : len(text) - len(right)]
            around = text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)
            if around and left not in inside and not inside.endswith("\\"):
                text = inside.strip()
        if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        if text == before:
            return text


def plain_words(text: str) -> str:
    """``\\text{(The) East}`` as ``the east``: lower case, no markup, no quotes, single spaces."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    bare = re.sub(r"[\"'`{}$]|\\[a-z]+", " ", bare)
    return " ".join(bare.lower().split()).strip(" .,;:!")
