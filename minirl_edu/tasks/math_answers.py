"""Mathematical answers: which one a response gives, and whether it equals the reference, by math-verify.

math-verify (0.9) compares expressions well. It also reads an answer out of a prose that never gave one, drops units,
bases and small differences, and knows neither mixed numbers nor `1.5e-3`; what is repaired here stands between it and
the model that is rewarded. `KNOWN_LIMITS` lists what is left.

This file is run in the verifiers' processes (`verifiers.VerifierPool`), so it imports nothing else of this package.
"""

import re
from collections.abc import Callable
from typing import Any

KNOWN_LIMITS = (
    (r"\frac{1}{3}", r"\boxed{0.333}", 0.0, "decimals are compared to six places"),
    ("10 cm", r"\boxed{0.1\text{ m}}", 0.0, "units are compared, not converted"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{(1,2)}", 0.0, "a pair is no column"),
    ("50\\%", r"\boxed{50}", 1.0, "a percentage equals its number and a hundredth of it"),
)
"""(reference, response, reward, why): answers that a person would judge otherwise. A test notices when one changes."""


def math_equivalence(require_box: bool = False) -> Callable[[str, str], float]:
    """A verifier: 1.0 if a response gives an answer (`answers`) that equals the reference (`reference_text`)."""
    equal = _comparison()

    def equivalence(response: str, answer: str) -> float:
        reference = reference_text(answer)
        return float(
            any(equal(reference, candidate) for candidate in candidate_answers(response, require_box=require_box))
        )

    return equivalence


def math_reference() -> Callable[[str], float]:
    """A verifier of reference answers: 1.0 if math-verify can read one and finds it equal to itself."""
    equal = _comparison(literally=False)

    def usable(answer: str) -> float:
        text = reference_text(answer)
        return float(equal(text, text))

    return usable


# ------------------------------------------------------------------------------------------- which answer is given

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|([\w.,/-]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:and|or)?[\s$]*(?:\w+\s*=\s*)?")
_FORMULA = r"(?:\$\$.+?\$\$|\$(?:\\\$|[^$\n])+\$|\\\(.+?\\\)|\\\[.+?\\\])"
_FORMULAS = rf"{_FORMULA}(?:\s*(?:,?\s*and|,?\s*or|,)\s*{_FORMULA})*"
_ANNOUNCED = re.compile(
    rf"\banswers?\b(?:[^.\n]{{0,80}}?\b(?:is|are|be)\b|\W{{0,4}}[:=])[\s:*]*(?:({_FORMULAS})|([^;\n]*))",
    re.IGNORECASE | re.DOTALL,
)
_LAST_FORMULAS = re.compile(rf"({_FORMULAS})\Z", re.DOTALL)
_LAST_NUMBER = re.compile(
    r"(?:^|(?<=[\s=:*≈]))[-+−(\[.$€£]*\d[\d.,/^*+()\[\] −-]*(?:[eE][-+−]?\d+)?(?:\\?%|\s?[a-zA-Z]+)?\Z"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s).*|[.!?*\s]+\Z", re.DOTALL)
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}")
_CHANGES_A_NUMBER = {
    *("and", "or", "to", "by", "over", "plus", "minus", "times", "divided", "point", "squared", "cubed"),
    *("dozen", "hundred", "thousand", "million", "billion"),
}
_NO_ANSWER_FOLLOWS = re.compile(r"\b(?:and|or|not|than|by|over|plus|minus|times)\s+\Z", re.IGNORECASE)


