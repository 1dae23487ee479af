"""Unicode, full-width and HTML notation rewritten as the LaTeX that the tokenizer reads."""

from __future__ import annotations

import re
import unicodedata

from verifiers.mathematics.expr import TooLargeError

MAX_CHARS = 10_000

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵏᵐᵗˣʸ", "0123456789+-=()nikmtxy", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₖₘₜₓⱼ", "0123456789+-=()nikmtxj", strict=True))
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξοπρστυφχψωςϕϵϑΓΔΘΛΞΠΣΦΨΩ",
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "epsilon",
            "zeta",
            "eta",
            "theta",
            "iota",
            "kappa",
            "lambda",
            "mu",
            "nu",
            "xi",
            "omicron",
            "pi",
            "rho",
            "sigma",
            "tau",
            "upsilon",
            "phi",
            "chi",
            "psi",
            "omega",
            "sigma",
            "phi",
            "epsilon",
            "theta",
            "Gamma",
            "Delta",
            "Theta",
            "Lambda",
            "Xi",
            "Pi",
            "Sigma",
            "Phi",
            "Psi",
            "Omega",
        ],
        strict=True,
    )
)
_COMMANDS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "•": "cdot", "÷": "div", "∕": "div", "∗": "cdot",
    "≤": "le", "⩽": "le", "≦": "le", "≥": "ge", "⩾": "ge", "≧": "ge", "≠": "ne", "≈": "approx", "≡": "equiv",
    "∞": "infty", "√": "surd", "∪": "cup", "∩": "cap", "∈": "in", "∉": "notin", "∅": "emptyset", "ø": "emptyset",
    "⊂": "subset", "⊆": "subseteq", "∖": "setminus", "±": "pm", "∓": "mp", "∀": "forall", "∃": "exists", "∣": "mid",
    "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "⟨": "langle", "⟩": "rangle", "∠": "angle",
    "△": "triangle", "∑": "sum", "∏": "prod", "∫": "int", "…": "ldots", "⋯": "cdots", "→": "to", "⇒": "Rightarrow",
    "∧": "land", "∨": "lor", "⊥": "perp", "∥": "parallel",
}  # fmt: skip
_BLACKBOARD = dict(zip("ℝℤℕℚℂ", "RZNQC", strict=True))
_PLAIN = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "⁄": "/", "∶": ":", "。": ".", "，": ",", "、": ",",
    "；": ";", "：": ":", "（": "(", "）": ")", "【": "[", "】": "]", "｛": "{", "｝": "}", "′": "'", "’": "'", "‘": "'",
    "″": "''", "“": '"', "”": '"', "％": "%", "﹪": "%", "＄": "$", "￥": "¥", "\u2061": "", "\u200b": "", "\ufeff": "",
    "\u2062": "", "`": "'",
}  # fmt: skip
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_CHINESE_PERCENT = re.compile(r"百分之([\d.]+|[零一二三四五六七八九十])")
_CIRCLED_RUN = re.compile(r"[①-⑳](?:[\s,，、和与]*[①-⑳])*")
_ORDINAL = re.compile(r"(\d)(?:st|nd|rd|th)(?![a-zA-Z])")
_SPACES = re.compile(r"\s{2,}")  # a long run makes patterns with several \s* slow
_CHOOSE = re.compile(r"(?:\{\s*\})?[_^]\{?(\d{1,4})\}?\s*C_\{?(\d{1,4})\}?")
_HTML_SCRIPT = re.compile(r"<(sup|sub)>(.{0,80}?)</\1>")
_HTML_ENTITY = {"&lt;": "<", "&gt;": ">", "&le;": r"\le ", "&ge;": r"\ge ", "&amp;": "&", "&nbsp;": " "}
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z{}])")
_BRACE = re.compile(r"\\([lr])brace(?![a-zA-Z])")
_GLUED_SPACE = re.compile(r"\\(q?quad)(?=[a-zA-Z])")


def _character(char: str) -> str:
    if char in _COMMANDS:
        return f"\\{_COMMANDS[char]} "
    if char in _GREEK:
        return f"\\{_GREEK[char]} "
    if char in _BLACKBOARD:
        return f"\\mathbb{{{_BLACKBOARD[char]}}}"
    if char in _PLAIN:
        return _PLAIN[char]
    if char == "°" or char == "º" or char == "˚":
        return r"^{\circ}"
    if char in "∛∜":
        return r"\sqrt[3]" if char == "∛" else r"\sqrt[4]"
    if char == "℃":
        return r"^{\circ}\text{C}"
    if unicodedata.category(char) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", char)):
        above, _, below = parts.partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    if unicodedata.category(char) == "Nd":
        return str(unicodedata.digit(char))
    plain = unicodedata.normalize("NFKC", char)
    return plain if plain.isascii() and len(plain) <= 4 else char


def _spelled(match: re.Match[str]) -> str:
    numbers = [str(int(unicodedata.numeric(char))) for char in match.group() if "①" <= char <= "⑳"]
    return ",".join(numbers)


def normalise(text: str) -> str:
    """`text` with its notation spelled in ASCII and LaTeX; raises `TooLargeError` beyond `MAX_CHARS`."""
    if len(text) > MAX_CHARS:
        raise TooLargeError(f"{len(text)} characters is too long for an answer (at most {MAX_CHARS})")
    text = _SPACES.sub(" ", text)
    if "<su" in text:
        text = _HTML_SCRIPT.sub(lambda m: f"{'^' if m[1] == 'sup' else '_'}{{{m[2]}}}", text)
    if "&" in text:
        for entity, char in _HTML_ENTITY.items():
            text = text.replace(entity, char)
    if "\\" in text:
        if "\\\\" in text and "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
        if "brace" in text:
            text = _BRACE.sub(lambda match: "\\{" if match[1] == "l" else "\\}", text)
        if "quad" in text:
            text = _GLUED_SPACE.sub(r"\\\1 ", text)
    if "C" in text and "_" in text:
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _ORDINAL.sub(r"\1", text)
    if not text.isascii():
        text = _CHINESE_PERCENT.sub(r"\1\%", text)
        text = _CIRCLED_RUN.sub(_spelled, text)
        text = _SUPERSCRIPT_RUN.sub(lambda m: f"^{{{''.join(_SUPERSCRIPTS[char] for char in m.group())}}}", text)
        text = _SUBSCRIPT_RUN.sub(lambda m: f"_{{{''.join(_SUBSCRIPTS[char] for char in m.group())}}}", text)
        text = "".join(char if char.isascii() else _character(char) for char in text)
        if len(text) > 4 * MAX_CHARS:
            raise TooLargeError(f"{len(text)} characters is too long for an answer")
    return text
