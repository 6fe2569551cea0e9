"""Numbers read exactly, with units, bases and percent signs."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.evaluate import arithmetic, cleaning, quantities


def value(text):
    return arithmetic.value(cleaning.clean(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42),
        ("1,024", 1024),
        ("1,234,567.50", Fraction("1234567.5")),
        ("1{,}024", 1024),
        (r"1\,024", 1024),
        ("-0", 0),
        ("-7", -7),
        ("−7", -7),
        ("- 7", -7),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("5.00", 5),
        ("$5", 5),
        ("-$5", -5),
        (r"\$1,024.00", 1024),
        ("$-5$", -5),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac1{2}", Fraction(1, 2)),
        (r"\frac{1}2", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1½", Fraction(3, 2)),
        ("1e-3", Fraction(1, 1000)),
        (r"\(42\)", 42),
        ("**42**.", 42),
        (r"\text{42}", 42),
        ("2^3", 8),
        ("2^{-3}", Fraction(1, 8)),
        ("-2^2", -4),
        ("(-2)^2", 4),
        (r"16^{\frac{3}{4}}", 8),
        (r"\sqrt[3]{-27}", -3),
        (r"2\sqrt9", 6),
        (r"\frac{\frac12}{3}", Fraction(1, 6)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"\binom{5}{2}", 10),
        ("3!", 6),
        (r"6.02 \times 10^{2}", 602),
        ("6.02 x 10^2", 602),
        ("(2)(3)4", 24),
    ],
)
def test_a_value_is_exact(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "$",
        "-",
        ".",
        "x",
        "1,2",
        "1,00,000",
        "1.2.3",
        "3/4/5",
        "1/0",
        r"\frac{1}{0}",
        "--5",
        "5$3",
        "1 2",
        "5 dollars",
        r"12\,34",
        "1e999999999",
        "٣",
        "nan",
        "inf",
        r"\sqrt{2}",
        r"\sqrt{-4}",
        "2x",
        "(1",
        "0^{-1}",
        "9" * 500,
        "(" * 300 + "1" + ")" * 300,
    ],
)
def test_what_is_no_rational_number_has_no_value(text):
    assert value(text) is None


@pytest.mark.parametrize("text", ["9^{9^9}", "99999!", "(10^{9999})^{9999}", r"\binom{99999}{9}"])
def test_a_power_tower_ends_at_once(text):
    with pytest.raises(arithmetic.TooLargeError):
        value(text)


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_values_are_those_of_python(a, b):
    first, second = (rf"\frac{{{x.numerator}}}{{{x.denominator}}}" for x in (a, b))
    assert value(f"{a.numerator}/{a.denominator}") == a
    assert value(rf"{first} \cdot ({second})") == a * b
    assert value(f"({first}) - ({second})") == a - b
    assert value(f"({first})^2") == a**2
    if b:
        assert value(rf"({first}) \div ({second})") == a / b


@given(st.decimals(allow_nan=False, allow_infinity=False, places=8))
def test_decimals_are_exact(number):
    assert value(f"{number:f}") == Fraction(number)


def read(text):
    return quantities.read(cleaning.clean(text))


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("5 cm", 5, "cm"),
        ("5cm", 5, "cm"),
        (r"5\text{ cm}", 5, "cm"),
        (r"12\,\mathrm{cm}^2", 12, "cm^2"),
        ("12 square centimetres", 12, "cm^2"),
        ("5 apples", 5, ""),
        ("18 eggs left over on Monday", 18, ""),
        ("$18 per day", 18, ""),
        ("USD 5", 5, ""),
        ("5 million people", 5_000_000, ""),
        ("90^\\circ", 90, "deg"),
        ("32°F", 32, "fahrenheit"),
        ("about 10 000", 10_000, ""),
        ("21st", 21, ""),
        ("5 (five)", 5, ""),
    ],
)
def test_a_unit_does_not_change_a_number(text, number, unit):
    assert read(text) == quantities.Quantity(Fraction(number), unit)


@pytest.mark.parametrize(
    "text",
    ["5x", "5 x", "5 xy", "5i", "5m", "5 pi", "5 squared", "5 or 6", "5 or more", "5 and 7",
     "2 abc", "1 half", "6'2\"", "10:30 pm", "2 hours and 30 minutes", "5 to 6", "x 5"],
)  # fmt: skip
def test_words_that_change_a_number_are_not_overlooked(text):
    assert read(text) is None


@pytest.mark.parametrize(
    ("answer", "gold", "is_equal"),
    [
        ("50%", "50", True),
        ("50", "50%", True),
        ("50 percent", r"50\%", True),
        ("0.5", "50%", True),
        ("50%", r"\frac12", True),
        ("5%", "50%", False),
        ("500%", "5", False),
        ("0.5", "50", False),
        ("5 cm", "5", True),
        ("5", "5 cm", True),
        ("5 cm", "5 m", False),
        ("5 centimeters", "5 cm", True),
        ("5 widgets", "5 cm", True),
    ],
)
def test_quantities_meet(answer, gold, is_equal):
    assert read(answer).equals(read(gold)) is is_equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("101_2", ("101", 2)),
        (r"101_{\text{two}}", ("101", 2)),
        ("0101 base 2", ("101", 2)),
        ("a3_{16}", ("A3", 16)),
        ("101", None),
        ("x_2", None),
        ("101_{99}", None),
    ],
)
def test_a_base_is_read(text, expected):
    assert quantities.based(cleaning.clean(text)) == expected