def after_thinking(response: str) -> str:
    """What a response says after its last `</think>`; all of it without one, nothing while a `<think>` is open."""
    text = response.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def candidate_answers(response: str, *, require_box: bool) -> list[str]:
    """The answer that `response` gives, none if there is none; two readings where boxes are joined by "and" or commas.

    What follows `</think>` is read. The last complete `\\boxed{}` or `\\fbox{}` is the answer, but a box that is still
    open behind it means that the answer was cut off. Without a box, unless `require_box`, it is what follows "the
    answer is", or the formula or number in which the response ends.
    """
    text = after_thinking(response).strip()
    boxes, cut_off = _last_boxes(text)
    if boxes or cut_off or require_box:
        return list(dict.fromkeys([boxes[-1], ",".join(boxes)])) if boxes else []
    last_line = text.rpartition("\n")[2]
    announced = list(_ANNOUNCED.finditer(text))
    if announced:
        formulas, words = announced[-1].groups()
        if answer := _joined(formulas) if formulas else _clause(words):
            return [answer]
        if announced[-1].start() >= len(text) - len(last_line):
            return []  # "The answer is not 42."
    ending = _SENTENCE_END.sub("", last_line)
    match = _LAST_FORMULAS.search(ending) or _LAST_NUMBER.search(ending)
    if match is None or _NO_ANSWER_FOLLOWS.search(ending[: match.start()]):
        return []
    if match.re is _LAST_FORMULAS:
        return [_joined(match[0])]
    return [match[0]] if _clause(match[0]) == match[0].strip() else []


def _last_boxes(text: str) -> tuple[list[str], bool]:
    """The contents of the last complete box and of those joined to it, in order; and whether a box is still open."""
    found: list[tuple[int, int, str]] = []
    position = 0
    while box := _BOX.search(text, position):
        if box[1] is None:
            position = box.end()
            found.append((box.start(), position, box[2]))
            continue
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                position = brace.end()
                found.append((box.start(), position, text[box.end() : brace.start()]))
                break
        else:
            return [], True
    joined = found[-1:]
    for box in reversed(found[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text, box[1], joined[0][0]):
            break
        joined.insert(0, box)
    return [content for _, _, content in joined], False


def _joined(formulas: str) -> str:
    return ",".join(_unwrapped(formula) for formula in re.findall(_FORMULA, formulas, re.DOTALL))


def _clause(text: str) -> str:
    """The expression at the start of `text`, with its unit if it is a known one, up to the first word of prose."""
    text = _SENTENCE_END.sub("", text.strip())
    word = _WORD.search(text)
    if word is None:
        return text.rstrip(" ,:*")
    if word[0].lower() in _CHANGES_A_NUMBER:
        return ""
    return text[: word.end() if _unit(word[0]) else word.start()].rstrip(" ,:*")


# ----------------------------------------------------------------------------------------------- what an answer says

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ "}
    | {"≤": r"\le ", "≥": r"\ge ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    | {"$": None, "€": None, "£": None, "\xa0": " ", "\u2009": " ", "\u202f": " "}
)
_WRAPPED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_MIXED = re.compile(r"(-?)\s*(\d+) +(\d+)\s*/\s*(\d+)")
_SCIENTIFIC = re.compile(r"(-?\d*\.?\d+)[eE]([+-]?\d{1,4})")
_CHOICE = re.compile(r"\W*([A-J])(?:\W*|\s*[:.)\]}].*)", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textrm|mathit|textit|mbox|rm|bf)\b\s*")
_BASE = re.compile(r"\(?(\d[\dA-Za-z]*)\)?_\s*\{?\s*(?:\\(?:text|textrm|mathrm)\s*\{)?\s*(\w+)\s*\}*")
_NUMBER_WORDS = dict(two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", twelve="12")

_UNIT_NAMES = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "mph": "",
    "degree": "deg",
    "radian": "rad",
    "dollar": "",
    "cent": "",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
_LATEX_UNIT = re.compile(
    r"(.*[\d})\]])[\s~\\,!;]*\\(?:text|textrm|textbf|mathrm|mbox|rm)\s*\{([^{}]*)\}(\^\s*\{?\s*\d\s*\}?)?", re.DOTALL
)
_PLAIN_UNIT = re.compile(r"(.*[\d})\]])(\s*)([A-Za-z][A-Za-z./ ]*?)\.?(\^\s*\{?\s*\d\s*\}?)?", re.DOTALL)


def reference_text(answer: str) -> str:
    """The answer in a row's `answer`: of a solution its box, what follows GSM8K's `####`, or its last formula."""
    boxes, _ = _last_boxes(answer)
    if boxes:
        return ",".join(boxes)
    text = answer.rpartition("####")[2].strip()
    formulas = re.findall(_FORMULA, text, re.DOTALL)
    prose = re.sub(_FORMULA, "", text, flags=re.DOTALL)
    return _unwrapped(formulas[-1]) if formulas and len(_WORD.findall(prose)) > 2 else text


def _unwrapped(text: str) -> str:
    match = _WRAPPED.fullmatch(text.strip())
    return next(group for group in match.groups() if group is not None) if match else text


def _readable(text: str) -> str:
    """`text` in LaTeX that math-verify reads as a person would; "" for numbers beside each other, as in `4 10/3`."""
    text = (
        re.sub(r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})|\\!\s*|\\\$", "", _unwrapped(text))
        .translate(_UNICODE)
        .strip()
        .rstrip(".")
        .strip()
    )
    if "\\" in text:
        return text
    text = re.sub(r"(?<!\d)(\d{1,3}(?: \d{3})+)(?!\d)", lambda match: match[1].replace(" ", ""), text)
    if (match := _MIXED.fullmatch(text)) and int(match[3]) < int(match[4]):
        return rf"{match[1]}({match[2]}+\frac{{{match[3]}}}{{{match[4]}}})"
    if match := _SCIENTIFIC.fullmatch(text):
        return rf"{match[1]} \times 10^{{{match[2]}}}"
    return "" if re.search(r"\d\.?\s+\.?\d", text) else text


def _unit(text: str) -> str | None:
    """One name for a unit of measure, such as `km/h`; None for any other word."""
    parts = [part.strip(" .~") for part in re.split(r"/|\bper\b", text.lower())]
    units = [_UNITS.get(part, _UNITS.get(part.removesuffix("s"))) for part in parts]
    return "/".join(map(str, units)) if all(units) else None


def _without_unit(text: str) -> tuple[str, str | None]:
    """`text` without the unit or the thing counted behind its number, and the unit if it is one of measure."""
    if match := _LATEX_UNIT.fullmatch(text):
        value, name, power = match.groups()
        if len(name.strip()) > 1 or _unit(name):
            return _named(text, value, name, power)
    elif match := _PLAIN_UNIT.fullmatch(text):
        value, space, name, power = match.groups()
        # A letter or two may be variables, and `pi` or `sqrt` is no unit.
        counted = space and min(map(len, name.split())) > 2 and not re.search(r"sqrt|infinity|percent|pct", name)
        if (_unit(name) and (space or len(name) > 1)) or counted:
            return _named(text, value, name, power)
    return text, None


def _named(text: str, value: str, name: str, power: str | None) -> tuple[str, str | None]:
    if _CHANGES_A_NUMBER & set(name.lower().split()):
        return text, None
    for words, exponent in (("square", "2"), ("sq", "2"), ("cubic", "3")):
        if name.strip().lower().startswith(words + " "):
            name, power = name.strip()[len(words) :], exponent
    unit = _unit(name)
    return value.strip(), unit and unit + re.sub(r"\D", "", power or "")


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer such as `E`, `(E)`, `E: text`, `\\text{(E)}`."""
    match = _CHOICE.fullmatch(_TEXT_COMMAND.sub("", text))
    return match[1] if match else None


def _in_base(text: str) -> tuple[str, str | None]:
    """`2134_5` as ("2134", "5"); without a base (text, None)."""
    match = _BASE.fullmatch(text.replace(" ", ""))
    if match is None:
        return text, None
    return match[1].upper(), _NUMBER_WORDS.get(match[2].lower(), match[2])


def _words(text: str) -> str:
    """The letters of an answer in words (`\\text{East}`, `Evelyn`), in lower case; "" for a formula."""
    plain = re.sub(r"[\s{}().]", "", _TEXT_COMMAND.sub("", text))
    return plain.lower() if plain.isalpha() and (len(plain) > 3 or "\\text" in text) else ""


# ----------------------------------------------------------------------------------------------- are two answers equal


def _comparison(literally: bool = True) -> Callable[[str, str], bool]:
    """equal(reference, candidate), whatever their notation; `literally`: two equal texts need not be read."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    _repair_math_verify()
    # Its own removal of units takes single letters off, variables among them.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
        )
    )

    def read(text: str) -> Any:
        # The library's own time limits use SIGALRM; 0 turns them off.
        return parse(rf"\boxed{{{text}}}", [latex], fallback_mode="no_fallback", parsing_timeout=0)

    def equal(reference: str, candidate: str) -> bool:
        if _choice(reference) and (choice := _choice(candidate)):
            return choice == _choice(reference)
        (gold, gold_unit), (given, given_unit) = map(_without_unit, map(_readable, (reference, candidate)))
        if gold_unit and given_unit and gold_unit != given_unit:
            return False
        (gold, gold_base), (given, given_base) = map(_in_base, (gold, given))
        if gold_base or given_base:
            return gold.upper() == given.upper() and (gold_base == given_base or None in (gold_base, given_base))
        if _words(gold) and _words(given):
            return _words(gold) == _words(given)
        if not gold or not given:
            return False
        if literally and gold == given:
            return True
        return verify(read(gold), read(given), allow_set_relation_comp=True, timeout_seconds=0)

    return equal


def _repair_math_verify() -> None:
    """Numbers must also be close in proportion to their size, and expressions may agree wherever both are real."""
    import sympy
    from math_verify import grader

    numeric, symbolic = grader.sympy_numeric_eq, grader.sympy_symbolic_eq

    def numeric_eq(a: Any, b: Any, *precision: int) -> bool:
        return numeric(a, b, *precision) and not _far_apart(a, b)

    def _far_apart(a: Any, b: Any) -> bool:
        if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a.is_number and b.is_number):
            return False
        if grader.get_pct_val(a) is not None or grader.get_pct_val(b) is not None:
            return False
        tolerance = 1e-3 if a.has(sympy.Float) or b.has(sympy.Float) else 1e-12
        return bool(abs(sympy.N(a - b)) > tolerance * max(abs(sympy.N(a)), abs(sympy.N(b))))

    def symbolic_eq(a: Any, b: Any) -> bool:
        return symbolic(a, b) or _agree(a, b)

    def _agree(a: Any, b: Any) -> bool:
        """√(1/n) and 1/√n: equal at every one of some points where either is real, which must be several."""
        if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or not a.free_symbols:
            return False
        if a.free_symbols != b.free_symbols or not (_roots(a) or _roots(b)):
            return False
        symbols, agreed = sorted(a.free_symbols, key=str), 0
        for n in range(12):
            point: Any = [
                (symbol, sympy.Rational((-1) ** (n >> i) * (7 * n + 5 * i + 3), 11)) for i, symbol in enumerate(symbols)
            ]
            x, y = (complex(sympy.N(each.subs(point))) for each in (a, b))
            if not (abs(x.imag) < 1e-12 * abs(x) or x == 0) and not (abs(y.imag) < 1e-12 * abs(y) or y == 0):
                continue
            if abs(x - y) > 1e-9 * max(abs(x), abs(y)):
                return False
            agreed += 1
        return agreed >= 3

    def _roots(expression: Any) -> bool:
        return any(power.exp.is_Rational and not power.exp.is_Integer for power in expression.atoms(sympy.Pow))

    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = numeric_eq, symbolic_eq
